"""What an evaluation found in each class, as tables for people."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from training.tasks.task import Findings

WORST, BEST = 15, 15  # the classes that are shown where there are more than these together
ORDERED_BY = ("auroc", "dice", "f1")  # what tells the worst classes from the best
CONFUSION_CLASSES = 12
WIDTH = 110  # characters; a confusion matrix that is wider has numbers above its columns

UNDEFINED = {
    "auroc": "only one class among the known labels, or outputs that are not numbers",
    "average_precision": "no positive among the known labels, or outputs that are not numbers",
    "recall": "no sample of the class",
    "precision": "the class was never said",
    "f1": "the class neither occurs nor was said",
    "dice": "the class neither occurs nor was said",
    "iou": "the class neither occurs nor was said",
}

Row = list[str]


def lines(findings: Findings, classes: tuple[str, ...], *, intervals: dict[str, Any] | None) -> list[str]:
    """The scores of each class, with `intervals` (of scores.bootstrap) if any, and the confusion matrix."""
    text: list[str] = []
    if findings.classes:
        text += ["", *_class_table(findings, classes, intervals or {})]
        notes = _notes(findings, classes, intervals)
        text += ["", *notes] if notes else []
    if findings.confusion is not None and len(classes) <= CONFUSION_CLASSES:
        text += ["", *_confusion_table(findings.confusion, classes)]
    return text


def _class_table(findings: Findings, classes: tuple[str, ...], intervals: dict[str, Any]) -> list[str]:
    columns = dict(findings.classes)
    if findings.thresholds is not None:
        columns["threshold"] = list(findings.thresholds)

    def row(label: int) -> Row:
        bounds = {name: found["classes"][label] for name, found in intervals.items()}
        return [classes[label], *(_cell(name, of[label], bounds.get(name)) for name, of in columns.items())]

    order = _shown(findings, len(classes))
    rows = [row(label) for label in order]
    if len(order) < len(classes):
        rows.insert(WORST, [f"({len(classes) - len(order)} not shown)"])
    if intervals:
        metrics, means = findings.metrics, {name: found["mean"] for name, found in intervals.items()}
        cells = [_cell(name, metrics.get(name), means[name]) if name in means else "" for name in columns]
        rows.append(["mean", *cells])
    return _table(["class", *(name.replace("_", " ") for name in columns)], rows)


def _notes(findings: Findings, classes: tuple[str, ...], intervals: dict[str, Any] | None) -> list[str]:
    notes = ["in brackets: 95 % intervals, by bootstrap"] if intervals else []
    if len(classes) > WORST + BEST:
        notes.append(f"shown: the {WORST} classes of lowest {_order(findings)} and the {BEST} of highest")
    for name, scores in findings.classes.items():
        if None in scores:
            notes.append(f"undefined {name.replace('_', ' ')}: {UNDEFINED[name]}")
    return notes


def _order(findings: Findings) -> str:
    return next(name for name in ORDERED_BY if name in findings.classes)


def _shown(findings: Findings, classes: int) -> list[int]:
    """All in their own order where there are few, else the worst and the best, worst first."""
    if classes <= WORST + BEST:
        return list(range(classes))
    scores = findings.classes[_order(findings)]
    known = [
        label for _, label in sorted((score, at) for at, score in enumerate(scores) if score is not None)
    ]
    unknown = [label for label, score in enumerate(scores) if score is None]
    # In the middle, where they are the first that are not shown.
    half = len(known) // 2
    ordered = known[:half] + unknown + known[half:]
    return ordered[:WORST] + ordered[-BEST:]


def _cell(name: str, score: float | None, bounds: list[float] | None) -> str:
    if score is None:
        return "undefined"
    if name == "positives":
        return f"{score:.0f}"
    if name == "threshold":
        return f"{score:.3f}" if score >= 0.001 else f"{score:.1e}"
    return f"{score:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")


def _confusion_table(confusion: list[list[int]], classes: tuple[str, ...]) -> list[str]:
    """Rows are the truth, columns what was said."""
    corner = "truth \\ said"
    rows = [[name, *map(str, counts)] for name, counts in zip(classes, confusion, strict=True)]
    text = _table([corner, *classes], rows)
    if max(map(len, text)) > WIDTH:
        numbered = [[f"{label} {row[0]}", *row[1:]] for label, row in enumerate(rows)]
        text = _table([corner, *map(str, range(len(classes)))], numbered)
    return text


def _table(header: Row, rows: list[Row]) -> list[str]:
    """Aligned columns, the first to the left and the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, name in enumerate(header):
        # Text, not str: square brackets in a class's name are no markup.
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    page = StringIO()
    # So wide that nothing is cut, whatever terminal the environment speaks of.
    Console(file=page, width=10_000, color_system=None).print(table, soft_wrap=True)
    return [line.rstrip() for line in page.getvalue().splitlines()]
