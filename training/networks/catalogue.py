"""The libraries that networks come from, the names they know, and the nearest to a name they do not."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torchvision

from data_pipeline.fault import UserError
from training.networks.spec import NetworkSpec

__all__ = [
    "encoder_names",
    "smp",
    "smp_names",
    "timm",
    "timm_names",
    "torchvision",
    "torchvision_names",
    "unknown_encoder",
    "unknown_network",
]


def timm_names() -> list[str]:
    """Classifiers of timm's, without the tags of their weights."""
    return list(timm.list_models())


def torchvision_names() -> list[str]:
    """Classifiers of torchvision's, without torchvision/."""
    return list(torchvision.models.list_models(module=torchvision.models))


def smp_names() -> list[str]:
    """Segmentation networks of segmentation_models_pytorch, without smp/."""
    return [architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()]


def encoder_names() -> list[str]:
    """What `encoder_name` of an smp network may be; tu- stands before a name of timm's."""
    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm_names())]


_NAMES: dict[str, tuple[str, Callable[[], list[str]], str]] = {
    "torchvision": (
        "torchvision/",
        torchvision_names,
        "import torchvision.models as m; print(*m.list_models(m))",
    ),
    "segmentation_models_pytorch": (
        "smp/",
        smp_names,
        "import segmentation_models_pytorch as s; print(*s.MODEL_ARCHITECTURES_MAPPING)",
    ),
    "timm": ("", timm_names, "import timm; print(*timm.list_models())"),
}


def unknown_network(spec: NetworkSpec) -> UserError:
    """CONFIG for a name that `spec.library` does not know, with the nearest name of any library."""
    ours = {"mlp": "mlp", "unet": "unet"}
    tails = dict(ours)
    # The last one wins: of two networks of one name, that of the library which was asked.
    for library in sorted(_NAMES, key=lambda one: one == spec.library):
        prefix, names, _ = _NAMES[library]
        tails |= {name.lower(): prefix + name for name in names()}
    if spec.library == "timm":  # a name without anything before it
        tails |= ours
    close = difflib.get_close_matches(spec.name.lower(), tails, n=1, cutoff=0.7)
    return UserError(
        f"model.name: {spec.library} has no network {spec.name!r}"
        + (f" (did you mean {tails[close[0]]}?)" if close else ""),
        mend=f'python -c "{_NAMES[spec.library][2]}" lists them',
        code="CONFIG",
    )


def unknown_encoder(name: str) -> UserError:
    """CONFIG for an `encoder_name` that segmentation_models_pytorch does not know, with the nearest."""
    close = difflib.get_close_matches(name, encoder_names(), n=1)
    return UserError(
        f"model.arguments: segmentation_models_pytorch has no encoder {name!r}"
        + (f" (did you mean {close[0]}?)" if close else ""),
        mend='python -c "import segmentation_models_pytorch as s; print(*s.encoders.get_encoder_names())" '
        "lists them; tu- before a name of timm's is one too",
        code="CONFIG",
    )
