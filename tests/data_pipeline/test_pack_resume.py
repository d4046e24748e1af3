"""Packing that is broken off, resumed, shared between machines and started over: always the same bytes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from data_pipeline.fault import UserError
from data_pipeline.items import SourceOptions
from data_pipeline.pack import merge_parts, pack_part, pack_whole
from data_pipeline.packed_shard import Storage
from data_pipeline.packing_plan import PackingOptions
from data_pipeline.packing_state import UNDER_WAY
from data_pipeline.sources import find_source

AS_THEY_ARE = Storage(resize_shorter=None, reencode=False, quality=90)
OPTIONS = PackingOptions(seed=0, shard_samples=4, shard_bytes=1 << 30, storage=AS_THEY_ARE)


SHARDS = 16  # 50 pictures for train, 12 for val


def hashes(root):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def shown(folder):
    return find_source(folder, SourceOptions(val_fraction=0.2, seed=0))


@pytest.fixture(scope="module")
def pictures(photo_folder, tmp_path_factory):
    """The photographs, with two that cannot be read."""
    root = shutil.copytree(photo_folder, tmp_path_factory.mktemp("pictures") / "p")
    for name in ("astronaut", "cat"):
        (root / name / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def source(pictures):
    return shown(pictures)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The hashes of what packing at one go gives."""
    root = tmp_path_factory.mktemp("whole") / "root"
    pack_whole(source, root, OPTIONS, workers=1)
    return hashes(root)


class Stop(Exception):
    pass


