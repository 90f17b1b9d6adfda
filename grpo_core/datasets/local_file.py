"""A data set in a file of this machine: JSONL, CSV, Parquet or a JSON list, by its name.

Owns which readers a file's name leads to. Invariant: a file in any of the forms gives the rows that its upload would.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from grpo_core.datasets.convert import convert, kind_of
from grpo_core.datasets.jsonl import read_jsonl
from grpo_core.datasets.row_reader import Needs
from grpo_core.datasets.rows import MAX_BYTES, MAX_ROWS, Row, error
from grpo_core.spec import DataSection


def read_local(data: DataSection, path: Path, needs: Needs) -> list[Row]:
    """Its rows; raises `DatasetError`."""
    kind = kind_of(path.name)
    if kind is None:
        return read_jsonl(data, path, needs)
    with TemporaryDirectory(prefix="grpo-data-") as folder:
        lines = Path(folder) / "dataset.jsonl"
        try:
            convert(path, kind, lines, max_rows=data.max_rows or MAX_ROWS, max_bytes=MAX_BYTES, stop_early=True)
        except OSError as reason:
            detail = f"the file {path.name!r} cannot be read: {reason.strerror or reason}"
            raise error("unreadable_file", detail, "Check data.dataset.", "/data/dataset") from reason
        return read_jsonl(data, lines, needs)
