"""Data sets on the Hugging Face hub, and local folders that replace them.

No code in a data set is run, and a data set cannot name files outside itself. The job's owner cannot correct a hub data
set, so unusable rows are left out and counted. Invariant: every exception of the libraries becomes a `DatasetError`,
which distinguishes an unreachable hub from a missing or unreadable data set.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_core import egress, hub
from grpo_core.datasets.card import MAX_CARD_BYTES, Card, Subset, read_card
from grpo_core.datasets.files import DataFile, splits_of
from grpo_core.datasets.repository import CARD, FolderRepository, HubRepository, Repository
from grpo_core.datasets.row_reader import Columns, Needs, RowReader, UnusableRow
from grpo_core.datasets.rows import (
    MAX_BYTES,
    MAX_ROWS,
    DatasetError,
    DatasetTooLargeError,
    DatasetUnreachableError,
    Row,
    error,
    problem,
)
from grpo_core.datasets.tables import Record, read_records
from grpo_core.errors import GrpoError
from grpo_core.hub import Warn
from grpo_core.reasons import FailureCode, WarningCode
from grpo_core.spec import DataSection
from grpo_core.spec.sections import HUB_NAME

LOOKED_AT = 200
"""Records of a look."""
DATASET_DIR_VARIABLE = "GRPO_DATASET_DIR"
"""Variable with a folder in which `hub` data sets are searched, as `owner/name`, before the hub."""


def read_hub(data: DataSection, dataset_dir: Path | None, warn: Warn, needs: Needs) -> list[Row]:
    """Return the rows of a hub data set, or of the folder in `dataset_dir` that has its name."""
    folder = _local_folder(data.dataset, dataset_dir)
    if folder is not None and data.revision is not None:
        warn(WarningCode.REVISION_IGNORED, f"{data.dataset} is a local folder, which has no revisions")
    return hub.patiently(
        lambda: _HubReader(data, warn, needs).read(folder, dataset_dir),
        warn,
        what=f"the data set {data.dataset!r}",
        otherwise=f"put the data set's folder into the worker's ${DATASET_DIR_VARIABLE}, or upload it as JSONL",
    )


def first_records(data: DataSection, most_bytes: int, most: int = LOOKED_AT) -> list[dict[str, Any]]:
    """Return the first records of a hub data set as they are stored. Raises `DatasetError`, and never waits."""
    _local_folder(data.dataset, None)  # only names of the hub
    reader = _HubReader(data, lambda _code, _message: None, Needs(answer=False))
    with _reading(data.dataset):
        repository = HubRepository(data.dataset, data.revision, most_bytes=most_bytes)
        with closing(reader.records(repository, Columns({}, everything=True))) as records:
            return [dict(record) for record in islice(records, most)]


class _HubReader:
    """Makes rows from a data set's records, within limits, and counts unusable records."""

    def __init__(self, data: DataSection, warn: Warn, needs: Needs) -> None:
        self._data = data
        self._warn = warn
        self._reader = RowReader(data, needs)

    def read(self, folder: Path | None, root: Path | None) -> list[Row]:
        """Read a folder below `root`; without a folder, read from the hub."""
        rows: list[Row] = []
        characters = read = 0
        limit = self._data.max_rows or MAX_ROWS
        with _reading(self._data.dataset), closing(self._records(folder, root)) as records:
            for index, record in enumerate(records):
                if index >= limit:
                    if self._data.max_rows is None:
                        raise self._too_large(f"more than {MAX_ROWS} rows")
                    break
                read += 1
                try:
                    row = self._reader.row(index, record)
                except UnusableRow:
                    continue
                characters += row.characters
                if characters > MAX_BYTES:
                    raise self._too_large(f"more than {MAX_BYTES} characters of text")
                rows.append(row)
        self._report(kept=len(rows), read=read)
        return rows

    def _records(self, folder: Path | None, root: Path | None) -> Generator[Record]:
        columns = self._reader.columns
        for number, record in enumerate(self.records(self._open(folder, root), columns)):
            if not number:
                self._reader.require_columns(list(record))
            yield record

    def _open(self, folder: Path | None, root: Path | None) -> Repository:
        name = self._data.dataset
        if folder is None or root is None:
            return HubRepository(name, self._data.revision)
        return FolderRepository(name, folder, root)

    def records(self, repository: Repository, columns: Columns) -> Generator[Record]:
        """Check the whole card first, then open only files that the repository lists."""
        name = self._data.dataset
        _require_no_script(repository, name)
        card = _card(repository, name)
        subset = card.subset(self._data.subset, name)
        card.require_plain(subset.name, columns.required)
        for file in _files(repository, subset, self._data):
            with closing(repository.open(file.path)) as raw:
                yield from read_records(raw, file, subset, columns)

    def _too_large(self, what: str) -> DatasetTooLargeError:
        detail = f"{self._data.dataset} has {what}"
        remedy = "Set data.max_rows to use only the first rows, or name a smaller split."
        return DatasetTooLargeError([problem("too_large", detail, remedy, "/data/max_rows")])

    def _report(self, *, kept: int, read: int) -> None:
        if not kept:
            detail = f"none of the {read} rows of {self._data.dataset} has both a question and an answer"
            raise error("empty", detail, "Name other columns or another split.", "/data/question_column")
        if kept < read:
            message = f"{read - kept} of {read} rows were left out, because they have no usable question or answer"
            self._warn(WarningCode.ROWS_WITHOUT_VALUES, message)


