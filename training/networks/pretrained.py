"""Start from published weights or from a file's, and say what did not come from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import UserError
from training.networks.first_convolution import first_convolution
from training.networks.fitting import Fitting, fit
from training.networks.published import Published, published_weights
from training.networks.spec import read_spec
from training.networks.torch_files import read_weights_file

OPTION = "model.pretrained"
REFUSED_LINES, REPORT_LINES = 50, 6


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did. The tuples hold "name: what about it", one tensor an entry."""

    origin: str  # where the weights are from, in words
    tensors: int  # that the network has
    loaded: int  # of them
    parameters: int  # numbers in those loaded, running statistics not counted
    renamed: str = ""  # what was done to the file's names; empty if nothing
    adapted: tuple[str, ...] = ()  # the first convolution, carried to other channels
    skipped: tuple[str, ...] = ()  # still random: in the file with another shape, or not at all
    unknown: tuple[str, ...] = ()  # in the file only
    converted: tuple[str, ...] = ()  # in the file in another number format

    def lines(self) -> list[str]:
        """The report for people, a few lines long."""
        formats = Counter(line.partition(": ")[2] for line in self.converted)
        return [
            f"loaded {self.loaded} of {self.tensors} tensors "
            f"({self.parameters / 1e6:.1f} M parameters) from {self.origin}"
            + (f", names with {self.renamed}" if self.renamed else ""),
            *(f"adapted {line}" for line in self.adapted),
            *(f"skipped {line}" for line in _shortened(self.skipped, REPORT_LINES)),
            *(f"converted {count} tensors from {words}" for words, count in formats.items()),
            *(
                ["in the file only: " + ", ".join(_shortened(self.unknown, REPORT_LINES))]
                if self.unknown
                else []
            ),
        ]


def load_pretrained(
    network: torch.nn.Module,
    source: bool | str,
    *,
    name: str,
    task: str,
    channels: int,
    outputs: int,
    arguments: Mapping[str, Any],
    head: frozenset[str],
) -> LoadReport:
    """Copy weights into `network`, in place: the published ones if `source` is true, else those of the file.

    The network is what `build_network` gave for the same name, task, channels, outputs and arguments; `head`
    is what `head_names` gave. A head of another shape keeps its random weights, as does what surrounds an
    encoder if the file holds only the encoder. Everything else must be there: otherwise CONFIG with every
    mismatch, and nothing is loaded. CONFIG too for numbers that are not finite, UNSAFE for a file that holds
    more than tensors. The global generator is left as it was.
    """
    assert source is not False, "there is nothing to load"
    if source is True:
        spec = read_spec(name, task=task, channels=channels, outputs=outputs, arguments=arguments)
        given = published_weights(spec)
    else:
        path = Path(source).expanduser()
        given = Published(read_weights_file(path, option=OPTION), f"'{path}'")
    here = {key: value for key, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
    first = first_convolution(network)
    fitting = fit(given.tensors, here, head=head, first=first and f"{first}.weight", channels=channels)
    _refuse_misfits(fitting, given.origin, name=name, tensors=len(here))
    with torch.no_grad():
        for key, value in fitting.values.items():
            here[key].copy_(value)
    weights = dict(network.named_parameters(remove_duplicate=False)).keys() & fitting.values.keys()
    return LoadReport(
        given.origin,
        tensors=len(here),
        loaded=len(fitting.values),
        parameters=sum(fitting.values[key].numel() for key in weights),
        renamed=fitting.renaming.words() if source is not True else "",
        adapted=(*given.adapted, *fitting.adapted),
        skipped=tuple(fitting.skipped),
        unknown=tuple(fitting.unknown),
        converted=tuple(fitting.converted),
    )


def _refuse_misfits(fitting: Fitting, origin: str, *, name: str, tensors: int) -> None:
    if fitting.refused:
        head = f"{OPTION}: {origin} does not fit {name!r}: {len(fitting.refused)} of {tensors} tensors differ"
        if not fitting.values:
            head += f"; it is for another network, with tensors such as {', '.join(fitting.unknown[:2])}"
        raise UserError(
            "\n".join([head, *_shortened(sorted(fitting.refused), REFUSED_LINES)]),
            mend="name the network that the weights were made with (--model.name, --model.arguments), "
            "or set --model.pretrained false",
            code="CONFIG",
        )
    broken = sorted(key for key, value in fitting.values.items() if not bool(value.isfinite().all()))
    if broken:
        head = f"{OPTION}: {origin} holds numbers that are not finite, in {len(broken)} of {tensors} tensors"
        raise UserError(
            "\n".join([head, *_shortened(broken, REFUSED_LINES)]),
            mend="choose weights from before that training broke down",
            code="CONFIG",
        )


def _shortened(lines: Sequence[str], most: int) -> list[str]:
    if len(lines) <= most:
        return list(lines)
    return [*lines[:most], f"… and {len(lines) - most} more"]
