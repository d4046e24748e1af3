"""Finds a user's pictures and what is known of them on disk, before any is read: their classes and splits."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.fault import UserError
from data_pipeline.items import Item as Item
from data_pipeline.items import Source as Source
from data_pipeline.items import SourceOptions as SourceOptions
from data_pipeline.items import Target as Target
from data_pipeline.source_csv import find_csv
from data_pipeline.source_folders import find_class_folders
from data_pipeline.source_pairs import find_pairs, looks_like_pairs

TABLES = (".csv", ".tsv")
KINDS = {"folders": find_class_folders, "csv": find_csv, "pairs": find_pairs}
# What only some kinds can use: an option that changes nothing would be a mistake that nobody sees.
OPTIONS = {
    "images": ("csv", "pairs"),
    "masks": ("pairs",),
    "label_columns": ("csv",),
    "image_column": ("csv",),
    "split_column": ("csv",),
    "group_column": ("csv",),
}
FLAGS = {"label_columns": "--labels"}


def find_source(root: Path, options: SourceOptions) -> Source:
    """Everything to pack below a folder, or named by a CSV; `Source.kind` says in words what it is taken for.

    A file is a CSV; a folder of images beside one of masks is pairs; any other holds a folder per class;
    `options.kind` overrides this. USAGE where an option does not go with the kind, DATA where samples are
    wrong.
    """
    kind = options.kind or _kind(root, options)
    for name, kinds in OPTIONS.items():
        if getattr(options, name) not in (None, ()) and kind not in kinds:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"{flag} does not go with a source of the kind {kind}, which '{root}' is taken for",
                mend=f"it goes with {' and '.join(kinds)}; --kind says what SOURCE is",
                code="USAGE",
            )
    if len(set(options.classes)) < len(options.classes):
        raise UserError("--classes names a class twice", mend="name each class once", code="USAGE")
    source = KINDS[kind](root, options)
    if not source.items:
        raise UserError(f"'{root}' holds nothing to pack", mend="give a folder or a CSV with pictures")
    return source


def _kind(root: Path, options: SourceOptions) -> str:
    if root.is_file():
        if root.suffix.lower() not in TABLES:
            raise UserError(
                f"'{root}' is a file, but no {' or '.join(TABLES)}",
                mend="give the folder of the pictures or a CSV that names them; or say so: --kind csv",
            )
        return "csv"
    if options.masks or options.images:
        return "pairs"
    return "pairs" if root.is_dir() and looks_like_pairs(root) else "folders"
