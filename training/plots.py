"""Draws what a run has recorded: loss and learning rate over the steps, scores over the evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.journal import read_records

INK, PALE, ACCENT = "#1f3a5f", "#b8c4d6", "#d1495b"


def draw_plots(run_dir: Path) -> list[Path]:
    """Write plots/loss.png and plots/<metric>.png; the files written."""
    records = read_records(run_dir)
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = [_draw_loss(steps, evaluations, folder / "loss.png")] if steps else []
    if evaluations:
        names = [name for name in evaluations[0]["metrics"] if name != "loss"]
        drawn += [path for name in names if (path := _draw_metric(evaluations, name, folder))]
    return drawn


def _draw_loss(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure("Loss")
    # A loss is null where it was not finite.
    known = [record for record in steps if record["loss"] is not None]
    at, losses = [record["step"] for record in known], [record["loss"] for record in known]
    axes.plot(at, losses, color=PALE, linewidth=1, label="each step")
    axes.plot(at, _smoothed(losses), color=INK, linewidth=2, label="running mean")
    held_out = [
        (record["step"], record["metrics"]["loss"])
        for record in evaluations
        if record["metrics"].get("loss") is not None
    ]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ACCENT, marker="o", linewidth=1.5, label="held out")
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    rates = axes.twinx()
    lines = [(record["step"], record["lr"]) for record in steps]
    rates.plot(*zip(*lines, strict=True), color=INK, linestyle=":", linewidth=1)
    rates.set_ylabel("learning rate (dotted)")
    rates.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    return _saved(figure, path)


def _draw_metric(evaluations: list[dict[str, Any]], name: str, folder: Path) -> Path | None:
    """The score over the evaluations where it is defined; None where it never is."""
    records = [record for record in evaluations if record["metrics"].get(name) is not None]
    if not records:
        return None
    figure, axes = _figure(f"{_title(name)} on the held-out samples")
    at = [record["step"] for record in records]
    values = [record["metrics"][name] for record in records]
    axes.plot(at, values, color=ACCENT, marker="o", linewidth=2)
    best = max(range(len(values)), key=values.__getitem__)
    axes.annotate(
        f"{values[best]:.4f}",
        (at[best], values[best]),
        textcoords="offset points",
        xytext=(0, -16),
        ha="center",
    )
    axes.set_ylabel(name)
    return _saved(figure, folder / f"{name}.png")


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words.upper() if words in ("auroc", "iou") else words.capitalize()


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display is looked for, no global state is kept

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ef")
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth, mean = [], values[0] if values else 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        smooth.append(mean)
    return smooth
