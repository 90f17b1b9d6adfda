"""Opaque cursors: a position in a list as text that clients send back.

Invariant: `decode` returns what was encoded, or raises `BadCursor` for any other text.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from jobs.errors import BadCursor


def encode(position: Any) -> str:
    """A position, which JSON can hold, as a cursor."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


def decode(cursor: str) -> Any:
    """The position in a cursor. Raises `BadCursor`."""
    try:
        return json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, RecursionError):
        raise BadCursor("is not a cursor") from None
