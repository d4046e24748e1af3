"""Data sets in folders and behind URLs: the same samples, whatever the way to them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset, write_dataset
from data_pipeline.read import ShardReader
from data_pipeline.store import Folder, RemoteFolder, default_cache, load_dataset, open_store
from data_pipeline.transfer import Patience

PATIENCE = Patience(tries=2, seconds=5.0, piece=20_000, pause=0.01)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def copied(photo_dataset, tmp_path):
    return Path(shutil.copytree(photo_dataset, tmp_path / "copied"))


def samples_of(opened, split="train"):
    reader = ShardReader(opened.store, opened.dataset, split)
    numbers = np.random.default_rng(0).permutation(opened.dataset.split(split).samples)
    try:
        return [(one.key, one.image, one.mask, one.label, one.fault) for one in reader.read_many(numbers)]
    finally:
        reader.close()


def tars_elsewhere(root, tars, folder):
    """Move the tars to another folder and say so in dataset.json."""
    folder.mkdir(parents=True)
    for path in root.glob("*.tar"):
        path.rename(folder / path.name)
    write_dataset(root, dataclasses.replace(read_dataset(root), tars=tars))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_data_set_reads_equal_from_a_folder_a_file_url_and_a_server(photo_dataset, serve, cache, split):
    local = load_dataset(photo_dataset)
    file = load_dataset(f"file://{photo_dataset}")
    served = load_dataset(serve(photo_dataset).url, cache=cache)
    assert isinstance(local.store, Folder)
    assert isinstance(file.store, Folder)
    assert isinstance(served.store, RemoteFolder)
    assert local.dataset == file.dataset == served.dataset
    assert samples_of(local, split) == samples_of(file, split) == samples_of(served, split)
    assert all(fault is None for *_, fault in samples_of(local, split))


def test_a_second_reader_and_a_second_start_ask_for_dataset_json_only(photo_dataset, serve, cache):
    server = serve(photo_dataset)
    expected = samples_of(load_dataset(server.url, cache=cache))
    before = len(server.log)
    assert samples_of(load_dataset(server.url, cache=cache)) == expected
    assert [request.path for request in server.log[before:]] == ["/dataset.json"]


@pytest.mark.parametrize("tars", ["tars", "{elsewhere}", "file://{elsewhere}"])
def test_a_local_data_set_may_have_its_tars_in_another_folder(photo_dataset, copied, tmp_path, tars):
    tars = tars.format(elsewhere=tmp_path / "else where").replace(" ", "%20" if ":" in tars else " ")
    folder = copied / "tars" if tars == "tars" else tmp_path / "else where"
    tars_elsewhere(copied, tars, folder)
    assert samples_of(load_dataset(str(copied))) == samples_of(load_dataset(photo_dataset))


def test_indexes_in_a_folder_and_tars_behind_a_url_are_one_data_set(
    photo_dataset, copied, tmp_path, serve, cache
):
    server = serve(tmp_path / "tars")
    tars_elsewhere(copied, server.url, tmp_path / "tars")
    opened = load_dataset(copied, cache=cache)
    assert samples_of(opened) == samples_of(load_dataset(photo_dataset))
    assert not any(request.path.endswith(".idx") for request in server.log)


@pytest.mark.parametrize("tars", ["deep/er", "{url}"])
def test_a_served_data_set_may_have_its_tars_below_it_or_on_another_server(copied, tmp_path, serve, tars):
    expected = samples_of(load_dataset(copied))
    folder = tmp_path / "tars" if tars == "{url}" else copied / "deep" / "er"
    tars_elsewhere(copied, tars.format(url=serve(folder).url), folder)
    assert samples_of(load_dataset(serve(copied).url, cache=tmp_path / "cache")) == expected


@pytest.mark.parametrize("tars", ["/etc", "../other", "file:///etc", "pipe:touch canary"])
def test_a_served_data_set_cannot_point_at_files_of_this_machine(copied, tmp_path, serve, cache, tars):
    tars_elsewhere(copied, tars, tmp_path / "tars")
    with pytest.raises(UserError) as caught:
        load_dataset(serve(copied).url, cache=cache)
    assert caught.value.code == "UNSAFE"


@pytest.mark.parametrize("root", ["pipe:touch canary", "ftp://host/x", "-o", "simplecache::http://host/x"])
def test_what_is_no_place_for_a_data_set_is_refused_before_anything_is_opened(root):
    for act in (load_dataset, open_store):
        with pytest.raises(UserError) as caught:
            act(root)
        assert caught.value.code == "UNSAFE"
    with pytest.raises(UserError, match="pipe"):
        open_store("here", tars="pipe:touch canary")


def test_a_server_without_a_data_set_is_an_error_with_the_url_and_the_status(tmp_path, serve, cache):
    with pytest.raises(UserError, match=r"/x/dataset\.json': HTTP status 404") as caught:
        load_dataset(f"{serve(tmp_path).url}/x/", cache=cache)
    assert caught.value.code == "DATA"


def test_a_damaged_dataset_json_from_a_server_is_an_error_with_its_url(tmp_path, serve, cache):
    (tmp_path / "dataset.json").write_bytes(b"<html>\xff")
    with pytest.raises(UserError, match=r"cannot use 'http://.*/dataset.json'"):
        load_dataset(serve(tmp_path).url, cache=cache)


def test_a_shard_that_the_server_lost_is_an_error_that_names_it_and_hides_no_other(copied, serve, cache):
    opened = load_dataset(serve(copied).url, cache=cache, patience=PATIENCE)
    first, second, *_ = opened.dataset.split("train").shards
    (copied / second.name).unlink()
    assert opened.store.shard_path(first).read_bytes() == (copied / first.name).read_bytes()
    with pytest.raises(UserError, match="404") as caught:
        opened.store.shard_path(second)
    assert caught.value.place == {"shard": second.name}


def test_a_shard_that_was_replaced_on_the_server_is_not_read(copied, serve, cache):
    opened = load_dataset(serve(copied).url, cache=cache, patience=PATIENCE)
    shard = opened.dataset.split("train").shards[0]
    (copied / shard.name).write_bytes(b"x" * shard.bytes)
    with pytest.raises(UserError, match="SHA-256"):
        opened.store.open_shard(shard)


def test_a_bit_that_flips_in_the_cache_is_a_fault_of_the_sample_and_gone_at_the_next_start(
    photo_dataset, serve, cache
):
    opened = load_dataset(serve(photo_dataset).url, cache=cache)
    expected = samples_of(opened)
    shard = opened.dataset.split("train").shards[0]
    path = opened.store.shard_path(shard)
    bent = bytearray(path.read_bytes())
    bent[ShardReader(opened.store, opened.dataset, "train").read(0).offset + 20] ^= 1
    path.write_bytes(bent)
    assert sum(fault is not None for *_, fault in samples_of(opened)) == 1
    assert samples_of(opened) == expected
    assert not opened.store.forget(shard)


def test_a_link_that_leads_out_of_the_folder_is_unsafe_and_one_within_is_not(copied, tmp_path):
    opened = load_dataset(copied)
    first, second, *_ = opened.dataset.split("train").shards
    (copied / first.name).rename(tmp_path / "outside.tar")
    (copied / first.name).symlink_to(tmp_path / "outside.tar")
    (copied / second.name).rename(copied / "inside.tar")
    (copied / second.name).symlink_to("inside.tar")
    (copied / first.index_name).rename(tmp_path / "outside.idx")
    (copied / first.index_name).symlink_to("../outside.idx")
    for ask in (opened.store.shard_path, opened.store.open_shard, opened.store.index_path):
        with pytest.raises(UserError, match="outside") as caught:
            ask(first)
        assert caught.value.code == "UNSAFE"
    assert opened.store.shard_path(second).stat().st_size == second.bytes
    (tmp_path / "link").symlink_to(copied)
    assert load_dataset(tmp_path / "link").store.shard_path(second)


def test_a_folder_that_opens_a_shard_checks_its_size(copied):
    opened = load_dataset(copied)
    shard = opened.dataset.split("train").shards[0]
    descriptor = opened.store.open_shard(shard)
    assert os.pread(descriptor, shard.bytes + 1, 0) == (copied / shard.name).read_bytes()
    os.close(descriptor)
    os.truncate(copied / shard.name, shard.bytes - 1)
    with pytest.raises(UserError, match=f"{shard.bytes - 1} bytes, dataset.json says {shard.bytes}"):
        opened.store.open_shard(shard)
    (copied / shard.name).unlink()
    with pytest.raises(UserError, match="No such file"):
        opened.store.open_shard(shard)


def test_a_store_works_as_a_copy_in_threads_and_after_a_fork(photo_dataset, serve, cache):
    opened = load_dataset(serve(photo_dataset).url, cache=cache)
    expected = samples_of(load_dataset(photo_dataset))
    assert samples_of(opened._replace(store=deepcopy(opened.store))) == expected
    shutil.rmtree(cache)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: samples_of(opened), range(4))) == [expected] * 4
    shutil.rmtree(cache)

    def read():
        assert samples_of(opened) == expected

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_the_cache_is_by_default_a_folder_per_url_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = default_cache("http://host/x"), default_cache("http://host/y")
    assert one.parent == other.parent == tmp_path / "lockstep"
    assert one != other
    assert open_store("HTTP://host/x/").cache.folder == one
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache("x").is_relative_to("/home/somebody/.cache/lockstep")


def test_a_cache_folder_that_cannot_be_is_a_mistake_of_the_configuration(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        open_store("http://host/x", cache=tmp_path / "file" / "cache")
    assert caught.value.code == "CONFIG"


@pytest.mark.parametrize(("scheme", "driver"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_driver_that_is_not_installed_is_named_with_the_command_that_installs_it(
    scheme, driver, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for ask in (load_dataset, open_store):
        with pytest.raises(UserError) as caught:
            ask(f"{scheme}://bucket/photos")
        assert caught.value.code == "USAGE"
        assert caught.value.mend == f'pip install "lockstep[{scheme}]"'
    with pytest.raises(UserError, match=driver):
        open_store(tmp_path, tars=f"{scheme}://bucket/photos")


@pytest.fixture
def bucket(photo_dataset, serve, tmp_path, monkeypatch):
    """A bucket as S3's own client sees one: a server that answers GET /BUCKET/KEY."""
    pytest.importorskip("s3fs")
    (tmp_path / "stores" / "bucket").mkdir(parents=True)
    shutil.copytree(photo_dataset, tmp_path / "stores" / "bucket" / "my photos")
    server = serve(tmp_path / "stores")
    options = {"anon": True, "endpoint_url": server.url, "client_kwargs": {"region_name": "us-east-1"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    return server


def test_an_s3_url_reads_equal_through_the_real_client(bucket, photo_dataset, cache):
    expected = samples_of(load_dataset(photo_dataset))
    opened = load_dataset("s3://bucket/my photos/", cache=cache, patience=PATIENCE)
    assert samples_of(opened) == expected
    shutil.rmtree(cache)

    def read():
        assert samples_of(opened) == expected

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_an_object_that_is_missing_forbidden_or_too_short_is_an_error_that_says_so(bucket, cache):
    opened = load_dataset("s3://bucket/my photos", cache=cache, patience=PATIENCE)
    missing, short, forbidden, *_ = opened.dataset.split("train").shards
    folder = bucket.root / "bucket" / "my photos"
    (folder / missing.name).unlink()
    os.truncate(folder / short.name, short.bytes - 1)
    bucket.behave(f"/bucket/my photos/{forbidden.name}", status=403)
    for shard, words in [(missing, "no such object"), (short, "came"), (forbidden, "permission")]:
        with pytest.raises(UserError, match=words) as caught:
            opened.store.shard_path(shard)
        assert caught.value.code == "DATA"
        assert caught.value.place == {"shard": shard.name}
