"""Prints `--help`: every option with its unit and the value that it has now, laid out by tyro."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import tyro
import yaml
from pydantic import Field, create_model

from training.config import Config, recipe_names
from training.config.loss import LossTerms
from training.config.schedule import Schedule
from training.config.transforms import TransformStep
from training.config.tree import Section, Spec
from training.config.update_rules import UpdateRules
from training.flags import MODES, Flags

HEAD = f"""lockstep: train, evaluate and resume vision models on any number of processes.

  run.py [{"|".join(MODES)}] [--config RECIPE|FILE.yaml] [--section.field VALUE ...]

Recipes: {", ".join(recipe_names())}. Values in brackets are those of the recipe and flags given here."""

# What stands above each list of names, and the section that has them.
LISTS: tuple[tuple[str, type[Section]], ...] = (
    (
        """transforms, a line each in data.train_transforms and data.eval_transforms, as
`- random_resized_crop: {size: 224}`, or `--data.train-transforms '[{random_resized_crop: {size: 224}}]'`:""",
        TransformStep,
    ),
    (
        """losses, one or several: `loss: focal`, `loss: {bce: 0.5, dice: {weight: 0.5, smooth: 0}}`,
or `--loss '{bce: 0.5, dice: 0.5}'`:""",
        LossTerms,
    ),
    (
        """schedules, one of them: `--optim.schedule cosine` or `--optim.schedule '{step: {step_size: 7ep}}'`;
lengths are 500 (optimizer steps), 3ep (epochs), 20000sp (samples) or 10% of the run, behind the warm-up:""",
        Schedule,
    ),
    (
        """update rules: `--optim.name sgd`, and what each takes in `--optim.arguments '{nesterov: false}'`,
beside all else that its class in torch.optim or timm.optim takes:""",
        UpdateRules,
    ),
)


def print_manual(config: Config) -> None:
    """Print the manual with `config`'s values as defaults."""
    manual = _plain(Config, config)
    both = create_model("Manual", __base__=(Flags, manual), __doc__=HEAD)
    try:
        tyro.cli(
            both, prog="run.py", description=HEAD, args=["--help"], config=(tyro.conf.FlagConversionOff,)
        )
    except SystemExit:
        for head, names in LISTS:
            sys.stdout.write("\n".join(["", head, "", *list_lines(names), ""]))
        sys.stdout.flush()


def list_lines(names: type[Section]) -> Iterator[str]:
    """Every name that a recipe may use there: what it does, its parameters with units and defaults."""
    specs = {name: _section_of(field.annotation) for name, field in names.model_fields.items()}
    width = max(len(parameter) for spec in specs.values() for parameter in spec.model_fields)
    for name, spec in specs.items():
        told = names.model_fields[name].description or (spec.__doc__ or "").split("\n\n")[0]
        yield f"  {'mymodule:name' if name == 'own' else name}: {_line(told)}"
        for parameter, field in spec.model_fields.items():
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            said = _line(field.description) + (f": {', '.join(choices)}" if choices else "")
            default = "required" if field.is_required() else json.dumps(field.default)
            yield f"      {parameter:<{width}}  {said} ({default})"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _section_of(annotation: Any) -> type[Section]:
    (section,) = (one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, Section))
    return section


def _plain(section: type[Section], values: Section) -> type[Section]:
    """The section with `values` as defaults, and all but single values as YAML, as `command` reads them."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        value, kind = getattr(values, name), field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Spec):
            inner = _plain(type(value), value)
            fields[name] = (inner, inner())
        elif isinstance(value, Section | tuple | dict):
            tree = values.model_dump(mode="json")[name]
            shown = yaml.safe_dump(tree, default_flow_style=True, width=1000, sort_keys=False)
            fields[name] = (str, _with(field, shown.strip()))
        elif any(isinstance(one, type) and issubclass(one, Section) for one in get_args(kind)):
            fields[name] = (str | None, _with(field, value))
        else:
            fields[name] = (kind, _with(field, value))
    return create_model(section.__name__, __base__=Section, __doc__=section.__doc__, **fields)


def _with(field: Any, default: Any) -> Any:
    return Field(default, description=field.description)
