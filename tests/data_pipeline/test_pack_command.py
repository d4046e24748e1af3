import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from data_pipeline.pack_command import pack
from data_pipeline.packing_state import UNDER_WAY


def test_pack_says_what_it_found_what_it_wrote_and_what_it_left_out(photo_folder, tmp_path, lockstep):
    source = shutil.copytree(photo_folder, tmp_path / "pictures")
    for number in range(12):
        (source / "cat" / f"broken {number}.png").write_bytes(b"no picture")
    root = tmp_path / "my data"
    packed = lockstep("pack", source, root, "--workers", 2, "--val-fraction", 0.25, "--shard-samples=20")
    assert (packed.returncode, packed.stderr) == (0, "")
    lines = packed.stdout.splitlines()
    assert lines[0] == (
        "found a folder per class, 25% of each class held out for val: 3 classes, 72 pictures"
    )
    assert re.fullmatch(r"  train: \d+ samples in 3 shards, [\d.]+ kB", lines[1])
    assert re.fullmatch(r"  val: \d+ samples in 1 shard, [\d.]+ kB", lines[2])
    assert lines[3] == f"left out 12 that cannot be read (listed in {root}/bad_files.jsonl):"
    assert len(lines[4:14]) == sum(line.endswith("cannot identify image file") for line in lines) == 10
    assert lines[14:] == ["  and 2 more", f"the data set is in {root}", f"next: lockstep show '{root}'"]
    assert sum(split.samples for split in read_dataset(root).splits.values()) == 60


def test_a_table_is_packed_with_its_missing_labels(photo_folder, photo_table, tmp_path, lockstep):
    root = tmp_path / "root"
    words = ["pack", photo_table, root, "--images", photo_folder, "--labels", "bright,wide,red"]
    packed = lockstep(*words, "--split-column", "split", "--workers", 1)
    assert (packed.returncode, packed.stderr) == (0, "")
    assert "3 labels, 60 pictures" in packed.stdout.splitlines()[0]
    missing = sum(row.split(",")[1:4].count("") for row in photo_table.read_text().splitlines())
    assert missing > 10
    assert f"\n{missing} of 180 labels are missing, and stay so: they count in no loss\n" in packed.stdout
    dataset = read_dataset(root)
    assert (dataset.task, dataset.classes) == ("multilabel", ("bright", "wide", "red"))
    assert [dataset.split(name).samples for name in ("train", "val")] == [45, 15]


def test_pairs_are_packed_with_the_names_given_to_the_values(mask_folder, tmp_path, lockstep):
    root = tmp_path / "root"
    packed = lockstep("pack", mask_folder, root, "--classes", "dark,bright", "--workers", 1)
    assert (packed.returncode, packed.stderr) == (0, "")
    assert packed.stdout.splitlines()[0].endswith("2 classes, 24 pictures")
    dataset = read_dataset(root)
    assert (dataset.task, dataset.classes) == ("segmentation", ("dark", "bright"))
    assert dataset.mask_values == (0, 255)
    nameless = lockstep("pack", mask_folder, tmp_path / "nameless", "--workers", 1)
    assert nameless.stdout.splitlines()[0].endswith(": 24 pictures")
    assert read_dataset(tmp_path / "nameless").classes == ("background", "foreground")


