"""Reads pictures that lie about as files, as if they were samples of a data set."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.batch import RawSample
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError, first_line
from data_pipeline.pictures import picture_bytes

# Not of this file: it would be the same with the next one.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MEND = "mend the file or leave it out"


@dataclass(frozen=True)
class PictureList:
    """Pictures in order: what each is called, its file, and the folders that a relative one may lie in.

    There may be ten million, so places are held as text, and most are what the picture is called.
    """

    names: Sequence[str]
    files: Sequence[str]
    folders: tuple[str, ...]

    def place(self, number: int) -> str:
        """The path of a picture: in the first of the folders that has it, else in the last."""
        places = [os.path.join(folder, self.files[number]) for folder in self.folders]  # noqa: PTH118 - see above
        return next(filter(os.path.lexists, places[:-1]), places[-1])


class FileReader:
    """Reads what a list names, as `pack` would store it; what cannot be read is a sample with a fault."""

    def __init__(self, pictures: PictureList) -> None:
        self._pictures = pictures
        self.samples = len(pictures.names)

    def read(self, number: int) -> RawSample:
        """The picture with this number: without a label, and with a `fault` where there is no such file."""
        name = self._pictures.names[number]
        raw = RawSample(number, name, b"", None, None, "", 0)
        try:
            if not self._pictures.files[number]:
                raise ValueError("no picture is named")
            return raw._replace(image=picture_bytes(Path(self._pictures.place(number))))
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            return raw._replace(fault=_fault(name, error.strerror or first_line(error)))
        except ValueError as error:
            return raw._replace(fault=_fault(name, first_line(error)))

    def read_many(self, numbers: IntArray) -> list[RawSample]:
        """The pictures with these numbers, in this order."""
        return [self.read(number) for number in numbers.tolist()]

    def close(self) -> None:
        """Nothing is left open."""


def _fault(name: str, what: str) -> UserError:
    return UserError(f"{name!r}: {what}", mend=MEND, place={"member": name})
