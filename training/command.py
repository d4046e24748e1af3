"""Turns the command line and a recipe into one validated request; all mistakes are named at once."""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from training.config import RECIPES, Config, UserError, recipe_names
from training.config.tree import Section, fields_of
from training.flags import MODES, Flags

Mode = Literal["train", "evaluate", "predict"]
S = typing.TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Request:
    """One call of the program: what to do, with what, and where."""

    mode: Mode
    config: Config
    flags: Flags
    run_dir: Path


@dataclass
class _Reading:
    """What the command line says, collected before anything is judged."""

    mode: str = "train"
    values: dict[str, str] = field(default_factory=dict)
    help: bool = False
    mistakes: list[str] = field(default_factory=list)


# The tree of flags and configuration fields, by dotted name. A flag is --NAME with dashes for underscores.
_FIELDS: dict[str, Any] = {**dict(fields_of(Flags)), **dict(fields_of(Config))}


def read_request(words: list[str]) -> Request | None:
    """The request that `words` (sys.argv without the program) make; None where they asked for text.

    Precedence: defaults, then the recipe or file, then flags. Raises USAGE and CONFIG.
    """
    reading = _read_words(words)
    mistakes = reading.mistakes
    code = "USAGE" if mistakes else "CONFIG"
    split: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name, value in reading.values.items():
        split[name in Flags.model_fields][name] = value
    flags = _validated(Flags, split[True], {}, "", mistakes)
    # Where a flag is wrong, the rest is read all the same, for the mistakes in it.
    name = split[True].get("config", Flags().config)
    run_dir = Path(split[True].get("run_dir", f"runs/{Path(name).stem}"))
    recorded = run_dir / "config.yaml"
    if reading.mode != "train" and "config" not in split[True] and recorded.exists():
        name = str(recorded)
    config = _validated(Config, split[False], read_yaml(name), name, mistakes)
    if config is None or flags is None or mistakes:
        mend = "run.py --help lists every option with its limits"
        raise UserError("\n".join(mistakes), mend=mend, code=code)
    if reading.help:
        from training.manual import print_manual  # tyro: 0.2 s that only --help needs

        print_manual(config)
        return None
    if flags.print_config:
        print(config.as_yaml(), end="")  # noqa: T201 - this is the output that was asked for
        return None
    return Request(typing.cast(Mode, reading.mode), config, flags, run_dir)


def read_yaml(name: str) -> dict[str, Any]:
    """The recipe or YAML file called `name`, as a tree; CONFIG where it is not there or is no mapping."""
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    try:
        tree = _plain_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config: cannot read '{name}': {error.strerror}",
            mend=f"give a YAML file or one of the recipes: {', '.join(recipe_names())}",
            code="CONFIG",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config: '{name}' is not plain YAML: {' '.join(str(error).split())}",
            mend="mend the file; --print-config shows how a whole one looks",
            code="CONFIG",
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--config: '{name}' holds no sections",
            mend="--print-config shows how a file looks",
            code="CONFIG",
        )
    return tree


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few lines of them unfold to gigabytes, and no configuration needs one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def _plain_yaml(text: str) -> Any:
    return yaml.load(text, _Plain)  # noqa: S506 - _Plain is a SafeLoader


def _read_words(words: list[str]) -> _Reading:
    reading = _Reading()
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        reading.mode = rest.pop(0)
        if reading.mode not in MODES:
            reading.mistakes.append(
                f"{reading.mode!r} is nothing to do{_nearest(reading.mode, MODES)}: {' or '.join(MODES)}"
            )
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            reading.help = True
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            reading.mistakes.append(f"{word!r} stands alone: every value follows its --option")
        elif (negated := _negated(name)) is not None:
            reading.values[negated] = "false"
        elif name not in _FIELDS:
            reading.mistakes.append(f"{flag}: no such option{_nearest_flag(name)}")
            if rest and not rest[0].startswith("--"):
                rest.pop(0)
        elif equals:
            reading.values[name] = value
        elif _is_switch(name) and (not rest or rest[0].startswith("--")):
            reading.values[name] = "true"
        elif rest and not rest[0].startswith("--"):
            reading.values[name] = rest.pop(0)
        else:
            reading.mistakes.append(f"{flag}: needs a value")
    return reading


def _is_switch(name: str) -> bool:
    """Whether the flag may stand alone, for yes."""
    kind = _FIELDS[name].annotation
    return kind is bool or bool in typing.get_args(kind)


def _negated(name: str) -> str | None:
    """The switch that `--train.no-exact` turns off."""
    section, dot, last = name.rpartition(".")
    positive = section + dot + last.removeprefix("no_")
    return positive if last.startswith("no_") and positive in _FIELDS and _is_switch(positive) else None


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _nearest_flag(name: str) -> str:
    """By the whole dotted name, or by its last part where the section was left out."""
    whole = {dotted: _flag(dotted) for dotted in _FIELDS}
    last = {dotted.rpartition(".")[2]: flag for dotted, flag in whole.items()}
    for table in (whole, last):
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.75)
        if close:
            return f" (did you mean {table[close[0]]}?)"
    return ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _validated(
    section: type[S], given: dict[str, str], tree: dict[str, Any], origin: str, mistakes: list[str]
) -> S | None:
    """Lay the flags over the tree and validate both together; None where `mistakes` has grown."""
    before = len(mistakes)
    for name, text in given.items():
        try:
            _lay(tree, name.split("."), _value(name, text))
        except (yaml.YAMLError, TypeError) as error:
            mistakes.append(f"{_flag(name)}: {text!r}: {' '.join(str(error).split())}")
    try:
        validated = section.model_validate(tree)
    except ValidationError as error:
        mistakes += [_mistake(one, given, origin) for one in error.errors()]
    return validated if len(mistakes) == before else None


def _value(name: str, text: str) -> Any:
    """A scalar stays text, which pydantic reads by the field's type; lists and trees are written as YAML."""
    kind = _FIELDS[name].annotation
    if text.lower() in ("none", "null") and type(None) in typing.get_args(kind):
        return None
    if kind is str:
        return text
    return _plain_yaml(text) if text[:1] in ("[", "{") else text


def _lay(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise TypeError(f"{part} is {tree!r} in the file, not a section")
    tree[path[-1]] = value


def _mistake(error: Any, given: dict[str, str], origin: str) -> str:
    name = ".".join(str(part) for part in error["loc"])
    flags = (flag for flag in given if name == flag or name.startswith(f"{flag}."))
    said_by = max(flags, key=len, default=None)
    if said_by is not None:
        where = _flag(said_by) + (f": {name[len(said_by) + 1 :]}" if name != said_by else "")
    else:
        where = f"{origin}: {name}" if name else origin or "configuration"
    if error["type"] == "extra_forbidden":
        return f"{where}: no such name{_nearest_sibling(error['loc'])}"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {said}" if not name else f"{where}: {error['input']!r} {said}"


def _nearest_sibling(location: tuple[Any, ...]) -> str:
    """The name nearest to an unknown one, in full: among those of its own section, else among all."""
    section: Any = Config
    for part in location[:-1]:
        kind = section.model_fields[part].annotation if part in section.model_fields else None
        kinds = [one for one in (kind, *typing.get_args(kind)) if isinstance(one, type)]
        section = next((one for one in kinds if issubclass(one, Section)), None)
        if section is None:
            break
    *before, last = map(str, location)
    if section is not None and (close := difflib.get_close_matches(last, section.model_fields, n=1)):
        return f" (did you mean {'.'.join([*before, *close])}?)"
    return _nearest(".".join([*before, last]), _FIELDS)
