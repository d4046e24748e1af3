import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.command_line import usable_cores
from data_pipeline.fault import UserError
from data_pipeline.show_command import show


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["show", "EMPTY"], ("DATA", "it holds no dataset.json", "lockstep pack PICTURES EMPTY")),
        (["show", "PACKED", "--split", "test"], ("DATA", "no split 'test'", "train, val")),
        (["show", "PACKED", "--out", "no/such/folder.png"], ("USAGE", "cannot write", "--out FILE.png")),
        (["show", "PACKED", "--sampels", "3"], ("USAGE", "--sampels", "did you mean --samples?")),
        (["shw", "PACKED"], ("USAGE", "unknown command 'shw'", "did you mean show?")),
        (["frobnicate"], ("USAGE", "unknown command 'frobnicate'", "lockstep --help")),
    ],
)
def test_what_a_user_can_get_wrong_ends_in_two_lines_and_a_two(
    photo_dataset, tmp_path, refused, words, expected
):
    def real(text):
        return text.replace("EMPTY", str(tmp_path)).replace("PACKED", str(photo_dataset))

    code, what, hint = refused(*map(real, words))
    assert code == expected[0]
    assert real(expected[1]) in what
    assert real(expected[2]) in hint


def test_show_draws_a_grid_and_prints_the_table_of_classes(photo_dataset, lockstep, tmp_path):
    out = tmp_path / "grid.png"
    shown = lockstep("show", photo_dataset, "--out", out)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"the picture grid is in {out}" in shown.stdout
    assert "pictures: colour (RGB)" in shown.stdout
    assert re.search(r"total +\d+ +\d+ +60", shown.stdout)
    assert out.read_bytes().startswith(b"\x89PNG")


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


def test_the_list_of_commands_names_each_with_what_it_is_for(lockstep):
    for words in ([], ["--help"], ["-h"]):
        done = lockstep(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"lockstep pack +make a data set", done.stdout)
        assert re.search(r"lockstep show +look at a data set", done.stdout)


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


def test_no_more_workers_than_usable_cores_by_default(lockstep):
    assert 1 <= usable_cores() <= os.cpu_count()
    one_core = lockstep("pack", "--help", preexec_fn=lambda: os.sched_setaffinity(0, [0]))
    assert "processes (1)" in one_core.stdout


def test_show_is_a_function_of_its_words(photo_dataset, tmp_path, capsys):
    show([str(photo_dataset), "--samples", "1", "--out", str(tmp_path / "one.png")])
    assert f"the picture grid is in {tmp_path / 'one.png'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown option --smaples") as caught:
        show(["a", "--smaples", "1"])
    assert caught.value.code == "USAGE"
