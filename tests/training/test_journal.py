"""metrics.jsonl: no gap and no duplicate after a kill and a resume."""

from __future__ import annotations

import errno
import json
import os

import pytest

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


def test_on_a_full_disk_records_wait_and_are_written_later_without_a_gap_or_a_torn_line(tmp_path, file_limit):
    told = []
    journal = Journal(tmp_path, active=True, committed=0, warn=told.append)
    journal.write("train", step=1)
    with file_limit(80):
        for step in (2, 3, 4):
            journal.write("train", step=step)
            assert (tmp_path / METRICS_FILE).read_bytes().endswith(b"}\n")
        with pytest.raises(OSError, match=METRICS_FILE) as caught:
            journal.commit()
        assert caught.value.errno == errno.EFBIG
        assert steps(tmp_path) == [1, 2]
        assert len(told) == 1, "it is said once"
        length = journal.length
    journal.write("train", step=5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert len(told) == 2
    assert journal.commit() == journal.length == (tmp_path / METRICS_FILE).stat().st_size > length


def test_records_that_wait_are_written_by_the_next_commit(tmp_path, file_limit):
    journal = Journal(tmp_path, active=True, committed=0, warn=lambda text: None)
    with file_limit(1):
        for step in (1, 2):
            journal.write("train", step=step)
    assert steps(tmp_path) == []
    assert journal.commit() == journal.length
    assert steps(tmp_path) == [1, 2]


def test_after_a_failed_push_the_file_is_opened_anew_and_written_again(tmp_path, monkeypatch):
    """The system forgets what it could not write: another push of that file would say that all is well."""
    real, failed = os.fsync, []

    def fail(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        os.ftruncate(descriptor, 30)  # what the disk has after it
        failed.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    journal = Journal(tmp_path, active=True, committed=0, warn=lambda text: None)
    journal.write("train", step=1)
    first = journal.commit()
    assert first < 30
    for step in (2, 3):
        journal.write("train", step=step)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        journal.commit()
    journal.write("train", step=4)
    assert failed
    assert journal.commit() == journal.length
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_file_that_lost_what_a_checkpoint_counts_on_is_told_of_and_not_filled_with_zeros(tmp_path):
    journal = Journal(tmp_path, active=True, committed=0)
    journal.write("train", step=1)
    committed, told = journal.commit(), []
    journal = Journal(tmp_path, active=True, committed=committed + 100, warn=told.append)
    journal.write("train", step=2)
    assert steps(tmp_path) == [1, 2]
    assert "100 bytes" in told[0]
