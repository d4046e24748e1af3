"""Training on a real SLURM: what ends a job, and that nothing is left or lost."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.slurm.training_jobs import EPOCH, STEPS, last_word, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SLOW = 0.4


def test_two_nodes_with_two_processes_each_learn_the_bits_of_one_process(submit, whole):
    job = submit(nodes=2, tasks=2).ends()
    job.went_on(whole, processes=[4])
    assert [one["step"] for one in records(job.run_dir, "eval")] == [EPOCH, STEPS]
    assert {one["certificate"]["unique"] for one in records(job.run_dir, "eval")} == {359}


def test_a_job_that_is_cancelled_stays_so_and_goes_on_once_it_is_submitted_again(submit, whole, cluster):
    job = submit(slow=SLOW, run_dir="run").reach(6)
    job.say("scancel")
    info = cluster.wait(job.number)
    assert (info["JobState"], info["Restarts"]) == ("CANCELLED", "0"), job.log
    job.leaves_nothing()
    assert job.failure["code"] == "STOPPED"
    time.sleep(3)
    assert cluster.info(job.number)["JobState"] == "CANCELLED"
    again = submit(run_dir="run").ends()
    again.went_on(whole, processes=[2, 2])


def test_a_rank_that_is_killed_ends_the_job_within_seconds_and_is_named(submit, cluster):
    job = submit(slow=SLOW).reach(3)
    os.kill(job.rank(1), signal.SIGKILL)
    killed = time.monotonic()
    job.ends("FAILED", 70)
    assert time.monotonic() - killed < 15
    failure = job.failure
    assert (failure["code"], failure["rank"], failure["host"]) == ("CRASH", 1, list(cluster.nodes)[1])
    assert last_word(job.log) == "CRASH"


@pytest.mark.parametrize("victim", ["srun", "the batch step"])
def test_whoever_is_killed_nothing_is_left(victim, submit):
    job = submit(nodes=2, slow=SLOW).reach(2)
    if victim == "srun":
        # srun has a child that looks after its messages; both are the program.
        for number in job.processes("srun "):
            os.kill(number, signal.SIGKILL)
        job.ends("FAILED", 70)
        assert last_word(job.log) == "CRASH"
    else:
        (supervisor,) = [one for one in job.processes("lockstep launch") if one not in job.processes("srun ")]
        os.kill(supervisor, signal.SIGKILL)
        info = job.cluster.wait(job.number)
        assert (info["JobState"], info["Restarts"]) == ("FAILED", "0"), info
        job.leaves_nothing()


def test_a_job_that_may_not_be_requeued_stops_with_its_checkpoint_and_says_so(submit):
    job = submit(slow=SLOW, nodes=1, options=["--no-requeue"]).reach(3)
    job.say("scancel", "--batch", "--signal=USR1")
    job.ends("FAILED", 75)
    assert job.failure["code"] == "STOPPED"
    assert "requeue" in job.log


def test_of_an_array_only_the_task_that_was_stopped_is_requeued(submit, whole):
    job = submit(nodes=1, slow=SLOW, options=["--array=0-2"])
    tasks = [job.task(number) for number in range(3)]
    tasks[1].reach(3).say("scancel", "--batch", "--signal=USR1")
    for task, restarts in zip(tasks, (0, 1, 0), strict=True):
        task.ends(restarts=restarts)
        task.went_on(whole, processes=[1] * (restarts + 1))


def test_two_jobs_at_once_on_the_same_nodes_never_meet(submit, whole):
    jobs = [submit(slow=0.1), submit(slow=0.1)]
    jobs[0].until(lambda: all(job.processes("training/run.py") for job in jobs))
    for job in jobs:
        job.ends().went_on(whole, processes=[2])
