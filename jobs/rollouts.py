"""Joins the rollout files of single steps into parts, so that a long job is a few objects and not thousands.

Knows Parquet, and of the schema only which columns are text: what a rollout holds is `grpo_core.records`'s to say.
Invariant: a part holds every row of the steps in its name, in order of step, and a step is in one row group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROW_GROUP_BYTES = 4 * 1024**2
"""Steps share a row group up to so much uncompressed: a reader of narrow columns asks for few ranges then, and a reader
of one completion still does not read megabytes."""
_TEXTS = frozenset({"prompt", "answer", "completion"})
"""Smallest and largest of these would fill the footer and help no search."""
_REPEATED = ["prompt_id", "prompt", "answer", "finish_reason"]
"""The same over a group."""

_STEP_FILE = re.compile(r"^step-(\d{6,})\.parquet$")


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """The files of single steps, in order."""
    matches = [(_STEP_FILE.match(path.name), path) for path in folder.glob("step-*.parquet")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def merge(folder: Path, up_to: int | None = None) -> tuple[Path, list[Path]] | None:
    """Write one part from the steps up to `up_to` (all when None); None where there are none.

    Returns the part and the files it replaces, which the caller removes once the part is safe.
    """
    pq = import_module("pyarrow.parquet")  # only where rollouts are: the API must not pay for it

    files = [(step, path) for step, path in step_files(folder) if up_to is None or step <= up_to]
    if not files:
        return None
    part = folder / f"part-{files[0][0]:06d}-{files[-1][0]:06d}.parquet"
    partial = part.with_suffix(".partial")
    schema = pq.read_schema(files[0][1])
    ranged = [name for name in schema.names if name not in _TEXTS]
    repeated = [name for name in _REPEATED if name in schema.names]
    with pq.ParquetWriter(
        partial, schema, compression="zstd", write_statistics=ranged, use_dictionary=repeated
    ) as writer:
        for table in _row_groups([path for _, path in files]):
            writer.write_table(table, row_group_size=table.num_rows)
    partial.replace(part)
    return part, [path for _, path in files]


def _row_groups(files: Sequence[Path]) -> Iterator[Any]:
    """The files' tables, neighbours joined while they are small."""
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")

    waiting: list[Any] = []
    for path in files:
        table = pq.read_table(path)
        if waiting and sum(t.nbytes for t in waiting) + table.nbytes > ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    yield pa.concat_tables(waiting)
