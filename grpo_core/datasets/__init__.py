"""Questions and their answers, from an uploaded file, the Hugging Face hub or a folder of local data sets.

Owns the accepted formats, how a value becomes text and how a row becomes a prompt (`prompts`). Invariants: code in a
data set is never run, and importing this package imports neither torch nor the hub's library.
"""

from __future__ import annotations

import os
from pathlib import Path

from grpo_core.datasets.hub import DATASET_DIR_VARIABLE, Warn, read_hub
from grpo_core.datasets.jsonl import MAX_LINE_BYTES, DatasetSummary, JsonlChecker, read_jsonl
from grpo_core.datasets.local_file import read_local
from grpo_core.datasets.row_reader import Needs, RowReader, UnusableRow
from grpo_core.datasets.rows import (
    MAX_BYTES,
    MAX_ROWS,
    DatasetError,
    DatasetTooLargeError,
    DatasetUnreachableError,
    Question,
    Row,
    text_of,
)
from grpo_core.spec import DataSection

__all__ = [
    "DATASET_DIR_VARIABLE",
    "EVALUATION_UPLOAD_NAME",
    "MAX_BYTES",
    "MAX_LINE_BYTES",
    "MAX_ROWS",
    "UPLOAD_NAME",
    "DatasetError",
    "DatasetSummary",
    "DatasetTooLargeError",
    "DatasetUnreachableError",
    "JsonlChecker",
    "Needs",
    "Question",
    "Row",
    "RowReader",
    "UnusableRow",
    "load_rows",
    "text_of",
]

UPLOAD_NAME = "dataset.jsonl"
"""Name of the file in a run's `inputs` folder to which the worker writes an upload or an S3 object."""
EVALUATION_UPLOAD_NAME = "evaluation.jsonl"
"""Name of the file for `evaluation.dataset`."""


def load_rows(
    data: DataSection,
    inputs: Path,
    *,
    dataset_dir: Path | None = None,
    warn: Warn = lambda _code, _message: None,
    needs: Needs = Needs(),  # noqa: B008 - frozen
    name: str = UPLOAD_NAME,
) -> list[Row]:
    """Read the rows of a job's data set. `inputs` is the run's folder of inputs, in which an upload has the name
    `name`.

    `dataset_dir`, or the folder in `GRPO_DATASET_DIR`, is searched before the hub. `warn` is called if rows were left
    out. Raises `DatasetError`; never returns an empty list.
    """
    if data.source == "hub":
        configured = os.environ.get(DATASET_DIR_VARIABLE)
        return read_hub(data, dataset_dir or (Path(configured) if configured else None), warn, needs)
    if data.source in ("upload", "s3"):
        return read_jsonl(data, inputs / name, needs)
    return read_local(data, Path(data.dataset), needs)