def packed_up_to(source, root, pictures):
    """Begin, and break off in this process when that many pictures are through."""
    seen = 0

    def progress(count):
        nonlocal seen
        seen += count
        if seen >= pictures:
            raise Stop

    with pytest.raises(Stop):
        pack_whole(source, root, OPTIONS, workers=1, progress=progress)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_packing_whose_processes_are_all_killed_goes_on_to_the_same_bytes(photo_folder, tmp_path, workers):
    source = shutil.copytree(photo_folder, tmp_path / "source")
    for copy in range(12):
        shutil.copytree(photo_folder / "cat", source / "cat" / str(copy))
    (source / "cat" / "broken.png").write_bytes(b"no picture")
    words = ["pack", str(source), "--shard-samples", "8", "--workers", str(workers)]
    start = [sys.executable, "-m", "launch", *words]
    subprocess.run([*start, str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    root = tmp_path / "root"
    done = []
    for _ in range(2):
        process = subprocess.Popen([*start, str(root)], stdout=subprocess.DEVNULL, start_new_session=True)
        while len(finished(root)) <= len(done):
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = finished(root)
    assert not (root / "dataset.json").exists()
    again = subprocess.run([*start, str(root)], check=True, capture_output=True, text=True, timeout=120)
    shards = len(list(root.glob("*.tar")))
    assert len(hashes(root)) == 2 * shards + 2
    assert f"going on: {len(done)} of {shards} shards were done\n" in again.stdout
    assert hashes(root) == hashes(tmp_path / "whole")


def finished(root):
    return list((root / UNDER_WAY).glob("*.tar.json"))


def test_workers_die_with_a_parent_that_is_killed_alone(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "source")
    for copy in range(20):
        shutil.copytree(photo_folder / "cat", source / "cat" / str(copy))
    words = ["pack", str(source), str(tmp_path / "root"), "--shard-samples", "8", "--workers", "3"]
    process = subprocess.Popen([sys.executable, "-m", "launch", *words], stdout=subprocess.DEVNULL)
    while not finished(tmp_path / "root"):
        assert process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 3
    deadline = time.monotonic() + 5
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a dead one not asked for has none
    except OSError:
        return False


@pytest.mark.parametrize("stop", range(1, 62, 4))
def test_wherever_it_is_broken_off_it_goes_on_to_the_same_bytes(source, whole, tmp_path, stop):
    packed_up_to(source, tmp_path / "root", stop)
    said, told = [], []
    pack_whole(source, tmp_path / "root", OPTIONS, workers=1, progress=told.append, say=said.append)
    assert hashes(tmp_path / "root") == whole
    assert sum(told) == 62
    done = (stop - 1) // 4 if stop <= 50 else 13 + (stop - 51) // 4  # the last tar of train holds two
    assert said == ([f"going on: {done} of {SHARDS} shards were done"] if done else [])


def test_a_stop_between_the_last_byte_and_the_tidying_up_is_mended_too(source, whole, tmp_path):
    root = tmp_path / "root"
    packed_up_to(source, root, 62)
    state = shutil.copytree(root / UNDER_WAY, tmp_path / "state")
    first = pack_whole(source, root, OPTIONS, workers=1)
    for name in ("val-000002.tar.json", "train-000000.tar.json"):
        (state / name).unlink(missing_ok=True)
    shutil.copytree(state, root / UNDER_WAY)
    again = pack_whole(source, root, OPTIONS, workers=1)
    assert (again.dataset, again.bad) == (first.dataset, first.bad)
    assert hashes(root) == whole


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_parts_in_any_order_merge_to_the_same_bytes(source, whole, tmp_path, parts):
    root = tmp_path / "root"
    written = [
        pack_part(source, root, OPTIONS, part=(number, parts), workers=1) for number in range(parts, 0, -1)
    ]
    assert (sum(written), max(written) - min(written) <= 1) == (SHARDS, True)
    assert not (root / "dataset.json").exists()
    merge_parts(source, root, OPTIONS)
    assert hashes(root) == whole


def test_parts_at_the_same_time_merge_to_the_same_bytes(pictures, whole, tmp_path):
    words = ["pack", str(pictures), str(tmp_path / "root"), "--shard-samples", "4", "--workers", "1"]
    start = [sys.executable, "-m", "launch", *words]
    parts = [
        subprocess.Popen([*start, "--part", f"{number}/3"], stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 3)
    ]
    said = [part.communicate(timeout=60)[0].splitlines()[-2:] for part in parts]
    assert said[1] == [
        "part 2/3 is packed: 5 shards",
        "next, when all parts are: the same command with --merge in place of --part",
    ]
    merged = subprocess.run([*start, "--merge"], capture_output=True, text=True, timeout=60, check=True)
    assert f"the data set is in {tmp_path / 'root'}\n" in merged.stdout
    assert hashes(tmp_path / "root") == whole


def test_a_merge_names_the_parts_and_the_tars_that_are_missing(source, whole, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(UserError, match="holds no parts"):
        merge_parts(source, root, OPTIONS)
    assert not root.exists()
    pack_part(source, root, OPTIONS, part=(3, 4), workers=1)
    with pytest.raises(UserError, match=r"12 of 16 shards of .* are missing: .*tar and 7 more") as caught:
        merge_parts(source, root, OPTIONS)
    assert caught.value.code == "DATA"
    assert "--part 1/4, 2/4, 4/4," in caught.value.mend
    (root / "train-000009.tar").write_bytes(b"half of it")
    for number in (1, 2, 4):
        pack_part(source, root, OPTIONS, part=(number, 4), workers=1)
    with pytest.raises(UserError, match=r"1 of 16 shards of .* are missing: train-000009.tar") as caught:
        merge_parts(source, root, OPTIONS)
    assert "--part 3/4," in caught.value.mend
    pack_whole(source, root, OPTIONS, workers=1)  # finishes what parts left
    assert hashes(root) == whole


@pytest.mark.parametrize("damage", ["cut tar", "no tar", "no index", "cut result", "foreign result"])
def test_a_finished_tar_that_is_not_as_it_was_noted_is_packed_again(source, whole, tmp_path, damage):
    root = tmp_path / "root"
    packed_up_to(source, root, 20)
    tar, note = root / "train-000001.tar", root / UNDER_WAY / "train-000001.tar.json"
    if damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "no tar":
        tar.unlink()
    elif damage == "no index":
        tar.with_suffix(".idx").unlink()
    elif damage == "cut result":
        note.write_text(note.read_text()[:100])
    else:
        note.write_text(json.dumps({**json.loads(note.read_text()), "plan": "0" * 64}))
    said = []
    pack_whole(source, root, OPTIONS, workers=1, say=said.append)
    assert said == [f"going on: 3 of {SHARDS} shards were done"]
    assert hashes(root) == whole


def other_seed(pictures):
    return shown(pictures), PackingOptions(1, 4, 1 << 30, AS_THEY_ARE)


def other_storage(pictures):
    return shown(pictures), PackingOptions(0, 4, 1 << 30, Storage(64, True, 90))


def other_picture(pictures):
    (pictures / "cat" / "another.png").write_bytes((pictures / "cat" / "00.png").read_bytes())
    return shown(pictures), OPTIONS


def other_content(pictures):
    os.utime(pictures / "cat" / "00.png", (1, 1))
    return shown(pictures), OPTIONS


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (other_seed, "begun with --seed 0, not 1"),
        (other_storage, "begun with --resize-shorter unset, not 64, with --reencode off, not on"),
        (other_picture, "begun with another number of pictures"),
        (other_content, "begun with other files in the source, or other sizes"),
    ],
)
def test_another_packing_is_not_mixed_with_the_one_begun_but_may_start_over(pictures, tmp_path, other, words):
    folder, root = shutil.copytree(pictures, tmp_path / "source"), tmp_path / "root"
    packed_up_to(shown(folder), root, 20)
    before = hashes_below(root)
    source, options = other(folder)
    for attempt in (pack_whole, merge_parts, pack_part):
        more = {merge_parts: {}, pack_part: {"part": (1, 2), "workers": 1}}.get(attempt, {"workers": 1})
        with pytest.raises(UserError, match=words) as caught:
            attempt(source, root, options, **more)
        assert "--fresh" in caught.value.mend
    assert {name: one for name, one in hashes_below(root).items() if "lock" not in name} == before
    pack_whole(source, root, options, workers=1, fresh=True)
    pack_whole(source, tmp_path / "new", options, workers=1)
    assert hashes(root) == hashes(tmp_path / "new")


def hashes_below(root):
    files = [path for path in root.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_strangers_file_among_ours_stops_everything_and_stays(source, tmp_path, fresh):
    root = tmp_path / "root"
    packed_up_to(source, root, 20)
    for name in ("thesis.tex", "train-999999.tar", "mine-000000.tar"):
        (root / name).write_text("mine")
        before = hashes_below(root)
        with pytest.raises(UserError, match=f"other files, such as '{name}'"):
            pack_whole(source, root, OPTIONS, workers=1, fresh=fresh)
        assert hashes_below(root) == before
        (root / name).unlink()


def test_a_stop_before_the_very_last_call_leaves_nothing_behind(source, whole, tmp_path):
    root = tmp_path / "root"
    pack_whole(source, root, OPTIONS, workers=1)
    (root / UNDER_WAY).mkdir()
    with pytest.raises(UserError, match="already holds a data set"):
        pack_whole(source, root, OPTIONS, workers=1)
    assert hashes(root) == whole


def test_starting_over_never_removes_a_data_set_that_is_whole(source, tmp_path):
    root = tmp_path / "root"
    pack_whole(source, root, OPTIONS, workers=1)
    before = hashes(root)
    with pytest.raises(UserError, match="already holds a data set"):
        pack_whole(source, root, OPTIONS, workers=1, fresh=True)
    assert hashes(root) == before


def test_two_at_once_do_not_write_over_each_other(source, whole, tmp_path):
    root = tmp_path / "root"
    packed_up_to(source, root, 20)
    with (root / UNDER_WAY / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        attempts = [
            lambda: pack_whole(source, root, OPTIONS, workers=1),
            lambda: pack_part(source, root, OPTIONS, part=(1, 2), workers=1),
            lambda: merge_parts(source, root, OPTIONS),
        ]
        for attempt in attempts:
            with pytest.raises(UserError, match="another lockstep pack is writing"):
                attempt()
    with (root / UNDER_WAY / "part-1-of-2.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another lockstep pack is writing"):
            pack_part(source, root, OPTIONS, part=(1, 2), workers=1)
        pack_part(source, root, OPTIONS, part=(2, 2), workers=1)
    pack_part(source, root, OPTIONS, part=(1, 2), workers=1)
    merge_parts(source, root, OPTIONS)
    assert hashes(root) == whole


def test_a_full_disk_leaves_a_packing_that_goes_on(pictures, whole, tmp_path):
    words = [
        *(sys.executable, "-c", LIMITED, "pack", str(pictures), str(tmp_path / "root")),
        *("--shard-samples", "4", "--workers", "2"),
    ]
    full = subprocess.run([*words, "9000"], capture_output=True, text=True, timeout=60, check=False)
    assert full.returncode == 74
    assert full.stderr.splitlines()[0] == "error: File too large"
    assert "FATAL code=STORAGE" in full.stderr.splitlines()[1]
    room = subprocess.run([*words, "-1"], capture_output=True, text=True, timeout=60, check=True)
    assert "the data set is in" in room.stdout
    assert hashes(tmp_path / "root") == whole


LIMITED = """
import resource, sys
from launch.__main__ import run
if __name__ == "__main__":
    limit = int(sys.argv.pop())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    sys.exit(run(sys.argv[1:]))
"""
