"""Data sets in CSV, Parquet and JSON lists: what they become, and how hostile ones end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_core.datasets import DatasetError, DatasetTooLargeError, Needs, load_rows
from grpo_core.datasets import parquet as parquet_module
from grpo_core.datasets.convert import convert, convert_apart, kind_of
from grpo_core.datasets.row_reader import item_of
from grpo_core.spec import DataSection
from tests.clock import patience

BOUNDS: dict[str, Any] = {"max_rows": 1000, "max_bytes": 10_000_000}


def converted(path: Path) -> list[dict[str, Any]]:
    kind = kind_of(path.name)
    assert kind is not None
    target = path.with_suffix(".out")
    convert(path, kind, target, **BOUNDS)
    return [json.loads(line) for line in target.read_text().splitlines()]


def written(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def test_csv_stays_text_and_an_index_column_is_dropped(tmp_path: Path) -> None:
    body = '\ufeff,question,answer\r\n0,"a, ""b""\nc",007\r\n1,二,None\r\n'.encode()
    assert converted(written(tmp_path / "a.csv", body)) == [
        {"question": 'a, "b"\nc', "answer": "007"},
        {"question": "二", "answer": "None"},
    ]


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_the_separator_is_found(tmp_path: Path, separator: str) -> None:
    body = separator.join(["question", "answer", "note"]) + "\n" + separator.join(["q", "1", ""]) + "\n"
    assert converted(written(tmp_path / "a.csv", body.encode())) == [{"question": "q", "answer": "1", "note": None}]


def test_parquet_keeps_lists_and_objects_and_drops_images(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]]
    columns = {
        "messages": chat,
        "extra": [{"gold": "1", "more": [1.5, None]}, {"gold": "2", "more": []}],
        "answer": [1, 2],
        "image": [b"x", b"y"],
        "pairs": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert converted(tmp_path / "a.parquet") == [
        {
            "messages": chat[0],
            "extra": {"gold": "1", "more": [1.5, None]},
            "answer": 1,
            "pairs": [["a", 1]],
        },
        {"messages": chat[1], "extra": {"gold": "2", "more": []}, "answer": 2, "pairs": []},
    ]


def test_a_json_list_is_read(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": [1]}, {"question": "r", "answer": [2]}]
    assert converted(written(tmp_path / "a.json", json.dumps(rows).encode())) == rows


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "a.jsonl"])
def test_a_local_file_gives_the_same_rows_in_every_form(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"q{n}", "answer": f"#### {n}", "level": "x"} for n in range(5)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        path.write_text("question,answer,level\n" + "".join(f"q{n},#### {n},x\n" for n in range(5)))
    else:
        text = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
    fields = {"source": "file", "dataset": str(path), "answer_pattern": "#### *(.+)", "max_rows": 4}
    found = load_rows(DataSection.model_validate(fields), tmp_path, needs=Needs(everything=True))
    assert [(row.question, row.answer) for row in found] == [(f"q{n}", str(n)) for n in range(4)]
    assert item_of(found[3]) == {"question": "q3", "answer": "3", "level": "x"}


def test_apart_says_the_same(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b"question,answer\nq,1\nr,2\n")
    summary = convert_apart(path, "csv", tmp_path / "out", **BOUNDS)
    assert (summary.rows, summary.columns) == (2, ["question", "answer"])
    assert summary == convert(path, "csv", tmp_path / "here", **BOUNDS)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "too_large"),
        ("a.parquet", b"", "unreadable"),
        ("a.csv", "问题,答案\n一,二\n".encode("gb18030"), "unreadable"),
        ("a.csv", b"question,answer\n", "empty"),
        ("a.json", b'[{"a": 1}, 2]', "unreadable"),
        ("a.json", b"[" * 100_000, "unreadable"),
        ("a.csv", b"a,b\n" + b"x,y\n" * 1001, "too_many_rows"),
        ("a.csv", b"a,b\n" + b"x" * 300_000 + b",y\n", "line_too_long"),
        ("a.csv", b'a,b\n"' + b"x" * 9_000_000, "too_large"),
    ],
)
def test_bad_files_are_refused_with_a_remedy(tmp_path: Path, name: str, body: bytes, code: str) -> None:
    path = written(tmp_path / name, body)
    with pytest.raises(DatasetError) as caught:
        convert_apart(path, kind_of(name) or "csv", tmp_path / "out", **BOUNDS)
    assert caught.value.code == code
    assert all(problem.remedy for problem in caught.value.problems)


def test_rows_are_named_by_their_number(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b"a,b\nx,y\nx," + b"y" * 70_000 + b"\n")
    with pytest.raises(DatasetError) as caught:
        convert_apart(path, "csv", tmp_path / "out", **BOUNDS)
    assert [problem.pointer for problem in caught.value.problems] == ["/rows/2"]


def test_a_text_that_lists_repeat_a_million_times_is_refused_quickly(tmp_path: Path) -> None:
    # A page of some kilobytes that stands for a terabyte.
    numbers = pa.array([0] * 1_000_000, pa.int32())
    texts = pa.DictionaryArray.from_arrays(numbers, pa.array(["x" * 1_000_000]))
    lists = pa.ListArray.from_arrays(pa.array([0, 1_000_000], pa.int32()), texts)
    pq.write_table(pa.table({"q": ["a"], "l": lists}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    began = time.perf_counter()
    with pytest.raises(DatasetTooLargeError):
        convert_apart(tmp_path / "a.parquet", "parquet", tmp_path / "out", **BOUNDS)
    assert time.perf_counter() - began < patience(30)


def test_a_list_of_very_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "MAX_NESTED_VALUES", 1000)
    pq.write_table(pa.table({"q": ["a"], "l": [[None] * 2000]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetTooLargeError, match="values in a row group"):
        convert(tmp_path / "a.parquet", "parquet", tmp_path / "out", **BOUNDS)


def test_a_reader_that_dies_refuses_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.csv", b"a,b\nx,y\n")
    monkeypatch.setattr("grpo_core.datasets.convert.sys.executable", "/bin/false")
    with pytest.raises(DatasetError, match="ends the reader"):
        convert_apart(path, "csv", tmp_path / "out", **BOUNDS)
