"""What a field of a record means to people, written once, in its annotation.

API, OpenAPI document, client and documentation take it from there. Owns the mark and how it is found. Knows no record.
Invariant: a field without the mark is shown to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Shown:
    """Marks a field that people are shown, as `name: Annotated[type, Shown("What it means")]`."""

    meaning: str = ""
    """Empty where the name says it."""
    least: float | None = None
    most: float | None = None
    pattern: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShownField:
    """A marked field."""

    name: str
    type: Any
    """Without the marks."""
    mark: Shown
    marks: tuple[Any, ...]
    """The others."""
    default: Any
    """`MISSING` where there is none, or one is made."""


def plain_type(hint: Any) -> Any:
    """A type without None, and without what a mapping holds."""
    options = [one for one in get_args(hint) if one is not NoneType]
    kind = options[0] if NoneType in get_args(hint) else hint
    return get_origin(kind) or kind


@cache
def shown_fields(record: type) -> dict[str, ShownField]:
    """The marked fields of a dataclass by name, in order."""
    hints = get_type_hints(record, include_extras=True)
    found: dict[str, ShownField] = {}
    for each in fields(record):
        hint = hints[each.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        for mark in (one for one in marks if isinstance(one, Shown)):
            found[each.name] = ShownField(
                name=each.name,
                type=kind,
                mark=mark,
                marks=tuple(one for one in marks if one is not mark),
                default=each.default,
            )
    return found
