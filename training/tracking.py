"""Weights & Biases through accelerate's trackers: one id in the life of a run directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data_pipeline.fault import first_line
from training.config import Config

ID_FILE = "wandb-id"


def start_tracking(
    accelerator: Accelerator, config: Config, run_dir: Path, say: Callable[[str], None]
) -> None:
    """Start the tracker that `tracking.wandb` asks for; without a network it goes offline, and says so."""
    mode = config.tracking.wandb
    if mode == "disabled" or not accelerator.is_main_process:
        return
    import wandb  # 1 s, for those who asked for it

    identity = run_dir / ID_FILE
    if not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    options = {"dir": str(run_dir), "id": identity.read_text(encoding="utf-8"), "name": run_dir.name}
    values = config.model_dump(mode="json")
    # wandb waits 90 s for a server by default and prints its own summary into the middle of ours.
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        _init(accelerator, config, values, {**options, "mode": mode})
    except Exception as error:  # wandb has its own kinds for no network, no key and a server that refuses
        if mode == "offline":
            raise
        say(f"wandb online: {first_line(error)}; tracking offline into {run_dir / 'wandb'}")
        accelerator.trackers.clear()  # accelerate keeps the one that failed, and wandb its half-open run
        wandb.teardown()
        _init(accelerator, config, values, {**options, "mode": "offline"})
    else:
        say(f"wandb     {accelerator.trackers[0].tracker.url or run_dir / 'wandb'}")


def _init(accelerator: Accelerator, config: Config, values: dict[str, Any], options: dict[str, Any]) -> None:
    keywords = {"wandb": {**options, "resume": "allow"}}
    accelerator.init_trackers(config.tracking.project, config=values, init_kwargs=keywords)


def track(accelerator: Accelerator, step: int, values: dict[str, float]) -> None:
    """Hand numbers of one optimizer step to the trackers."""
    if accelerator.trackers:
        accelerator.log(values, step=step)


def stop_tracking(accelerator: Accelerator) -> None:
    """Let the trackers write what they hold; `end_training` would take the process group down as well."""
    for tracker in accelerator.trackers:
        tracker.finish()
