"""Plots are pictures of the records, drawn without a display."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from training.journal import Journal
from training.plots import draw_plots


def write_records(run_dir, *, steps, evaluations):
    journal = Journal(run_dir, active=True, committed=0)
    journal.write("start", step=0)
    for step in range(1, steps + 1):
        journal.write("train", step=step, loss=3 / step, lr=1e-3)
        if step in evaluations:
            metrics = {"accuracy": 1 - 1 / step, "loss": 2 / step}
            journal.write("eval", step=step, metrics=metrics, certificate={})


@pytest.mark.parametrize(
    ("steps", "evaluations", "drawn"),
    [
        (60, [20, 40, 60], ["accuracy.png", "loss.png"]),
        (1, [1], ["accuracy.png", "loss.png"]),
        (5, [], ["loss.png"]),
        (0, [], []),
    ],
)
def test_every_kind_of_record_is_drawn(tmp_path, steps, evaluations, drawn):
    write_records(tmp_path, steps=steps, evaluations=evaluations)
    assert sorted(path.name for path in draw_plots(tmp_path)) == drawn
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == drawn
    for name in drawn:
        path = tmp_path / "plots" / name
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
            pixels = np.asarray(picture.convert("L"))
        assert path.stat().st_size > 5000
        assert 0.005 < (pixels < 250).mean() < 0.5, "ink on a white ground"


def test_drawing_again_shows_what_is_new(tmp_path):
    write_records(tmp_path, steps=10, evaluations=[10])
    before = [path.read_bytes() for path in draw_plots(tmp_path)]
    write_records(tmp_path, steps=40, evaluations=[10, 40])
    after = [path.read_bytes() for path in draw_plots(tmp_path)]
    assert all(new != old for new, old in zip(after, before, strict=True))
