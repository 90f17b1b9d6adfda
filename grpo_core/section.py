"""The base of everything that is read from a job spec: frozen, strict about types, closed to unknown fields.

**How to add a field.** Give it a default that means what a job without the field does, and annotate it with the format
of the coming release: `threads: Annotated[int, Since(2)] = 0`. A new value of an old field is declared with
`Since(2, values=("native",))`, a raised bound with `Since(2, above=1)`. Where `tests/unit/spec_formats.json` lists the
current `SPEC_FORMAT`, that format is released: raise it by one first. Nothing else is needed. Jobs that do not use the
field are stored without it, so that older workers read them; jobs that use it wait in queues that only newer workers
listen to; and a test fails for a field without a declaration. The default of such a field never changes, because in
stored specs its absence means that default.

Owns how a part of a spec is validated, written and versioned; knows no field. Invariant: what is written holds nothing
newer than its format, so that the digest of an older spec stays the same and a reader from before can still read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic.fields import FieldInfo

SPEC_FORMAT = 2
"""The newest format of specs that this release reads and writes. A release that adds to the spec adds one to it."""


@dataclass(frozen=True)
class Since:
    """Marks a field as unknown to readers of formats before `format`; with `values` or `above`, only such values."""

    format: int
    values: tuple[object, ...] = ()
    above: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the field itself is new."""
        return not self.values and self.above is None

    def covers(self, value: object, field: FieldInfo) -> bool:
        """Whether a reader of an earlier format cannot read this value of the field."""
        if self.whole:
            return field.is_required() or value != _default(field)
        parts = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
        is_above = self.above is not None and isinstance(value, int | float) and value > self.above
        return is_above or any(part in self.values for part in parts)


class Section(BaseModel):
    """Base of every section."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        serialize_by_alias=True,
    )

    @field_validator("*")
    @classmethod
    def _one_zero(cls, value: object) -> object:
        """-0.0 equals 0.0 and means the same, but prints differently: equal specs would differ in their digest."""
        return value + 0.0 if isinstance(value, float) else value

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        unused = self.unused_later_fields()
        return {name: value for name, value in written.items() if name not in unused}

    def unused_later_fields(self) -> set[str]:
        """The fields that an earlier format does not have and that say nothing here."""
        return {name for name, field in _later_fields(type(self)).items() if getattr(self, name) == _default(field)}

    def needed_format(self) -> int:
        """The oldest format that can express this: what its readers must know."""
        needed = [1]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            needed += [mark.format for mark in marks(field) if mark.covers(value, field)]
            needed += [inner.needed_format() for inner in _sections(value)]
        return max(needed)


def marks(field: FieldInfo) -> list[Since]:
    """What a field is marked with."""
    return [mark for mark in field.metadata if isinstance(mark, Since)]


@cache
def _later_fields(section: type[Section]) -> dict[str, FieldInfo]:
    return {
        name: field
        for name, field in section.model_fields.items()
        if not field.is_required() and any(mark.whole for mark in marks(field))
    }


def _default(field: FieldInfo) -> object:
    return field.get_default(call_default_factory=True, validated_data={})


def _sections(value: Any) -> Iterable[Section]:
    """The sections in a field's value."""
    if isinstance(value, Section):
        yield value
    elif isinstance(value, tuple | dict):
        parts = value.values() if isinstance(value, dict) else value
        for part in cast("Iterable[Any]", parts):
            yield from _sections(part)
