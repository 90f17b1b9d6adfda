"""Templates of graders: text with `{{item.path}}` and `{{sample.path}}` in it.

    {{item.answer}}  {{ sample.output_json.name }}  {{item.options[2].text}}  {{item['a column']}}

Owns their syntax and how a value becomes text. Invariant: a template is parsed once, before values are inserted, so
that no text in a completion or a row is ever parsed as a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

Root = Literal["item", "sample"]
SAMPLE_FIELDS: Final = ("output_text", "output_json", "output_tools", "choices")

_PART: Final = re.compile(r"\.?([^\W\d][\w-]*)|\[([0-9]{1,9})\]|\['([^'\]]{1,128})'\]")
_MAX_PARTS: Final = 32


class TemplateError(ValueError):
    """The text is not a template; the message says what to write."""


class MissingValueError(LookupError):
    """A path has no value. `root` says where it is missing: in the row (`item`) or the completion (`sample`)."""

    def __init__(self, path: Path, part: str | int) -> None:
        super().__init__(f"{path} has no {part!r}")
        self.root: Root = path.root


@dataclass(frozen=True, slots=True)
class Path:
    """A path into the row (`item`) or the completion (`sample`)."""

    root: Root
    parts: tuple[str | int, ...]

    def __str__(self) -> str:
        return self.root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.parts)


class Template:
    """A parsed template."""

    def __init__(self, text: str) -> None:
        self._segments: list[str | Path] = []
        at = 0
        while (start := text.find("{{", at)) >= 0 and (end := text.find("}}", start)) >= 0:
            self._segments += [text[at:start], read_path(text[start + 2 : end])]
            at = end + 2
        self._segments.append(text[at:])

    @property
    def paths(self) -> list[Path]:
        """The paths in the template, in order."""
        return [segment for segment in self._segments if isinstance(segment, Path)]

    def render(self, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
        """Return the text with the values inserted. Raises `MissingValueError`."""
        return "".join(
            segment if isinstance(segment, str) else as_text(look_up(segment, item, sample))
            for segment in self._segments
        )


def read_path(text: str) -> Path:
    """Parse the path between `{{` and `}}`. Raises `TemplateError`."""
    inner = text.strip()
    root = next((root for root in ("item", "sample") if inner.startswith(root)), None)
    parts = None if root is None else _read_parts(inner[len(root) :])
    if root is None or parts is None:
        raise TemplateError(
            f"{{{{{inner[:60]}}}}}, which is no path: a path is item or sample, then .name, [0] or ['a name'] each"
        )
    if root == "sample" and parts and parts[0] not in SAMPLE_FIELDS:
        raise TemplateError(f"{{{{{inner[:60]}}}}}, and a sample has only {', '.join(SAMPLE_FIELDS)}")
    return Path(cast("Root", root), tuple(parts))


def look_up(path: Path, item: Mapping[str, Any], sample: Mapping[str, Any]) -> Any:
    """Return the value at a path. Raises `MissingValueError`."""
    value: Any = item if path.root == "item" else sample
    for part in path.parts:
        try:
            if isinstance(value, Mapping) != isinstance(part, str) or isinstance(value, str):
                raise MissingValueError(path, part)
            value = value[part]
        except (LookupError, TypeError):
            raise MissingValueError(path, part) from None
    return value


def as_text(value: Any) -> str:
    """Return a string as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_parts(text: str) -> list[str | int] | None:
    """Parse the path after its root; None if it is not a path or is too long."""
    parts: list[str | int] = []
    at = 0
    while at < len(text) and len(parts) < _MAX_PARTS:
        found = _PART.match(text, at)
        if found is None or (found[1] and text[at] != "."):
            return None
        name, index, quoted = found.groups()
        parts.append(int(index) if index is not None else name or quoted)
        at = found.end()
    return parts if at == len(text) else None
