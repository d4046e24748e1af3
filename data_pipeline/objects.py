"""The bytes of an object in S3 or Google Cloud Storage, from any byte on, through the fsspec drivers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import fsspec

from data_pipeline.fault import UserError, first_line
from data_pipeline.transfer import Failure, Patience
from data_pipeline.urls import scheme_of

AT_ONCE = 4  # pieces asked for together: a store answers each one late, but all of them as late as one


def require_driver(url: str) -> None:
    """Load what reads this URL now, in the main thread; USAGE where it is not installed."""
    scheme = scheme_of(url)
    # gcsfs asks through gRPC what kind of bucket it is, and gRPC does not outlive a fork.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(
            f"cannot read '{url}': {first_line(error)}",
            mend=f'pip install "lockstep[{scheme}]"',
            code="USAGE",
        ) from None


def object_body(url: str, start: int, size: int | None, patience: Patience) -> Iterator[bytes]:
    """The object from byte `start` on, a few pieces at a time; Failure where the store gives less."""
    while size is None or start < size:
        try:
            # Asked for anew each time: fsspec keeps one driver a process, and another one after a fork.
            driver = fsspec.filesystem(scheme_of(url))
            if size is None:
                size = int(_wait(driver, _size(driver, url, patience)))
                continue
            ends = [*range(start, size, patience.piece)][: AT_ONCE + 1]
            ends = [*ends, size] if len(ends) <= AT_ONCE else ends
            pieces = _wait(driver, _pieces(driver, url, ends, patience))
        except (FileNotFoundError, PermissionError) as error:
            gone = isinstance(error, FileNotFoundError)
            what = "there is no such object" if gone else f"no permission: {first_line(error)}"
            raise Failure(what, final=True) from None
        except (TimeoutError, asyncio.TimeoutError):
            raise Failure(f"a piece took longer than {patience.seconds:g} s", slow=True) from None
        except Exception as error:  # each driver has its own kinds
            raise Failure(f"{type(error).__name__}: {first_line(error)}") from None
        for piece, (first, last) in zip(pieces, pairwise(ends), strict=True):
            if len(piece) != last - first:
                raise Failure(f"of the bytes {first} to {last} came {len(piece)}")
            yield piece
        start = ends[-1]


def _wait(driver: Any, task: Any) -> Any:
    return fsspec.asyn.sync(driver.loop, lambda: task)


async def _size(driver: Any, url: str, patience: Patience) -> int:
    about = await asyncio.wait_for(driver._info(url), patience.seconds)
    return int(about["size"])


async def _pieces(driver: Any, url: str, ends: list[int], patience: Patience) -> list[bytes]:
    tasks = [driver._cat_file(url, start=first, end=last) for first, last in pairwise(ends)]
    return await asyncio.wait_for(asyncio.gather(*tasks), patience.seconds * len(tasks))
