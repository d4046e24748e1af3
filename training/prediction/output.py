"""Where predictions go: a table, or a folder of masks with one; the table is seen only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_pipeline.disk import replace_file
from data_pipeline.fault import UserError
from data_pipeline.file_reader import PictureList
from training.config import Config
from training.prediction.inputs import PredictionInputs, Predictor
from training.prediction.rows import Column
from training.prediction.table import TABLE_FORMATS, TableFormat, table_format

TABLE = "predictions.csv"


@dataclass(frozen=True)
class Output:
    """The table, and for masks their folder."""

    table: Path
    folder: Path | None

    @property
    def format(self) -> TableFormat:
        """How the table is written."""
        return table_format(self.table)

    @property
    def words(self) -> str:
        """What a person is told to look at."""
        return str(self.folder or self.table)

    def part(self, process: int) -> Path:
        """The hidden neighbour that a process writes its rows to."""
        return self.table.with_name(f".{self.table.name}.part-{process}")

    def join(self, parts: Sequence[Path], columns: Sequence[Column]) -> None:
        """Put the parts together, in order, in the place of what was there; CONFIG where one is missing."""
        for part in parts:
            if not part.exists():
                raise UserError(
                    f"predict.out: '{part}', written by another process, cannot be seen by process 0",
                    mend="give an --predict.out in a folder that all machines share",
                    code="CONFIG",
                )
        replace_file(self.table, lambda whole: self.format.join(parts, columns, whole))
        for part in parts:
            part.unlink()


def find_output(config: Config, saved: Predictor, run_dir: Path) -> Output:
    """Where the configuration says; USAGE where that is no place for it."""
    given = config.predict.out
    if not saved.makes_masks:
        table = Path(given) if given is not None else run_dir / TABLE
        table_format(table)
        if os.path.isdir(table):  # noqa: PTH112 - False, not an error, where a name is too long
            raise _no_place(f"'{table}' is a folder", "give a file")
        return Output(table, None)
    folder = Path(given) if given is not None else run_dir / "predictions"
    if folder.suffix.lower() in TABLE_FORMATS or (folder.exists() and not folder.is_dir()):
        raise _no_place(
            f"'{folder}' is a file, masks go to a folder", "give a folder, which gets a table too"
        )
    return Output(folder / TABLE, folder)


def prepare_output(output: Output, config: Config, inputs: PredictionInputs) -> None:
    """Make the folder, and clear away what a run that was killed has left of its parts."""
    source = Path(config.predict.source or "")
    if source.is_file() and output.table.exists() and source.samefile(output.table):
        raise _no_place(f"'{output.table}' is the list to predict on", "write to another file")
    if output.folder is not None and isinstance(inputs.recipe.store, PictureList):
        _check_apart(source, inputs.recipe.store, output.folder)
    folder, prefix = output.table.parent, output.part(0).name.removesuffix("0")
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(prefix)]
    for path in left:
        Path(path).unlink()


def _check_apart(source: Path, pictures: PictureList, folder: Path) -> None:
    """Masks must not replace pictures, nor be taken for pictures the next time."""
    real = lru_cache(maxsize=1024)(os.path.realpath)
    masks = f"{real(os.fspath(folder))}/"
    if source.is_dir() and masks.startswith(f"{real(os.fspath(source))}/"):
        raise _no_place(
            f"'{folder}' lies in '{source}', so that masks would be taken for pictures the next time",
            "write to a folder beside it",
        )
    for number in range(0 if source.is_dir() else len(pictures.names)):
        place = pictures.place(number)
        if f"{real(os.path.dirname(place))}/".startswith(masks):  # noqa: PTH120 - there may be ten million
            raise _no_place(
                f"'{folder}' holds '{place}', which a mask could replace",
                "write to a folder without pictures",
            )


def _no_place(what: str, mend: str) -> UserError:
    return UserError(f"predict.out: {what}", mend=f"{mend}: --predict.out", code="USAGE")
