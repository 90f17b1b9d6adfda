"""Converts a data set in CSV, Parquet or a JSON list to JSON lines, in a separate process for untrusted files.

Owns which formats are accepted besides JSON lines, and the limits of reading them. `convert_apart` runs the conversion
in a process with limited memory and time, because a library in C++ decodes Parquet. Invariant: the output is JSONL that
`JsonlChecker` has accepted.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from grpo_core.datasets.card import Subset
from grpo_core.datasets.files import DataFile, Kind
from grpo_core.datasets.jsonl import DatasetSummary, JsonlChecker
from grpo_core.datasets.row_reader import Columns, json_line
from grpo_core.datasets.rows import DatasetError, DatasetTooLargeError, error
from grpo_core.datasets.tables import read_records
from grpo_core.spec import Problem

SECONDS: Final = 300
MEMORY_BYTES: Final = 6 * 1024**3
"""Limit of the address space, most of which Arrow reserves without using it."""

_KINDS: Mapping[str, Kind] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "json"}
_NAMES: Mapping[Kind, str] = {"csv": "CSV", "tsv": "tab-separated", "parquet": "Parquet", "json": "JSON"}
_BATCH_BYTES = 1024**2


def kind_of(name: str) -> Kind | None:
    """Return the format of a file that must be converted, by its name; None for JSON lines and unknown formats."""
    return _KINDS.get(Path(name).suffix.lower())


def convert(
    source: Path, kind: Kind, target: Path, *, max_rows: int, max_bytes: int, stop_early: bool = False
) -> DatasetSummary:
    """Write the rows of `source` to `target` as JSON lines. Raises `DatasetError`.

    Also raises for more than `max_rows` rows; with `stop_early` it ends after that many.
    """
    checker = JsonlChecker(max_rows=max_rows, max_bytes=max_bytes)
    held = bytearray()
    with source.open("rb") as raw, target.open("wb") as file:
        try:
            for number, record in enumerate(_records(raw, kind)):
                if stop_early and number == max_rows:
                    break
                held += json_line(record)
                if len(held) > _BATCH_BYTES:
                    checker.feed(bytes(held))
                    file.write(held)
                    held.clear()
            checker.feed(bytes(held))
            file.write(held)
            return checker.finish()
        except DatasetError as reason:
            raise _by_row(reason) from reason
        except (ValueError, EOFError, csv.Error) as reason:  # pyarrow's errors are ValueErrors too
            said = (str(reason).splitlines() or [""])[0][:200]
            detail = f"the file cannot be read as {_NAMES[kind]}: {said or type(reason).__name__}"
            raise error("unreadable", detail, _remedy(kind)) from reason


def convert_apart(source: Path, kind: Kind, target: Path, *, max_rows: int, max_bytes: int) -> DatasetSummary:
    """Convert in a separate process. Raises `DatasetError` too if the process crashes or takes too long."""
    order = {"source": str(source), "kind": kind, "target": str(target), "max_rows": max_rows, "max_bytes": max_bytes}
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "grpo_core.datasets.convert"],
            input=json.dumps(order).encode(),
            capture_output=True,
            timeout=SECONDS,
            cwd=Path(__file__).resolve().parents[2],
            env={**environment, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
            check=False,
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as reason:
        how = f"takes more than {SECONDS} s" if isinstance(reason, subprocess.TimeoutExpired) else "ends the reader"
        raise error("unreadable", f"reading the file as {_NAMES[kind]} {how}", _remedy(kind)) from reason
    if "problems" in answer:
        kind_of_error = DatasetTooLargeError if answer["too_large"] else DatasetError
        raise kind_of_error([Problem(**one) for one in answer["problems"]], more=answer["more"])
    return DatasetSummary(**answer["summary"])


def _records(raw: Any, kind: Kind) -> Iterator[Mapping[str, Any]]:
    columns = Columns({}, everything=True)
    for record in read_records(raw, DataFile("", kind), Subset(), columns, typed=False):
        yield {str(name): value for name, value in record.items()}


def _by_row(reason: DatasetError) -> DatasetError:
    """Call the lines of the output rows, because the file may have other lines."""
    reason.problems = [
        Problem(
            pointer=one.pointer.replace("/lines/", "/rows/", 1),
            code=one.code,
            detail=one.detail,
            remedy=one.remedy,
        )
        for one in reason.problems
    ]
    return reason


def _remedy(kind: Kind) -> str:
    return f"Write it as {_NAMES[kind]} in UTF-8 again, or send JSON lines."


def _limit() -> None:
    """Limit the memory of this process, where the system can; the parent limits its time."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """Read a request from standard input, convert, and write the result to standard output."""
    order = json.loads(sys.stdin.buffer.read())
    _limit()
    try:
        summary = convert(
            Path(order["source"]),
            order["kind"],
            Path(order["target"]),
            max_rows=order["max_rows"],
            max_bytes=order["max_bytes"],
        )
        answer: dict[str, Any] = {"summary": asdict(summary)}
    except DatasetError as reason:
        problems = [asdict(one) for one in reason.problems]
        answer = {"problems": problems, "more": reason.more, "too_large": isinstance(reason, DatasetTooLargeError)}
    except MemoryError:
        problem = Problem(
            pointer="", code="too_large", detail="reading the file takes too much memory", remedy="Split the file."
        )
        answer = {"problems": [asdict(problem)], "more": False, "too_large": True}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
