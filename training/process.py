"""The life of one process among others: what it checks at its start, how it agrees, and its last words."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from data_pipeline.fault import USER_EXIT
from training.config import UserError, fatal_line, user_error_text
from training.vigil.ending import EXIT_CODES as EXIT_CODES
from training.vigil.ending import Ended as Ended
from training.vigil.ending import Ending, Failure, speak
from training.vigil.place import Place as Place
from training.vigil.spokesman import is_said_by_another
from training.vigil.stacks import forget

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
CAUSE_WITHIN = 1.2  # seconds in which the cause of a failure that may be another process's is known
STACKS_WITHIN = 5.0  # seconds for the vigil to write this process's stacks
LAST_WORDS_WITHIN = 600.0  # seconds that process zero may take for its last checkpoint
# The disk's or its owner's doing, not the program's: told in one line, without a traceback.
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM}


def forget_failure(run_dir: Path) -> None:
    """Remove the word and the stacks of an earlier start's failure, before the processes join; one does it.

    After that, the first process that writes failure.json is the one that speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            (run_dir / "failure.json").unlink(missing_ok=True)
        forget(run_dir)


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
    except SystemExit as error:
        if not place.together:
            if error.code:
                is_said_by_another(place)
            raise
        _left(place, error)
    except UserError as error:
        if not is_said_by_another(place) and _is_first(place, error.code, error.what, error.mend):
            speak(user_error_text(error, rank=place.rank))
        _end(place, error.code, USER_EXIT)
    except Agreed as error:
        _end(place, "AGREED", error.exit_code)
    except Ended as error:
        _ended(place, error)
    except KeyboardInterrupt:
        _end(place, "INTERRUPTED", INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (_nobody_reads() or not place.together):
            _end(place, "PIPE", PIPE_CLOSED)  # `evaluate | head`
        _storage(place, error)
    except BaseException as error:
        _crash(place, "CRASH", f"{type(error).__name__}: {error}", error)


def _ended(place: Place, error: Ended) -> NoReturn:
    """All processes come here alike; process zero speaks, and may have to wait for its last checkpoint."""
    known = place.watcher.settle(LAST_WORDS_WITHIN) if place.watcher and place.rank else None
    where = {"samples": error.samples, "layer": error.layer}
    if known is None and _is_first(
        place, error.code, error.what, error.hint, replace=place.rank == 0, **where
    ):
        speak(f"{error.what}\n{fatal_line(error.code, rank=place.rank, hint=error.hint)}")
    _end(place, error.code, EXIT_CODES[error.code])


def end_early(place: Place, error: Ended) -> NoReturn:
    """End from a thread, before training: each process that is asked to does, and the others with it.

    All are asked as a rule, so before they know one another the first of them speaks.
    """
    speaks = place.together or place.rank == 0
    if speaks and _is_first(place, error.code, error.what, error.hint):
        speak(f"{error.what}\n{fatal_line(error.code, rank=place.rank, hint=error.hint)}")
    _end(place, error.code, EXIT_CODES[error.code])


def _left(place: Place, error: SystemExit) -> NoReturn:
    """Somebody's code called sys.exit(): rich does where nobody reads on; else it is a fault."""
    if isinstance(error.__context__, BrokenPipeError):
        _end(place, "PIPE", PIPE_CLOSED)
    _crash(place, "CRASH", f"sys.exit({error.code!r}) was called", error)


def _nobody_reads() -> bool:
    """Whether the other end of stdout or stderr is closed."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _storage(place: Place, error: OSError) -> NoReturn:
    what = f"error: {error.strerror or error}: {error.filename or ''}"
    if not error.errno or isinstance(error, ConnectionError):
        _crash(place, "CRASH", what, error)
    if error.errno not in STORAGE_ERRORS:
        _crash(place, "STORAGE", what, error)
    hint = "make room or mend the disk, then start the same command again"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(Path(str(error.filename or place.run_dir or ".")).absolute().parent).free
        hint = f"{free:,} bytes are free there; {hint}"
    if _is_first(place, "STORAGE", what, hint):
        speak(f"{what}\n{fatal_line('STORAGE', rank=place.rank, hint=hint)}")
    _end(place, "STORAGE", EXIT_CODES["STORAGE"])


def _crash(place: Place, code: str, what: str, error: BaseException) -> NoReturn:
    """The first process to fail is the cause, and shows its traceback; the others fail because it is gone."""
    if place.watcher is not None:
        # Libraries tell of a connection that was closed, or of a partner that is late, in one of these.
        secondary = isinstance(error, RuntimeError | ConnectionError)
        known = place.watcher.settle(CAUSE_WITHIN if secondary else 0)
        if known is not None:
            _fold(known)
    hint = "start the same command again to resume; the traceback above is of the process that failed"
    failure = Failure(code, place.rank, socket.gethostname(), what, hint, place.done, tuple(place.samples))
    if failure.write(place.run_dir, first=place.together):
        speak(f"{traceback.format_exc()}\n{failure.where()}\n{failure.line()}")
    elif place.watcher is None:
        speak(f"process {place.rank} ends because another one failed")
    exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 0
    _end(place, code, EXIT_CODES[code], own=exit_code)


def _is_first(place: Place, code: str, what: str, hint: str, *, replace: bool = False, **where: Any) -> bool:
    """Write RUN/failure.json unless another process of this start has; whether this one is the first."""
    failure = Failure(code, place.rank, socket.gethostname(), what, hint, place.done, **where)
    return failure.write(place.run_dir, first=place.together and not replace)


def _fold(ending: Ending) -> NoReturn:
    """Leave without a word, for the reason that another process gave."""
    if ending.code == "HANG":
        threading.Event().wait(STACKS_WITHIN)  # the vigil writes this process's stacks, and leaves
    _exit(ending.exit_code)


def _end(place: Place, code: str, exit_code: int, *, own: int = 0) -> NoReturn:
    """Tell the others, and leave with the same exit code, or with this process's `own`."""
    if place.watcher is not None:
        place.watcher.announce(Ending(code, exit_code, place.rank))
    _exit(own or exit_code)


def _exit(code: int) -> NoReturn:
    """Leave at once: threads of the collectives abort a process now and then that ends the usual way."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave(accelerator: Accelerator, place: Place) -> NoReturn:
    """The good end: wait for all, take the process group down in an order that never aborts, exit 0.

    2 to 4 % of gloo processes abort after success when the interpreter tears the group down (pytorch#190489).
    """
    place.rest()
    if place.watcher is not None:
        place.watcher.part()
    accelerator.wait_for_everyone()
    if place.watcher is not None:
        place.watcher.stop()
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
