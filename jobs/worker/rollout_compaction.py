"""Merges the rollout files of single steps into parts, so that a long job has a few objects instead of thousands.

It knows only which columns of the schema are text; `grpo_core.run_dir.records` defines the schema. Invariant: a part
holds every row of the steps in its name, in order of steps, and all rows of a step are in one row group.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import structlog

from grpo_core.datasets.parquet import read_bounded
from jobs.worker import untrusted_files

log = structlog.get_logger()

ROW_GROUP_BYTES = 4 * 1024**2
"""Largest uncompressed size of a row group of several steps: a reader of narrow columns needs few requests, and a
reader of one completion does not read many megabytes."""
MAX_STEP_BYTES = 256 * 1024**2
"""Largest size of a step's file, compressed and uncompressed."""
MAX_STEP_ROWS = 100_000
_TEXTS = frozenset({"prompt", "answer", "completion"})
"""Columns without statistics: their minimum and maximum would fill the footer and help no search."""
_REPEATED = ["prompt_id", "prompt", "answer", "finish_reason"]
"""Columns with equal values within a group."""

_STEP_FILE = re.compile(r"^step-(\d{6,})\.parquet$")


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the files of single steps, in order."""
    matches = [(_STEP_FILE.match(path.name), path) for path in folder.glob("step-*.parquet")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def merge(
    folder: Path, up_to: int | None = None, *, after: int = 0, into: Path | None = None
) -> tuple[Path, list[Path]] | None:
    """Write one part from the steps after `after` up to `up_to` (None: all), in `into` (None: the same folder).

    Returns the part and the files that it replaces, which the caller removes once the part is uploaded. Returns None if
    there are no files.
    """
    pq = import_module("pyarrow.parquet")  # imported here, so that the API does not load it

    into = into or folder
    files = [(step, path) for step, path in step_files(folder) if after < step and (up_to is None or step <= up_to)]
    files = [(step, path) for step, path in files if _read(folder, path) is not None]
    if not files:
        return None
    part = into / f"part-{files[0][0]:06d}-{files[-1][0]:06d}.parquet"
    with untrusted_files.file(folder, files[0][1]) as source:
        schema = pq.read_schema(source)
    ranged = [name for name in schema.names if name not in _TEXTS]
    repeated = [name for name in _REPEATED if name in schema.names]
    with (
        untrusted_files.new_file(into, part) as partial,
        pq.ParquetWriter(
            partial, schema, compression="zstd", write_statistics=ranged, use_dictionary=repeated
        ) as writer,
    ):
        for table in _row_groups(folder, [path for _, path in files]):
            writer.write_table(table, row_group_size=table.num_rows)
    return part, [path for _, path in files]


def _read(folder: Path, path: Path) -> Any | None:
    """Return a step's rows; None if the file is unsafe to decode in this process, which holds the worker's keys."""
    try:
        with untrusted_files.file(folder, path) as source:
            if source.stat().st_size > MAX_STEP_BYTES:
                raise ValueError(f"it has more than {MAX_STEP_BYTES} bytes")  # noqa: TRY301 - told below
            return read_bounded(source, rows=MAX_STEP_ROWS, group_bytes=MAX_STEP_BYTES)
    except (ValueError, OSError) as error:
        log.warning("rollouts_refused", file=path.name, folder=str(folder), reason=str(error))
        return None


def remove(folder: Path, files: Sequence[Path]) -> None:
    """Remove files that a part has replaced."""
    with untrusted_files.folder(folder, folder) as place:
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=place)


def _row_groups(folder: Path, files: Sequence[Path]) -> Iterator[Any]:
    """Yield the files' tables, with small neighbours joined."""
    pa = import_module("pyarrow")

    waiting: list[Any] = []
    for path in files:
        table = _read(folder, path)
        if table is None:
            raise untrusted_files.Refused(errno.EPERM, "has changed since it was judged", path.name)
        if waiting and sum(t.nbytes for t in waiting) + table.nbytes > ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    yield pa.concat_tables(waiting)
