"""A job's progress while someone watches: a bar with a reward sparkline on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, Any

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32

OnEvent = Callable[[dict[str, Any]], None]


def sparkline(values: list[float], width: int = SPARK_WIDTH) -> str:
    """Values as a row of blocks, at most `width`: neighbours are averaged, the lowest is the lowest block."""
    if not values:
        return ""
    size = min(width, len(values))
    cuts = [len(values) * i // size for i in range(size + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


@contextmanager
def show_progress(job: dict[str, Any], stream: IO[str]) -> Generator[OnEvent]:
    """Yields what to tell of each event; draws on a terminal, prints lines elsewhere."""
    if stream.isatty():
        with _bar(job, stream) as on_event:
            yield on_event
    else:
        _write(stream, f"{job['id']}: {job['status']}")
        yield _Lines(job, stream).take


class _Lines:
    """One line for each step that is told of, and for what else matters."""

    def __init__(self, job: dict[str, Any], stream: IO[str]) -> None:
        self._total = job["total_steps"]
        self._stream = stream

    def take(self, event: dict[str, Any]) -> None:
        text = _describe(event, self._total)
        if text:
            _write(self._stream, text)


@contextmanager
def _bar(job: dict[str, Any], stream: IO[str]) -> Generator[OnEvent]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    rewards: list[float] = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reward]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        task = progress.add_task(job["status"], total=job["total_steps"] or None, reward="")

        def take(event: dict[str, Any]) -> None:
            data = event["data"]
            if event["type"] == "metric" and isinstance(data.get("reward"), int | float):
                rewards.append(data["reward"])
                progress.update(task, completed=event["step"], reward=f"reward {rewards[-1]:6.3f} {sparkline(rewards)}")
            elif event["type"] == "status":
                progress.update(task, description=_printable(str(data.get("phase") or data.get("status") or "")))
            elif event["type"] in ("warning", "error"):
                progress.console.print(Text(_describe(event, job["total_steps"])))

        yield take


def _describe(event: dict[str, Any], total: int) -> str:
    data = event["data"]
    match event["type"]:
        case "metric":
            reward = data.get("reward")
            return f"step {event['step']}/{total}" + (
                f"  reward {reward:.3f}" if isinstance(reward, int | float) else ""
            )
        case "status":
            return _printable(str(data.get("phase") or data.get("status") or ""))
        case "warning" | "error":
            return _printable(f"{event['type']} {data.get('code', '')}: {data.get('message', '')}")
        case "checkpoint":
            return f"checkpoint at step {event['step']}"
        case _:
            return ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _write(stream: IO[str], text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
