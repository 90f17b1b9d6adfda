"""Reads server-sent events: bytes to events, whatever way they are cut up.

By hand, since lines end at a line feed and nowhere else here: a library that also splits at the other characters
Unicode calls line ends would tear an event apart whose text holds one. Invariant: only whole frames are yielded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

MAX_FRAME_BYTES = 16 * 1024**2


def read_events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """The events of a stream; None for each comment, which says that the other side is there.

    Raises `ValueError` for what is no event of this service.
    """
    data: list[bytes] = []
    for line in _lines(chunks):
        if line.startswith(b"data:"):
            data.append(line[5:])
        elif line.startswith(b":"):
            yield None
        elif not line and data:
            event = json.loads(b"\n".join(data))
            if not isinstance(event, dict) or not isinstance(event.get("seq"), int):
                raise ValueError("not an event")
            yield event
            data = []


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    held = b""
    for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        if len(held) > MAX_FRAME_BYTES:
            raise ValueError("a line without an end")
        for line in whole:
            yield line.removesuffix(b"\r")
