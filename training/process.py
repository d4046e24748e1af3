"""The life of one process among others: what it checks at its start, who may stop it, and its last words."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from data_pipeline.fault import USER_EXIT
from training.config import UserError, fatal_line, user_error_text

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

EXIT_CODES = {"CRASH": 70, "STORAGE": 74, "STOPPED": 75, "NONFINITE": 76}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The disk's or its owner's doing, not the program's: told in one line, without a traceback.
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM}


class Ended(Exception):
    """The run ends here for a reason that has a name in EXIT_CODES."""

    def __init__(self, code: str, what: str, *, hint: str) -> None:
        super().__init__(what)
        self.code, self.what, self.hint = code, what, hint


@dataclass
class Place:
    """Where this process is, as far as it knows: what its last words mention."""

    run_dir: Path | None = None
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0") or 0))
    step: int | None = None
    samples: list[str] = field(default_factory=list)  # keys of the micro-batch under way
    beats: int = 0  # goes up with every sign of progress
    together: bool = False
    """whether the processes have joined: from then on a mistake is one process's own"""

    def at(self, *, step: int | None = None, samples: list[str] | None = None) -> None:
        """Something goes on: here."""
        self.step = self.step if step is None else step
        self.samples = self.samples if samples is None else samples
        self.beats += 1

    def joined(self, rank: int) -> None:
        """From now on the processes know one another."""
        self.rank, self.together = rank, True

    @property
    def speaks(self) -> bool:
        """Whether this process reports a user's mistake that all of them make: one on each machine does."""
        return self.together or os.environ.get("LOCAL_RANK", "0") == "0"


def forget_failure(run_dir: Path) -> None:
    """Remove the word of an earlier start's failure, before the processes join; one process does it.

    After that, the first process that writes failure.json is the one that speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            (run_dir / "failure.json").unlink(missing_ok=True)


class Agreed(Exception):
    """Something that process zero found and reports; the others leave with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@contextlib.contextmanager
def last_words() -> Iterator[Place]:
    """Turn whatever ends the block into the contract's exit code, last line on stderr and failure.json."""
    place = Place()
    try:
        yield place
    except SystemExit:
        raise
    except UserError as error:
        if place.speaks and _write_failure(place, error.code, error.what, error.mend):
            _speak(place, user_error_text(error, rank=place.rank))
        _exit(USER_EXIT)
    except Agreed as error:
        _exit(error.exit_code)
    except Ended as error:
        if place.rank == 0:
            _speak(place, f"{error.what}\n{fatal_line(error.code, rank=place.rank, hint=error.hint)}")
            _write_failure(place, error.code, error.what, error.hint)
        _exit(EXIT_CODES[error.code])
    except KeyboardInterrupt:
        _exit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not place.together:  # `--help | head`: nobody reads on
            os._exit(128 + signal.SIGPIPE)
        _storage(place, error)
    except BaseException as error:
        _crash(place, "CRASH", f"{type(error).__name__}: {error}")


def _storage(place: Place, error: OSError) -> NoReturn:
    what = f"error: {error.strerror or error}: {error.filename or ''}"
    if not error.errno or isinstance(error, ConnectionError):
        _crash(place, "CRASH", what)
    if error.errno not in STORAGE_ERRORS:
        _crash(place, "STORAGE", what)
    hint = "make room or mend the disk, then start the same command again"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(Path(str(error.filename or place.run_dir or ".")).absolute().parent).free
        hint = f"{free:,} bytes are free there; {hint}"
    if _write_failure(place, "STORAGE", what, hint):
        _speak(place, f"{what}\n{fatal_line('STORAGE', rank=place.rank, hint=hint)}")
    _exit(EXIT_CODES["STORAGE"])


def _crash(place: Place, code: str, what: str) -> NoReturn:
    hint = "start the same command again to resume; the traceback above is of the process that failed"
    step = place.step if place.step is not None else "start"
    where: dict[str, object] = {"host": socket.gethostname(), "step": step}
    # The first process to fail is the cause; the others fail because it is gone, and only say so.
    first = _write_failure(place, code, what, hint)
    text = traceback.format_exc() if first else f"process {place.rank} ends because another one failed"
    line = fatal_line(code, rank=place.rank, hint=hint, place=where)
    _speak(place, f"{text}\n{line}" if first else text)
    _exit(EXIT_CODES[code])


def _speak(place: Place, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk behind stdout must not swallow the last words
        sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the contract's last line


def _write_failure(place: Place, code: str, what: str, hint: str) -> bool:
    """Write RUN/failure.json unless another process of this start has; whether this one is the first."""
    if place.run_dir is None or not place.run_dir.is_dir():
        return True
    content = {"code": code, "rank": place.rank, "host": socket.gethostname(), "step": place.step}
    text = json.dumps({**content, "what": what, "hint": hint}, indent=1, ensure_ascii=False)
    try:
        with (place.run_dir / "failure.json").open("x" if place.together else "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _exit(code: int) -> NoReturn:
    """Leave at once: threads of the collectives abort a process now and then that ends the usual way."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave(accelerator: Accelerator) -> NoReturn:
    """The good end: wait for all, take the process group down in an order that never aborts, exit 0.

    2 to 4 % of gloo processes abort after success when the interpreter tears the group down (pytorch#190489).
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _exit(0)


def agree(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What process zero decides, on every process; if that fails, all end, and only it reports."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, 0]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except Exception as error:
            failure = error
            answer[1] = (
                USER_EXIT if isinstance(error, UserError) else EXIT_CODES[getattr(error, "code", "CRASH")]
            )
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if failure is not None:
        raise failure
    if answer[1]:
        raise Agreed(answer[1])
    result: T = answer[0]
    return result


class StopFlag:
    """Set by SIGTERM, SIGINT and SIGUSR1, looked at between steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None
