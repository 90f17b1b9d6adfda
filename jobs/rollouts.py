"""Joins the rollout files of single steps into parts, so that a long job is a few objects and not thousands.

Knows Parquet and no schema: what a rollout holds is `grpo_core.records`'s to say. Invariant: a part holds every
row of the steps in its name, in order of step.
"""

from __future__ import annotations

import re
from pathlib import Path

_STEP_FILE = re.compile(r"^step-(\d{6,})\.parquet$")


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """The files of single steps, in order."""
    matches = [(_STEP_FILE.match(path.name), path) for path in folder.glob("step-*.parquet")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def merge(folder: Path, up_to: int | None = None) -> tuple[Path, list[Path]] | None:
    """Write one part from the steps up to `up_to` (all when None); None where there are none.

    Returns the part and the files it replaces, which the caller removes once the part is safe.
    """
    import pyarrow.parquet as pq  # only where rollouts are: the API must not pay for it

    files = [(step, path) for step, path in step_files(folder) if up_to is None or step <= up_to]
    if not files:
        return None
    part = folder / f"part-{files[0][0]:06d}-{files[-1][0]:06d}.parquet"
    partial = part.with_suffix(".partial")
    with pq.ParquetWriter(partial, pq.read_schema(files[0][1]), compression="zstd") as writer:
        for _, path in files:
            writer.write_table(pq.read_table(path))
    partial.replace(part)
    return part, [path for _, path in files]
