"""What belongs to one call of the program and not to the run's configuration."""

from __future__ import annotations

from pydantic import PositiveInt

from training.config.tree import Section

MODES = ("train", "evaluate", "predict")


class Flags(Section):
    """Options beside the configuration tree."""

    config: str = "digits"
    """a recipe that comes with lockstep, or a YAML file"""
    run_dir: str | None = None
    """folder of the run; one that exists is resumed; default: runs/RECIPE"""
    fresh: bool = False
    """move an existing run directory aside instead of resuming it"""
    allow_config_change: bool = False
    """resume although keys that decide what is learned have changed"""
    init_from: str | None = None
    """a new run begins with another one's weights: its directory, a checkpoint, or a .safetensors file"""
    weights: str = "best"
    """evaluate, predict: best, last, or a .safetensors file with its model.json; also of --init-from RUN"""
    expect_processes: PositiveInt | None = None
    """processes that must have come together, all nodes'; fewer or more are refused"""
    print_config: bool = False
    """print the resolved configuration and stop"""
    dry_run: bool = False
    """show configuration, network, plan and memory of two steps; write nothing"""
    quiet: bool = False
    """print warnings and errors only"""
