"""JSON as this project accepts it: one meaning for every text, on every machine.

Refuses what Python's parser lets through (NaN, numbers beyond a float, the last of two equal keys, lone
surrogates, nesting deep enough to exhaust the stack), and owns the pointers that say where. Knows nothing of any
schema. Invariant: a value that is refused in a document that can be parsed is refused with its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from grpo_core.errors import GrpoError

MAX_DEPTH = 32
MAX_DIGITS = 400

Path = tuple[str | int, ...]
"""Keys and indexes that lead to a value."""


class StrictJsonError(GrpoError):
    """The text is not valid JSON; the message says what to change, and where."""

    def __init__(self, detail: str, remedy: str, path: Path = ()) -> None:
        self.detail, self.remedy, self.path = detail, remedy, path
        super().__init__(f"{f'{self.pointer}: ' if path else ''}{detail}. {remedy}")

    @property
    def pointer(self) -> str:
        """RFC 6901 pointer to the place; empty for the whole text."""
        return pointer_of(self.path)

    def below(self, key: str | int) -> StrictJsonError:
        """The same error, one level up: `key` is put in front of the pointer."""
        return StrictJsonError(self.detail, self.remedy, (key, *self.path))


def loads(text: str | bytes) -> Any:
    """Parse `text`, or raise `StrictJsonError`."""
    if isinstance(text, bytes):
        text = _decode(text)
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"This is not JSON: {error}", "Correct it there.") from error
    _check(value)
    return value


def dumps(value: object) -> str:
    """Compact JSON in one line with non-ASCII text kept; raises ValueError on NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def canonical(value: object) -> str:
    """The canonical text of `value` for hashing: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True, allow_nan=False)


def pointer_of(path: Path) -> str:
    """The RFC 6901 pointer of a path of keys and indexes."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)


@dataclass(frozen=True, slots=True)
class _Refused:
    """Placeholder for an invalid value until its position is known, which the parser does not report."""

    detail: str
    remedy: str


def parts_of(pointer: str) -> list[str]:
    """The keys and indexes in a pointer, as text."""
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"The text is not UTF-8 (byte {error.start})", "Send it encoded as UTF-8.") from error


def _check_depth(text: str) -> None:
    """Count brackets outside strings before parsing, so that the parser never recurses deeply."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise StrictJsonError(f"The JSON is nested more than {MAX_DEPTH} levels deep", "Flatten it.")
        elif character in "]}":
            depth -= 1


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            value = _Refused(f"The key {key[:80]!r} occurs twice in one object", "Keep one of them.")
        result[key] = value
    return result


def _constant(name: str) -> _Refused:
    return _Refused(f"{name} is not a JSON number", "Give a finite number.")


def _finite_float(text: str) -> float | _Refused:
    value = float(text)
    return value if math.isfinite(value) else _Refused(f"The number {text[:40]} is too large", "Give a finite number.")


def _bounded_int(text: str) -> int | _Refused:
    if len(text) > MAX_DIGITS:
        return _Refused(f"A number has {len(text)} digits", f"Give one with at most {MAX_DIGITS}.")
    return int(text)


def _check(value: Any) -> None:
    """Refuse what the parser's hooks marked, and lone surrogates and NUL, which no UTF-8 file, object key or database
    accepts. A bad key is reported at its parent object, because its own pointer could not be encoded."""
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise StrictJsonError("A string holds NUL or half of a surrogate pair", "Send valid Unicode text.")
    elif isinstance(value, dict):
        for key in value:
            _check(key)
        _check_all(value.items())
    elif isinstance(value, list):
        _check_all(enumerate(value))
    elif isinstance(value, _Refused):
        raise StrictJsonError(value.detail, value.remedy)


def _check_all(items: Iterable[tuple[str | int, Any]]) -> None:
    for key, item in items:
        try:
            _check(item)
        except StrictJsonError as error:
            raise error.below(key) from None


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
