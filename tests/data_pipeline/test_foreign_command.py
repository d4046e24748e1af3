"""The command `lockstep index`: the tars that are named, their splits, and what is said."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from data_pipeline.index_command import index
from data_pipeline.shard_files import (
    SplitRule,
    assign_splits,
    expand_braces,
    find_shards,
    split_of,
    split_rule,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """Ten tars of two samples each, of class numbers, with litter and pickles among them."""
    root = tmp_path_factory.mktemp("foreign") / "my tars"
    root.mkdir()
    for shard in range(10):
        with tarfile.open(root / f"shard-{shard:03d}.tar", "w") as tar:
            for number in range(2):
                file = io.BytesIO()
                Image.fromarray(photographs["cat"][shard * 9 : shard * 9 + 30, :40]).save(file, "JPEG")
                key = f"{shard}{number}"
                members = {f"{key}.jpg": file.getvalue(), f"{key}.cls": b"%d" % number, f"{key}.pkl": b"."}
                for name, data in {**members, f"._{key}.jpg": b"x", f"README{key}": b"x"}.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return root


def names(paths):
    return [path.name for path in paths]


def test_index_says_what_it_found_and_leads_to_show(folder, lockstep, tmp_path):
    done = lockstep("index", folder, "--out", tmp_path / "an index", "--val-shards", 2, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.sub(r"[\d.]+ kB", "N kB", done.stdout).splitlines() == [
        "train: 8 shards, shard-000.tar to shard-007.tar",
        "val: 2 shards, shard-008.tar to shard-009.tar",
        "multiclass: the image is .jpg, the target .cls (class numbers)",
        "  train: 16 samples in 8 shards, N kB",
        "  val: 4 samples in 2 shards, N kB",
        "2 classes: '0', '1'",
        "ignored: 20 hidden members",
        "ignored: 20 unsupported members .pkl (never opened)",
        "ignored: 20 members without an extension",
        "mean and std are of 16 images over train, mode RGB",
        f"the index is in {tmp_path}/an index",
        f"next: lockstep show '{tmp_path}/an index'",
    ]
    shown = lockstep("show", tmp_path / "an index")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"the tars lie in {folder}" in shown.stdout


def in_process(*words):
    """The command in this process: thirty new ones would take a minute."""
    index([str(word) for word in words])


def test_what_training_will_miss_is_said(folder, tmp_path, capsys):
    (tmp_path / "names").write_text("zero\none\ntwo\n")
    in_process(folder, "--out", tmp_path / "a", "--classes-file", tmp_path / "names", "--workers", 1)
    said = capsys.readouterr().out
    assert "warning: there is no val split, which training needs: --val-shards N, or --split val=GLOB" in said
    assert "warning: train holds nothing of 'two'" in said
    in_process(folder, "--out", tmp_path / "b", "--split", "test=*", "--workers", 1)
    said = capsys.readouterr().out
    assert "warning: there is no train split: name its shards with --split train=GLOB" in said
    assert "over all, mode RGB" in said
    assert read_dataset(tmp_path / "b").splits.keys() == {"test"}


CANARY = "canary"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pipe:touch canary"], ("UNSAFE", "through 'pipe:', which is not done", "on this machine")),
        (["{pipe:touch,x} canary.tar"], ("UNSAFE", "through 'pipe:'", "on this machine")),
        (["http://127.0.0.1:9/{000..003}.tar"], ("UNSAFE", "through 'http:'", "download")),
        (["s3://bucket/a.tar"], ("UNSAFE", "through 's3:'", "download")),
        (["file://elsewhere/a.tar"], ("UNSAFE", "names no file of this machine", "file:///FOLDER")),
        (["missing.tar"], ("DATA", "there is no shard 'missing.tar'", "path")),
        (["missing-*.tar"], ("DATA", "nothing matches 'missing-*.tar'", "a glob")),
        (["EMPTY"], ("DATA", "holds no tar", "a folder of tars")),
        (["FOLDER/shard-{000..999}.tar"], ("DATA", "shard-010.tar'", "path")),
        (["FOLDER/shard-{0..999999999999}.tar"], ("USAGE", "1,000,000,000,000 shards", "1,000,000 at most")),
        (["FOLDER/shard-{9..1}.tar"], ("USAGE", "stands for 0 shards", "upwards")),
        (["FOLDER", "OTHER"], ("USAGE", "the shards lie in 2 folders", "one folder")),
        (["LINKED"], ("UNSAFE", "is a link to a file in another folder", "--out DEST")),
        (["EMPTY/note.txt"], ("USAGE", "'note.txt' is not named as a tar", "NAME.tar")),
        (["FOLDER", "--split", "val"], ("USAGE", "'val' is not NAME=GLOB", "--split")),
        (["FOLDER", "--split", "../x=*"], ("USAGE", "'../x=*' is not NAME=GLOB", "--split")),
        (["FOLDER", "--split", "val=none*"], ("USAGE", "val=none* matches no shard", "shard-000.tar")),
        (["FOLDER", "--split", "a=*0.tar", "--split", "b=*00.tar"], ("USAGE", "two splits: a and b", "once")),
        (["FOLDER", "--val-shards", "10"], ("USAGE", "cannot be held out: train has 10", "fewer")),
        (["FOLDER", "--val-shards", "-1"], ("USAGE", "is not a whole number from 0", "--help")),
        (["FOLDER", "--classes", "a,a"], ("USAGE", "'a,a' is not a list of different names", "--help")),
        (["FOLDER", "--classes", "a,b", "--classes-file", "x"], ("USAGE", "are both given", "one of them")),
        (["FOLDER", "--classes-file", "none"], ("USAGE", "cannot read --classes-file", "a line")),
        (["FOLDER", "--target", "json"], ("DATA", "no member .json in the first samples", "--target EXT")),
        (["FOLDER", "--field", "x"], ("DATA", "--field needs JSON", "--field NAME")),
        (["FOLDER", "--target", "jpg", "--image", "jpg"], ("DATA", "cannot be both", "--image")),
        (["FOLDER", "--key-scope", "all"], ("USAGE", "invalid choice: 'all'", "--help")),
        (["FOLDER", "--out", "EMPTY/note.txt"], ("USAGE", "is a file", "--out DEST")),
        (["FOLDER", "--worker", "2"], ("USAGE", "unknown option --worker", "did you mean --workers?")),
        ([], ("USAGE", "arguments are required: SHARDS", "--help")),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong_ends_in_two_lines_and_a_two(
    folder, words, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "note.txt").write_text("no tar")
    (tmp_path / "OTHER").mkdir()
    shutil.copy(folder / "shard-000.tar", tmp_path / "OTHER")
    (tmp_path / "LINKED").mkdir()
    (tmp_path / "LINKED" / "a.tar").symlink_to(folder / "shard-000.tar")
    words = [word.replace("FOLDER", str(folder)) for word in words]
    with pytest.raises(UserError) as caught:
        in_process(*words)
    code, what, mend = expected
    assert caught.value.code == code
    assert what in caught.value.what
    assert mend in caught.value.mend
    assert not list(tmp_path.rglob(CANARY))
    assert not list(folder.glob("*.idx"))


def test_a_refusal_reaches_the_user_in_two_lines_and_a_two(lockstep, folder):
    done = lockstep("index", "pipe:touch canary")
    assert done.returncode == 2
    what, fatal = done.stderr.splitlines()
    assert what.startswith("error: 'pipe:touch canary' would be read through")
    assert fatal.startswith("FATAL code=UNSAFE rank=0 hint=")
    assert not Path("canary").exists()


def test_shards_are_found_by_folder_file_glob_range_and_url(folder, monkeypatch):
    everything = [f"shard-{number:03d}.tar" for number in range(10)]
    assert names(find_shards([str(folder)])) == everything
    assert names(find_shards([f"file://{folder}".replace(" ", "%20")])) == everything
    assert names(find_shards([str(folder / "*.tar")])) == everything
    assert names(find_shards([str(folder / "shard-{000..009}.tar")])) == everything
    assert names(find_shards([str(folder / "shard-00{1,3}.tar"), str(folder / "shard-003.tar")])) == [
        "shard-001.tar",
        "shard-003.tar",
    ]
    monkeypatch.chdir(folder)
    assert find_shards(["shard-00[2-3].tar"]) == [folder / "shard-002.tar", folder / "shard-003.tar"]


def test_a_file_whose_name_holds_braces_is_that_file(folder, tmp_path):
    shutil.copy(folder / "shard-000.tar", tmp_path / "a{0..3}.tar")
    assert names(find_shards([str(tmp_path / "a{0..3}.tar")])) == ["a{0..3}.tar"]


@given(st.integers(0, 500), st.integers(0, 60), st.integers(1, 6))
def test_a_range_with_zeros_in_front_keeps_its_width(first, more, width):
    ends = f"{first:0{width}d}", f"{first + more:0{width}d}"
    texts = list(expand_braces(f"a-{{{ends[0]}..{ends[1]}}}.tar"))
    padded = max(map(len, ends)) if len(str(first)) < width or len(str(first + more)) < width else 1
    assert texts == [f"a-{number:0{padded}d}.tar" for number in range(first, first + more + 1)]


@pytest.mark.skipif(not shutil.which("bash"), reason="compares with bash")
def test_ranges_are_those_of_bash():
    texts = ["{0..10}", "{00..3}", "{8..11}", "{008..11}", "{1..010}", "{a,b}{0..1}", "x{1,,2}y", "{0..0}"]
    for text in texts:
        done = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True)
        assert list(expand_braces(text)) == done.stdout.split(), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a}{b..c}{}", ["{a}{b..c}{}"]),
        ("x{1..1}", ["x1"]),
        ("{a}{1..2}", ["{a}1", "{a}2"]),
        ("{-1..2}", ["{-1..2}"]),
        ("{000..3}", ["000", "001", "002", "003"]),
    ],
)
def test_braces_stand_for_what_a_shell_would_make_of_them(text, expected):
    assert list(expand_braces(text)) == expected


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("val_01.tar", "val"),
        ("validation000.tar", "val"),
        ("imagenet1k-validation-00.tar", "val"),
        ("TEST-3.tar", "test"),
        ("valley-0.tar", "train"),
        ("contest-0.tar", "train"),
        ("000123.tar", "train"),
        ("dev.tar", "val"),
    ],
)
def test_a_file_name_tells_its_split_by_a_whole_word(name, split):
    assert split_of(name) == split


def test_rules_come_before_names_and_splits_in_their_usual_order(folder):
    shards = find_shards([str(folder)])
    rules = [split_rule("test=*-000.tar"), SplitRule("extra", "*-001.tar"), SplitRule("val", "*-00[23].tar")]
    splits = assign_splits(shards, rules)
    assert {name: [path.name[6:9] for path in one] for name, one in splits.items()} == {
        "train": ["004", "005", "006", "007", "008", "009"],
        "val": ["002", "003"],
        "test": ["000"],
        "extra": ["001"],
    }
    assert list(splits) == ["train", "val", "test", "extra"]
    with pytest.raises(UserError, match="val has 2 shards already"):
        assign_splits(shards, rules, val_shards=1)


def test_help_lists_every_option(lockstep):
    done = lockstep("index", "--help")
    assert done.returncode == 0
    for option in ("--out", "--image", "--target", "--field", "--classes", "--classes-file", "--split"):
        assert option in done.stdout
    for option in ("--val-shards", "--key-scope", "--skip-incomplete", "--force", "--workers"):
        assert option in done.stdout


def test_the_written_dataset_names_what_was_chosen(folder, tmp_path):
    in_process(folder, "--out", tmp_path, "--classes", "even,odd", "--key-scope", "shard", "--workers", 1)
    described = json.loads((tmp_path / "dataset.json").read_text())
    assert described["classes"] == ["even", "odd"]
    assert described["tars"] == str(folder)
    assert described["members"] == {"image": ["jpg"], "target": "cls"}
    assert described["counts"] == {"train": 20}
