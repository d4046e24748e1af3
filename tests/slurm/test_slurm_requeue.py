"""Jobs that are interrupted and started again, on a real SLURM: nothing is lost, and nothing done twice."""

from __future__ import annotations

import time

import pytest

from tests.slurm.training_jobs import STEPS, last_step, last_word, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SLOW = 0.4


def test_a_job_that_is_told_of_its_time_limit_saves_and_goes_on_by_itself(submit, whole):
    job = submit(slow=SLOW).reach(5)
    job.say("scancel", "--batch", "--signal=USR1")
    job.ends(restarts=1)
    job.went_on(whole, processes=[2, 2])


def test_a_job_that_meets_its_time_limit_goes_on_by_itself(submit, whole):
    # SLURM looks at limits every half minute or so, and the signal comes that much too early.
    job = submit(slow=2.5, nodes=1, options=["--time=1", "--signal=B:USR1@10"])
    job.until(lambda: job.info["Restarts"] != "0")
    assert last_step(job.run_dir) < STEPS
    job.until(lambda: job.info["JobState"] == "COMPLETED")
    # On a busy machine the later starts may meet it as well.
    job.ends(restarts=int(job.info["Restarts"]))
    job.went_on(whole, processes=[1] * len(records(job.run_dir, "start")))


@pytest.mark.parametrize("partition", ["low", "grace"])
def test_a_job_that_another_one_pushes_aside_goes_on_behind_it(partition, submit, whole, cluster):
    job = submit(slow=SLOW, options=[f"--partition={partition}"]).reach(5)
    other = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    urgent = cluster.submit(options=other, cwd=job.run_dir.parent)
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    job.ends(restarts=1)
    job.went_on(whole, processes=[2, 2])


def test_a_job_that_is_requeued_on_fewer_nodes_goes_on_to_the_same_bits(submit, whole, cluster):
    job = submit(slow=SLOW, nodes=2).reach(5)
    job.say("scontrol", "requeuehold")
    cluster.wait(job.number, ["PENDING"])
    cluster.call("scontrol", "update", f"jobid={job.number}", "numnodes=1", "numtasks=1")
    job.say("scontrol", "release")
    job.ends(restarts=1)
    assert job.info["NumNodes"] == "1"
    job.went_on(whole, processes=[2, 1])


def test_a_job_that_is_requeued_from_outside_goes_on_to_the_same_bits(submit, whole):
    job = submit(slow=SLOW, tasks=2, nodes=1).reach(5)
    job.say("scontrol", "requeue")
    job.ends(restarts=1)
    job.went_on(whole, processes=[2, 2])


def test_a_job_whose_node_crashes_goes_on_once_the_node_is_back(submit, whole, cluster):
    if not cluster.isolated:
        pytest.skip("the nodes are no hosts of their own here")
    job = submit(slow=SLOW).reach(6)
    cluster.crash(list(cluster.nodes)[1])
    try:
        job.until(lambda: job.info["Restarts"] == "1")
    finally:
        cluster.revive()
    job.ends(restarts=1)
    job.went_on(whole, processes=[2, 2])


def test_three_starts_that_bring_a_run_no_further_are_the_last(submit, cluster):
    job = submit(nodes=1, slow=SLOW)
    for restarts in range(3):

        def begins(restarts=str(restarts)):
            info = job.info
            running = (info["JobState"], info["Restarts"]) == ("RUNNING", restarts)
            return running and job.processes("training/run.py")

        job.until(begins)
        assert records(job.run_dir, "train") == [], "it should not come to its first step"
        job.say("scontrol", "requeue")
    job.ends("FAILED", 70, restarts=3)
    assert "no progress in 3 starts" in job.log
    assert last_word(job.log) == "CRASH"
    time.sleep(2)
    assert cluster.info(job.number)["JobState"] == "FAILED"
