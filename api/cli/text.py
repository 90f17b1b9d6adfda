"""Text for terminals: what cannot steer one, values drawn as blocks, and how many there are of a thing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32

OnEvent = Callable[[dict[str, Any]], None]


def sparkline(values: list[float], width: int = SPARK_WIDTH) -> str:
    """Values as a row of blocks, at most `width`: neighbours are averaged, the lowest is the lowest block."""
    means = thin(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def thin(values: list[float], width: int) -> list[float]:
    """At most `width` values: neighbours are averaged."""
    size = min(width, len(values))
    cuts = [len(values) * i // size for i in range(size + 1)] if size else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]


def count(number: int, thing: str) -> str:
    """How many of a thing: `no files`, `1 file`, `2,000 files`."""
    return f"{f'{number:,}' if number else 'no'} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Text that cannot steer a terminal, in one line."""
    return "".join(c if c.isprintable() else " " for c in text)
