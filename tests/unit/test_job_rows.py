"""The rows of a job's data set: the same numbers, parts, prompts and columns as in training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from grpo_core.datasets import EVALUATION_UPLOAD_NAME, UPLOAD_NAME, DatasetError
from grpo_core.datasets.prompts import messages_for
from grpo_core.evaluation.held_out import load_split
from grpo_core.spec import DataSection, JobSpec, Problem, parse_spec
from jobs.errors import BadCursor, Denied, NotFound, Rejected
from jobs.read.job_rows import JobRowPage, JobRows, Part, RowQuery, row_digest
from jobs.store import row_files
from jobs.store.row_files import Place, RowFile, RowIndexes, read_page

TRAIN, OTHER = "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T7", "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T8"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def line(number: int) -> bytes:
    row: dict[str, Any] = {
        "question": f" Frage é{number}",
        "answer": number,
        "tolerance": {"of": number},
        "chat": [*CHAT, *CHAT[1:]],
    }
    row["chat"][-1] = {"role": "user", "content": f"Hello Frage {number}"}
    return json.dumps(row).encode()


def lines(rows: int) -> bytes:
    """Rows with a byte order mark and blank lines, and without an end of the last one."""
    return b"\xef\xbb\xbf" + b"\r\n \n".join(line(number) for number in range(rows))


class Files:
    """Data sets in memory, and how often each was opened."""

    def __init__(self, **bodies: bytes) -> None:
        self.bodies, self.opened = bodies, 0
        self.known: int | None = None

    def row_file(self, data: DataSection, owner: str) -> RowFile:
        body = self.bodies.get({TRAIN: "train", OTHER: "other"}[data.dataset])
        if body is None or owner != "ann":
            raise NotFound("data set", data.dataset)
        return RowFile(name=data.dataset, open=lambda: self._open(body), rows=self.known)

    def _open(self, body: bytes) -> io.BytesIO:
        self.opened += 1
        return io.BytesIO(body)


def spec_of(data: Mapping[str, Any] | None = None, **sections: Any) -> JobSpec:
    given = {"source": "upload", "dataset": TRAIN, **(data or {})}
    return parse_spec({"data": given, "sampling": {"prompts_per_step": 1}, **sections})


def every(rows: JobRows, spec: JobSpec, part: Part, **query: Any) -> list[JobRowPage]:
    pages = [rows.page(spec.as_dict(), "ann", RowQuery(part=part, **query))]
    while (place := pages[-1].next) is not None:
        pages.append(rows.page(spec.as_dict(), "ann", RowQuery(part=part, place=place, **query)))
    return pages


SPECS = [
    pytest.param({}, {"questions": 0}, id="none held out"),
    pytest.param({}, {"questions": 7}, id="the last ones"),
    pytest.param({"max_rows": 31}, {"questions": 7}, id="the last ones of the first"),
    pytest.param({}, {"questions": 128, "automatic": True}, id="as many as fit"),
    pytest.param({"max_rows": 25}, {"questions": 10, "automatic": True}, id="too few for any"),
    pytest.param({}, {"questions": 9, "dataset": OTHER}, id="of another"),
    pytest.param({}, {"questions": 50, "dataset": OTHER}, id="all of another"),
    pytest.param({}, {"questions": 50, "dataset": OTHER, "automatic": True}, id="another that suffices"),
    pytest.param({}, {"questions": 5, "dataset": OTHER, "automatic": True}, id="another with too few"),
    pytest.param({"format": "messages", "question_column": "chat"}, {"questions": 4}, id="chats"),
    pytest.param(
        {"examples": [{"question": "1+1", "answer": "2"}], "system_prompt": "Reckon."}, {"questions": 4}, id="examples"
    ),
    pytest.param({"answer_column": "tolerance", "answer_path": "of"}, {"questions": 4}, id="an answer inside"),
]


@pytest.mark.parametrize("known", [None, 120])
@pytest.mark.parametrize(("data", "evaluation"), SPECS)
def test_rows_are_those_of_training(
    data: dict[str, Any], evaluation: dict[str, Any], known: int | None, tmp_path: Path
) -> None:
    files = Files(train=lines(120), other=lines(20))
    # Rows of the held-out data set with other questions, since training leaves repeated ones out.
    files.bodies["other"] = files.bodies["other"].replace(b"Frage", b"Andere")
    for name, body in ((UPLOAD_NAME, files.bodies["train"]), (EVALUATION_UPLOAD_NAME, files.bodies["other"])):
        (tmp_path / name).write_bytes(body)
    if "dataset" not in evaluation:
        files.known = known
    spec = spec_of(data, evaluation=evaluation)
    split, rows = load_split(spec, tmp_path, lambda _code, _text: None), JobRows(files.row_file)
    for part, trained in (("train", split.train), ("held_out", split.held_out)):
        pages = every(rows, spec, cast("Part", part), limit=13)
        found = [row for page in pages for row in page.rows]
        # Rows to train on may be held out too where the questions repeat; none do here.
        assert [row.prompt.row for row in found] == [row.row for row in trained]
        assert [row.prompt.messages for row in found] == [messages_for(row, spec.data) for row in trained]
        assert [row.prompt.answer for row in found] == [row.answer for row in trained]
        assert {page.count for page in pages} == {len(trained)}
        assert {page.first for page in pages} == {trained[0].row if trained else len(split.train)}
        for row in found:
            word = b"Andere" if "Andere" in str(row.prompt.values) else b"Frage"
            assert row.prompt.values == json.loads(line(row.prompt.row).replace(b"Frage", word))
            assert row.sha256 == row_digest(row.prompt.values)


def test_any_row_is_found_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_EVERY", 10)
    files = Files(train=lines(125))
    rows, spec = JobRows(files.row_file), spec_of(evaluation={"questions": 25})
    for number in (0, 1, 9, 10, 11, 55, 99):
        (row,) = rows.page(spec.as_dict(), "ann", RowQuery(first=number, limit=1)).rows
        assert row.prompt.row == number
    (row,) = rows.page(spec.as_dict(), "ann", RowQuery(part="held_out", first=124, limit=1)).rows
    assert row.prompt.row == 124
    assert rows.page(spec.as_dict(), "ann", RowQuery(first=100)).rows == (), "held out"
    assert rows.page(spec.as_dict(), "ann", RowQuery(part="held_out", first=125)).rows == ()
    assert rows.page(spec.as_dict(), "ann", RowQuery(part="held_out", first=3, limit=1)).rows[0].prompt.row == 100


def test_an_index_is_made_once() -> None:
    files, indexes = Files(train=lines(3)), RowIndexes()
    file = files.row_file(spec_of().data, "ann")
    assert [indexes.of(file).rows for _ in range(3)] == [3, 3, 3]
    assert files.opened == 1


def test_a_search_finds_questions_answers_and_turns_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(train=lines(120))
    rows, spec = JobRows(files.row_file), spec_of(evaluation={"questions": 0})

    def found(text: str, **data: Any) -> list[int]:
        pages = every(rows, spec_of(data, evaluation={"questions": 0}), "train", search=text, limit=5)
        return [row.prompt.row for page in pages for row in page.rows]

    assert found("FRAGE É11") == [11, *range(110, 120)]
    assert found("119") == [119]
    assert found("nothing") == []
    assert len(found("hello", format="messages", question_column="chat")) == 120
    # A page ends after a while, and the next one goes on.
    monkeypatch.setattr(row_files, "SEARCHED_BYTES", 1000)
    pages = every(rows, spec, "train", search="119")
    assert len(pages) > 10
    assert [row.prompt.row for page in pages for row in page.rows] == [119]


def test_a_row_that_the_job_cannot_use_says_why() -> None:
    files = Files(train=b'{"question": "", "answer": "1", "more": 1}\n{"question": "x", "answer": null}')
    first, second = JobRows(files.row_file).page(spec_of().as_dict(), "ann", RowQuery()).rows
    assert first.prompt.problem is not None
    assert "'question'" in first.prompt.problem.detail
    assert (second.prompt.problem, second.prompt.answer) == (None, "")


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_all: object) -> Any:
        raise error

    return raises


PROBLEM = Problem(pointer="/data/dataset", code="hub_unreachable", detail="cannot be read here", remedy="Upload it.")


@pytest.mark.parametrize(
    ("data", "reader", "code"),
    [
        pytest.param({}, {"row_file": raising(NotFound("data set", TRAIN))}, "dataset_deleted", id="deleted"),
        pytest.param({}, {"row_file": raising(DatasetError([PROBLEM]))}, "hub_unreachable", id="an object"),
        pytest.param({}, {"row_file": raising(Denied(403))}, "access_denied", id="denied"),
        pytest.param({"source": "hub", "dataset": "a/b"}, {"look": raising(Rejected(PROBLEM))}, "hub_unreachable"),
    ],
)
def test_rows_that_cannot_be_shown_say_why(data: dict[str, Any], reader: dict[str, Any], code: str) -> None:
    rows = JobRows(**{"row_file": raising(AssertionError()), **reader})
    page = rows.page(spec_of(data).as_dict(), "ann", RowQuery())
    assert page.unavailable is not None
    assert (page.unavailable.code, page.rows) == (code, ())
    assert page.unavailable.remedy


def test_other_jobs_and_files_that_changed_say_so() -> None:
    rows = JobRows(Files(train=b"{}\n[1\n").row_file)
    page = rows.page(spec_of().as_dict(), "ann", RowQuery())
    assert page.unavailable
    assert page.unavailable.code == "bad_json"
    page = rows.page({**spec_of().as_dict(), "newer": 1}, "ann", RowQuery())
    assert page.unavailable
    assert page.unavailable.code == "other_release"
    serving = parse_spec({"kind": "serving", "serving": {"job": "job-01JDZ5T1E4Q8Y7M2N3P4R5S6T7"}})
    page = rows.page(serving.as_dict(), "ann", RowQuery())
    assert page.unavailable
    assert page.unavailable.code == "no_rows"
    with pytest.raises(BadCursor):
        rows.page(spec_of().as_dict(), "ann", RowQuery(place=Place(row=1, byte=1)))


def test_the_start_of_a_hub_data_set_is_read_once() -> None:
    asked: list[JobSpec] = []

    def look(spec: JobSpec, _owner: str) -> list[Mapping[str, Any]]:
        asked.append(spec)
        return [{"question": f"{spec.data.split} {number}", "answer": "1"} for number in range(9)]

    rows = JobRows(raising(AssertionError()), look)
    data = {"source": "hub", "dataset": "a/b", "question_column": "question", "answer_column": "answer"}
    spec = spec_of(data, evaluation={"questions": 4})
    pages = every(rows, spec, "train", limit=5)
    assert [row.prompt.row for page in pages for row in page.rows] == list(range(9))
    assert {page.count for page in pages} == {None}
    held_out = every(rows, spec, "held_out", search="TEST", first=1)
    assert [row.prompt.values["question"] for page in held_out for row in page.rows] == ["test 1", "test 2", "test 3"]
    assert [one.data.split for one in asked] == ["train", "test"]
    page = rows.page(spec_of(data, evaluation={"questions": 4, "split": "train"}).as_dict(), "ann", RowQuery())
    assert len(page.rows) == 9
    page = rows.page(
        spec_of(data, evaluation={"questions": 4, "split": "train"}).as_dict(), "ann", RowQuery(part="held_out")
    )
    assert page.unavailable
    assert page.unavailable.code == "not_readable_here"
    assert every(rows, spec_of(data, evaluation={"questions": 0}), "held_out")[0].rows == ()


def test_a_page_ends_with_its_rows() -> None:
    body = io.BytesIO(b'{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    page = read_page(body, 2, first=1)
    assert ([row.row for row in page.rows], page.next) == ([1, 2], None)
    page = read_page(body, 1, end=2)
    assert ([row.row for row in page.rows], page.next) == ([0], Place(row=1, byte=9))
    assert read_page(body, 1, page.next, end=2).next is None
