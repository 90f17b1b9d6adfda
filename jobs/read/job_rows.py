"""The rows of a job's data set as the prompts that the job makes from them: those it trains on, and those it holds out.

Owns which rows these are, the search in them and the reasons why they cannot be shown. `jobs.store.row_files` reads
files, and `hub_look` the hub. Invariant: a row has the number, the prompt and the columns that it has in training.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, cast

from grpo_core import strict_json
from grpo_core.datasets import DatasetError
from grpo_core.datasets.preview import PreviewedRow, preview_row
from grpo_core.schedule import LEAST_AUTOMATIC, last_held_out
from grpo_core.spec import DataSection, JobSpec, Problem, SpecError, parse_spec
from jobs.errors import Denied, NotFound, Rejected
from jobs.read.hub_look import hub_records
from jobs.store.row_files import Place, RowFile, RowIndexes, StoredRow, read_page

Part = Literal["train", "held_out"]

LOOK_SECONDS: Final = 600.0
"""How long the rows of a hub data set that were looked at are kept."""
_MOST_LOOKS: Final = 8
_RECORDS: Final = "Choose a question from the job's records, or type a prompt."


@dataclass(frozen=True, kw_only=True)
class RowQuery:
    """Which rows are wanted."""

    part: Part = "train"
    first: int = 0
    """Only rows of this number and later."""
    search: str = ""
    """Only rows whose question or answer has this text, in any case."""
    limit: int = 20
    place: Place | None = None
    """Where the previous page ended."""


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One row."""

    prompt: PreviewedRow
    sha256: str
    """Of all its columns, so that a reference shows whether the row is still the same."""


@dataclass(frozen=True, kw_only=True)
class JobRowPage:
    """Some rows of one part, or why there are none."""

    rows: tuple[JobRow, ...] = ()
    next: Place | None = None
    first: int = 0
    """Number of the part's first row."""
    count: int | None = None
    """How many rows the part has; None: not known here."""
    unavailable: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class _Range:
    data: DataSection
    first: int = 0
    count: int | None = None
    file: RowFile | None = None
    """None: a hub data set."""


class JobRows:
    """Reads rows for jobs. `row_file` returns the file of a `data` section that an owner may read. Thread-safe."""

    def __init__(
        self,
        row_file: Callable[[DataSection, str], RowFile],
        look: Callable[[JobSpec, str], list[Mapping[str, Any]]] = hub_records,
    ) -> None:
        self._row_file, self._look = row_file, look
        self._indexes = RowIndexes()
        self._looks: OrderedDict[tuple[str, str], tuple[float, list[Mapping[str, Any]]]] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, stored: Mapping[str, Any], owner: str, query: RowQuery) -> JobRowPage:
        """Return rows of the job with this stored spec. Raises `BadCursor` and `Unavailable`."""
        try:
            spec = _read(stored)
            found = self._range(spec, owner, query.part)
            return self._hub_page(spec, owner, found, query) if found.file is None else self._file_page(found, query)
        except NotFound:
            detail = "The job's data set was deleted, so its rows cannot be shown"
            return _none(Problem(pointer="/data/dataset", code="dataset_deleted", detail=detail, remedy=_RECORDS))
        except (Rejected, DatasetError) as error:
            return _none(error.problems[0])
        except Denied as error:
            detail = f"The store refuses access to the job's data set ({error})"
            return _none(Problem(pointer="/data/dataset", code="access_denied", detail=detail, remedy=_RECORDS))
        except strict_json.StrictJsonError:
            detail = "The job's data set has a line that is not JSON; it has changed since the job ran"
            return _none(Problem(pointer="/data/dataset", code="bad_json", detail=detail, remedy=_RECORDS))

    def _range(self, spec: JobSpec, owner: str, part: Part) -> _Range:
        if spec.data.source == "hub":
            return _hub_range(spec, part)
        apart = self._apart(spec, owner) if part == "held_out" or spec.evaluation.automatic else None
        if part == "held_out" and apart is not None:
            return apart
        file = self._row_file(spec.data, owner)
        rows = self._limited(file, spec.data.max_rows)
        last = 0 if apart is not None else self._last_held_out(spec, rows)
        if part == "train":
            return _Range(data=spec.data, file=file, count=max(0, rows - last))
        return _Range(data=spec.data, file=file, first=max(0, rows - last), count=min(rows, last))

    @staticmethod
    def _last_held_out(spec: JobSpec, rows: int) -> int:
        """How many of the last rows are held out; also where the data set of the questions has too few."""
        if spec.evaluation.automatic:
            spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"dataset": None})})
        return last_held_out(spec, rows)

    def _apart(self, spec: JobSpec, owner: str) -> _Range | None:
        """The held-out rows of a separate data set; None where they are the last rows of the job's."""
        evaluation = spec.evaluation
        if evaluation.dataset is None or not evaluation.questions:
            return None
        data = spec.data.model_copy(update={"dataset": evaluation.dataset, "max_rows": evaluation.questions})
        file = self._row_file(data, owner)
        count = self._limited(file, evaluation.questions)
        return None if evaluation.automatic and count < LEAST_AUTOMATIC else _Range(data=data, file=file, count=count)

    def _limited(self, file: RowFile, most: int | None) -> int:
        rows = self._indexes.of(file).rows if file.rows is None else file.rows
        return rows if most is None else min(rows, most)

    def _file_page(self, found: _Range, query: RowQuery) -> JobRowPage:
        file, count = cast("RowFile", found.file), found.count or 0
        first, end = max(found.first, query.first), found.first + count
        shown = JobRowPage(first=found.first, count=count)
        if first >= end:
            return shown
        place = query.place or (Place(row=0, byte=0) if first == 0 else self._indexes.of(file).before(first))
        with file.open() as lines:
            page = read_page(lines, query.limit, place, first=first, end=end, matches=_matcher(found.data, query))
        return JobRowPage(rows=_prompts(found.data, page.rows), next=page.next, first=shown.first, count=shown.count)

    def _hub_page(self, spec: JobSpec, owner: str, found: _Range, query: RowQuery) -> JobRowPage:
        records = self._records(spec.model_copy(update={"data": found.data}), owner)
        end = len(records) if found.data.max_rows is None else min(len(records), found.data.max_rows)
        start, matches = max(query.first, query.place.row if query.place else 0), _matcher(found.data, query)
        rows = (StoredRow(row=row, values=dict(records[row])) for row in range(start, end))
        chosen = list(islice((row for row in rows if matches is None or matches(row.values)), query.limit + 1))
        following = Place(row=chosen[query.limit].row, byte=0) if len(chosen) > query.limit else None
        return JobRowPage(rows=_prompts(found.data, chosen[: query.limit]), next=following)

    def _records(self, spec: JobSpec, owner: str) -> list[Mapping[str, Any]]:
        """The first records of a hub data set, which are fetched once in a while."""
        key = (owner, strict_json.canonical(spec.as_dict()["data"]))
        with self._lock:
            at, records = self._looks.get(key, (0.0, []))
        if records and time.monotonic() - at < LOOK_SECONDS:
            return records
        records = self._look(spec, owner)
        with self._lock:
            self._looks[key] = (time.monotonic(), records)
            while len(self._looks) > _MOST_LOOKS:
                self._looks.popitem(last=False)
        return records


