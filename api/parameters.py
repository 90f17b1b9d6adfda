"""What a handler says of its query parameters: their names, whether they repeat, and what they take, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from litestar.params import ParameterKwarg, QueryParameter

from api.compat import parameters_of

if TYPE_CHECKING:
    from litestar.handlers import BaseRouteHandler

METADATA = "metadata[key]"
"""The name of the metadata filter, which stands for any number of parameters."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One query parameter."""

    expected: str
    """What it takes, to end the sentence `Give ...`."""
    repeats: bool = False
    is_choice: bool = False
    """Whether it takes one of a few words."""


@cache
def declared(handler: BaseRouteHandler) -> Mapping[str, Declared]:
    """The query parameters of a handler by name."""
    found: dict[str, Declared] = {}
    for name, field in parameters_of(handler).items():
        if name == "metadata":
            found[METADATA] = Declared(expected="a pair as metadata[key]=value")
        if isinstance(field.kwarg_definition, QueryParameter):
            kind = _plain_type(field.annotation)
            expected = _expected(kind, field.kwarg_definition)
            found[field.kwarg_definition.name or name] = Declared(
                expected=expected, repeats=get_origin(kind) is list, is_choice=expected.startswith("one of ")
            )
    return found


def _plain_type(annotation: Any) -> Any:
    """The side of an optional type that is not None."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    is_optional = type(None) in get_args(annotation)
    return options[0] if is_optional and len(options) == 1 else annotation


def _expected(kind: Any, bounds: ParameterKwarg) -> str:
    if get_origin(kind) is list:
        return _expected(get_args(kind)[0], bounds)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"a whole number from {bounds.ge:.0f} to {bounds.le:.0f}"
    if kind is date:
        return "a day such as 2026-11-30"
    if kind is float:
        return "a finite number"
    return f"text of {bounds.min_length} to {bounds.max_length} characters" if bounds.max_length else "text"
