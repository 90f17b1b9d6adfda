"""Reads the spec that a user submits: a JSON file, with `a.b=c` changes made to it.

Owns the checks of the file itself: text that is not JSON, duplicate keys, numbers that JSON does not have. The service
checks the spec. Invariant: the result can be sent as JSON.
"""

from __future__ import annotations

import codecs
import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from grpo_client.cli.output import EXIT_REFUSED, CommandError

_TEXTS = {("name", 1), ("metadata", 2)}
"""Fields whose values are always text, by their first name and the number of names in their path."""


def read_spec(file: str, changes: list[str]) -> Any:
    """The spec in `file`, with the changes made; `-` is standard input."""
    try:
        raw = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror or error}.", EXIT_REFUSED) from error
    try:
        spec = _loads(raw)
    except ValueError as error:
        raise CommandError(f"{file} is not JSON: {error}.{_not_a_spec(raw)}", EXIT_REFUSED) from error
    for change in changes:
        set_field(spec, change)
    return spec


def set_field(spec: Any, change: str) -> None:
    """Make one change, written `a.b=c`."""
    path, mark, text = change.partition("=")
    names = path.split(".")
    if not mark or not all(names):
        raise CommandError(f"--set {change!r} is not FIELD=VALUE, such as training.steps=20.", EXIT_REFUSED)
    try:
        value: Any = _loads(text.encode())
    except ValueError:
        value = text
    if (names[0], len(names)) in _TEXTS and not isinstance(value, str | None):
        value = text  # a shell removes the quotes that would mark it as text
    section = spec
    for name in names[:-1]:
        if isinstance(section, dict):
            section = section.setdefault(name, {})
    if not isinstance(section, dict):
        raise CommandError(f"--set {change!r}: {'.'.join(names[:-1]) or 'the spec'} is not an object.", EXIT_REFUSED)
    section[names[-1]] = value


def _loads(raw: bytes) -> Any:
    """Parse JSON as the service does; raises ValueError for input that only Python accepts."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite_float
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair; write the whole character") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} occurs twice in one object; keep one of them")
        result[key] = value
    return result


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; give a finite one")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _not_a_spec(raw: bytes) -> str:
    """A hint if the file is a data set instead of a spec."""
    lines = raw.split(b"\n", 2)
    is_lines = len(lines) > 1 and all(line.strip().startswith(b"{") and b"}" in line for line in lines[:2])
    return " It looks like a data set: upload it with grpo datasets upload." if is_lines else ""
