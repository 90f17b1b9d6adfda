"""Data sets: the JSONL checker, values as text, and the loader over uploads, files, local folders and the hub.

The hub's library is the real one; the hub is a local folder of the real data set's shape, or a server of two lines.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.datasets import (
    DATASET_DIR_VARIABLE,
    DatasetError,
    DatasetSummary,
    DatasetTooLargeError,
    DatasetUnreachableError,
    JsonlChecker,
    Row,
    load_rows,
    text_of,
)
from grpo_core.datasets import hub as hub_module
from grpo_core.spec import DataSection
from grpo_core.training.classify_error import failure_of
from tests.hub_server import HubHandler, Recorder, Repo, hub_with, point_at, serve

GOOD = b'{"question": "6+6=?", "answer": "12"}\n'
RECIPE = "swulling/gsm8k_chinese"


def check(body: bytes, *, chunk: int = 7, **limits: int) -> DatasetSummary:
    checker = JsonlChecker(**limits)
    for start in range(0, len(body), chunk):
        checker.feed(body[start : start + chunk])
    return checker.finish()


def problems(body: bytes, **limits: int) -> list[tuple[str, str]]:
    with pytest.raises(DatasetError) as caught:
        check(body, **limits)
    assert all(problem.detail and problem.remedy for problem in caught.value.problems)
    return [(problem.pointer, problem.code) for problem in caught.value.problems]


def line(**columns: Any) -> bytes:
    return json.dumps(columns, ensure_ascii=False).encode() + b"\n"


def test_summary_of_a_good_file() -> None:
    body = line(question="一加一", answer=2, note=None) + line(answer="12", question="6+6=?", more=1)
    assert check(body) == DatasetSummary(
        rows=2,
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        columns=["question", "answer"],
        fields=["question", "answer"],
    )


@given(
    st.lists(st.sampled_from([GOOD, b"\n", b" \t\r\n", line(question="好" * 50, answer=1), GOOD[:-1] + b"\r\n"])),
    st.integers(1, 200),
)
def test_chunks_may_be_cut_anywhere(lines: list[bytes], chunk: int) -> None:
    body = GOOD + b"".join(lines) + GOOD.rstrip()
    assert check(body, chunk=chunk) == check(body, chunk=len(body))


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        pytest.param(GOOD.rstrip(), 1, id="no final newline"),
        pytest.param(GOOD.replace(b"\n", b"\r\n") * 2, 2, id="CRLF"),
        pytest.param(b"\n \n" + GOOD + b"\n\n" + GOOD + b"\n\n", 2, id="blank lines are no rows"),
        pytest.param(b"\xef\xbb\xbf" + GOOD, 1, id="byte order mark"),
        pytest.param(line(question="x", answer=1.5, tags=["a", {"b": 1}], ok=True), 1, id="other columns of any type"),
        pytest.param(line(question="x" * 65_536, answer="1"), 1, id="longest field"),
        pytest.param(line(**{f"c{i}": 1 for i in range(64)}), 1, id="most columns"),
    ],
)
def test_accepted(body: bytes, rows: int) -> None:
    assert check(body).rows == rows


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"not json", "bad_json"),
        (b'{"question": "x", "answer": NaN}', "bad_json"),
        (b'{"question": "x", "answer": 1e999}', "bad_json"),
        (b'{"question": "x", "question": "y"}', "bad_json"),
        (b'{"question": "\\ud800", "answer": "1"}', "bad_json"),
        (b'{"question": "\\u0000", "answer": "1"}', "bad_json"),
        (b'{"question": "\xff", "answer": "1"}', "bad_json"),
        (b'{"question": ' + b"[" * 1000 + b"]" * 1000 + b"}", "bad_json"),
        (GOOD.strip() * 2, "bad_json"),
        (b"\xef\xbb\xbf" + GOOD.strip(), "bad_json"),
        (b'["question", "answer"]', "not_an_object"),
        (b"12", "not_an_object"),
        (line(**{f"c{i}": 1 for i in range(65)}).strip(), "too_many_columns"),
        (line(**{"": 1}).strip(), "bad_column_name"),
        (line(**{"c" * 129: 1}).strip(), "bad_column_name"),
        (line(question="x" * 65_537, answer="1").strip(), "field_too_long"),
        (b" " * (256 * 1024 + 1), "line_too_long"),
    ],
)
def test_a_bad_line_is_named(bad: bytes, code: str) -> None:
    assert problems(GOOD + b"\n" + bad + b"\n" + GOOD, chunk=4096) == [("/lines/3", code)]


def test_position_within_the_line_is_the_parsers() -> None:
    with pytest.raises(DatasetError, match=r"^/lines/2 is not JSON: Expecting value at column 14\."):
        check(GOOD + b'{"question": oops}\n')


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"question": "x", "answer": NaN}', "/answer: NaN is not a JSON number. Give a finite number."),
        (b'{"a": 1, "a": 2}', "/a: The key 'a' occurs twice in one object. Keep one of them."),
    ],
)
def test_a_column_that_is_not_strict_json_is_named(bad: bytes, said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        check(GOOD + bad)
    assert str(caught.value) == f"/lines/2 cannot be read: {said}"


def test_all_bad_lines_are_named_together() -> None:
    assert problems(b"x\n" + GOOD + b"[]\n" + GOOD + b"{") == [
        ("/lines/1", "bad_json"),
        ("/lines/3", "not_an_object"),
        ("/lines/5", "bad_json"),
    ]


def test_twenty_bad_lines_are_all_there_are() -> None:
    with pytest.raises(DatasetError) as caught:
        check(b"x\n" * 20)
    assert len(caught.value.problems) == 20
    assert not caught.value.more
    assert str(caught.value).endswith("; and 17 more")


def test_reading_stops_at_more_than_twenty_bad_lines_and_says_that_there_are_more() -> None:
    checker = JsonlChecker()
    checker.feed(b"x\n" * 20)
    with pytest.raises(DatasetError) as caught:
        checker.feed(b"x\n" * 100)
    assert [problem.pointer for problem in caught.value.problems] == [f"/lines/{n}" for n in range(1, 21)]
    assert caught.value.more
    assert str(caught.value).endswith("; and at least 18 more")
    assert failure_of(caught.value).report.message.endswith("; and more")


@pytest.mark.parametrize(
    ("limits", "code"), [({"max_rows": 3}, "too_many_rows"), ({"max_bytes": 4 * len(GOOD) - 1}, "too_many_bytes")]
)
def test_too_much_stops_at_once(limits: dict[str, int], code: str) -> None:
    assert check(GOOD * 3, **limits).rows == 3
    checker = JsonlChecker(**limits)
    checker.feed(GOOD * 3)
    with pytest.raises(DatasetTooLargeError) as caught:
        checker.feed(GOOD)
    assert caught.value.code == code


@pytest.mark.parametrize("body", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_nothing_in_it(body: bytes) -> None:
    assert problems(body) == [("", "empty")]


@pytest.mark.parametrize("useless", [None, "", " \u3000", True, [], {"a": 1}])
def test_columns_are_those_with_a_value_in_every_row(useless: Any) -> None:
    body = line(a=1, b="x", c=useless) + line(c=2, b=True, a=useless, d=1) + line(a=1, b=1, c=1)
    expected = r"every row \(c has none in line 1, a has none in line 2, b has none in line 2\)"
    with pytest.raises(DatasetError, match=expected) as caught:
        check(body)
    assert caught.value.code == "no_columns"
    assert check(body.replace(line(c=2, b=True, a=useless, d=1), b"")).columns == ["a", "b"]


def test_a_file_of_questions_alone_is_a_data_set() -> None:
    assert check(line(question="x")).columns == ["question"]


def test_memory_does_not_grow_with_an_endless_line() -> None:
    checker = JsonlChecker()
    chunk = b"x" * 65_536
    tracemalloc.start()
    try:
        for _ in range(500):
            checker.feed(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    with pytest.raises(DatasetError, match="longer than 262144 bytes"):
        checker.finish()


def test_errors_do_not_repeat_the_data() -> None:
    body = line(question="CANARY" * 20_000, answer="1") + b'{"question": "CANARY", oops\n"CANARY"\n'
    with pytest.raises(DatasetError) as caught:
        check(body)
    assert len(caught.value.problems) == 3
    assert "CANARY" not in str(caught.value) + repr(caught.value.problems)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" 十二 \n", "十二"),
        (12, "12"),
        (-3, "-3"),
        (12.0, "12"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1200.50, "1200.5"),
        (1e22, "10000000000000000000000"),
        (2.5e-7, "0.00000025"),
        (100, "100"),
        (Decimal("12.00"), "12"),
        (Decimal(100), "100"),
        (10**40, "1" + "0" * 40),
        (True, None),
        (None, None),
        ("", None),
        (" \t\u3000", None),
        ("a\0b", None),
        ("x" * 65_537, None),
        (float("nan"), None),
        (float("-inf"), None),
        (Decimal("NaN"), None),
        ([12], None),
        ({"value": 12}, None),
        (b"12", None),
    ],
)
def test_text_of(value: object, text: str | None) -> None:
    assert text_of(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_float_is_plain_and_reads_back(value: float) -> None:
    text = text_of(value)
    assert text is not None
    assert set(text) <= set("-0123456789.")
    assert float(text) == value


# load_rows: uploads and files


def section(**fields: Any) -> DataSection:
    return DataSection.model_validate({"source": "file", **fields})


def write(path: Path, *lines: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
    return path


def test_upload_is_read_from_the_inputs(tmp_path: Path) -> None:
    write(tmp_path / "dataset.jsonl", line(question=" 一加一 ", answer=2), b"\n", line(question="x", answer=12.0))
    data = DataSection(source="upload", dataset="ds-01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert load_rows(data, tmp_path) == [Row(0, "一加一", "2"), Row(1, "x", "12")]


def test_file_is_read_from_its_path_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", line(q="x", a="1", question="no", answer="no"))
    data = section(dataset=str(path), question_column="q", answer_column="a")
    assert load_rows(data, tmp_path / "none") == [Row(0, "x", "1")]


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", GOOD * 3, b"not json\n")
    assert len(load_rows(section(dataset=str(path), max_rows=3), tmp_path)) == 3
    with pytest.raises(DatasetError, match="/lines/4"):
        load_rows(section(dataset=str(path), max_rows=4), tmp_path)


def test_every_row_of_a_file_must_be_usable(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", GOOD, line(question="x", answer=" "), GOOD, line(question="x"))
    with pytest.raises(DatasetError) as caught:
        load_rows(section(dataset=str(path)), tmp_path)
    assert [(p.pointer, p.code) for p in caught.value.problems] == [("/lines/2", "no_value"), ("/lines/4", "no_value")]


def test_missing_columns_of_a_file_name_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", line(prompt="x", answer="1") * 30)
    with pytest.raises(DatasetError) as caught:
        load_rows(section(dataset=str(path)), tmp_path)
    (problem,) = caught.value.problems
    assert (problem.pointer, problem.code) == ("/data/question_column", "missing_column")
    assert problem.remedy == "The columns are: prompt, answer."


@pytest.mark.parametrize("body", [b"", b"\n\n"])
def test_empty_file(tmp_path: Path, body: bytes) -> None:
    path = write(tmp_path / "sums.jsonl", body)
    with pytest.raises(DatasetError) as caught:
        load_rows(section(dataset=str(path)), tmp_path)
    assert caught.value.code == "empty"


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        load_rows(section(dataset=str(tmp_path / name)), tmp_path)
    assert caught.value.code == "unreadable_file"


# load_rows: folders that stand in for the hub, through the hub's own library

pytest.importorskip("huggingface_hub", reason="the hub's library comes with the training extras")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets with one of the recipe's shape, named in the environment."""
    monkeypatch.setenv(DATASET_DIR_VARIABLE, str(tmp_path / "shelf"))
    write_parquet(
        tmp_path / "shelf" / RECIPE / "data" / "train-00000-of-00001.parquet",
        {
            "question": ["Natalia sold 48 clips.", "Weng earns $12.", "Betty saves.", "Julie reads."],
            "answer": ["48 #### 72", "#### 10", "#### 5", "#### 42"],
            "question_zh-cn": ["娜塔莉亚卖了48个夹子。", " 翁每小时赚12美元。\n", "", "朱莉在读书。"],
            "answer_only": [72, 10, 5, None],
        },
    )
    write_parquet(
        tmp_path / "shelf" / RECIPE / "data" / "test-00000-of-00001.parquet",
        {"question": ["t"], "answer": ["#### 1"], "question_zh-cn": ["测试"], "answer_only": [1]},
    )
    return tmp_path / "shelf"


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def load(warned: list[str] | None = None, **fields: Any) -> list[Row]:
    def warn(code: str, message: str) -> None:
        assert message
        if warned is not None:
            warned.append(code)

    return load_rows(DataSection.model_validate(fields), Path("unused"), warn=warn)


