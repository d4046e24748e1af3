"""Which parameters do not change, and from which optimizer step on some of them do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data_pipeline.fault import UserError
from training.name_patterns import matches, with_modules


@dataclass(frozen=True)
class Freezing:
    """A plan for the parameters called `names`, made by `plan_freezing`."""

    names: tuple[str, ...]
    thaw: Mapping[
        str, int | None
    ]  # of each that is frozen at first: the step from which it changes; None: never

    def frozen_at(self, step: int) -> frozenset[str]:
        """Those that optimizer step `step` (from 0) does not change."""
        return frozenset(name for name, thaw in self.thaw.items() if thaw is None or step < thaw)

    @property
    def thaw_steps(self) -> tuple[int, ...]:
        """The steps from which something more changes, ascending, without 0."""
        return tuple(sorted({step for step in self.thaw.values() if step}))

    @property
    def trainable(self) -> frozenset[str]:
        """All that change at some step."""
        return frozenset(name for name in self.names if self.thaw.get(name, 0) is not None)


def plan_freezing(
    names: Sequence[str],
    *,
    head: frozenset[str],
    freeze: Sequence[str],
    unfreeze: Mapping[str, int],
    fixed: frozenset[str] = frozenset(),
) -> Freezing:
    """Read the patterns of model.freeze and model.unfreeze, the latter with their optimizer steps.

    A pattern, with *, ? and [], is for whole dotted names, and for names of modules, where it means all that
    is in the module. The words `head` (the names in `head`) and `body` (all others) come before patterns. In
    `freeze`, `!pattern` excepts, and the last match wins; of several matches in `unfreeze` the earliest step
    wins. Parameters in `fixed`, which the library itself holds fast, stay so whatever the patterns say.

    CONFIG for a pattern that matches nothing, or excepts or unfreezes nothing that is frozen, and if nothing
    is left that changes, be it only at first.
    """
    frozen: set[str] = set()
    for pattern in freeze:
        excepts = pattern.startswith("!")
        matched = _matches(pattern.removeprefix("!"), names, head, option="model.freeze")
        if excepts and not matched & frozen:
            raise _refused(
                f"model.freeze: {pattern!r} excepts nothing: no pattern before it freezes what it names",
                mend="freeze first, then except: body, '!layer4'",
            )
        frozen = frozen - matched if excepts else frozen | matched
    thaw: dict[str, int | None] = {name: None for name in names if name in frozen | fixed}
    for pattern, step in unfreeze.items():
        matched = _matches(pattern, names, head, option="model.unfreeze") & frozen - fixed
        if not matched:
            raise _refused(
                f"model.unfreeze: {pattern!r} names nothing that is frozen",
                mend="leave it out, or freeze it first with model.freeze",
            )
        for name in matched:
            before = thaw[name]
            thaw[name] = step if before is None else min(before, step)
    freezing = Freezing(tuple(names), thaw)
    if len(freezing.frozen_at(0)) == len(names):
        first = freezing.thaw_steps[:1]
        raise _refused(
            "model.freeze: nothing is left to learn" + (f" before step {first[0]}" if first else ""),
            mend="except the head from what is frozen: --model.freeze body",
        )
    return freezing


def apply_freezing(network: torch.nn.Module, frozen: frozenset[str]) -> None:
    """Let gradients be computed for all parameters but those in `frozen`."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)


def train_mode(network: torch.nn.Module, frozen: frozenset[str]) -> None:
    """`network.train()`, except that a normalisation whose parameters are all frozen keeps its statistics.

    One that has no parameters of its own goes by those of the module around it.
    """
    network.train()
    if not frozen:
        return
    for path, module in network.named_modules():
        if getattr(module, "running_mean", None) is not None and _is_frozen(network, path, frozen):
            module.eval()


def _is_frozen(network: torch.nn.Module, path: str, frozen: frozenset[str]) -> bool:
    """Whether `frozen` has all parameters of the module at `path`, or of the nearest around it with any."""
    own = [f"{path}.{name}".lstrip(".") for name, _ in network.get_submodule(path).named_parameters()]
    if own or not path:
        return bool(own) and frozen.issuperset(own)
    return _is_frozen(network, path.rpartition(".")[0], frozen)


def _matches(pattern: str, names: Sequence[str], head: frozenset[str], *, option: str) -> set[str]:
    matched = {name for name in names if matches(pattern, name, head=head)}
    if not matched:
        known = with_modules(names)
        close = difflib.get_close_matches(pattern.rstrip("*").rstrip("."), known, n=3) or known[:3]
        raise _refused(
            f"{option}: {pattern!r} matches no parameter (names near it: {', '.join(close)})",
            mend="give a name, a module's name or a pattern such as layer1.*; or head, body",
        )
    return matched


def _refused(what: str, *, mend: str) -> UserError:
    return UserError(what, mend=mend, code="CONFIG")
