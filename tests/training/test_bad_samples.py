"""bad_samples.jsonl: each broken sample once in the life of a run, and an end where there are too many."""

from __future__ import annotations

import json

import pytest
from accelerate import Accelerator

from data_pipeline.batch import BadSample
from data_pipeline.fault import UserError
from training.bad_samples import BAD_SAMPLES_FILE, BadSamples


def bad(key, shard="train-000000.tar"):
    return BadSample(shard, key, 512, f"'{shard}': sample {key!r}: cannot decode", "other")


@pytest.fixture
def keep(tmp_path):
    """`keep(most)`: what keeps the file of one start of the run, and the lines that it says."""
    accelerator = Accelerator(cpu=True)

    def start(most=10):
        return BadSamples(tmp_path, accelerator, most=most)

    return start


def written(folder):
    return [json.loads(line) for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()]


def test_a_broken_sample_is_written_with_its_place_its_fault_and_what_stands_in_for_it(keep, tmp_path):
    said, samples = [], keep()
    samples.met(7, [bad("a/1")])
    samples.settle(said.append)
    (line,) = written(tmp_path)
    assert line == {
        "step": 7,
        "shard": "train-000000.tar",
        "key": "a/1",
        "offset": 512,
        "exception": "'train-000000.tar': sample 'a/1': cannot decode",
        "replaced_by": "other",
    }
    (words,) = said
    assert "'other' takes its place (1 so far, at most 10)" in words


def test_a_sample_is_written_once_however_often_and_in_however_many_starts_it_is_met(keep, tmp_path):
    samples = keep()
    for step in (1, 5):
        samples.met(step, [bad("a"), bad("b")])
        samples.settle(lambda _line: None)
    again = keep()
    again.met(9, [bad("b"), bad("c"), bad("b", "train-000001.tar")])
    again.settle(lambda _line: None)
    assert [(line["shard"][6:12], line["key"]) for line in written(tmp_path)] == [
        ("000000", "a"),
        ("000000", "b"),
        ("000000", "c"),
        ("000001", "b"),
    ]


def test_a_line_that_a_kill_broke_off_is_written_anew(keep, tmp_path):
    samples = keep()
    samples.met(1, [bad("a"), bad("b")])
    samples.settle(lambda _line: None)
    path = tmp_path / BAD_SAMPLES_FILE
    path.write_text(path.read_text()[:-9])
    again = keep()
    again.met(4, [bad("b")])
    again.settle(lambda _line: None)
    assert [line["key"] for line in written(tmp_path)] == ["a", "b"]


def test_one_more_than_allowed_ends_the_run_and_names_the_last(keep, tmp_path):
    samples = keep(most=2)
    samples.met(1, [bad("a"), bad("b")])
    samples.settle(lambda _line: None)
    samples.met(2, [bad("c")])
    with pytest.raises(
        UserError, match=r"3 samples of the training split are broken, data.max_bad allows 2"
    ) as end:
        samples.settle(lambda _line: None)
    assert (end.value.code, end.value.place["member"]) == ("DATA", "c")
    assert len(written(tmp_path)) == 3
