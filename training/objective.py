"""What is minimised: a weighted sum of losses, each a function of sums over the whole global batch.

A loss that is a mean is total / count; one of overlapping areas is a ratio of areas. Both are functions of
sums that add over samples, micro-batches and processes, so their value and gradient do not depend on the cut.
Shapes: B samples, S sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from training.inputs import Inputs

Needs = Literal["nothing", "targets", "outputs"]  # of the whole global batch, before the first backward pass
TermSums = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # outputs, targets, weights


@dataclass(frozen=True)
class Term:
    """One loss.

    `sums(outputs, targets, weights)` are `size` sums over the samples of a batch, float32 [size], with a
    gradient; weights are float32 [B], 0 for a sample that does not count. `value(sums)` is the loss from the
    sums over a whole global batch, float64. Where no outputs are needed to know the gradient's scale,
    `count(targets, weights)` gives what `value` divides by, which is then sums[1], and sums[0] the total.
    """

    size: int
    sums: TermSums
    value: Callable[[torch.Tensor], torch.Tensor]
    count: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    counts_samples: bool = False  # the count is the number of samples, whatever their targets


def mean_term(
    sums: TermSums, count: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, **more: bool
) -> Term:
    """A loss that is sums[0] / sums[1]: a total and a count."""
    return Term(2, sums, mean_of, count, **more)


def mean_of(sums: torch.Tensor) -> torch.Tensor:
    """Total by count; zero where nothing counts, as where every label of a batch is missing."""
    total, count = sums
    return torch.where(count > 0, total / count.clamp(min=1e-12), total * 0.0)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms; its sums are theirs, one after the other."""

    terms: tuple[tuple[float, Term], ...]  # factor and loss

    @cached_property
    def size(self) -> int:
        """S, the number of sums."""
        return sum(term.size for _, term in self.terms)

    @cached_property
    def needs(self) -> Needs:
        """What must be known of the whole global batch before a gradient can be taken."""
        if any(term.count is None for _, term in self.terms):
            return "outputs"
        return "nothing" if all(term.counts_samples for _, term in self.terms) else "targets"

    def sums(self, outputs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Float32 [S]; a mixed sample counts in part for its own target and its partner's."""
        outputs = outputs.float()

        def of(targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return _joined([term.sums(outputs, targets, weights) for _, term in self.terms])

        return _of_both(inputs, of)

    def counts(self, inputs: Inputs) -> torch.Tensor:
        """Float64 [S]: what `sums` will hold where it does not depend on outputs, else zero."""

        def of(targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            pieces = []
            for _, term in self.terms:
                piece = torch.zeros(term.size, dtype=torch.float64, device=weights.device)
                if term.count is not None:
                    piece[1] = term.count(targets, weights)
                pieces.append(piece)
            return torch.cat(pieces)

        return _of_both(inputs, of)

    def known_counts(self, samples: int) -> torch.Tensor:
        """Float64 [S]: `counts` of a global batch of `samples`, where nothing needs to be known."""
        assert self.needs == "nothing"
        return torch.tensor([0.0, float(samples)], dtype=torch.float64).repeat(len(self.terms))

    def values(self, sums: torch.Tensor) -> list[torch.Tensor]:
        """The loss of each term, 0-dimensional, from float64 sums [S] over the whole global batch."""
        pieces = torch.split(sums, [term.size for _, term in self.terms]) if len(self.terms) > 1 else [sums]
        return [term.value(piece) for (_, term), piece in zip(self.terms, pieces, strict=True)]

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the losses."""
        values = self.values(sums)
        return torch.stack(
            [factor * value for (factor, _), value in zip(self.terms, values, strict=True)]
        ).sum()

    def slopes(self, sums: torch.Tensor) -> torch.Tensor:
        """Float64 [S], the derivative of `value` by each sum over the global batch.

        The gradient of the loss is that of slopes @ sums, and this is linear in the sums of each micro-batch.
        """
        at = sums.detach().double().requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(self.value(at), at)
        return slopes


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _of_both(inputs: Inputs, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `of(targets, weights)` gives for a batch, whose mixed samples have two targets."""
    if inputs.partner_targets is None:
        return of(inputs.targets, inputs.weights)
    own = of(inputs.targets, inputs.weights * inputs.share)
    return own + of(inputs.partner_targets, inputs.weights * (1 - inputs.share))
