"""Prints `--help`: every option with its unit and the value that it has now, laid out by tyro."""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import tyro
import yaml
from pydantic import Field, create_model

from training.augmentation import TransformStep
from training.config import Config, recipe_names
from training.flags import MODES, Flags
from training.tree import Section

HEAD = f"""lockstep: train, evaluate and resume vision models on any number of processes.

  run.py [{"|".join(MODES)}] [--config RECIPE|FILE.yaml] [--section.field VALUE ...]

Recipes: {", ".join(recipe_names())}. Values in brackets are those of the recipe and flags given here."""


TRANSFORMS_HEAD = """transforms, a line each in data.train_transforms and data.eval_transforms, as
`- random_resized_crop: {size: 224}`, or `--data.train-transforms '[{random_resized_crop: {size: 224}}]'`:"""


def print_manual(config: Config) -> None:
    """Print the manual with `config`'s values as defaults."""
    manual = _plain(Config, config)
    both = create_model("Manual", __base__=(Flags, manual), __doc__=HEAD)
    try:
        tyro.cli(
            both, prog="run.py", description=HEAD, args=["--help"], config=(tyro.conf.FlagConversionOff,)
        )
    except SystemExit:
        sys.stdout.write("\n".join(["", TRANSFORMS_HEAD, "", *transform_lines(), ""]))
        sys.stdout.flush()


def transform_lines() -> list[str]:
    """Every transform of a recipe: its name, what it does, its parameters with units and defaults."""
    lines = []
    for name, field in TransformStep.model_fields.items():
        (spec,) = [one for one in get_args(field.annotation) if one is not type(None)]
        lines.append(f"  {name}: {field.description or _first_sentence(spec)}")
        for parameter, told in spec.model_fields.items():
            default = "required" if told.is_required() else json.dumps(told.default)
            lines.append(f"      {parameter:<14} {' '.join((told.description or '').split())} ({default})")
    return lines


def _first_sentence(spec: type[Section]) -> str:
    return " ".join((spec.__doc__ or "").split("\n\n")[0].split())


def _plain(section: type[Section], values: Section) -> type[Section]:
    """The section with `values` as defaults, and lists as YAML text, which is how `command` reads them."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Section):
            inner = _plain(type(value), value)
            fields[name] = (inner, inner())
        elif isinstance(value, tuple):
            shown = yaml.safe_dump(
                values.model_dump(mode="json")[name], default_flow_style=True, width=1000
            ).strip()
            fields[name] = (str, _with(field, shown))
        else:
            fields[name] = (field.annotation, _with(field, value))
    return create_model(section.__name__, __base__=Section, __doc__=section.__doc__, **fields)


def _with(field: Any, default: Any) -> Any:
    return Field(default, description=field.description)
