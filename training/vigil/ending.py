"""How a job ends: the name and exit code, the block on stderr, and failure.json."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.fault import fatal_line

EXIT_CODES = {"RENDEZVOUS": 69, "CRASH": 70, "HANG": 71, "STORAGE": 74, "STOPPED": 75, "NONFINITE": 76}
SHOWN = 4  # keys of samples that a message names


class Ended(Exception):
    """The run ends here for a reason that has a name in EXIT_CODES."""

    def __init__(
        self, code: str, what: str, *, hint: str, samples: tuple[str, ...] = (), layer: str = ""
    ) -> None:
        super().__init__(what)
        self.code, self.what, self.hint = code, what, hint
        self.samples, self.layer = samples, layer  # where numbers stopped being finite


@dataclass(frozen=True)
class Ending:
    """What the process that knows why the job ends tells the others."""

    code: str
    exit_code: int
    rank: int  # whose ending it is

    def as_json(self) -> dict[str, Any]:
        """The fields of a message."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """Why a job ends, and where: what a person and failure.json are told."""

    code: str
    rank: int
    host: str
    what: str
    hint: str
    step: int | None = None  # counted as in metrics.jsonl; None: before the first or after the last
    samples: tuple[str, ...] = ()  # keys of the micro-batch under way, or of what is not finite
    layer: str = ""  # where numbers stopped being finite

    def where(self) -> str:
        """The place in words, a line."""
        words = f"process {self.rank} on {self.host}, " + (f"step {self.step}" if self.step else "no step")
        if self.samples:
            more = len(self.samples) - SHOWN
            words += f", samples {', '.join(self.samples[:SHOWN])}" + (
                f" and {more} more" if more > 0 else ""
            )
        return words

    def line(self) -> str:
        """The last line on stderr, with the place."""
        step = "start" if self.step is None else self.step
        return fatal_line(self.code, rank=self.rank, hint=self.hint, place={"host": self.host, "step": step})

    def as_text(self) -> str:
        """The content of failure.json."""
        named = {"samples": list(self.samples[:SHOWN]), "samples_under_way": len(self.samples)}
        named |= {"layer": self.layer} if self.layer else {}
        order = ("code", "rank", "host", "step", "what", "hint")
        return json.dumps({name: getattr(self, name) for name in order} | named, indent=1, ensure_ascii=False)

    def write(self, run_dir: Path | None, *, first: bool) -> bool:
        """Write RUN/failure.json; with `first`, unless another process has: whether this one may speak."""
        if run_dir is None or not run_dir.is_dir():
            return True
        try:
            with (run_dir / "failure.json").open("x" if first else "w", encoding="utf-8") as file:
                file.write(self.as_text() + "\n")
        except FileExistsError:
            return False
        except OSError:
            return True
        return True


def speak(text: str) -> None:
    """A block on stderr, in one piece, behind what was said on stdout."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads on, or a full disk
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
