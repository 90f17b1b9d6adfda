"""Data sets of the Hugging Face hub, and local folders that stand in for them.

Nothing that comes with a data set is run, and none may point at files outside of it. A hub data set is somebody
else's, so its unusable rows are left out and counted. Invariant: whatever the library raises becomes a
`DatasetError` that tells an unreachable hub from a missing or unreadable data set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from grpo_core import hub
from grpo_core.datasets.rows import (
    MAX_BYTES,
    MAX_ROWS,
    DatasetError,
    DatasetTooLargeError,
    DatasetUnreachableError,
    Row,
    error,
    problem,
    require_columns,
    text_of,
)
from grpo_core.errors import GrpoError
from grpo_core.hub import Warn
from grpo_core.spec import DataSection
from grpo_core.spec.sections import HUB_NAME

if TYPE_CHECKING:
    import datasets

DATASET_DIR_VARIABLE = "GRPO_DATASET_DIR"
"""Names a folder in which `hub` data sets are looked up, as `owner/name`, before the hub."""


def read_hub(data: DataSection, dataset_dir: Path | None, warn: Warn) -> list[Row]:
    """The rows of a hub data set, or of the folder in `dataset_dir` that has its name."""
    folder = _local_folder(data.dataset, dataset_dir)
    if folder is not None and data.revision is not None:
        warn("revision_ignored", f"{data.dataset} is a local folder, which has no revisions")
    return hub.patiently(
        lambda: _HubReader(data, warn).read(_open_builder(data, folder)),
        warn,
        what=f"the data set {data.dataset!r}",
        otherwise=f"put the data set's folder into the worker's ${DATASET_DIR_VARIABLE}, or upload it as JSONL",
    )


class _Stream(Protocol):
    """What is used of the library's `IterableDataset`, which has no types of its own."""

    @property
    def column_names(self) -> list[str] | None: ...
    def select_columns(self, column_names: list[str]) -> _Stream: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class _HubReader:
    """Turns a data set's records into rows, within bounds, and counts those it cannot use."""

    def __init__(self, data: DataSection, warn: Warn) -> None:
        self._data = data
        self._warn = warn

    def read(self, builder: datasets.DatasetBuilder) -> list[Row]:
        rows: list[Row] = []
        characters = read = 0
        limit = self._data.max_rows or MAX_ROWS
        with _reading(self._data.dataset):
            for index, record in enumerate(self._records(builder)):
                if index >= limit:
                    if self._data.max_rows is None:
                        raise self._too_large(f"more than {MAX_ROWS} rows")
                    break
                read += 1
                question = text_of(record[self._data.question_column])
                answer = text_of(record[self._data.answer_column])
                if question is None or answer is None:
                    continue
                characters += len(question) + len(answer)
                if characters > MAX_BYTES:
                    raise self._too_large(f"more than {MAX_BYTES} characters of text")
                rows.append(Row(index, question, answer))
        self._report(kept=len(rows), read=read)
        return rows

    def _records(self, builder: datasets.DatasetBuilder) -> Iterator[dict[str, Any]]:
        columns = [self._data.question_column, self._data.answer_column]
        stream = _open_split(builder, self._data)
        # The list of columns is known beforehand for Parquet and not for JSON: there the first record tells.
        require_columns(self._data, stream.column_names or list(next(iter(stream), cast("dict[str, Any]", {}))))
        # Only these two are decoded: other columns may hold images, audio or anything else.
        return iter(stream.select_columns(columns))

    def _too_large(self, what: str) -> DatasetTooLargeError:
        detail = f"{self._data.dataset} has {what}"
        remedy = "Set data.max_rows to use only the first rows, or name a smaller split."
        return DatasetTooLargeError([problem("too_large", detail, remedy, "/data/max_rows")])

    def _report(self, *, kept: int, read: int) -> None:
        if not kept:
            detail = f"none of the {read} rows of {self._data.dataset} has both a question and an answer"
            raise error("empty", detail, "Name other columns or another split.", "/data/question_column")
        if kept < read:
            message = f"{read - kept} of {read} rows were left out: no usable question or answer in them"
            self._warn("rows_without_values", message)


