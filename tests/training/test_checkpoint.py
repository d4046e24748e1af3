"""Checkpoints: whatever happens to the newest one, a whole one is found, and it is said why."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from training.checkpoints.manifest import fault_of, verify
from training.checkpoints.protocol import (
    checkpoints,
    newest_verified,
    read_state,
    read_tensors,
    remove_leftovers,
    write_checkpoint,
)
from training.checkpoints.retention import Retention, dispensable
from training.checkpoints.snapshot import Snapshot, layout_of
from training.checkpoints.writer import CheckpointWriter, Plan

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def tensors(value, size=100):
    return {"weight": torch.full((size, size), float(value)), "steps": torch.tensor(value)}


def write(folder, step):
    files = {"model.safetensors": tensors(step), "optimizer.safetensors": tensors(-step)}
    return write_checkpoint(folder, step, files, {"progress": {"step": step}})


def writer_of(folder, keep=5):
    return CheckpointWriter(folder, Retention(keep))


def save(writer, step, files=None, *, best_step=None, before=lambda: None, then=lambda path: ()):
    """Save and wait for the end of it; how it ended."""
    files = files or {"model.safetensors": tensors(step)}
    writer.save(Plan(step, {"step": step}, best_step, before, then), files)
    writer.busy(None)
    return writer.outcome()


def saved(*arguments, **keywords):
    outcome = save(*arguments, **keywords)
    assert outcome.error is None, outcome
    assert outcome.unpruned is None, outcome


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, *, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    return tmp_path


def assert_the_one_before_is_taken(folder, *reasons):
    said = []
    found = newest_verified(folder, say=said.append)
    assert found == folder / "step-00000001"
    assert len(said) == 1
    for reason in reasons:
        assert reason in said[0], said


def test_what_was_written_is_read_back(two):
    said = []
    newest = newest_verified(two, say=said.append)
    assert newest == two / "step-00000002"
    assert said == []
    assert read_state(newest)["progress"] == {"step": 2}
    assert torch.equal(read_tensors(newest, "model.safetensors")["weight"], tensors(2)["weight"])
    assert torch.equal(read_tensors(newest, "optimizer.safetensors")["steps"], torch.tensor(-2))
    assert names(newest) == sorted(FILES)
    assert names(two) == ["step-00000001", "step-00000002"]


def test_a_folder_that_is_empty_or_not_there_holds_no_checkpoint(tmp_path):
    assert newest_verified(tmp_path, say=pytest.fail) is None
    assert newest_verified(tmp_path / "nowhere", say=pytest.fail) is None


@pytest.mark.parametrize("file", FILES)
def test_a_file_short_of_one_byte_is_found_out(two, file):
    path = two / "step-00000002" / file
    with path.open("r+b") as opened:
        opened.truncate(
            path.stat().st_size - (1 if file != "MANIFEST.json" else 2)
        )  # its last one is a newline
    assert_the_one_before_is_taken(two, "step-00000002", file)


@pytest.mark.parametrize("file", FILES[:-1])
def test_one_flipped_bit_anywhere_is_found_out(two, file):
    """The older one is taken, and what is said names the file."""
    path, draws = two / "step-00000002" / file, random.Random(0)
    whole = path.read_bytes()
    for _ in range(250):
        flip(path, at=draws.randrange(len(whole)), bit=draws.randrange(8))
        assert_the_one_before_is_taken(two, "step-00000002", file)
        path.write_bytes(whole)
    assert verify(path.parent) is None


def test_no_flipped_bit_of_the_manifest_can_make_it_vouch_for_other_content(two):
    path = two / "step-00000002" / "MANIFEST.json"
    whole = path.read_bytes()
    listed = json.loads(whole)
    for number in range(0, 8 * len(whole), 3):
        flip(path, at=number // 8, bit=number % 8)
        try:
            fault = fault_of(path.parent)
        except FileNotFoundError:  # the name of a file has changed
            fault = "missing"
        assert fault is not None or json.loads(path.read_bytes()) == listed
        path.write_bytes(whole)
    assert verify(path.parent) is None


@pytest.mark.parametrize("number", [2, 4, 7, 8, 10, 99])
def test_a_checkpoint_of_a_later_version_is_refused_and_left_where_it_is(two, number):
    path = two / "step-00000002" / "MANIFEST.json"
    path.write_text(json.dumps({"format": number, "something": "else"}))
    with pytest.raises(UserError, match=f"format {number}, this version reads format 1") as caught:
        newest_verified(two, say=pytest.fail)
    assert caught.value.code == "RESUME"
    assert names(two) == ["step-00000001", "step-00000002"]


def test_a_file_that_the_manifest_does_not_list_is_found_out(two):
    (two / "step-00000002" / "optimizer.bin").write_bytes(b"\x80\x04")
    assert_the_one_before_is_taken(two, "step-00000002", "optimizer.bin")
    (two / "step-00000002" / "optimizer.bin").rename(two / "step-00000002" / ".nfs0000000001")
    assert newest_verified(two, say=pytest.fail) == two / "step-00000002"


def test_a_copy_under_another_step_is_found_out(two):
    shutil.copytree(two / "step-00000001", two / "step-00000099")
    shutil.rmtree(two / "step-00000002")
    assert_the_one_before_is_taken(two, "step-00000099", "of step 1")


def test_a_file_that_is_late_on_a_network_is_waited_for(two):
    path = two / "step-00000002" / "state.json"
    late = path.rename(two / "late")
    threading.Timer(0.2, late.rename, [path]).start()
    assert newest_verified(two, say=pytest.fail) == two / "step-00000002"


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found_out(two, file):
    (two / "step-00000002" / file).unlink()
    assert_the_one_before_is_taken(two, "step-00000002", file)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "3",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 0, "files": {}}',
        '{"format": 3, "step": 2, "files": {}}',
        '{"format": "2", "step": 2, "files": {}}',
        '{"format": 1, "step": 2, "files": {}}',
        '{"format": 1, "step": 2, "files": []}',
        '{"format": 1, "step": 2, "files": {"state.json": {"size": 1}}}',
        '{"format": 1, "step": 2, "files": {"state.json": {"size": NaN, "sha256": ""}}}',
        '{"format": 1, "step": 2, "files": {"state.json": null}}',
        "[" * 100_000,
        "\0",
    ],
    ids=lambda content: content[:60] or "empty",
)
def test_a_manifest_that_vouches_for_nothing_is_found_out(two, content):
    (two / "step-00000002" / "MANIFEST.json").write_text(content)
    assert_the_one_before_is_taken(two, "step-00000002")


@pytest.mark.parametrize("prefix", ["../step-00000001/", "{folder}/step-00000001/", "./", "sub/../"])
def test_a_manifest_that_vouches_for_files_elsewhere_is_not_believed(two, prefix):
    path = two / "step-00000002" / "MANIFEST.json"
    (two / "step-00000002" / "sub").mkdir()
    manifest = json.loads((two / "step-00000001" / "MANIFEST.json").read_text())
    if ".." not in prefix.partition("/")[0] and "{" not in prefix:
        manifest = json.loads(path.read_text())
    folder = prefix.format(folder=two)
    manifest["files"] = {folder + name: entry for name, entry in manifest["files"].items()}
    path.write_text(json.dumps(manifest))
    assert_the_one_before_is_taken(two, "step-00000002")


def test_an_empty_folder_named_like_a_checkpoint_is_passed_over(two):
    shutil.rmtree(two / "step-00000002")
    (two / "step-00000099").mkdir()
    assert_the_one_before_is_taken(two, "step-00000099", "MANIFEST.json")


def test_a_file_named_like_a_checkpoint_is_passed_over(two):
    shutil.rmtree(two / "step-00000002")
    (two / "step-00000099").write_text("")
    assert_the_one_before_is_taken(two, "step-00000099")


@pytest.mark.parametrize(
    "name",
    [
        ".step-00000099.part",
        ".step-00000099.old",
        "checkpoint_foo",
        "step-foo",
        "step--1",
        "step-",
        "step-٣",
        "step-3²",
        "xstep-00000099",
    ],
)
def test_other_folders_are_no_checkpoints_even_if_they_are_whole(two, name):
    shutil.copytree(two / "step-00000002", two / name)
    assert newest_verified(two, say=pytest.fail) == two / "step-00000002"


def test_newest_is_by_step_and_not_by_name_or_date(tmp_path):
    for step in (100_000_000, 99_999_999, 7):
        write(tmp_path, step)
        os.utime(tmp_path / f"step-{step:08d}", (step, step))
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-100000000",
        "step-99999999",
        "step-00000007",
    ]


def test_when_none_is_whole_every_fault_is_said(two):
    for path in checkpoints(two):
        flip(path / "state.json", at=5)
    said = []
    assert newest_verified(two, say=said.append) is None
    assert len(said) == 2


def test_a_damaged_checkpoint_of_the_same_step_makes_room_and_is_kept_aside(two):
    flip(two / "step-00000002" / "state.json", at=5)
    write(two, 2)
    assert newest_verified(two, say=pytest.fail) == two / "step-00000002"
    assert names(two) == ["aside-step-00000002.1", "step-00000001", "step-00000002"]


def test_what_a_kill_left_behind_is_cleared_away(two):
    shutil.copytree(two / "step-00000001", two / ".step-00000009.part")
    (two / ".step-00000008.old").mkdir()
    (two / "notes.txt").write_text("mine")
    (two / ".step-notes").mkdir()
    (two / ".step-00000007.part").symlink_to(two / "step-00000001")
    remove_leftovers(two)
    left = [".step-00000007.part", ".step-notes", "notes.txt", "step-00000001", "step-00000002"]
    assert names(two) == left
    assert verify(two / "step-00000001") is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write(tmp_path, 1)
        assert os.umask(umask) == umask, "reading the umask leaves it as it was"
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        FILES, oct(mode)
    )


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path):
    tied = torch.arange(12.0).reshape(3, 4)
    given = {
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "transposed": tied.T,
        "tied": tied,
        "tied again": tied,
        "a part of it": tied[1],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
    }
    saved(writer_of(tmp_path), 1, {"model.safetensors": given})
    read = read_tensors(tmp_path / "step-00000001", "model.safetensors")
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].nan_to_num(7), tensor.nan_to_num(7))


def test_a_snapshot_is_not_touched_by_steps_taken_while_it_is_written(tmp_path):
    state = tensors(1, size=2000)
    writer = writer_of(tmp_path)
    for step in (1, 2):
        writer.save(Plan(step, {}, None, lambda: None, lambda path: ()), {"model.safetensors": state})
        for tensor in state.values():
            tensor.add_(1)  # what an optimizer does, while the thread writes
    writer.busy(None)
    for step in (1, 2):
        read = read_tensors(tmp_path / f"step-{step:08d}", "model.safetensors")
        assert read["weight"].eq(step).all()
        assert read["steps"] == step


def test_memory_for_copies_is_there_before_the_first_and_is_used_again():
    state = {"model.safetensors": tensors(1), "optimizer.safetensors": tensors(2)}
    snapshot = Snapshot()
    snapshot.reserve(
        {file: {name: layout_of(one) for name, one in named.items()} for file, named in state.items()}
    )
    size = snapshot.size
    assert size == 2 * (100 * 100 * 4 + 8)
    places = []
    for _ in range(2):
        snapshot.take(state)
        places.append([one.data_ptr() for named in snapshot.files.values() for one in named.values()])
    assert places[0] == places[1]
    assert snapshot.size == size
    snapshot.take({"model.safetensors": {"weight": torch.zeros(7)}})  # another network, and fewer tensors
    assert snapshot.files["model.safetensors"].keys() == {"weight"}
    assert snapshot.files["model.safetensors"]["weight"].shape == (7,)


def test_what_comes_after_a_checkpoint_sees_it_committed_and_what_comes_before_does_not(tmp_path):
    seen = []
    saved(
        writer_of(tmp_path),
        3,
        before=lambda: seen.append(names(tmp_path)),
        then=lambda path: seen.append((path, verify(path))),
    )
    assert seen == [[], (tmp_path / "step-00000003", None)]


def test_an_error_while_writing_is_the_outcome_and_the_same_snapshot_can_be_written_again(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    writer = writer_of(tmp_path / "checkpoints")
    state = tensors(1)
    assert isinstance(save(writer, 1, {"model.safetensors": state}).error, NotADirectoryError)
    assert writer.outcome() is None, "it is told once"
    state["weight"].zero_()
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").mkdir()
    writer.again()
    writer.busy(None)
    assert writer.outcome().error is None
    assert read_tensors(tmp_path / "checkpoints" / "step-00000001", "model.safetensors")["weight"].eq(1).all()


def test_what_has_to_be_on_the_disk_first_fails_the_save(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    assert save(writer_of(tmp_path), 1, before=fail).error.errno == 28
    assert names(tmp_path) == []


def test_the_newest_and_the_best_are_kept_and_no_others(tmp_path):
    writer = writer_of(tmp_path, keep=2)
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)]:
        saved(writer, step, best_step=best)
        kept = {best, step, step - 1} - {0}
        assert names(tmp_path) == [f"step-{one:08d}" for one in sorted(kept)]


def test_what_is_still_needed_is_kept(tmp_path):
    writer = writer_of(tmp_path, keep=1)
    saved(writer, 1)
    saved(writer, 2, then=lambda path: [1])
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    saved(writer, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_a_damaged_newer_one_never_costs_the_one_that_was_just_written(tmp_path):
    for step in (98, 99):
        (tmp_path / f"step-{step:08d}").mkdir()
    writer = writer_of(tmp_path, keep=1)
    for step in (3, 4):
        saved(writer, step)
        said = []
        assert newest_verified(tmp_path, say=said.append) == tmp_path / f"step-{step:08d}"
        assert "step-00000099" in said[0]


def test_an_older_one_that_cannot_be_removed_does_not_fail_the_save(tmp_path):
    writer = writer_of(tmp_path, keep=1)
    saved(writer, 1)
    (tmp_path / "step-00000001" / "mine").mkdir()
    outcome = save(writer, 2)
    assert outcome.error is None
    assert isinstance(outcome.unpruned, OSError)
    assert newest_verified(tmp_path, say=pytest.fail) == tmp_path / "step-00000002"


STEPS = st.sets(st.integers(0, 60))


@given(
    steps=STEPS,
    keep=st.integers(1, 8),
    every=st.none() | st.integers(1, 20),
    written=st.integers(0, 60),
    wanted=STEPS,
)
@example(steps={1, 2, 3, 4}, keep=2, every=None, written=3, wanted=set())
def test_what_may_go_is_older_than_the_newest_and_nobody_wants_it(steps, keep, every, written, wanted):
    gone = dispensable(steps, Retention(keep, every), written=written, wanted=wanted)
    assert gone == sorted(set(gone))
    assert set(gone) <= steps
    assert all(step < written for step in gone)
    assert not set(gone) & wanted
    newest = sorted(step for step in steps | {written} if step <= written)[-keep:]
    assert not set(gone) & set(newest)
    assert not every or all(step % every for step in gone)
    stays = (steps | {written}) - set(gone)
    # Nothing stays without a reason.
    for step in stays:
        assert step >= written or step in newest or step in wanted or (every and step % every == 0)


CHAOS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from training.checkpoints.protocol import newest_verified, step_of
from training.checkpoints.writer import CheckpointWriter, Plan
from training.checkpoints.retention import Retention

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
draws = random.Random(0)
torch.manual_seed(0)

def save_for_ever(step, acknowledge):
    names = ("model.safetensors", "optimizer.safetensors")
    state = {name: {"weight": torch.randn(2_500_000)} for name in names}
    writer = CheckpointWriter(folder, Retention(2))
    while True:
        step += 1
        writer.save(Plan(step, {"step": step}, step // 10 * 10, lambda: None, lambda path: ()), state)
        writer.busy(None)
        assert writer.outcome().error is None
        os.write(acknowledge, f"{step}\\n".encode())

last, caught, faults, steps, pace = 0, 0, [], [], None
for _ in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(last, writing)
    os.close(writing)
    if pace is None:  # seconds to the first save of a child, on this machine, now
        began = time.monotonic()
        os.read(reading, 1 << 16)
        pace, last = time.monotonic() - began, 1
    time.sleep(draws.uniform(0.05, 3) * pace)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading) as acknowledged:
        last = max([last, *map(int, acknowledged.read().split())])
    caught += any(path.name.startswith(".") for path in folder.iterdir())
    said = []
    found = newest_verified(folder, say=said.append)
    if said or (last and (found is None or step_of(found) < last)):
        faults.append([last, str(found), said])
    last = max(last, step_of(found)) if found else last
    steps.append(last)
print(json.dumps({"caught": caught, "faults": faults, "steps": steps}))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_acknowledged_checkpoint_whole(script, tmp_path):
    """Real saves of 20 MB, killed with SIGKILL at random moments, one after the other in the same folder."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    done = script(CHAOS, folder, 8)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["faults"] == []
    assert outcome["caught"] > 1, "most kills must strike while something is being written"
    assert outcome["steps"][-1] > 3
    assert len(checkpoints(folder)) <= 4
