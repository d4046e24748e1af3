"""The cache, by real processes that fetch, wait, die and make room at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections import namedtuple
from hashlib import sha256

import pytest

from data_pipeline.cache import Cache, Entry
from data_pipeline.fault import UserError
from data_pipeline.locks import lockable, try_lock
from data_pipeline.transfer import Patience, StoppedError, Wanted
from data_pipeline.web import web_body

SIZE = 400_000
PATIENCE = Patience(tries=3, seconds=5.0, piece=80_000, pause=0.01)
PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def server(serve, tmp_path):
    """Ten files of equal size and one index."""
    root = tmp_path / "served"
    root.mkdir()
    for number in range(10):
        (root / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    (root / "0.idx").write_bytes(b"an index" * 1000)
    return serve(root)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def cache_of(folder, *, budget=100 * SIZE, patience=PATIENCE):
    return Cache(folder, budget, web_body, patience)


def content(server, name):
    return (server.root / name).read_bytes()


def entry(server, name="0.tar"):
    whole = content(server, name)
    size = len(whole) if name.endswith("tar") else None
    return Entry(name[-3:], Wanted(f"{server.url}/{name}", size, 1 << 30), sha256(whole).hexdigest())


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def age(folder, one, *, seconds):
    """As if it had been used so long ago."""
    at = time.time() - seconds
    os.utime(folder / one.name, (at, at))


def started(*functions):
    """Run each in a forked process of its own."""
    processes = [PROCESSES.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    return processes


def wait_for(condition, *, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@pytest.mark.parametrize("name", ["0.tar", "0.idx"])
def test_a_file_is_fetched_once_and_found_from_then_on(server, folder, name):
    one = entry(server, name)
    for _ in range(3):
        assert cache_of(folder).path(one).read_bytes() == content(server, name)
    assert server.asked(f"/{name}") == [0]
    assert kept(folder) == [one.name]


def test_processes_that_start_at_once_fetch_each_file_once_and_all_get_it_whole(server, folder):
    for number in range(3):
        server.behave(f"/{number}.tar", drop_after=SIZE // 3, times=2)

    def read_all():
        for number in range(3):
            one = entry(server, f"{number}.tar")
            assert cache_of(folder).path(one).read_bytes() == content(server, f"{number}.tar")

    processes = started(*[read_all] * 8)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    for number in range(3):
        requests = [request for request in server.log if request.path == f"/{number}.tar"]
        assert sum(request.sent for request in requests) == SIZE
        assert [request.first for request in requests] == [0, SIZE // 3, 2 * (SIZE // 3)]
    assert len(kept(folder)) == 3


def test_threads_of_one_process_fetch_a_file_once(server, folder):
    one, cache, found = entry(server), cache_of(folder), []
    threads = [threading.Thread(target=lambda: found.append(cache.path(one).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [content(server, "0.tar")] * 8
    assert server.asked("/0.tar") == [0]


def test_a_fetcher_that_is_killed_is_followed_by_a_waiter_that_goes_on_where_it_was(server, folder):
    one, cache = entry(server), cache_of(folder)
    server.behave("/0.tar", bytes_a_second=2000, times=1)
    (fetcher,) = started(lambda: cache.path(one))
    wait_for(lambda: folder.exists() and any(path.stat().st_size > 50 for path in folder.glob("*.part")))
    waiters = started(*[lambda: cache.path(one)] * 2)
    time.sleep(0.2)
    assert all(process.is_alive() for process in (fetcher, *waiters))
    os.kill(fetcher.pid, signal.SIGKILL)
    for process in (fetcher, *waiters):
        process.join(20)
    assert [process.exitcode for process in waiters] == [0, 0]
    assert (folder / one.name).read_bytes() == content(server, "0.tar")
    (again,) = [request for request in server.log if request.first > 0]
    assert again.first >= 50
    assert again.sent == SIZE - again.first
    assert kept(folder) == [one.name]


def test_a_fetch_that_failed_is_gone_on_with_by_the_next_start(server, folder):
    one = entry(server)
    server.behave("/0.tar", drop_after=100, times=3)
    with pytest.raises(UserError, match=f"300 of {SIZE} bytes came in 3 tries"):
        cache_of(folder).path(one)
    assert cache_of(folder).path(one).read_bytes() == content(server, "0.tar")
    assert server.asked("/0.tar") == [0, 100, 200, 300]


def test_a_fetch_that_brought_nothing_leaves_nothing(server, folder):
    server.behave("/0.tar", status=404)
    with pytest.raises(UserError, match="404"):
        cache_of(folder).path(entry(server))
    assert kept(folder) == []


def test_an_unfinished_file_that_is_not_its_beginning_is_fetched_anew(server, folder):
    one = entry(server)
    server.behave("/0.tar", drop_after=100, times=3)
    with pytest.raises(UserError):
        cache_of(folder).path(one)
    (part,) = folder.glob("*.part")
    part.write_bytes(b"\0" * 1000)
    assert cache_of(folder).path(one).read_bytes() == content(server, "0.tar")
    assert server.asked("/0.tar")[-2:] == [1000, 0]


def test_a_wrong_checksum_is_tried_twice_and_then_an_error(server, folder):
    one = entry(server)
    (server.root / "0.tar").write_bytes(b"x" * SIZE)
    with pytest.raises(UserError, match=r"0\.tar' came 2 times with a SHA-256") as caught:
        cache_of(folder).path(one)
    assert caught.value.code == "DATA"
    assert server.asked("/0.tar") == [0, 0]
    assert kept(folder) == []


@pytest.mark.parametrize("name", ["0.tar", "0.idx"])
def test_a_cached_file_of_another_size_is_fetched_again(server, folder, name):
    one = entry(server, name)
    path = cache_of(folder).path(one)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache_of(folder).path(one).read_bytes() == content(server, name)


def test_a_cached_index_with_a_flipped_bit_is_fetched_again(server, folder):
    one = entry(server, "0.idx")
    path = cache_of(folder).path(one)
    path.write_bytes(b"A" + path.read_bytes()[1:])
    assert cache_of(folder).path(one).read_bytes() == content(server, "0.idx")


def test_a_cached_tar_is_forgotten_only_where_it_is_not_what_was_fetched(server, folder):
    one, cache = entry(server), cache_of(folder)
    path = cache.path(one)
    assert not cache_of(folder).forget(one)
    assert path.exists()
    path.write_bytes(b"x" * SIZE)
    assert cache.forget(one)
    assert not cache.forget(one)
    assert cache.path(one).read_bytes() == content(server, "0.tar")


def test_what_was_used_longest_ago_makes_room(server, folder):
    cache = cache_of(folder, budget=3 * SIZE + SIZE // 2)
    entries = [entry(server, f"{number}.tar") for number in range(5)]
    for number in range(3):
        cache.path(entries[number])
        age(folder, entries[number], seconds=100 - number)
    cache.path(entries[0])  # used now: number 1 is the oldest
    cache.path(entries[3])
    assert kept(folder) == sorted(entries[number].name for number in (0, 2, 3))
    cache.path(entries[4])
    assert kept(folder) == sorted(entries[number].name for number in (0, 3, 4))


def test_files_of_strangers_in_the_folder_are_left_alone(server, folder):
    folder.mkdir()
    for name in ["precious.tar", "0" * 63 + ".tar", "notes.part"]:
        (folder / name).write_bytes(b"x" * SIZE)
    cache = cache_of(folder, budget=SIZE)
    for number in range(3):
        cache.path(entry(server, f"{number}.tar"))
    assert len(kept(folder)) == 4


def test_an_unfinished_file_that_nobody_is_at_makes_room_too_but_one_under_way_does_not(server, folder):
    cache = cache_of(folder, budget=2 * SIZE)
    for number in (0, 1):
        server.behave(f"/{number}.tar", drop_after=100)
        with pytest.raises(UserError):
            cache.path(entry(server, f"{number}.tar"))
    busy, idle = (next(folder.glob(f"{entry(server, name).name}*")) for name in ("0.tar", "1.tar"))
    with lockable(busy, create=False) as descriptor:
        assert try_lock(descriptor)
        cache.path(entry(server, "2.tar"))
        # What is under way is promised its whole size: with it, one more file is all there is room for.
        assert kept(folder) == sorted([busy.name, entry(server, "2.tar").name])
    assert not idle.exists()


def test_a_file_larger_than_the_budget_is_a_mistake_of_the_configuration_with_both_numbers(server, folder):
    with pytest.raises(UserError, match=r"400,000 bytes.* 399,999") as caught:
        cache_of(folder, budget=SIZE - 1).path(entry(server))
    assert caught.value.code == "CONFIG"
    assert server.log == []


def test_a_disk_with_less_room_than_the_budget_decides(server, folder, monkeypatch):
    def disk(path):
        stored = sum(one.stat().st_size for one in folder.iterdir())
        return usage(4 * SIZE, stored, 3 * SIZE - stored)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("data_pipeline.cache.disk_usage", disk)
    for number in range(6):
        cache_of(folder).path(entry(server, f"{number}.tar"))
    assert kept(folder) == sorted(entry(server, f"{number}.tar").name for number in (3, 4, 5))


def test_what_another_process_has_open_stays_readable_after_it_made_room(server, folder):
    cache = cache_of(folder, budget=SIZE)
    descriptor = cache.open(entry(server))
    cache.path(entry(server, "1.tar"))
    assert kept(folder) == [entry(server, "1.tar").name]
    assert os.pread(descriptor, SIZE, 0) == content(server, "0.tar")
    os.close(descriptor)


def test_processes_with_room_for_one_file_only_still_all_get_what_they_ask_for(server, folder):
    def read_all(shift):
        cache = cache_of(folder, budget=SIZE)
        for number in range(12):
            name = f"{(number + shift) % 4}.tar"
            descriptor = cache.open(entry(server, name))
            assert os.pread(descriptor, SIZE, 0) == content(server, name)
            os.close(descriptor)

    processes = started(*[lambda shift=shift: read_all(shift) for shift in range(4)])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * SIZE


def test_the_budget_of_the_smaller_run_holds_for_a_folder_that_two_share(server, folder):
    for number in range(4):
        cache_of(folder).path(entry(server, f"{number}.tar"))
    cache_of(folder, budget=2 * SIZE).path(entry(server, "4.tar"))
    assert len(kept(folder)) == 2
    assert entry(server, "4.tar").name in kept(folder)


def test_a_child_forked_while_a_thread_fetches_neither_hangs_nor_keeps_its_lock(server, folder):
    one, cache = entry(server), cache_of(folder)
    server.behave("/0.tar", bytes_a_second=2000, times=1)
    (fetcher,) = started(lambda: fork_and_wait(cache, one, folder))
    wait_for((folder.parent / "forked").exists)
    os.kill(fetcher.pid, signal.SIGKILL)
    wait_for(lambda: fetcher.exitcode is not None)
    grandchild = int((folder.parent / "forked").read_text())
    try:
        assert cache.path(one).read_bytes() == content(server, "0.tar")
    finally:
        os.kill(grandchild, signal.SIGKILL)


def fork_and_wait(cache, one, folder):
    thread = threading.Thread(target=cache.path, args=(one,), daemon=True)
    thread.start()
    wait_for(lambda: folder.exists() and any(path.stat().st_size > 50 for path in folder.glob("*.part")))
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    note = folder.parent / "note"
    note.write_text(str(child))
    note.rename(folder.parent / "forked")
    thread.join()


def test_a_forked_child_fetches_by_itself_while_a_thread_of_its_parent_does_too(server, folder):
    cache = cache_of(folder)
    server.behave("/0.tar", bytes_a_second=20_000, times=1)
    stop = threading.Event()

    def fetch():
        with pytest.raises(StoppedError):
            cache.path(entry(server), stop)

    thread = threading.Thread(target=fetch)
    thread.start()
    wait_for(lambda: folder.exists() and any(path.stat().st_size > 50 for path in folder.glob("*.part")))
    (child,) = started(lambda: cache.path(entry(server, "1.tar")))
    child.join(10)
    assert child.exitcode == 0
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_who_waits_for_another_fetcher_can_be_told_to_stop(server, folder):
    one, cache = entry(server), cache_of(folder)
    cache.path(one).unlink()
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    with lockable(cache._part(one), create=True) as descriptor:
        assert try_lock(descriptor)
        with pytest.raises(StoppedError):
            cache.path(one, stop)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_rest(server, folder):
    one, cache = entry(server), cache_of(folder)

    def fetch():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        with pytest.raises(OSError, match="too large") as caught:
            cache.path(one)
        assert caught.value.errno == errno.EFBIG
        assert str(folder) in caught.value.filename

    (process,) = started(fetch)
    process.join(20)
    assert process.exitcode == 0
    assert kept(folder) == []
