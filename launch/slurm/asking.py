"""Asks SLURM's programs: an argument list, an answer within a limit, and never a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from training.config import UserError

WITHIN = 60.0  # seconds; a controller that is busy takes some, one that is gone never answers
LATE = 124  # exit code of what did not answer, as timeout(1) has it


class Answer(NamedTuple):
    """What a program of SLURM said."""

    code: int
    said: str
    complaint: str

    def complaint_in_words(self) -> str:
        """In a line, without the program's name before each part of it."""
        parts = [line.strip() for line in self.complaint.splitlines() if line.strip()]
        plain = [part.partition(": ")[2].removeprefix("error: ").removeprefix("fatal: ") for part in parts]
        return (
            "; ".join(text or part for text, part in zip(plain, parts, strict=True)) or "it does not say why"
        )


def ask(
    argv: Sequence[str],
    *,
    script: bytes = b"",
    env: Mapping[str, str] | None = None,
    within: float = WITHIN,
) -> Answer:
    """Run `argv` with `script` to read; USAGE where there is no such program."""
    try:
        done = subprocess.run(argv, input=script, env=env, capture_output=True, timeout=within, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{argv[0]} is not on PATH",
            mend="go to a login node of the cluster, or load SLURM's module; elsewhere leave --slurm out",
            code="USAGE",
        ) from None
    except subprocess.TimeoutExpired:
        return Answer(LATE, "", f"{argv[0]}: no answer in {within:g} s")
    said, complaint = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Answer(done.returncode, said, complaint)