def refused(**fields: Any) -> tuple[str, str]:
    with pytest.raises(DatasetError) as caught:
        load(**fields)
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem.pointer, problem.code


def test_the_recipes_data_set_from_a_folder(shelf: Path) -> None:
    warned: list[str] = []
    assert load(warned) == [Row(0, "娜塔莉亚卖了48个夹子。", "72"), Row(1, "翁每小时赚12美元。", "10")]
    assert warned == ["rows_without_values"]


def test_the_fixture_has_the_real_types(shelf: Path) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(next(shelf.rglob("train*.parquet")))
    assert [str(kind) for kind in schema.types] == ["string", "string", "string", "int64"]


def test_split_columns_and_rows_are_chosen(shelf: Path) -> None:
    assert load(split="test") == [Row(0, "测试", "1")]
    assert load(question_column="question", max_rows=1) == [Row(0, "Natalia sold 48 clips.", "72")]


def test_rows_keep_their_place_when_others_are_left_out(shelf: Path) -> None:
    assert [row.row for row in load(answer_column="answer")] == [0, 1, 3]


def test_the_argument_wins_over_the_environment(shelf: Path, tmp_path: Path) -> None:
    write(tmp_path / "other" / RECIPE / "rows.jsonl", line(**{"question_zh-cn": "x", "answer_only": 1.0}))
    assert load_rows(DataSection(), Path("unused"), dataset_dir=tmp_path / "other") == [Row(0, "x", "1")]