def _local_folder(name: str, dataset_dir: Path | None) -> Path | None:
    """Return the local folder for a hub name; None if it must be read from the hub."""
    # Checked here too: a name such as ../x must not leave the folder, also in a spec that was not parsed.
    if not re.fullmatch(HUB_NAME, name):
        raise error("bad_name", f"{name[:80]!r} is not a hub name", "Use owner/name.", "/data/dataset")
    if dataset_dir is not None and (dataset_dir / name).is_dir():
        return (dataset_dir / name).absolute()
    if "/" not in name:
        # The library takes some names without an owner for a file format, and reads files of the working directory.
        detail = f"{name!r} has no owner and is not in this worker's folder of data sets"
        raise error("dataset_not_found", detail, "Name it as owner/name.", "/data/dataset")
    return None


def _require_no_script(repository: Repository, name: str) -> None:
    """Raise `DatasetError` for a data set that a script must generate, because scripts are never run."""
    script = f"{name.rpartition('/')[2]}.py"
    if script in repository.paths:
        detail = f"{name} is generated by its own script, {script}, which is not run"
        raise error("dataset_script", detail, "Use a copy of it as Parquet or JSONL, or upload one.", "/data/dataset")


def _card(repository: Repository, name: str) -> Card:
    if CARD not in repository.paths:
        return Card()
    with closing(repository.open(CARD)) as file:
        return read_card(file.read(MAX_CARD_BYTES), name)


def _files(repository: Repository, subset: Subset, data: DataSection) -> list[DataFile]:
    splits: Mapping[str, list[DataFile]] = splits_of(repository.paths, subset)
    if not splits:
        remedy = "Use Parquet, JSONL or CSV; archives are not opened."
        raise error("no_data_files", f"{data.dataset} holds no data files", remedy, "/data/dataset")
    if data.split not in splits:
        detail = f"{data.dataset} has no split {data.split!r}"
        raise error("no_such_split", detail, f"Its splits are: {', '.join(list(splits)[:40])}.", "/data/split")
    return splits[data.split]


@contextmanager
def _reading(name: str) -> Generator[None]:
    """Convert exceptions of the library: the hub is unreachable, or the data set is missing or cannot be read."""
    try:
        yield
    except egress.EgressRefused as reason:
        raise _refused(name) from reason
    except (GrpoError, MemoryError):
        raise
    except Exception as reason:  # the library may raise anything for an untrusted file
        raise _as_dataset_error(name, reason) from reason


def _as_dataset_error(name: str, reason: Exception) -> DatasetError:
    from huggingface_hub import errors

    if egress.refusal(reason):
        return _refused(name)
    if isinstance(reason, errors.GatedRepoError):
        return error(
            "dataset_gated", f"{name} is gated", f"{hub.ASK_FOR_TOKEN} Accept its terms first.", "/data/dataset"
        )
    said = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"[:200]
    if isinstance(reason, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        remedy = f"Check data.dataset and data.revision. {hub.ASK_FOR_TOKEN}"
        return error("dataset_not_found", f"{name} was not found on the hub ({said})", remedy, "/data/dataset")
    is_away = hub.is_away(reason)
    if is_away or isinstance(reason, ConnectionError):
        detail = f"{name} is not on this worker, and the hub does not answer ({said})"
        remedy = f"Try again later, put the data set in the worker's {DATASET_DIR_VARIABLE}, or upload it as JSONL."
        # If the hub was turned off on purpose, a retry does not help.
        kind = DatasetUnreachableError if is_away else DatasetError
        return kind([problem(FailureCode.HUB_UNREACHABLE, detail, remedy, "/data/dataset")])
    remedy = "Try another revision, or upload the rows as JSONL."
    return error("unreadable", f"{name} could not be read ({said})", remedy, "/data/dataset")


def _refused(name: str) -> DatasetError:
    detail = f"{name} leads to a host that the training process may not connect to"
    remedy = f"If the hub uses it, ask the operator to add it to {egress.HOSTS_VARIABLE}; if not, use another data set."
    return error("egress_refused", detail, remedy, "/data/dataset")
