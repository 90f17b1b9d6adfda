"""The preview of a data set: what its columns hold, and its rows as the prompts that a job would send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from grpo_core.datasets.preview import preview_columns, preview_rows, records_of
from grpo_core.spec import parse_spec
from tests.unit.fakes import BOB, FakeJobService, bearer

Client = TestClient[Litestar]

REVIEWS: list[dict[str, Any]] = [
    {"text": "Lovely film", "label": "good", "stars": 5, "tags": ["a"]},
    {"text": "Dull.", "label": "bad", "stars": None, "tags": []},
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "One word."}, {"role": "user", "content": "2+2?"}], "answer": "4"}
]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def client() -> Iterator[Client]:
    with TestClient(create_app(FakeJobService()), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        yield client


def upload(client: Client, rows: list[dict[str, Any]]) -> str:
    headers = {**bearer(), "Content-Type": "application/x-ndjson"}
    return client.post("/datasets", content=lines_of(rows), headers=headers).json()["id"]


def test_columns_say_what_every_row_holds() -> None:
    found = {one.name: one.holds for one in preview_columns([*REVIEWS])}
    assert found == {"text": "text", "label": "text", "stars": "other", "tags": "other"}
    assert [one.holds for one in preview_columns(CHATS)] == ["chat", "text"]


def test_lines_that_are_no_objects_are_left_out() -> None:
    assert records_of(b'{"a": 1}\n[]\nnot json\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]
    assert len(records_of(b'{"a": 1}\n' * 10, most=3)) == 3


def test_a_row_is_shown_as_the_prompt_it_becomes() -> None:
    data = {"source": "upload", "dataset": "ds-00000000000000000000000000", "question_column": "text"}
    spec = parse_spec({"data": {**data, "answer_column": "label", "system_prompt": "Good or bad?"}})
    first, second = preview_rows(spec, REVIEWS)
    assert first.messages == [
        {"role": "system", "content": "Good or bad?"},
        {"role": "user", "content": "Lovely film"},
    ]
    assert (first.answer, second.answer) == ("good", "bad")
    assert first.values == REVIEWS[0]


def test_a_row_that_no_job_can_use_says_why() -> None:
    data = {"source": "upload", "dataset": "ds-00000000000000000000000000", "question_column": "nothing"}
    row = preview_rows(parse_spec({"data": data}), REVIEWS)[0]
    assert row.values == REVIEWS[0]
    assert row.messages == ()
    assert row.problem is not None
    assert "'nothing'" in row.problem.detail


def test_the_service_previews_an_upload_of_its_owner(client: Client) -> None:
    dataset = upload(client, CHATS)
    spec = {"data": {"source": "upload", "dataset": dataset, "format": "messages"}}
    answer = client.post("/datasets/preview", json=spec, headers=bearer())
    assert answer.status_code == 200
    body = answer.json()
    assert body["columns"] == [{"name": "messages", "holds": "chat"}, {"name": "answer", "holds": "text"}]
    assert body["data"][0]["messages"] == CHATS[0]["messages"]
    assert body["data"][0]["answer"] == "4"
    assert body["data"][0]["values"] == CHATS[0]
    assert body["data"][0]["problem"] is None
    strange = client.post("/datasets/preview", json=spec, headers=bearer(BOB))
    assert (strange.status_code, strange.json()["errors"][0]["pointer"]) == (422, "/data/dataset")
    assert "2+2" not in strange.text


def test_a_preview_has_as_many_rows_as_were_asked_for(client: Client) -> None:
    spec = {"data": {"source": "upload", "dataset": upload(client, REVIEWS * 10), "question_column": "text"}}
    for limit, rows in ((3, 3), (50, 20)):
        answer = client.post(f"/datasets/preview?limit={limit}", json=spec, headers=bearer())
        assert len(answer.json()["data"]) == rows
        assert answer.json()["data"][1]["values"]["stars"] is None
    assert client.post("/datasets/preview?limit=51", json=spec, headers=bearer()).status_code == 400
