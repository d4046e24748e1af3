"""metrics.jsonl: no gap and no duplicate after a kill and a resume."""

from __future__ import annotations

import json

from training.journal import METRICS_FILE, Journal, read_records


def steps(run_dir):
    return [record["step"] for record in read_records(run_dir)]


def test_what_lies_behind_the_checkpoint_is_cut_off_and_written_again(tmp_path):
    journal = Journal(tmp_path, active=True, committed=0)
    for step in (1, 2):
        journal.write("train", step=step)
    committed = journal.commit()
    journal.write("train", step=3)
    journal = Journal(tmp_path, active=True, committed=committed)
    assert steps(tmp_path) == [1, 2]
    for step in (3, 4):
        journal.write("train", step=step)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_committed_bytes_are_those_of_whole_records(tmp_path):
    journal = Journal(tmp_path, active=True, committed=0)
    assert journal.commit() == 0
    journal.write("eval", step=1, metrics={"accuracy": 0.5}, note="Größe")
    committed = journal.commit()
    content = (tmp_path / METRICS_FILE).read_bytes()
    assert len(content) == committed
    assert json.loads(content) == {"kind": "eval", "step": 1, "metrics": {"accuracy": 0.5}, "note": "Größe"}


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    journal = Journal(tmp_path, active=True, committed=0)
    journal.write("train", step=1)
    assert steps(tmp_path) == [1]


def test_a_last_line_that_a_kill_cut_short_is_no_record(tmp_path):
    journal = Journal(tmp_path, active=True, committed=0)
    journal.write("train", step=1)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind": "train", "st')
    assert steps(tmp_path) == [1]


def test_other_processes_write_nothing(tmp_path):
    journal = Journal(tmp_path, active=False, committed=0)
    journal.write("train", step=1)
    assert journal.commit() == 0
    assert list(tmp_path.iterdir()) == []


def test_numbers_come_back_to_the_last_digit(tmp_path):
    loss = 0.1 + 0.2
    Journal(tmp_path, active=True, committed=0).write("train", step=1, loss=loss)
    assert read_records(tmp_path)[0]["loss"] == loss
