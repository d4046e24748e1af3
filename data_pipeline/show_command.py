"""The command `lockstep show`: what it takes, and what it says."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.command_line import Parser, say, whole


def show(argv: list[str]) -> None:
    """Draw a grid of a data set's pictures and print its table of classes: `lockstep show`."""
    options = _show_parser().parse(argv)
    from rich.console import Console

    from data_pipeline.show import write_grid
    from data_pipeline.show_table import class_table, facts
    from data_pipeline.store import Folder, load_dataset

    opened = load_dataset(options.dataset)
    beside = opened.store.root if isinstance(opened.store, Folder) else Path()
    out = Path(options.out) if options.out else beside / "samples.png"
    write_grid(opened, split=options.split, samples=options.samples, out=out)
    Console(markup=False, highlight=False, emoji=False).print(class_table(opened.dataset))
    for fact in facts(opened.dataset):
        say(fact)
    say(f"the picture grid is in {out}")


def _show_parser() -> Parser:
    parser = Parser(
        prog="lockstep show",
        description="Draw a grid of a data set's pictures, and print how many there are of each class.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder or URL of a data set")
    add = parser.add_argument
    add("--split", default="train", metavar="NAME", help="whose pictures to draw (%(default)s)")
    add("--samples", type=whole(1, 1000), default=40, metavar="N", help="how many of them (%(default)s)")
    add("--out", metavar="FILE.png", help="where to write the grid (samples.png in DATASET)")
    return parser
