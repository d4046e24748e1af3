"""Decides whether a job whose training has ended starts again by itself; pure."""

from __future__ import annotations

from dataclasses import dataclass

from launch.attempts import NO_PROGRESS
from training.vigil.ending import EXIT_CODES

AGAIN = frozenset({"STOPPED", "RENDEZVOUS"})  # all is saved, or a node is gone; another start goes on


@dataclass(frozen=True)
class Situation:
    """All that the decision depends on."""

    mode: str
    """train, evaluate or predict"""
    exit_code: int
    """how the processes ended"""
    name: str = ""
    """of that ending, in failure.json; empty: it has none"""
    node_lost: bool = False
    """whether a node does not answer any more"""
    terminated: bool = False
    """whether the batch script was sent SIGTERM: SLURM, or a person, has decided"""
    time_is_over: bool = False
    """whether that was because of the time limit"""
    stuck: bool = False
    """whether the last starts have not brought the run on"""
    state: str | None = "RUNNING"
    """the job's, as SLURM says; None: it does not say"""
    allowed: bool = True
    """whether SLURM requeues this job: --requeue"""
    batch: bool = True
    """whether there is a batch script to start again; salloc has none"""


@dataclass(frozen=True)
class Decision:
    """What becomes of the job."""

    requeue: bool
    exit_code: int
    words: str = ""
    """why, for a person; empty where there is nothing to explain"""


def decide(situation: Situation) -> Decision:
    """Requeue exactly where another start goes on, and nobody else has decided.

    What ended the batch script with SIGTERM decides itself: `scontrol requeue` would bring a job back that a
    person has cancelled. The time limit is no such decision.
    """
    code = situation.exit_code
    goes_on = situation.name in AGAIN or (situation.node_lost and code != 0)
    if not goes_on or situation.mode != "train":
        return Decision(False, code)
    if situation.stuck:
        return Decision(False, EXIT_CODES["CRASH"], NO_PROGRESS)
    against = _against(situation)
    return Decision(not against, code, against)


def _against(situation: Situation) -> str:
    """Why a job that could go on is not requeued by us; empty where it is."""
    over = situation.time_is_over
    reasons = {
        "SLURM or a person has ended this job, and decides whether it comes back": situation.terminated
        and not over,
        "a shell of salloc cannot be requeued": not situation.batch,
        "SLURM does not requeue this job (--no-requeue)": not situation.allowed,
        f"SLURM has decided: the job is {situation.state}": situation.state not in (None, "RUNNING")
        and not over,
    }
    return next((words for words, holds in reasons.items() if holds), "")
