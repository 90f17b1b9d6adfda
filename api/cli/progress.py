"""What is shown while something takes long: a job's progress, and bytes on their way.

A live view on a terminal (`live`), plain lines elsewhere. Owns which of the two, and the lines. Invariant: nothing a
model or another person wrote reaches the terminal but as printable text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import IO, Any

from api.cli.text import OnEvent, count, printable

OnBytes = Callable[[str, int, int], None]
"""Told of a file's name, the bytes of it that are done, and its size."""


@contextmanager
def show_progress(job: dict[str, Any], stream: IO[str]) -> Generator[OnEvent]:
    """Yields what to tell of each event; draws on a terminal, prints lines elsewhere."""
    if stream.isatty():
        from api.cli.live import show_live  # rich, which a pipe does not need

        with show_live(job, stream) as on_event:
            yield on_event
    else:
        _write(stream, f"{job['id']}: {job['status']}")
        yield _Lines(job, stream).take


@contextmanager
def show_bytes(stream: IO[str], *, lines: bool = True) -> Generator[OnBytes]:
    """Yields what to tell of bytes on their way: bars on a terminal; elsewhere a line for each file that is done."""
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
    """A bar for each file under way; one that is done becomes a line."""
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
    """One line for each step that is told of, and for what else matters."""

    def __init__(self, job: dict[str, Any], stream: IO[str]) -> None:
        self._total = job["total_steps"]
        self._stream = stream
        self._last = str(job["status"])

    def take(self, event: dict[str, Any]) -> None:
        text = describe(event, self._total)
        # A phase is told of by the worker and by the training process: one line is enough.
        if text and not (event["type"] == "status" and text == self._last):
            _write(self._stream, text)
            self._last = text


_IN_A_LINE = (
    ("completion_tokens_mean", "tokens", ".0f"),
    ("kl", "kl", ".3g"),
    ("zero_variance_share", "no variance", ".0%"),
)


def describe(event: dict[str, Any], total: int) -> str:
    """An event in a line; empty for those that are not worth one."""
    data = event["data"]
    match event["type"]:
        case "metric":
            words = [f"step {event['step']}/{total}"]
            for field, name, form in (("reward", "reward", ".3f"), *_IN_A_LINE):
                value = data.get(field)
                words += [f"{name} {value:{form}}"] if isinstance(value, int | float) else []
            return "  ".join(words)
        case "status":
            return printable(str(data.get("phase") or data.get("status") or ""))
        case "warning" | "error":
            return printable(f"{event['type']} {data.get('code', '')}: {data.get('message', '')}")
        case "checkpoint":
            return f"checkpoint at step {event['step']}"
        case "evaluation" if "paired" in data:
            return printable(str(data["paired"]["strict"]["verdict"]))
        case _:
            return ""


def _write(stream: IO[str], text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
