"""What a configuration tree is made of: frozen sections in which no unknown name is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.config.arguments import numbers_read

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A branch of the tree: frozen, and no name is allowed that is not written here."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


class Spec(Section):
    """A section that is one value of its parent: a flag gives it whole, as a name or as YAML.

    What has an import path, `module:name`, for a name is the user's own, and goes to the field `own`.
    """

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, written: Any) -> Any:
        if isinstance(written, str):
            written = {written: None}
        if not isinstance(written, dict):
            return written
        specs = {name: cls.arguments_of(spec) for name, spec in written.items()}
        own = {name: specs.pop(name) for name in list(specs) if ":" in str(name)}
        return {**specs, "own": own} if own else specs

    @classmethod
    def arguments_of(cls, written: Any) -> Any:
        """The arguments that are meant by what stands behind a name."""
        return {} if written is None else written


class Own(Section):
    """Something of the user's: names that are not written here are its arguments."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """Its keyword arguments."""
        return {name: numbers_read(value) for name, value in (self.model_extra or {}).items()}


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
