"""`run.py evaluate`: scores saved weights, prints the scores to the last digit, and keeps them."""

from __future__ import annotations

import json
from typing import Any

from training.assembly import join
from training.command import Request
from training.console import Console
from training.evaluation import Examined, Scores, describe, evaluate
from training.process import Place, forget_failure, leave
from training.reading import open_dataset
from training.scores.bootstrap import intervals
from training.scores.text import lines
from training.vigil.joining import watch_over
from training.weights import check_fits, read_weights


def evaluate_weights(request: Request, place: Place) -> None:
    """Score on `data.val_split`, with intervals where scores come from ranks; every process comes here."""
    config = request.config
    forget_failure(request.run_dir)
    dataset = open_dataset(config, learning=False)
    accelerator = join(config, place=place)
    watch_over(place, accelerator, config)
    saved = read_weights(request)
    check_fits(saved, dataset)
    device = accelerator.device
    network = saved.network.to(device)
    examined = Examined(network, saved.task, config, dataset, accelerator, saved.normalizer(device))
    scores = evaluate(examined, place=place)
    place.rest()
    assert scores is not None, "nobody asks this to stop"
    if accelerator.is_main_process:
        spread = _intervals(scores, request)
        record = {
            "kind": "evaluate",
            "weights": str(saved.path),
            "split": config.data.val_split,
            **scores.as_json(),
            "class_names": list(saved.classes),
            "confusion": scores.findings.confusion,
            "thresholds": scores.findings.thresholds,
            "intervals": spread,
        }
        file = saved.path.parent / f"{saved.path.stem}.evaluation.json"
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console = Console(active=not request.flags.quiet, every_seconds=1)
        console.say(f"weights   {saved.path}")
        console.say(f"split     {config.data.val_split}, {describe(scores.certificate)}")
        console.say(f"digest    {scores.certificate.digest}")
        width = max(map(len, [*scores.metrics, "weights  "]))
        for name, value in scores.metrics.items():
            console.say(f"{name:<{width}} {'undefined' if value is None else repr(value)}")
        for line in lines(scores.findings, saved.classes, intervals=spread):
            console.say(line)
    leave(accelerator, place)


def _intervals(scores: Scores, request: Request) -> dict[str, Any] | None:
    if scores.kept is None or not request.config.eval.bootstrap:
        return None
    return intervals(scores.kept, resamples=request.config.eval.bootstrap, seed=request.config.seed)
