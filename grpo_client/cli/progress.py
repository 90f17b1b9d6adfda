"""Progress of a job, and of uploads and downloads.

A live view on a terminal (`live`), plain lines elsewhere. Owns which of the two, and the lines. Invariant: text written
by a model or another person reaches the terminal only as printable text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import IO

from grpo_client.cli.text import OVER, SHOWN, OnEvent, count, evaluated, printable, verdicts
from grpo_client.results import Event, Job
from grpo_client.words import METRICS

OnBytes = Callable[[str, int, int], None]
"""Called with a file's name, the bytes done, and its size."""


@contextmanager
def show_progress(job: Job, stream: IO[str]) -> Generator[OnEvent]:
    """Yields the function to call for each event; draws on a terminal, prints lines elsewhere."""
    if stream.isatty():
        from grpo_client.cli.live import show_live  # rich, which a pipe does not need

        with show_live(job, stream) as on_event:
            yield on_event
    else:
        _write(stream, f"{job.id}: {job.status}")
        yield _Lines(job, stream).take


@contextmanager
def show_bytes(stream: IO[str], *, lines: bool = True) -> Generator[OnBytes]:
    """Yields the function to call for transferred bytes: bars on a terminal, elsewhere a line for each finished
    file."""
    if stream.isatty():
        with _bars(stream) as on_bytes:
            yield on_bytes
        return

    def tell(path: str, done: int, size: int) -> None:
        if done == size and lines:
            _write(stream, printable(f"  {path}  {count(size, 'byte')}"))

    yield tell


@contextmanager
def _bars(stream: IO[str]) -> Generator[OnBytes]:
    """A bar for each file in progress; a finished one becomes a line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
    from rich.text import Text

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=stream)) as progress:

        def tell(path: str, done: int, size: int) -> None:
            if done < size and path not in tasks:
                tasks[path] = progress.add_task(printable(path), total=size)
            if done < size:
                progress.update(tasks[path], completed=done)
                return
            if path in tasks:
                progress.remove_task(tasks.pop(path))
            progress.console.print(Text(printable(f"  {path}  {count(size, 'byte')}")))

        yield tell


class _Lines:
    """One line for each step with metrics, and for other important events."""

    def __init__(self, job: Job, stream: IO[str]) -> None:
        self._total = job.total_steps
        self._stream = stream
        self._last = str(job.status)

    def take(self, event: Event) -> None:
        text = describe(event, self._total)
        # The worker and the training process both report a phase: one line is enough.
        if text and not (event.type == "status" and text == self._last):
            _write(self._stream, text)
            self._last = text


_IN_A_LINE = ("reward", "completion_tokens_mean", "kl", "zero_variance_share")


def describe(event: Event, total: int) -> str:
    """An event in one line; empty for unimportant ones."""
    data = event.data
    match event.type:
        case "metric":
            words = [f"step {event.step}/{total}"]
            for field in _IN_A_LINE:
                (name, form), value = METRICS[field], data.get(field)
                words += [f"{name} {value:{form}}"] if isinstance(value, int | float) else []
            return "  ".join(words)
        case "status":
            return printable(str(data.get("phase") or data.get("status") or ""))
        case "warning" | "error":
            return printable(f"{event.type} {data.get('code', '')}: {data.get('message', '')}")
        case "checkpoint":
            return f"checkpoint at step {event.step}"
        case "evaluation" if data.get("stage") == "during":
            return printable(evaluated(data))
        case "log" if data.get("code") in SHOWN:
            return printable(str(data.get("message", "")))
        case "evaluation" if "paired" in data:
            return printable(" ".join(verdicts(data)))
        case "log" if data.get("code") == OVER:
            return printable(f"over {data.get('audit', '')}: {data.get('message', '')}")
        case _:
            return ""


def _write(stream: IO[str], text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
