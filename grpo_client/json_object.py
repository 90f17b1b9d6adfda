"""One JSON object of the service as a Python object: its fields are attributes, and `raw` is the JSON as it came.

Owns how JSON becomes the types that `results` names. Invariant: what a newer service adds is in `raw` and breaks
nothing, and a field that an older service does not send is missed only by the code that reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, KeysView
from datetime import datetime
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


class JsonObject:
    """Base of every result. `result["name"]` reads the JSON, as `result.name` reads the typed field."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        hint = None if name.startswith("__") or name == "raw" else fields(type(self)).get(name)
        if hint is None:
            raise AttributeError(f"{type(self).__name__} has no field {name}.", name=name, obj=self)
        key = name.rstrip("_")  # `class_`, whose name in JSON is a word of Python
        if key not in self.raw and NoneType not in get_args(hint):
            reason = "it is older than this client, or was asked for other fields"
            message = f"The service sent no {key} of this {type(self).__name__}: {reason}."
            raise AttributeError(message, name=name, obj=self)
        value = _typed(self.raw.get(key), hint)
        self.__dict__[name] = value
        return value

    def __getitem__(self, key: str) -> Any:
        return self.raw[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def keys(self) -> KeysView[str]:
        """The names in the JSON, so that `dict(result)` is the JSON."""
        return self.raw.keys()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.raw == self.raw

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.raw!r})"


@cache
def fields(kind: type[JsonObject]) -> dict[str, Any]:
    """The type of each field of a result, by its name in Python."""
    hints: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if issubclass(each, JsonObject) and each is not JsonObject:
            hints |= get_type_hints(each, vars(sys.modules[each.__module__]))
    return hints


def _typed(value: Any, hint: Any) -> Any:
    """A value of JSON as its annotation has it; what does not fit stays as it is."""
    if value is None:
        return None
    if NoneType in get_args(hint):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is list and isinstance(value, list):
        (item,) = get_args(hint)
        return [_typed(each, item) for each in value]
    if get_origin(hint) is dict and isinstance(value, dict):
        _, each = get_args(hint)
        return {key: _typed(item, each) for key, item in value.items()}
    if hint is datetime and isinstance(value, str):
        return datetime.fromisoformat(value)
    if isinstance(hint, type) and issubclass(hint, JsonObject) and isinstance(value, dict):
        return hint(value)
    return value
