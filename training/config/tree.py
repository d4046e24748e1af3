"""What a configuration tree is made of: frozen sections in which no unknown name is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A branch of the tree: frozen, and no name is allowed that is not written here."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


class Spec(Section):
    """A section that is one value of its parent: a flag gives it whole, as a name or as YAML."""


def free(default: Any, **limits: Any) -> Any:
    """Mark a field that changes where, how fast or how visibly a run goes, not what it learns."""
    return Field(default, json_schema_extra={"free": True}, **limits)


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and pydantic field of every leaf of the tree."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and not issubclass(inner, Spec):
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
