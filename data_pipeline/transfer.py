"""Gets a whole file out of a server that may be slow, busy or cut off: tries again from the byte reached."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.draws import hash64
from data_pipeline.fault import UserError

LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Patience:
    """What is borne from a server before a transfer is given up."""

    tries: int = 5  # in a row that bring the transfer no further
    seconds: float = 60.0  # for one piece, and for a connection
    piece: int = 8 << 20  # bytes
    pause: float = 1.0  # seconds before the second try; each further one doubles


class Failure(Exception):
    """One try that failed. `final`: no other will do better. `wait`: seconds that the server asks for."""

    def __init__(
        self,
        what: str,
        *,
        final: bool = False,
        slow: bool = False,
        unsafe: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(what)
        self.final, self.slow, self.unsafe, self.wait = final, slow, unsafe, wait


class StoppedError(Exception):
    """Whoever wanted the file does not want it any more."""


@dataclass(frozen=True)
class Wanted:
    """A file behind a URL: its size in bytes where that is known, else `limit`, which it does not exceed."""

    url: str
    size: int | None
    limit: int


Body = Callable[[str, int, int | None, Patience], Iterator[bytes]]  # url, first byte, size, patience


def transfer(
    wanted: Wanted,
    body: Body,
    write: Callable[[bytes], object],
    *,
    start: int = 0,
    patience: Patience,
    stop: threading.Event | None = None,
) -> None:
    """Give `write` the file from byte `start` on, exactly once each; DATA where that cannot be done.

    A try that brings less than an eighth of a piece counts as one that brought nothing, and so does one that
    was too slow: a server that sends a byte at a time is given up like one that sends none.
    """
    at, tries, vain = start, 0, 0
    while at != wanted.size:
        before, tries = at, tries + 1
        try:
            for chunk in body(wanted.url, at, wanted.size, patience):
                if stop is not None and stop.is_set():
                    raise StoppedError
                if at + len(chunk) > (wanted.limit if wanted.size is None else wanted.size):
                    raise Failure("there it has more bytes", final=True)
                write(chunk)
                at += len(chunk)
            if wanted.size is None:
                return
            if at < wanted.size:
                raise Failure("it ended early")
        except Failure as failure:
            progress = at - before >= max(1, patience.piece // 8) and not failure.slow
            vain = 0 if progress else vain + 1
            if failure.final or vain >= patience.tries:
                raise fault_of(wanted, failure, at, tries) from None
            _pause(wanted.url, failure, vain, patience, stop)


def _pause(url: str, failure: Failure, vain: int, patience: Patience, stop: threading.Event | None) -> None:
    """Each time twice as long, times 0.5 to 1.5 by machine and file, so that not all knock at once again."""
    share = hash64(socket.gethostname().encode(), url.encode(), bytes([min(vain, 255)])) / 2**64
    wanted = max(failure.wait, patience.pause * 2.0 ** max(0, vain - 1) * (0.5 + share))
    seconds = min(LONGEST_PAUSE, wanted)
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise StoppedError


def fault_of(wanted: Wanted, failure: Failure, at: int, tries: int) -> UserError:
    """The error that tells the user what a server did not give."""
    of = f" of {wanted.size}" if wanted.size is not None else ""
    times = "1 try" if tries == 1 else f"{tries} tries"
    if failure.unsafe:
        mend = "if you trust that place, give its URL as the data set's"
    elif failure.final:
        mend = "check the URL and what lies there; a data set that was made again needs its new dataset.json"
    else:
        mend = "see whether the server is up and reachable from this machine, then start again"
    return UserError(
        f"cannot fetch '{wanted.url}': {failure}; {at}{of} bytes came in {times}",
        mend=mend,
        code="UNSAFE" if failure.unsafe else "DATA",
    )