def test_a_folder_has_no_revisions(shelf: Path) -> None:
    warned: list[str] = []
    load(warned, split="test", revision="v1")
    assert warned == ["revision_ignored"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"question_column": "nope"}, ("/data/question_column", "missing_column")),
        ({"answer_column": "nope"}, ("/data/answer_column", "missing_column")),
        ({"split": "validation"}, ("/data/split", "no_such_split")),
        ({"subset": "main"}, ("/data/subset", "no_such_subset")),
        ({"dataset": "text"}, ("/data/dataset", "dataset_not_found")),
    ],
)
def test_what_a_folder_does_not_have(shelf: Path, fields: dict[str, str], problem: tuple[str, str]) -> None:
    assert refused(**fields) == problem


def test_missing_columns_of_a_folder_are_listed_with_those_there_are(shelf: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load(question_column="q", answer_column="a")
    assert [problem.pointer for problem in caught.value.problems] == ["/data/question_column", "/data/answer_column"]
    assert {p.remedy for p in caught.value.problems} == {
        "The columns are: question, answer, question_zh-cn, answer_only."
    }


def test_jsonl_folder_without_declared_columns(shelf: Path) -> None:
    write(shelf / "own" / "sums" / "train.jsonl", line(question="x", answer=2.5), line(question="y", answer=None))
    columns = {"question_column": "question", "answer_column": "answer"}
    assert load(dataset="own/sums", **columns) == [Row(0, "x", "2.5")]
    assert refused(dataset="own/sums", question_column="question", answer_column="a") == (
        "/data/answer_column",
        "missing_column",
    )


def test_no_row_left(shelf: Path) -> None:
    write_parquet(shelf / "own" / "blank" / "train.parquet", {"question_zh-cn": ["", "x"], "answer_only": [1, None]})
    assert refused(dataset="own/blank") == ("/data/question_column", "empty")


def test_broken_and_empty_folders(shelf: Path) -> None:
    write(shelf / "own" / "broken" / "train.parquet", b"PAR1 and no more")
    (shelf / "own" / "hollow").mkdir()
    assert refused(dataset="own/broken") == ("/data/dataset", "unreadable")
    assert refused(dataset="own/hollow") == ("/data/dataset", "no_data_files")


def test_hub_bounds(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_ROWS", 3)
    assert refused() == ("/data/max_rows", "too_large")
    assert len(load(max_rows=3)) == 2
    monkeypatch.setattr(hub_module, "MAX_ROWS", 4)
    monkeypatch.setattr(hub_module, "MAX_BYTES", 20)
    assert refused() == ("/data/max_rows", "too_large")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc", "a/b/c", "..", "a/..", ""])
def test_a_name_cannot_leave_the_folder(shelf: Path, name: str) -> None:
    write(shelf.parent / "secret" / "rows.jsonl", line(**{"question_zh-cn": "x", "answer_only": 1}))
    data = DataSection.model_construct(**{**DataSection().model_dump(), "dataset": name})
    with pytest.raises(DatasetError) as caught:
        load_rows(data, Path("unused"))
    assert caught.value.code == "bad_name"


@pytest.mark.parametrize("outside", ["../../other/data/rows.jsonl", "{root}/other/data/rows.jsonl"])
def test_a_description_cannot_name_files_outside(shelf: Path, outside: str) -> None:
    row = line(**{"question_zh-cn": "x", "answer_only": 1})
    write(shelf / "other" / "data" / "rows.jsonl", row)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {outside.format(root=shelf)}\n---\n"
    write(shelf / "own" / "sly" / "README.md", card.encode())
    assert refused(dataset="own/sly") == ("/data/dataset", "foreign_files")
    inside = "---\nconfigs:\n- config_name: default\n  data_files: sub/*.jsonl\n---\n"
    write(shelf / "own" / "sly" / "README.md", inside.encode())
    write(shelf / "own" / "sly" / "sub" / "rows.jsonl", row)
    assert load(dataset="own/sly") == [Row(0, "x", "1")]


# load_rows: the hub itself


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Recorder], None]) -> Iterator[None]:
    """A hub on loopback that answers every request alike."""
    with serve(Recorder, answer=lambda request, _path: answer(request)) as server:
        point_at(monkeypatch, server.url)
        yield


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cached copy nor minutes of retries."""
    monkeypatch.delenv(DATASET_DIR_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)


def recipe(shelf: Path) -> dict[str, bytes]:
    name = "data/train-00000-of-00001.parquet"
    return {name: (shelf / RECIPE / name).read_bytes(), "README.md": b"# GSM8K in Chinese\n"}


def test_the_recipes_data_set_from_a_hub(shelf: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with({RECIPE: Repo(recipe(shelf))}) as server:
        point_at(monkeypatch, server.url)
        assert load() == [Row(0, "娜塔莉亚卖了48个夹子。", "72"), Row(1, "翁每小时赚12美元。", "10")]
    assert any(path.endswith(".parquet") for _, path in server.asked)


def test_a_hub_data_set_cannot_name_the_workers_files(
    shelf: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = write(shelf / "secret.jsonl", line(**{"question_zh-cn": "x", "answer_only": 1}))
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n"
    with hub_with({RECIPE: Repo({**recipe(shelf), "README.md": card.encode()})}) as server:
        point_at(monkeypatch, server.url)
        assert refused() == ("/data/dataset", "foreign_files")


def test_a_hub_that_does_not_know_the_data_set(hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with({}) as server:
        point_at(monkeypatch, server.url)
        with pytest.raises(DatasetError) as caught:
            load()
    assert not isinstance(caught.value, DatasetUnreachableError)
    assert (caught.value.code, caught.value.problems[0].pointer) == ("dataset_not_found", "/data/dataset")


def test_a_hub_that_is_broken(hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_core.hub.WAIT_SECONDS", ())
    with hub_server(monkeypatch, lambda request: request.respond(b"", 503)), pytest.raises(DatasetUnreachableError):
        load()


def test_a_hub_that_is_away_for_a_while(shelf: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_core.hub.WAIT_SECONDS", (0, 0))
    told: list[str] = []

    class AwayAtFirst(HubHandler):
        repos = {RECIPE: Repo(recipe(shelf))}  # noqa: RUF012 - never changed

        def answer(self, path: str) -> None:
            if told:
                super().answer(path)
            else:
                self.respond(b"", 503)

    with serve(AwayAtFirst) as server:
        point_at(monkeypatch, server.url)
        assert len(load(told, max_rows=2)) == 2
    assert told == ["hub_away"]


def test_a_hub_that_is_not_there(hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(DatasetUnreachableError) as caught:
        load()
    assert caught.value.code == "hub_unreachable"


def test_no_folder_of_the_working_directory_is_taken_for_the_hub(
    hub_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / RECIPE / "rows.jsonl", line(**{"question_zh-cn": "x", "answer_only": 1}))
    monkeypatch.chdir(tmp_path)
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(DatasetUnreachableError):
        load()


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"question,answer\n1+1,2\n", "looks like CSV; convert it to JSON lines"),
        (b"question;answer\r\n1+1;2\r\n", "looks like CSV"),
        (b'[{"question": "1", "answer": 2}]', "looks like one JSON list"),
        (b'[\n{"question": "1", "answer": 2}\n]', "looks like one JSON list"),
        (b"PAR1\x15\x04", "looks like Parquet"),
        (b"\x1f\x8b\x08\x00", "with gunzip"),
        ('{"question": "中"}'.encode("utf-16"), "this is UTF-16"),
        ('{"question": "中国", "answer": 2}\n'.encode("gbk"), "iconv -f GB18030"),
        (b'{"question": "1", "answer": 2}{"question": "2", "answer": 3}', "--data-binary"),
        (b'{"question": "1", "answer": 2} {"question": "2"', "--data-binary"),
        (b'{"question": "{a}{b}", "answer": 2,}', "Put one JSON object on each line"),
        (b'{"question": "{a} {b}"', "Put one JSON object on each line"),
        (b'{"question": "1", "answer": 2}]', "Put one JSON object on each line"),
        (b'{"a":' * 50_000, "Put one JSON object on each line"),
        (b"{'question': '1', 'answer': 2}", "double quotes"),
        (b'{"question": "1", "answer": 2,}', "Put one JSON object on each line"),
        (b"What is 1, and 2, plus: 3?\n", "Put one JSON object on each line"),
    ],
)
def test_a_file_of_another_format_is_told_how_to_become_jsonl(content: bytes, remedy: str) -> None:
    checker = JsonlChecker()
    checker.feed(content)
    with pytest.raises(DatasetError) as caught:
        checker.finish()
    assert remedy in caught.value.problems[0].remedy


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_the_command_that_is_told_makes_jsonl_of_a_table(tmp_path: Path, separator: str, encoding: str) -> None:
    """Whatever stands between its columns; a value is not made another: 007 is not 7, nor 3 a 3.0 beside a gap."""
    rows = [("1,5 + 1;5?", "3"), ('他说"中"\tx', "007"), ("two\nlines", "")]
    lines = io.StringIO()
    csv.writer(lines, delimiter=separator).writerows([("question", "answer"), *rows])
    content = lines.getvalue().encode(encoding)
    (tmp_path / "FILE").write_bytes(content)
    checker = JsonlChecker()
    checker.feed(content)
    with pytest.raises(DatasetError) as caught:
        checker.finish()
    command = caught.value.problems[0].remedy.partition(": ")[2].removesuffix(".")
    assert command.startswith("python -c ")
    arguments = [sys.executable, *shlex.split(command)[1:]]
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=120)
    made = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text("utf-8").splitlines()]
    assert made == [{"question": question, "answer": answer or None} for question, answer in rows]