def _local_folder(name: str, dataset_dir: Path | None) -> Path | None:
    """The local folder that stands for a hub name; None means: ask the hub."""
    # Checked here too: a name such as ../x must not leave the folder, whoever made the section.
    if not re.fullmatch(HUB_NAME, name):
        raise error("bad_name", f"{name[:80]!r} is not a hub name", "Use owner/name.", "/data/dataset")
    if dataset_dir is not None and (dataset_dir / name).is_dir():
        return (dataset_dir / name).absolute()
    if "/" not in name:
        # The library would take some bare names for a file format, and read files of the working directory.
        detail = f"{name!r} has no owner and is not in this worker's folder of data sets"
        raise error("dataset_not_found", detail, "Name it as owner/name.", "/data/dataset")
    return None


def _open_builder(data: DataSection, folder: Path | None) -> datasets.DatasetBuilder:
    """The data set's reader, with nothing read yet but its description."""
    import datasets  # slow to import, and absent where only uploads are checked

    # With this prefix the name cannot be taken for a folder below the working directory.
    path = str(folder) if folder else f"hf://datasets/{data.dataset}"
    open_builder = cast("Callable[..., datasets.DatasetBuilder]", datasets.load_dataset_builder)
    with _reading(data.dataset):
        builder = open_builder(path, data.subset, revision=None if folder else data.revision)
    _refuse_foreign_files(builder, data.dataset, folder)
    return builder


def _refuse_foreign_files(builder: datasets.DatasetBuilder, name: str, folder: Path | None) -> None:
    """A data set's description may list any path or address as its data: the worker's own files are not data."""
    listed = cast("Mapping[str, Iterable[str]]", builder.config.data_files or {})
    for files in listed.values():
        for file in map(str, files):
            inside = file.startswith("hf://datasets/") if folder is None else _is_within(file, folder)
            if not inside or "::" in file:
                detail = f"the description of {name} names data files outside of it"
                raise error("foreign_files", detail, "Use a data set that holds its own files.", "/data/dataset")


def _is_within(file: str, folder: Path) -> bool:
    # Links are not followed: the hub's own download layout is made of links to a neighbouring folder.
    return "://" not in file and Path(os.path.normpath(file)).is_relative_to(folder)


def _open_split(builder: datasets.DatasetBuilder, data: DataSection) -> _Stream:
    names = list(map(str, builder.info.splits or builder.config.data_files or {}))
    if names and data.split not in names:
        detail = f"{data.dataset} has no split {data.split!r}"
        raise error("no_such_split", detail, f"Its splits are: {', '.join(names)}.", "/data/split")
    return cast("_Stream", builder.as_streaming_dataset(split=data.split))


@contextmanager
def _reading(name: str) -> Generator[None]:
    """Give whatever the library raises a meaning: the hub is away, there is no such thing, or it cannot be read."""
    try:
        yield
    except (GrpoError, MemoryError):
        raise
    except Exception as reason:  # a foreign library on foreign files may raise anything
        raise _as_dataset_error(name, reason) from reason


def _as_dataset_error(name: str, reason: Exception) -> DatasetError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    said = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"[:200]
    if isinstance(reason, DatasetNotFoundError):
        remedy = "Check data.dataset and data.revision; a private or gated data set needs HF_TOKEN on the worker."
        return error("dataset_not_found", f"{name} was not found on the hub ({said})", remedy, "/data/dataset")
    if isinstance(reason, DataFilesNotFoundError | EmptyDatasetError):
        return error("no_data_files", f"{name} holds no data files", "Use Parquet, JSONL or CSV.", "/data/dataset")
    is_away = hub.is_away(reason)
    if is_away or isinstance(reason, ConnectionError):
        detail = f"{name} is not on this worker, and the hub does not answer ({said})"
        remedy = f"Try again later, put the data set in the worker's {DATASET_DIR_VARIABLE}, or upload it as JSONL."
        # One that is turned off on purpose will be so at the next try.
        kind = DatasetUnreachableError if is_away else DatasetError
        return kind([problem("hub_unreachable", detail, remedy, "/data/dataset")])
    if isinstance(reason, ValueError) and "onfig" in said:
        detail = f"{name} has no such subset ({said})"
        return error("no_such_subset", detail, "Set data.subset to one that there is.", "/data/subset")
    remedy = "Try another revision, or upload the rows as JSONL."
    return error("unreadable", f"{name} could not be read ({said})", remedy, "/data/dataset")
