"""Text for terminals: escaping, sparklines, and counts with their noun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from grpo_client.results import Event

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32

OVER = "audit_over"
"""The code of a log event: what an audit warned of is past."""
SHOWN = ("stopped_early", "export_progress", "export")
"""Codes of log events whose message is for who follows the job."""

OnEvent = Callable[[Event], None]


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
    """A count with its noun: `no files`, `1 file`, `2,000 files`."""
    return f"{f'{number:,}' if number else 'no'} {thing}{'' if number == 1 else 's'}"


def number_at(data: Any, path: str) -> float | None:
    """A number in nested objects, such as `seconds.total`; None where there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return float(data) if isinstance(data, int | float) else None


def verdicts(data: Mapping[str, Any]) -> list[str]:
    """The verdicts after training: against the base model and, of a job from a checkpoint, first against that."""
    pairs = (data.get(name) for name in ("paired_start", "paired"))
    return [str((paired.get("metric") or paired["strict"])["verdict"]) for paired in pairs if paired]


def evaluated(data: Mapping[str, Any]) -> str:
    """An evaluation during training, in one line."""
    point: Mapping[str, Any] = data.get("curve") or {}
    value, interval = point.get("value"), point.get("interval") or ()
    shown = "unknown" if value is None else f"{value:.3g}"
    between = f" (95 % {interval[0]:.3g} to {interval[1]:.3g})" if len(interval) == 2 else ""
    questions = count(point.get("questions", 0), "question")
    best = f"; best so far: step {data['best_step']}" if data.get("best_step") else ""
    return f"evaluation at step {point.get('step')}: {point.get('metric')} {shown}{between}, {questions}{best}"


def printable(text: str) -> str:
    """Text in one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
