"""Finds the pictures that somebody wants predictions for: a folder, one picture, or a list of them.

| source | pictures, in order | called |
|---|---|---|
| a folder | all in it and below, sorted | by the path relative to it |
| a picture | that one | by its name |
| a .txt list | a path a line, relative to the list's folder or else to the working directory | as written |
| a .csv | its column of paths, read as `pack` does, else as those of a .txt | as written |

Only what the source names is looked for here; whether it is a picture is found out when it is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.csv_columns import check_header, likely_image_column
from data_pipeline.csv_pictures import CsvPictures
from data_pipeline.csv_table import Faults, open_table
from data_pipeline.fault import UserError
from data_pipeline.file_reader import PictureList
from data_pipeline.picture_files import PICTURE_EXTENSIONS, files_below

LIST_EXTENSIONS = (".txt", ".csv")
MOST_NAME = 4096  # bytes of a path: Linux opens no longer one


def find_pictures(source: Path) -> PictureList:
    """The pictures of a source, by the table above; DATA where there is none, USAGE for other files."""
    if os.path.isdir(source):  # noqa: PTH112 - False, not an error, where a name is too long
        return _in_folder(source)
    if not _is_file(source):
        raise UserError(
            f"no file or folder '{source}'",
            mend="give a data set, a folder of pictures, a picture, or a list of them (.txt, .csv)",
        )
    extension = source.suffix.lower()
    if extension in PICTURE_EXTENSIONS:
        return PictureList((source.name,), (source.name,), (str(source.parent),))
    if extension == ".txt":
        return _in_list(source)
    if extension == ".csv":
        return _in_table(source)
    raise UserError(
        f"'{source}' is neither a picture nor a list of pictures",
        mend=f"pictures end in {', '.join(PICTURE_EXTENSIONS)}, lists in {', '.join(LIST_EXTENSIONS)}",
        code="USAGE",
    )


def _in_folder(folder: Path) -> PictureList:
    names = files_below(folder, extensions=PICTURE_EXTENSIONS)
    if not names:
        raise UserError(
            f"no picture in '{folder}'",
            mend=f"give a folder of files that end in {', '.join(PICTURE_EXTENSIONS)}, or a data set",
        )
    return PictureList(names, names, (str(folder),))


def _in_list(path: Path) -> PictureList:
    names: list[str] = []
    try:
        # Names on a disk are bytes: whatever they are, they come back as they were.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            while line := file.readline(MOST_NAME + 1):
                if len(line) > MOST_NAME:
                    raise _no_list(path, len(names) + 1)
                if line.strip():
                    names.append(line.rstrip("\r\n"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", mend="make it readable") from None
    if not names:
        raise UserError(f"'{path}' names no picture", mend="write the path of a picture on each line")
    return PictureList(names, names, _folders(path))


def _no_list(path: Path, line: int) -> UserError:
    return UserError(
        f"'{path}' line {line} has more than {MOST_NAME} letters",
        mend="write the path of a picture on each line",
        place={"file": str(path), "line": line},
    )


def _in_table(path: Path) -> PictureList:
    table, pictures, folders = open_table(path), CsvPictures(path.parent), _folders(path)

    def holds(cell: str) -> bool:
        return pictures.holds(cell) or (bool(cell) and any(_is_file(Path(one, cell)) for one in folders))

    column = likely_image_column(table, holds)
    if column is None:
        raise UserError(
            f"no column of '{path}' names pictures",
            mend="call one of them 'image', with paths relative to the folder of the CSV or the working "
            f"directory; its columns are: {', '.join(table.header)}",
        )
    check_header(table, column)
    faults = Faults(path)
    names, files = [], []
    for row in table.rows(faults):
        cell = row.cells[column].strip()
        names.append(cell)
        files.append(_file_of(cell, pictures))
    faults.raise_any()
    return PictureList(names, files, folders)


def _file_of(cell: str, pictures: CsvPictures) -> str:
    """The file that `pack` would find for a cell, else the cell as a path."""
    try:
        return pictures.find(cell) if pictures.inside(cell) else cell
    except LookupError:
        return cell


def _folders(path: Path) -> tuple[str, ...]:
    return (str(path.parent), "")


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - False, not an error, where a name is too long
