"""The ends of other processes of this machine, which the kernel tells at once."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Sequence

from training.vigil.siblings import Sibling, how_it_ended


class PidFiles:
    """A file descriptor for each process, readable once it has ended; none where the kernel has none."""

    def __init__(self, siblings: Iterable[Sibling]) -> None:
        self._by_file: dict[int, Sibling] = {}
        self._over: list[Sibling] = []  # had ended before we looked
        for sibling in siblings if hasattr(os, "pidfd_open") else []:
            try:
                self._by_file[os.pidfd_open(sibling.pid)] = sibling
            except ProcessLookupError:
                self._over.append(sibling)
            except OSError:  # an old kernel, or too many open files: its connection has to do
                continue
        self._seen = {*self._by_file.values(), *self._over}

    def wait(self, files: Sequence[int], *, seconds: float) -> set[int]:
        """Those of `files`, and of our own, on which something happens within `seconds`."""
        poll = select.poll()
        for file in [*files, *self._by_file]:
            poll.register(file, select.POLLIN)
        return {file for file, _ in poll.poll(0 if self._over else 1000 * seconds)}

    def ended(self, ready: set[int]) -> list[tuple[Sibling, str]]:
        """Who has ended, each once, and how, in words."""
        over = [(sibling, how_it_ended(sibling.pid)) for sibling in self._over]
        self._over = []
        for file in ready & self._by_file.keys():
            sibling = self._by_file.pop(file)
            over.append((sibling, how_it_ended(sibling.pid, file)))
            os.close(file)
        return over

    def sees(self, sibling: Sibling) -> bool:
        """Whether the kernel will tell, or has told, of this one's end."""
        return sibling in self._seen

    @property
    def alive(self) -> list[Sibling]:
        """Who has not ended."""
        return list(self._by_file.values())
