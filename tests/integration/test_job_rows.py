"""The rows of a job over HTTP, from a bucket: pages, searches, references, and why there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_client import GrpoClient, ProblemError
from jobs.auth.api_keys import OWNER_SCOPES
from tests.integration.running import RunningApi

NEAR = "def grade(sample, item):\n    return float(sample['output_text'] == str(item['target']))\n"
GRADERS = {
    "near": {"type": "python", "source": NEAR},
    "unit": {
        "type": "string_check",
        "input": "{{sample.output_text}}",
        "reference": "{{item.unit}}",
        "operation": "eq",
    },
}


@pytest.fixture
def ann(api: RunningApi) -> Iterator[GrpoClient]:
    with GrpoClient(api.url, api.service.keys.create("ann", OWNER_SCOPES)[0]) as client:
        yield client


def upload(client: GrpoClient, folder: Path, rows: int) -> str:
    path = folder / "rows.jsonl"
    lines = [
        json.dumps({"question": f"What is {row}?", "answer": str(row), "target": row, "unit": "m"})
        for row in range(rows)
    ]
    # As some programs write it: with a byte order mark, and blank lines.
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    return client.upload_dataset(path).id


def submit(client: GrpoClient, data: dict[str, Any], questions: int = 200) -> str:
    spec = {"data": data, "rewards": {"graders": GRADERS, "weights": {"correctness": 0}}}
    return client.submit({**spec, "evaluation": {"questions": questions}}).id


def test_every_row_is_shown_once_as_the_prompt_of_the_job(api: RunningApi, ann: GrpoClient, tmp_path: Path) -> None:
    made = upload(ann, tmp_path, 2500)
    job = submit(ann, {"source": "upload", "dataset": made, "system_prompt": "Reckon."})
    assert [row.row for row in ann.dataset_rows(made, limit=3).data] == [0, 1, 2], "a byte order mark is no error"

    page = ann.job_rows(job, limit=100)
    assert (page.first_row, page.rows, page.unavailable) == (0, 2300, None)
    (row,) = ann.job_rows(job, first=2222, limit=1).data
    assert row.row == 2222
    assert row.values == {"question": "What is 2222?", "answer": "2222", "target": 2222, "unit": "m"}
    assert [(turn.role, turn.content) for turn in row.messages] == [("system", "Reckon."), ("user", "What is 2222?")]
    assert (row.answer, len(row.sha256)) == ("2222", 64)
    held_out = ann.job_rows(job, part="held_out", limit=100)
    assert (held_out.first_row, held_out.rows, held_out.data[0].row) == (2300, 200, 2300)
    seen, cursor = [row.row for row in held_out.data], held_out.next_cursor
    while cursor:
        held_out = ann.job_rows(job, part="held_out", limit=100, cursor=cursor)
        seen, cursor = seen + [row.row for row in held_out.data], held_out.next_cursor
    assert seen == list(range(2300, 2500))
    found = ann.job_rows(job, search="WHAT IS 229")
    assert [row.row for row in found.data] == [229, *range(2290, 2300)]

    with GrpoClient(api.url, api.service.keys.create("bob", OWNER_SCOPES)[0]) as bob:
        with pytest.raises(ProblemError) as refused:
            bob.job_rows(job)
        assert refused.value.status == 404
    for wrong in ({"cursor": "5-7"}, {"first": -1}, {"limit": 101}, {"search": ""}, {"part": "other"}):
        with pytest.raises(ProblemError) as refused:
            ann.job_rows(job, **wrong)  # type: ignore[arg-type]
        assert (refused.value.status, refused.value.code) == (400, "bad_query"), wrong


def test_rows_say_why_there_are_none(ann: GrpoClient, tmp_path: Path) -> None:
    made = upload(ann, tmp_path, 400)
    job = submit(ann, {"source": "upload", "dataset": made}, questions=8)
    ann.cancel(job)
    ann.delete_dataset(made)
    page = ann.job_rows(job)
    assert page.data == []
    assert page.unavailable
    assert page.unavailable.code == "dataset_deleted"


def test_an_object_is_read_as_workers_read_it(ann: GrpoClient, api: RunningApi, tmp_path: Path) -> None:
    store = api.service.store
    body = b"".join(
        b'{"question": "q%d", "answer": "%d", "target": 1, "unit": "m"}\n' % (row, row) for row in range(300)
    )
    store.put("data/rows.jsonl", body)
    url = f"s3://{store.bucket}/data/rows.jsonl"
    job = submit(ann, {"source": "s3", "dataset": url}, questions=50)
    page = ann.job_rows(job, part="held_out", limit=1)
    assert (page.first_row, page.rows, page.data[0].row) == (250, 50, 250)
    reference = ann.job_rows(job, first=7, limit=1).data[0].sha256
    # It is written again with other rows: counted anew, and a reference shows that the row is another.
    store.put("data/rows.jsonl", body.replace(b"q7", b"x7") + body)
    page = ann.job_rows(job, first=7, limit=1)
    assert (page.rows, page.data[0].sha256 == reference) == (550, False)
    store.delete("data/rows.jsonl")
    page = ann.job_rows(job)
    assert page.unavailable
    assert page.unavailable.code == "no_such_dataset"


def test_scores_are_those_of_the_whole_row_and_say_which_column_is_missing(ann: GrpoClient, tmp_path: Path) -> None:
    job = submit(ann, {"source": "upload", "dataset": upload(ann, tmp_path, 400)}, questions=8)
    spec = ann.get(job).spec
    (row,) = ann.job_rows(job, first=5, limit=1).data
    free = {"question": "What is 5?", "answer": "5"}
    found = ann.score_rows(
        {"data": spec["data"], "rewards": spec["rewards"]},
        [{"item": item, "model_sample": text} for item in (row.values, free) for text in ("5", "m")],
    )
    scores = [one.rewards for one in found.data]
    assert [(one["near"], one["unit"]) for one in scores[:2]] == [(1, 0), (0, 1)]
    assert [one.missing_columns for one in found.data] == [{}, {}, *2 * [{"near": ["target"], "unit": ["unit"]}]]
    assert [(one["near"], one["unit"]) for one in scores[2:]] == 2 * [(None, None)]
