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

from data_pipeline.commands import pack, show, usable_cores
from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset


def lockstep(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def refused(*words):
    """The code and the two lines of a command that must end with them, and with nothing else."""
    done = lockstep(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    what, fatal = done.stderr.splitlines()
    assert what.startswith("error: ")
    code, hint = re.fullmatch(r'FATAL code=(\w+) rank=0.* hint="(.+)"', fatal).groups()
    return code, what, hint


def test_pack_and_show_lead_from_a_folder_to_a_grid(photo_folder, tmp_path):
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

    shown = lockstep("show", root)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"the picture grid is in {root}/samples.png" in shown.stdout
    assert "pictures: colour (RGB)" in shown.stdout
    assert re.search(r"total +\d+ +\d+ +60", shown.stdout)
    assert (root / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pack", "EMPTY", "new"], ("DATA", "'EMPTY' is empty", "CLASS/picture.jpg")),
        (["pack", "missing", "new"], ("DATA", "missing'", "one folder of pictures per class")),
        (["pack", "PHOTOS", "PACKED"], ("DATA", "already holds a data set", "another folder")),
        (["pack", "PHOTOS", "PHOTOS/new"], ("USAGE", "lies inside SOURCE", "outside")),
        (["pack", "PHOTOS", "new", "--worker", "3"], ("USAGE", "option --worker", "did you mean --workers?")),
        (["pack", "--valfraction=0.1", "PHOTOS", "new"], ("USAGE", "--valfraction", "mean --val-fraction?")),
        (
            ["pack", "PHOTOS", "new", "--workers", "-1"],
            ("USAGE", "'-1' is not a whole number from 1", "--help"),
        ),
        (["pack", "PHOTOS", "new", "--workers", "two"], ("USAGE", "'two' is not a whole number", "--help")),
        (["pack", "PHOTOS", "new", "--val-fraction", "1"], ("USAGE", "'1' is not a number from 0", "--help")),
        (["pack", "PHOTOS", "new", "--val-fraction", "nan"], ("USAGE", "'nan' is not a number", "--help")),
        (["pack", "PHOTOS", "new", "--shard-bytes", "0"], ("USAGE", "'0' is not a whole number", "--help")),
        (["pack", "PHOTOS"], ("USAGE", "required: DEST", "lockstep pack --help")),
        (["pack", "PHOTOS", "new", "more"], ("USAGE", "unrecognized arguments: more", "--help")),
        (["show", "EMPTY"], ("DATA", "it holds no dataset.json", "lockstep pack PICTURES EMPTY")),
        (["show", "PACKED", "--split", "test"], ("DATA", "no split 'test'", "train, val")),
        (["show", "PACKED", "--out", "no/such/folder.png"], ("USAGE", "cannot write", "--out FILE.png")),
        (["show", "PACKED", "--sampels", "3"], ("USAGE", "--sampels", "did you mean --samples?")),
        (["shw", "PACKED"], ("USAGE", "unknown command 'shw'", "did you mean show?")),
        (["frobnicate"], ("USAGE", "unknown command 'frobnicate'", "lockstep --help")),
    ],
)
def test_what_a_user_can_get_wrong_ends_in_two_lines_and_a_two(
    photo_folder, photo_dataset, tmp_path, words, expected
):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PHOTOS": photo_folder, "PACKED": photo_dataset}

    def real(text):
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    words = [str(tmp_path / word) if word in ("new", "missing") else real(word) for word in words]
    code, what, hint = refused(*words)
    assert code == expected[0]
    assert real(expected[1]) in what
    assert real(expected[2]) in hint
    assert not (tmp_path / "new").exists()


def test_help_is_answered_without_loading_anything_heavy():
    code = "import sys, launch.__main__ as m; sys.argv = sys.argv[1:]; sys.exit(m.run(sys.argv))"
    check = code.replace("sys.exit(m.run(sys.argv))", "\ntry: m.run(sys.argv)\nexcept SystemExit: pass\n")
    heavy = ("torch", "numpy", "webdataset", "PIL", "rich", "matplotlib", "sklearn")
    check += f"print([name for name in {heavy} if name in sys.modules])"
    for words in ([], ["--help"], ["pack", "--help"], ["show", "--help"], ["pack", "--wrong"]):
        done = subprocess.run(
            [sys.executable, "-c", check, "lockstep", *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_names_each_with_what_it_is_for():
    for words in ([], ["--help"], ["-h"]):
        done = lockstep(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"lockstep pack +make a data set", done.stdout)
        assert re.search(r"lockstep show +look at a data set", done.stdout)


def test_the_help_of_a_command_lists_its_options_and_their_defaults():
    done = lockstep("pack", "--help")
    assert done.returncode == 0
    for word in ("SOURCE", "DEST", "--workers", "--val-fraction X", "(0.2)", "--shard-samples", "(10000)"):
        assert word in done.stdout


def test_a_disk_that_cannot_be_written_is_a_storage_error(photo_folder):
    done = lockstep("pack", photo_folder, "/proc/no/data/set", "--workers", 1)
    assert done.returncode == 74
    what, fatal = done.stderr.splitlines()
    assert what.startswith("error: ")
    assert "/proc/no" in what
    assert fatal.startswith("FATAL code=STORAGE rank=0 hint=")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_while_packing_is_a_storage_error(photo_folder, tmp_path, workers):
    words = ["pack", photo_folder, tmp_path / "root", "--shard-samples", 30, "--workers", workers]
    done = lockstep(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert done.returncode == 74
    what, fatal = done.stderr.splitlines()
    assert what == "error: File too large"
    assert fatal.startswith("FATAL code=STORAGE")
    assert not (tmp_path / "root" / "dataset.json").exists()


def test_an_output_that_is_full_is_a_storage_error(photo_dataset):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launch", "show", photo_dataset, "--out", "/dev/null"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 74
    assert done.stderr.splitlines()[0] == "error: No space left on device"
    assert "FATAL code=STORAGE" in done.stderr.splitlines()[1]


def test_a_reader_that_goes_away_is_no_error(photo_dataset):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "launch", "show", photo_dataset, "--out", "/dev/null"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (1, 141)  # rich gives 1 where it meets the broken pipe first


def is_running(process):
    try:
        return (
            Path(f"/proc/{process}/cmdline").read_bytes() != b""
        )  # a dead one that nobody asked for has none
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_ends_all_processes_quietly(photo_folder, tmp_path, workers):
    source = shutil.copytree(photo_folder, tmp_path / "many")
    for copy in range(40):
        shutil.copytree(photo_folder / "cat", source / "cat" / str(copy))
    words = ["pack", source, tmp_path / "root", "--shard-samples", "5", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list((tmp_path / "root").glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers as well
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert len(children) >= workers - 1
    deadline = time.monotonic() + 20
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "root" / "dataset.json").exists()


def test_names_that_are_not_text_are_printed_and_not_stumbled_over(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "pictures")
    (source / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    done = lockstep("pack", source, tmp_path / "root", "--workers", 1, env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\udce9.png: cannot decode" in done.stdout
    assert json.loads((tmp_path / "root" / "bad_files.jsonl").read_text())["path"].endswith("caf\udce9.png")


def test_no_more_workers_than_usable_cores_by_default():
    assert 1 <= usable_cores() <= os.cpu_count()
    one_core = lockstep("pack", "--help", preexec_fn=lambda: os.sched_setaffinity(0, [0]))
    assert "processes (1)" in one_core.stdout


def test_the_commands_are_functions_of_their_words(photo_folder, tmp_path, capsys):
    pack([str(photo_folder), str(tmp_path / "root"), "--workers", "1"])
    show([str(tmp_path / "root"), "--samples", "1", "--out", str(tmp_path / "one.png")])
    assert f"the picture grid is in {tmp_path / 'one.png'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown option --seeed") as caught:
        pack(["a", "b", "--seeed", "1"])
    assert caught.value.code == "USAGE"