@pytest.fixture
def folders(photo_folder, photo_dataset):
    return {"PHOTOS": photo_folder, "PACKED": photo_dataset}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["EMPTY", "new"], ("DATA", "'EMPTY' is empty", "CLASS/picture.jpg")),
        (["missing", "new"], ("DATA", "missing'", "one folder of pictures per class")),
        (["PHOTOS", "PACKED"], ("DATA", "already holds a data set", "another folder")),
        (["PHOTOS", "PHOTOS/new"], ("USAGE", "lies inside SOURCE", "outside")),
        (["EMPTY", "PHOTOS/new", "--masks", "PHOTOS"], ("USAGE", "lies inside the folder", "outside")),
        (["PHOTOS", "new", "--worker", "3"], ("USAGE", "option --worker", "did you mean --workers?")),
        (["--valfraction=0.1", "PHOTOS", "new"], ("USAGE", "--valfraction", "mean --val-fraction?")),
        (["PHOTOS", "new", "--workers", "-1"], ("USAGE", "'-1' is not a whole number from 1", "--help")),
        (["PHOTOS", "new", "--workers", "two"], ("USAGE", "'two' is not a whole number", "--help")),
        (["PHOTOS", "new", "--val-fraction", "1"], ("USAGE", "'1' is not a number from 0", "--help")),
        (["PHOTOS", "new", "--val-fraction", "nan"], ("USAGE", "'nan' is not a number", "--help")),
        (["PHOTOS", "new", "--shard-bytes", "0"], ("USAGE", "'0' is not a whole number", "--help")),
        (["PHOTOS", "new", "--quality", "101"], ("USAGE", "'101' is not a whole number from 1", "--help")),
        (["PHOTOS", "new", "--kind", "zip"], ("USAGE", "invalid choice: 'zip'", "--help")),
        (["PHOTOS", "new", "--classes", "a,,b"], ("USAGE", "'a,,b' is not a list of different", "--help")),
        (["PHOTOS", "new", "--labels", "a,a"], ("USAGE", "'a,a' is not a list of different", "--help")),
        (["PHOTOS", "new", "--part", "0/4"], ("USAGE", "'0/4' is not I/N with I from 1 to N", "--help")),
        (["PHOTOS", "new", "--part", "5/4"], ("USAGE", "'5/4' is not I/N", "--help")),
        (["PHOTOS", "new", "--part", "1/2", "--merge"], ("USAGE", "--part and --merge exclude", "merged")),
        (["PHOTOS", "new", "--part", "1/2", "--fresh"], ("USAGE", "--part and --fresh", "remove DEST")),
        (["PHOTOS", "new", "--merge"], ("DATA", "holds no parts", "--part 1/N")),
        (["PHOTOS"], ("USAGE", "required: DEST", "lockstep pack --help")),
        (["PHOTOS", "new", "more"], ("USAGE", "unrecognized arguments: more", "--help")),
    ],
)
def test_what_a_user_can_get_wrong_ends_in_two_lines_and_a_two(folders, tmp_path, refused, words, expected):
    names = {**folders, "EMPTY": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()

    def real(text):
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    words = [str(tmp_path / word) if word in ("new", "missing") else real(word) for word in words]
    code, what, hint = refused("pack", *words)
    assert code == expected[0]
    assert real(expected[1]) in what
    assert real(expected[2]) in hint
    assert not (tmp_path / "new").exists()


def test_help_lists_every_option_and_its_default(lockstep):
    done = lockstep("pack", "--help")
    assert done.returncode == 0
    for word in ("SOURCE", "DEST", "--workers", "--val-fraction X", "(0.2)", "--shard-samples", "(10000)"):
        assert word in done.stdout
    options = "kind images masks labels image-column split-column group-column classes resize-shorter"
    for option in (*options.split(), "reencode", "quality", "part", "merge", "fresh", "seed"):
        assert f"--{option}" in done.stdout


def test_a_disk_that_cannot_be_written_is_a_storage_error(photo_folder, lockstep):
    done = lockstep("pack", photo_folder, "/proc/no/data/set", "--workers", 1)
    assert done.returncode == 74
    what, fatal = done.stderr.splitlines()
    assert what.startswith("error: ")
    assert "/proc/no" in what
    assert fatal.startswith("FATAL code=STORAGE rank=0 hint=")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_while_packing_is_a_storage_error(photo_folder, tmp_path, lockstep, workers):
    words = ["pack", photo_folder, tmp_path / "root", "--shard-samples", 30, "--workers", workers]
    done = lockstep(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert done.returncode == 74
    what, fatal = done.stderr.splitlines()
    assert what == "error: File too large"
    assert fatal.startswith("FATAL code=STORAGE")
    assert not (tmp_path / "root" / "dataset.json").exists()


def is_running(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a dead one not asked for has none
    except OSError:
        return False


def many_pictures(photo_folder, root):
    source = shutil.copytree(photo_folder, root / "many")
    for copy in range(40):
        shutil.copytree(photo_folder / "cat", source / "cat" / str(copy))
    return source


def started(*words):
    """A packing of its own session whose first tar is finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "pack", *map(str, words), "--shard-samples", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list((words[1] / UNDER_WAY).glob("*.tar.json")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def workers_of(process):
    """Children that were spawned to pack: the other one tracks what they share."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [one for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_ends_all_processes_quietly(photo_folder, tmp_path, workers):
    process = started(many_pictures(photo_folder, tmp_path), tmp_path / "root", "--workers", workers)
    children = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers as well
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert len(children) == (0 if workers == 1 else workers)
    assert not any(map(is_running, children))
    assert not (tmp_path / "root" / "dataset.json").exists()


def test_a_worker_that_is_killed_ends_the_packing_in_seconds_and_it_goes_on_later(
    photo_folder, tmp_path, lockstep
):
    words = many_pictures(photo_folder, tmp_path), tmp_path / "root", "--workers", 3
    process = started(*words)
    children = workers_of(process)
    os.kill(int(children[1]), signal.SIGKILL)
    since = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < 10
    what, fatal = errors.splitlines()
    assert process.returncode == 2
    assert re.fullmatch(
        r"error: a worker process was killed from outside \(SIGKILL\)( at (train|val)-\d+\.tar)?, with 3 of "
        "them at work",
        what,
    )
    assert re.search(r"FATAL code=DATA .*goes on where it stopped; .* --workers 1", fatal)
    assert not any(map(is_running, children))
    again = lockstep("pack", *words, "--shard-samples", "5")
    assert (again.returncode, again.stderr) == (0, "")
    assert re.search(r"\ngoing on: \d+ of \d+ shards were done\n", again.stdout)


def test_packing_does_not_load_torch_not_even_to_write_tars(photo_folder, tmp_path):
    code = (
        "import sys; from data_pipeline.pack_command import pack; pack(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    words = [str(photo_folder), str(tmp_path / "root"), "--workers", "1"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=60, capture_output=True)


def test_names_that_are_not_text_are_printed_and_not_stumbled_over(photo_folder, tmp_path, lockstep):
    source = shutil.copytree(photo_folder, tmp_path / "pictures")
    (source / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    done = lockstep("pack", source, tmp_path / "root", "--workers", 1, env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\udce9.png: cannot decode" in done.stdout
    assert json.loads((tmp_path / "root" / "bad_files.jsonl").read_text())["path"].endswith("caf\udce9.png")


def test_pack_is_a_function_of_its_words(photo_folder, tmp_path, capsys):
    pack([str(photo_folder), str(tmp_path / "root"), "--workers", "1"])
    assert f"the data set is in {tmp_path / 'root'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown option --seeed") as caught:
        pack(["a", "b", "--seeed", "1"])
    assert caught.value.code == "USAGE"
