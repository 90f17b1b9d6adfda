"""Questions and their answers, from a JSONL file, the Hugging Face hub or a folder of local data sets.

Owns what a data set may look like and how a value becomes text; knows nothing of tokens or chat templates, and
never runs code that comes with a data set. Importing it imports neither torch nor the hub's library.
"""

from __future__ import annotations

import os
from pathlib import Path

from grpo_core.datasets.hub import DATASET_DIR_VARIABLE, Warn, read_hub
from grpo_core.datasets.jsonl import MAX_LINE_BYTES, DatasetSummary, JsonlChecker, read_jsonl
from grpo_core.datasets.rows import (
    MAX_BYTES,
    MAX_ROWS,
    DatasetError,
    DatasetTooLargeError,
    DatasetUnreachableError,
    Row,
    text_of,
)
from grpo_core.spec import DataSection

__all__ = [
    "DATASET_DIR_VARIABLE",
    "MAX_BYTES",
    "MAX_LINE_BYTES",
    "MAX_ROWS",
    "UPLOAD_NAME",
    "DatasetError",
    "DatasetSummary",
    "DatasetTooLargeError",
    "DatasetUnreachableError",
    "JsonlChecker",
    "Row",
    "load_rows",
    "text_of",
]

UPLOAD_NAME = "dataset.jsonl"
"""The file in a run's `inputs` folder that the worker puts an upload or an S3 object in."""


def load_rows(
    data: DataSection, inputs: Path, *, dataset_dir: Path | None = None, warn: Warn = lambda _code, _message: None
) -> list[Row]:
    """Read the rows a job asks for; `inputs` is the run's folder of inputs.

    `dataset_dir` (else the environment's `GRPO_DATASET_DIR`) is looked in before the hub. `warn` is told of rows
    that were left out. Raises `DatasetError`; never returns an empty list.
    """
    if data.source == "hub":
        configured = os.environ.get(DATASET_DIR_VARIABLE)
        return read_hub(data, dataset_dir or (Path(configured) if configured else None), warn)
    return read_jsonl(data, inputs / UPLOAD_NAME if data.source in ("upload", "s3") else Path(data.dataset))
