"""Data sets over HTTP beside upload and preview: rows in pages, the jobs that use one, whose they are, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_client import GrpoClient, ProblemError
from grpo_client.cli import main
from grpo_core.spec import parse_spec
from jobs.auth.api_keys import OPERATOR, OWNER_SCOPES
from jobs.store import row_files
from tests.integration.running import RunningApi


def client_of(api: RunningApi, owner: str, *more: str) -> GrpoClient:
    return GrpoClient(api.url, api.service.keys.create(owner, [*OWNER_SCOPES, *more])[0])


def file_of(folder: Path, rows: int, width: int = 1) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"question": "é" * width + str(row), "answer": str(row), "n": row}) for row in range(rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def all_rows(client: GrpoClient, dataset_id: str, limit: int) -> list[list[int]]:
    """The answers of each page."""
    pages, cursor = [], None
    while True:
        page = client.dataset_rows(dataset_id, limit=limit, cursor=cursor)
        assert [row.row for row in page.data] == [row["values"]["n"] for row in page.data]
        pages.append([row.row for row in page.data])
        cursor = page.next_cursor
        if cursor is None:
            return pages


def test_rows_come_in_pages_each_once(api: RunningApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(api, "ann") as ann:
        made = ann.upload_dataset(file_of(tmp_path, 45, width=300))
        pages = all_rows(ann, made.id, 20)
        assert pages == [list(range(20)), list(range(20, 40)), list(range(40, 45))]
        assert all_rows(ann, made.id, 45) == [list(range(45))], "the last page says so"
        monkeypatch.setattr(row_files, "ROWS_BYTES", 2000)
        pages = all_rows(ann, made.id, 20)
        assert [row for page in pages for row in page] == list(range(45))
        assert len(pages) > 10, "long rows make short pages"
        for cursor in ("5-7", "x", "1-999999999", "-1-0"):
            with pytest.raises(ProblemError) as refused:
                ann.dataset_rows(made.id, cursor=cursor)
            assert (refused.value.status, refused.value.code) == (400, "bad_query")


def test_a_data_set_names_the_jobs_that_use_it_and_is_kept_for_them(api: RunningApi, tmp_path: Path) -> None:
    with client_of(api, "ann") as ann:
        made, other = (ann.upload_dataset(file_of(tmp_path, rows)) for rows in (30, 31))
        data = {"source": "upload", "dataset": made.id}
        spec: dict[str, Any] = {"data": data, "evaluation": {"questions": 0}}
        ids = [ann.submit({**spec, "name": f"job {number}"}).id for number in range(3)]
        elsewhere = {"data": {"source": "upload", "dataset": other.id}, "metadata": {"not": made.id}}
        ann.submit({**elsewhere, "evaluation": {"questions": 0}})
        first = ann.dataset_jobs(made.id, limit=2)
        rest = ann.dataset_jobs(made.id, limit=2, cursor=first.next_cursor)
        assert [job.id for job in (*first.data, *rest.data)] == ids[::-1]
        assert rest.next_cursor is None
        with pytest.raises(ProblemError) as refused:
            ann.delete_dataset(made.id)
        assert refused.value.status == 409
        assert any(job_id in refused.value.detail for job_id in ids)
        for job_id in ids:
            ann.cancel(job_id)
        ann.delete_dataset(made.id)
        for call in (ann.dataset, ann.dataset_rows, ann.dataset_jobs):
            with pytest.raises(ProblemError) as refused:
                call(made.id)
            assert refused.value.status == 404


def test_what_is_others_is_not_there_except_for_operators(api: RunningApi, tmp_path: Path) -> None:
    with client_of(api, "ann") as ann, client_of(api, "bob") as bob, client_of(api, "chief", OPERATOR) as chief:
        made = ann.upload_dataset(file_of(tmp_path, 3))
        theirs = bob.upload_dataset(file_of(tmp_path, 4))
        for call in (bob.dataset, bob.dataset_rows, bob.dataset_jobs, bob.delete_dataset):
            with pytest.raises(ProblemError) as refused:
                call(made.id)
            assert refused.value.status == 404
        with pytest.raises(ProblemError) as refused:
            bob.datasets(owner="*")
        assert refused.value.status == 403
        assert [one.id for one in bob.datasets().data] == [theirs.id]
        assert [one.id for one in chief.datasets(owner="*").data] == [theirs.id, made.id]
        first = chief.datasets(owner="*", limit=1)
        assert [one.id for one in chief.datasets(owner="*", limit=1, cursor=first.next_cursor).data] == [made.id]
        assert [one.owner for one in chief.datasets(owner="ann").data] == ["ann"]
        job = api.service.submit(
            parse_spec({"data": {"source": "upload", "dataset": made.id}, "evaluation": {"questions": 0}}), "ann"
        )
        assert [one.id for one in chief.dataset_jobs(made.id).data] == [job.id]
        assert len(chief.dataset_rows(made.id).data) == 3
        chief.delete_dataset(theirs.id)
        assert bob.datasets().data == []


def test_the_commands_show_a_data_set_its_rows_and_its_jobs(
    api: RunningApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _ = api.service.keys.create("ann", [*OWNER_SCOPES, OPERATOR])
    monkeypatch.setenv("GRPO_URL", api.url)
    monkeypatch.setenv("GRPO_API_KEY", key)
    with GrpoClient(api.url, key) as ann:
        made = ann.upload_dataset(file_of(tmp_path, 3), name="three")
        ann.submit({"name": "user", "data": {"source": "upload", "dataset": made.id}, "evaluation": {"questions": 0}})

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as raised:
            main(["datasets", *words])
        assert raised.value.code == 0
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if "[info" not in line)

    shown = run("show", made.id)
    assert made.sha256 in shown
    assert "user" in shown.splitlines()[-1]
    assert json.loads(run("show", made.id, "--json"))["jobs"][0]["name"] == "user"
    assert [json.loads(line)["n"] for line in run("rows", made.id, "--limit", "2").splitlines()] == [0, 1]
    assert "ann" in run("list", "--owner", "*")
