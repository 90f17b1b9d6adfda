"""The live view of a job on a terminal: its state, the reward as a plot, every metric as a sparkline, and warnings.

Owns what is kept of a job's events and how it is drawn. Knows no client: it receives events, each once. Invariant: the
view is a function of the events so far, so a reconnect changes nothing.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_client.cli.text import (
    BLOCKS,
    OVER,
    SHOWN,
    OnEvent,
    evaluated,
    number_at,
    printable,
    sparkline,
    thin,
    verdicts,
)
from grpo_client.results import Event, Job
from grpo_client.words import METRICS

PLOT_HEIGHT = 8
WARNINGS_SHOWN = 4
PACE_STEPS = 20
"""Number of steps whose mean duration gives the time left."""

_NUMBERS = [(short, path, form) for path, (short, form) in METRICS.items() if path != "reward"]


@dataclass
class Seen:
    """The state of a job, from its events so far."""

    job: Job
    status: str = ""
    phase: str = ""
    step: int = 0
    steps: list[int] = field(default_factory=list[int])
    """The steps with metrics, in order."""
    series: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By name: `reward`, `reward NAME`, and the rows of the table."""
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Warnings, errors and results: kind and text."""

    def __post_init__(self) -> None:
        self.status, self.phase = self.job.status, self.job.phase or ""

    def take(self, event: Event) -> None:
        """Take the next event."""
        data = event.data
        match event.type:
            case "metric":
                self._take_step(event.step, data)
            case "status":
                self.status = str(data.get("status") or self.status)
                self.phase = str(data.get("phase") or ("" if "status" in data else self.phase))
            case "warning" | "error":
                at = f"step {event.step}: " if event.step else ""
                self._note(event.type, f"{at}{data.get('code', '')}: {data.get('message', '')}")
            case "log" if data.get("code") == OVER:
                # In place of the warning, which tells of it as present.
                code = printable(str(data.get("audit", "")))
                self.notes = [note for note in self.notes if note[0] != "warning" or f"{code}: " not in note[1]]
                self._note("over", f"{code}: {data.get('message', '')}")
            case "evaluation" if data.get("stage") == "during":
                self.notes = [note for note in self.notes if note[0] != "evaluation"]
                self._note("evaluation", evaluated(data))
            case "log" if data.get("code") == "stopped_early":
                self._note("stopped", str(data.get("message", "")))
            case "log" if data.get("code") in SHOWN:
                # Only the last one: each says how far the export is.
                self.notes = [note for note in self.notes if note[0] != "export"]
                self._note("export", str(data.get("message", "")))
            case "evaluation" if "paired" in data:
                for verdict in verdicts(data):
                    self._note("result", verdict)
            case _:
                pass

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the last steps; None before the first."""
        pace = self.series.get("seconds", [])[-PACE_STEPS:]
        left = self.job.total_steps - self.step
        return statistics.fmean(pace) * left if pace and left > 0 and self.status in ("running", "queued") else None

    def _take_step(self, step: int, data: dict[str, Any]) -> None:
        # A job that resumed from a checkpoint may report a step again: the new values replace the old.
        if step <= self.step:
            kept = bisect_left(self.steps, step)
            self.steps = self.steps[:kept]
            self.series = {name: values[:kept] for name, values in self.series.items()}
        self.steps.append(step)
        self.step, self.status = step, "running" if self.status == "queued" else self.status
        self._add("reward", data.get("reward"))
        for name, value in (data.get("rewards") or {}).items():
            self._add(f"reward {printable(str(name))}", value)
        for name, path, _ in _NUMBERS:
            self._add(name, number_at(data, path))

    def _add(self, name: str, value: object) -> None:
        if isinstance(value, int | float):
            self.series.setdefault(name, []).append(float(value))

    def _note(self, kind: str, text: str) -> None:
        self.notes.append((kind, printable(text)))


@contextmanager
def show_live(job: Job, stream: IO[str]) -> Generator[OnEvent]:
    """Draw the job on a terminal until the block ends; yields the function to call for each event."""
    seen, console = Seen(job), Console(file=stream)
    with Live(console=console, get_renderable=lambda: draw(seen, console.width), refresh_per_second=4):
        yield seen.take


def draw(seen: Seen, width: int) -> RenderableType:
    """The whole view, for a terminal of this width in columns."""
    parts: list[RenderableType] = [_where(seen)]
    rewards = seen.series.get("reward", [])
    if len(rewards) > 1:
        parts += [Text(), *(Text(line) for line in plot(rewards, width=max(20, width - 16)))]
    if seen.series:
        parts += [Text(), _numbers(seen, max(8, width - 46))]
    hidden = len(seen.notes) - WARNINGS_SHOWN
    if hidden > 0:
        parts.append(Text(f"{hidden} earlier; all of them: grpo watch {seen.job.id} | cat", style="dim"))
    styles = {
        "warning": "yellow",
        "error": "bold red",
        "result": "bold green",
        "over": "dim",
        "evaluation": "cyan",
        "stopped": "cyan",
        "export": "cyan",
    }
    parts += [Text(text, style=styles[kind]) for kind, text in seen.notes[-WARNINGS_SHOWN:]]
    title = Text(printable(f"{seen.job.id}  {seen.job.name or ''}".rstrip()))
    return Panel(Group(*parts), title=title, title_align="left")


def plot(values: list[float], *, width: int, height: int = PLOT_HEIGHT) -> list[str]:
    """A curve as lines of blocks with the axis on the left: at most `width` columns and `height` lines."""
    means = thin(values, width)
    low, high = min(means), max(means)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    levels = height * len(BLOCKS)
    filled = [1 + round((mean - low) / (high - low) * (levels - 1)) for mean in means]
    lines: list[str] = []
    for row in range(height - 1, -1, -1):
        label = {height - 1: f"{high:8.3f}", 0: f"{low:8.3f}"}.get(row, " " * 8)
        cells = (min(max(level - row * len(BLOCKS), 0), len(BLOCKS)) for level in filled)
        lines.append(f"{label} │" + "".join(BLOCKS[cell - 1] if cell else " " for cell in cells))
    return lines


def duration(seconds: float) -> str:
    """An approximate duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _where(seen: Seen) -> RenderableType:
    total = seen.job.total_steps
    left = seen.seconds_left
    words = [seen.status + (f" ({seen.phase})" if seen.phase else ""), f"step {seen.step}/{total}"]
    words += [f"about {duration(left)} left"] if left is not None else []
    row = Table.grid(padding=(0, 2))
    row.add_row(
        Text(printable("   ".join(words)), style="bold"), ProgressBar(total=total or 1, completed=seen.step, width=30)
    )
    return row


def _numbers(seen: Seen, spark_width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (("", "left"), ("first", "right"), ("now", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rewards = [name for name in seen.series if name.startswith("reward")]
    rows: Sequence[tuple[str, str]] = [(name, ".3f") for name in rewards]
    rows = [*rows, *((name, form) for name, _, form in _NUMBERS if name in seen.series)]
    for name, form in rows:
        values = seen.series[name]
        first, now = (statistics.fmean(part) for part in (values[:5], values[-5:]))
        table.add_row(name, f"{first:{form}}", f"{now:{form}}", sparkline(values, spark_width))
    return table