def row_digest(values: Mapping[str, Any]) -> str:
    """The SHA-256 of a row's columns."""
    return hashlib.sha256(strict_json.canonical(values).encode()).hexdigest()


def _read(stored: Mapping[str, Any]) -> JobSpec:
    try:
        spec = parse_spec(stored)
    except SpecError as error:
        detail = "The job's spec is of another release, so its rows cannot be shown"
        raise Rejected(Problem(pointer="", code="other_release", detail=detail, remedy=_RECORDS)) from error
    if spec.source is not None:
        detail = f"A job of kind {spec.kind} has no data set"
        raise Rejected(Problem(pointer="/kind", code="no_rows", detail=detail, remedy="Ask for the job that trained."))
    return spec


def _hub_range(spec: JobSpec, part: Part) -> _Range:
    if part == "train":
        return _Range(data=spec.data)
    if not spec.evaluation.questions:
        return _Range(data=spec.data.model_copy(update={"max_rows": 0}), count=0)
    if spec.held_out_rows:
        detail = "The held-out rows are the last of a hub data set, of which only the start can be read here"
        raise Rejected(Problem(pointer="/data/dataset", code="not_readable_here", detail=detail, remedy=_RECORDS))
    other: dict[str, Any] = {"split": spec.evaluation.split, "max_rows": spec.evaluation.questions}
    if spec.evaluation.dataset is not None:
        other |= {"dataset": spec.evaluation.dataset, "subset": None, "revision": None}
    return _Range(data=spec.data.model_copy(update=other))


def _prompts(data: DataSection, rows: list[StoredRow]) -> tuple[JobRow, ...]:
    return tuple(JobRow(prompt=preview_row(data, row.row, row.values), sha256=row_digest(row.values)) for row in rows)


def _matcher(data: DataSection, query: RowQuery) -> Callable[[Mapping[str, Any]], bool] | None:
    wanted = query.search.casefold()
    if not wanted:
        return None
    return lambda values: any(
        wanted in text.casefold()
        for name in (data.question_column, data.answer_column)
        for text in _texts(values.get(name))
    )


def _texts(value: object) -> list[str]:
    """Every text in a value; of a chat, those of its turns."""
    match value:
        case str():
            return [value]
        case bool() | None:
            return []
        case int() | float():
            return [str(value)]
        case dict():
            inside = list(cast("dict[str, object]", value).values())
        case list():
            inside = cast("list[object]", value)
        case _:
            return []
    return [text for one in inside for text in _texts(one)]


def _none(problem: Problem) -> JobRowPage:
    return JobRowPage(unavailable=problem)
