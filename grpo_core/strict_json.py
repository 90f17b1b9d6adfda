"""JSON as this project accepts it: one meaning for every text, on every machine.

Refuses what Python's parser lets through (NaN, numbers beyond a float, the last of two equal keys, lone
surrogates, nesting deep enough to exhaust the stack). Knows nothing of any schema.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from grpo_core.errors import GrpoError

MAX_DEPTH = 32
MAX_DIGITS = 400


class StrictJsonError(GrpoError):
    """The text is not acceptable JSON; the message says what to change."""


def loads(text: str | bytes) -> Any:
    """Parse `text`, or raise `StrictJsonError`."""
    if isinstance(text, bytes):
        text = _decode(text)
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except StrictJsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"This is not JSON: {error}.") from error
    _check_text(value)
    return value


def dumps(value: object) -> str:
    """Compact JSON in one line with non-ASCII text kept; raises ValueError on NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def canonical(value: object) -> str:
    """The one text of `value` that hashes are taken of: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"The text is not UTF-8 (byte {error.start}); send it encoded as UTF-8.") from error


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
                raise StrictJsonError(f"The JSON is nested more than {MAX_DEPTH} levels deep; flatten it.")
        elif character in "]}":
            depth -= 1


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"The key {key[:80]!r} occurs twice in one object; keep one of them.")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not a JSON number; give a finite number.")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError(f"The number {text[:40]} is too large; give a finite number.")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise StrictJsonError(f"A number has {len(text)} digits; at most {MAX_DIGITS} are accepted.")
    return int(text)


def _check_text(value: Any) -> None:
    """Refuse lone surrogates and NUL, which no UTF-8 file, object key or database takes."""
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise StrictJsonError("A string holds NUL or half of a surrogate pair; send valid Unicode text.")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
