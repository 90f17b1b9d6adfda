from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import structlog
from litestar import Litestar
from litestar.testing import TestClient

import grpo_client.client
from api.cli import ALL
from grpo_client import GrpoClient
from grpo_client.cli import main
from grpo_client.cli.output import CommandError, confirm
from grpo_client.cli.text import BLOCKS, count, sparkline
from grpo_client.errors import PushError
from grpo_client.results import JobDetail
from grpo_core.evaluation.paired_stats import wilson_interval
from grpo_core.spec import JobSpec, parse_spec
from jobs.auth.api_keys import KeyRecord
from jobs.errors import NotFound
from jobs.read.rollouts import Rollout
from jobs.store.job import JobStatus
from tests.unit.fakes import ALICE, FakeJobService, key_record, make_record

GOOD = "<reasoning>\n6+6 is 12\n</reasoning>\n<answer>\n12\n</answer>\n"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, f"one line of JSON and nothing else: {self.out!r}"
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `grpo` with these words."""

    def run_words(*words: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run_words


@pytest.fixture
def online(
    client: TestClient[Litestar], service: FakeJobService, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeJobService]:
    """The commands talk to the application on a fake service; storage has what its artifacts announce."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "storage.test":
            return httpx.Response(200, content=service.contents[request.url.path])
        response = client.request(
            request.method, str(request.url.raw_path, "ascii"), content=request.read(), headers=dict(request.headers)
        )
        # The test client has unpacked it.
        headers = {name: value for name, value in response.headers.items() if name != "content-encoding"}
        return httpx.Response(response.status_code, content=response.content, headers=headers)

    service.contents = {}  # type: ignore[attr-defined]
    monkeypatch.setenv("GRPO_URL", "http://api.test")
    monkeypatch.setenv("GRPO_API_KEY", ALICE)
    original = grpo_client.client.GrpoClient
    monkeypatch.setattr(grpo_client.client, "GrpoClient", lambda: original(transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    # The service's log lines are not the command's output.
    with structlog.testing.capture_logs():
        yield service


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "spec.json"
    file.write_text('{"training": {"steps": 20}}')
    return str(file)


def ends(monkeypatch: pytest.MonkeyPatch, service: FakeJobService, status: JobStatus, **fields: Any) -> None:
    """Whatever is submitted ends at once."""
    submit = service.submit

    def submit_and_end(*arguments: Any, **options: Any) -> Any:
        record = submit(*arguments, **options)
        for step in (1, 2):
            service.add_event(record.id, "metric", step=step, reward=step / 2)
        service.put(record, status=status, **fields)
        return record

    monkeypatch.setattr(service, "submit", submit_and_end)


# Rewards, without a service.


def test_rewards_list(run: Run) -> None:
    names = ["correctness", "integer", "strict_format", "soft_format", "xml_count"]
    assert [reward["name"] for reward in run("rewards", "list", "--json").json["data"]] == names
    assert [line.split()[0] for line in run("rewards", "list", "--mode", "published").out.splitlines()] == names


@pytest.mark.parametrize(("mode", "soft", "total"), [("fixed", 0.5, 4.0), ("published", 0.0, 3.5)])
def test_rewards_score(run: Run, tmp_path: Path, mode: str, soft: float, total: float) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"completion": GOOD, "answer": "12"}, {"completion": "12", "answer": 12}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    result = run("rewards", "score", str(file), "--mode", mode)
    first, second = [json.loads(line) for line in result.out.splitlines()]
    assert list(first) == ["correctness", "integer", "strict_format", "soft_format", "xml_count", "total"]
    assert (first["correctness"], first["soft_format"], first["total"]) == (2.0, soft, total)
    assert second["correctness"] == (2.0 if mode == "published" else 0.0)


def test_rewards_score_reads_standard_input(run: Run) -> None:
    line = json.dumps({"completion": GOOD, "answer": "12"}).encode()
    assert len(run("rewards", "score", "-", stdin=line + b"\n\n" + line).out.splitlines()) == 2


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense",
        b"[]",
        b'{"completion": "x"}',
        b'{"answer": "x"}',
        b'{"completion": 3, "answer": "x"}',
        b'{"completion": "x", "answer": [1]}',
        b'{"completion": "x", "answer": NaN}',
        b'{"completion": "\\ud800", "answer": "x"}',
        b"\xff\xfe",
    ],
)
def test_a_bad_line_is_named(run: Run, bad: bytes) -> None:
    good = json.dumps({"completion": GOOD, "answer": "12"}).encode()
    result = run("rewards", "score", "-", stdin=good + b"\n" + bad + b"\n" + good)
    assert result.code == 2
    assert "Line 2:" in result.err
    assert len(result.out.splitlines()) == 1, "what came before is scored"


def test_a_missing_file_is_one_sentence(run: Run) -> None:
    result = run("rewards", "score", "/nowhere/rows.jsonl")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "/nowhere/rows.jsonl cannot be read" in result.err


# Jobs.


def test_submit_prints_the_job(run: Run, online: FakeJobService, spec: str) -> None:
    result = run("submit", spec, "--json")
    assert (result.code, result.json["total_steps"]) == (0, 20)
    told = run("submit", spec)
    assert (told.out.startswith("job-"), told.err) == (True, "warning /resources: No worker is connected.\n")
    assert len(online.jobs) == 2


def test_submit_makes_changes(run: Run, online: FakeJobService, spec: str) -> None:
    changes = ["training.steps=5", "name=my run", "metadata.team=a=b", "lora.rank=8", "model.revision=null"]
    words = [word for change in changes for word in ("--set", change)]
    job = run("submit", spec, *words, "--json").json
    assert (job["total_steps"], job["name"], job["metadata"]) == (5, "my run", {"team": "a=b"})
    assert job["spec"]["lora"]["rank"] == 8


@pytest.mark.parametrize("change", ["steps", "=5", "training..steps=5", "training.steps.x=1", ".=1"])
def test_a_change_that_makes_no_sense_is_refused(run: Run, online: FakeJobService, spec: str, change: str) -> None:
    result = run("submit", spec, "--set", change)
    assert result.code == 2
    assert change in result.err
    assert online.jobs == {}


def test_a_text_stays_one_though_the_shell_took_its_quotes(run: Run, online: FakeJobService, spec: str) -> None:
    changes = ["name=5", "metadata.run=7", "metadata.on=true"]
    job = run("submit", spec, "--json", *[part for change in changes for part in ("--set", change)]).json
    assert (job["name"], job["metadata"]) == ("5", job["metadata"] | {"run": "7", "on": "true"})


def test_submit_reads_standard_input(run: Run, online: FakeJobService) -> None:
    assert run("submit", "-", "--json", stdin=b"{}").json["status"] == "queued"


@pytest.mark.parametrize("text", ["", "nonsense", '{"name": "a", "name": "b"}', '{"training": {"steps": NaN}}'])
def test_a_file_that_is_not_json_is_refused(run: Run, online: FakeJobService, text: str) -> None:
    assert run("submit", "-", stdin=text.encode()).code == 2
    assert online.jobs == {}


def test_a_refused_spec_prints_every_field_with_its_remedy(run: Run, online: FakeJobService) -> None:
    body = b'{"training": {"steps": 0}, "lora": {"rnk": 1}}'
    result = run("submit", "-", stdin=body)
    assert (result.code, result.out) == (2, "")
    assert "/training/steps: " in result.err
    assert "Did you mean rank?" in result.err
    errors = run("submit", "-", "--json", stdin=body).json["error"]["errors"]
    assert {error["pointer"] for error in errors} == {"/training/steps", "/lora/rnk"}


def test_dry_run(run: Run, online: FakeJobService, spec: str) -> None:
    result = run("submit", spec, "--dry-run")
    assert "warning /resources: No worker is connected." in result.out
    assert "completions to 20 questions" in result.err
    assert "accepted, with 1 warning; nothing was stored" in result.err
    assert run("submit", spec, "--dry-run", "--json").json["spec"]["training"]["steps"] == 20
    assert online.jobs == {}


@pytest.mark.parametrize(
    ("status", "code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 1), (JobStatus.CANCELLED, 3)]
)
def test_wait_exits_as_the_job_ended(
    run: Run, online: FakeJobService, spec: str, monkeypatch: pytest.MonkeyPatch, status: JobStatus, code: int
) -> None:
    error = {"code": "cuda_oom", "class": "oom", "message": "full", "hint": "Lower lora.rank.", "retryable": False}
    ends(monkeypatch, online, status, error=error if status is JobStatus.FAILED else None)
    result = run("submit", spec, "--wait")
    assert result.code == code
    assert "step 2/20  reward 1.000" in result.out
    assert ("Lower lora.rank." in result.out) is (status is JobStatus.FAILED)


def test_wait_with_json_prints_the_job_alone(
    run: Run, online: FakeJobService, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(monkeypatch, online, JobStatus.SUCCEEDED)
    result = run("submit", spec, "--wait", "--json")
    assert result.json["status"] == "succeeded"
    assert "step 2/20" in result.err


def test_watch_follows_a_job_that_was_submitted_before(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record(), status=JobStatus.FAILED)
    online.add_event(record.id, "metric", step=3, reward=0.5)
    result = run("watch", record.id)
    assert result.code == 1
    assert "step 3/250  reward 0.500" in result.out
    event, job = (json.loads(line) for line in run("watch", record.id, "--json").out.splitlines())
    assert (event["type"], event["step"], job["id"]) == ("metric", 3, record.id)
    assert run("watch", "job-01ARZ3NDEKTSV4RRFFQ69G5FAV").code == 2


def test_watch_says_what_a_queued_job_waits_for(
    run: Run, online: FakeJobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(client: GrpoClient, job_id: str, *_: object, **__: object) -> JobDetail:
        return JobDetail({**client.get(job_id), "status": "cancelled"})

    monkeypatch.setattr(GrpoClient, "wait", wait)
    online.workers = 0
    record = online.put(make_record())
    result = run("watch", record.id)
    assert f"{record.id} waits: no worker that can run it is connected (queue grpo-cpu)" in result.err
    assert result.code == 3


def test_submit_again_with_the_same_key_is_one_job(run: Run, online: FakeJobService, spec: str) -> None:
    first = run("submit", spec, "--idempotency-key", "nightly-1", "--json").json
    assert run("submit", spec, "--idempotency-key", "nightly-1", "--json").json == first
    other = run("submit", spec, "--idempotency-key", "nightly-1", "--set", "training.steps=3")
    assert (other.code, len(online.jobs)) == (2, 1)
    assert "Use a new key" in other.err


def test_pause_and_resume(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record())
    assert run("pause", record.id).out == f"{record.id}: paused\n"
    assert run("resume", record.id, "--json").json["status"] == "queued"
    online.put(record, status=JobStatus.PAUSING)
    early = run("resume", record.id)
    assert (early.code, "Wait until it is paused" in early.err) == (2, True)


def test_one_of_a_thing_is_not_many() -> None:
    assert [count(number, "file") for number in (0, 1, 2, 2000)] == ["no files", "1 file", "2 files", "2,000 files"]


def test_list_show_and_cancel(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record(name="first", metadata={"team": "a"}), step=3, reward=0.5, checkpoint_step=2)
    online.put(make_record())
    assert len(run("list", "--json").json["data"]) == 2
    assert [job["id"] for job in run("list", "--metadata", "team=a", "--json").json["data"]] == [record.id]
    assert run("list", "--limit", "1").out.count("\n") == 2
    shown = run("show", record.id).out
    assert "first" in shown
    assert "saved     step 2\n" in shown
    assert "waits     1 worker for its queue grpo-cpu" in shown
    online.workers = 0
    assert "waits     no worker that can run it is connected (queue grpo-cpu)" in run("show", record.id).out
    other = online.put(make_record())
    online.workers = 3
    assert "waits     2 jobs before it, 3 workers for its queue grpo-cpu" in run("show", other.id).out
    assert run("show", record.id, "--json").json["id"] == record.id
    assert run("cancel", record.id).out == f"{record.id}: cancelled\n"
    again = run("cancel", record.id)
    assert (again.code, "cannot be cancelled" in again.err) == (2, True)


def test_a_bad_option_of_list_is_named(run: Run, online: FakeJobService) -> None:
    result = run("list", "--status", "done")
    assert result.code == 2
    assert "status: " in result.err


def test_download(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    record = online.put(make_record(), status=JobStatus.SUCCEEDED)
    content = b"adapter"
    online.add_artifact(record.id, "adapter/a.bin", content)
    online.contents["/adapter/a.bin"] = content  # type: ignore[attr-defined]
    folder = tmp_path / "out"
    result = run("download", record.id, str(folder), "--json").json
    assert result["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert "Signature" not in json.dumps(result)
    assert (folder / "adapter/a.bin").read_bytes() == content
    online.contents["/adapter/a.bin"] = b"tamper!"  # type: ignore[attr-defined]
    failed = run("download", record.id, str(tmp_path / "other"))
    assert failed.code == 1
    assert "not what the service announced" in failed.err


class FakeHub:
    """Notes what is pushed; `refuses` says why something is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pushed: list[tuple[str, str, list[str]]] = []
        self.asked: list[tuple[str, str]] = []
        self.no_access = self.breaks_off = ""
        for name in ("connect", "check_access", "push"):
            monkeypatch.setattr(f"grpo_client.push.{name}", getattr(self, name))

    def connect(self) -> FakeHub:
        return self

    def check_access(self, _hub: Any, name: str, form: str, *, private: bool) -> None:
        assert private
        self.asked.append((name, form))
        if self.no_access:
            raise PushError(self.no_access)

    def push(self, _hub: Any, folder: Path, name: str, **_: Any) -> str:
        if self.breaks_off:
            raise PushError(self.breaks_off)
        self.pushed.append((name, folder.name, sorted(file.name for file in folder.iterdir())))
        return f"https://hub.test/{name}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch)


def exported(online: FakeJobService, status: JobStatus = JobStatus.SUCCEEDED) -> str:
    """A job that exports, with its files once it has succeeded."""
    source = online.put(make_record(), status=JobStatus.SUCCEEDED).id
    spec = {"kind": "export", "export": {"job": source, "format": "gguf", "type": "q8_0"}}
    record = online.put(make_record(spec=parse_spec(spec), total_steps=0), status=status)
    if status is JobStatus.SUCCEEDED:
        online.add_artifact(record.id, "export/model-q8_0.gguf", b"model")
        online.add_artifact(record.id, "report.json", b"{}")
        online.contents["/export/model-q8_0.gguf"] = b"model"  # type: ignore[attr-defined]
    return record.id


def test_what_an_export_has_made_is_pushed_without_another_one(
    run: Run, online: FakeJobService, hub: FakeHub, tmp_path: Path
) -> None:
    job = exported(online)
    before = set(online.jobs)
    result = run("export", job, "--push", "ann/model", "--to", str(tmp_path / "out"))
    assert (result.code, result.err) == (0, "")
    assert hub.asked == [("ann/model", "gguf")]
    assert hub.pushed == [("ann/model", "export", ["model-q8_0.gguf"])]
    assert set(online.jobs) == before


def test_a_push_that_breaks_off_says_how_to_go_on(
    run: Run, online: FakeJobService, hub: FakeHub, tmp_path: Path
) -> None:
    hub.breaks_off = "The hub broke off."
    job, folder = exported(online), tmp_path / "out"
    result = run("export", job, "--push", "ann/model", "--to", str(folder))
    assert result.code == 1
    assert f"try again with: grpo export {job} --push ann/model --to {folder}\n" in result.err


def test_a_push_that_the_hub_will_refuse_costs_no_export(
    run: Run, online: FakeJobService, hub: FakeHub, tmp_path: Path
) -> None:
    hub.no_access = "Your token is of bob."
    source = online.put(make_record(), status=JobStatus.SUCCEEDED).id
    result = run("export", source, "--merge", "--push", "ann/model", "--to", str(tmp_path / "out"))
    assert (result.code, set(online.jobs)) == (2, {source})
    assert "Your token is of bob." in result.err


def test_an_export_that_has_not_succeeded_has_nothing_to_push(
    run: Run, online: FakeJobService, hub: FakeHub, tmp_path: Path
) -> None:
    job = exported(online, JobStatus.RUNNING)
    result = run("export", job, "--push", "ann/model", "--to", str(tmp_path / "out"))
    assert (result.code, hub.asked) == (1, [])
    assert f"{job} is running and has made nothing yet" in result.err


def test_files_that_find_no_room_are_fetched_again(
    run: Run, online: FakeJobService, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = exported(online)
    monkeypatch.setattr(GrpoClient, "download", full)
    result = run("export", job, "--push", "ann/model", "--to", str(tmp_path / "out"))
    assert result.code == 1
    assert (
        f"No space left on device. The service keeps the files: grpo download {job} FOLDER --only export" in result.err
    )
    assert not hub.pushed


def test_an_export_is_shown_as_one(run: Run, online: FakeJobService) -> None:
    done, running = exported(online), exported(online, JobStatus.RUNNING)
    source = online.jobs[done].spec["export"]["job"]
    shown = run("show", done).out
    assert f"exports   {source} as gguf in q8_0; fetch it with: grpo download {done} FOLDER --only export\n" in shown
    assert not re.search("^(step|data) ", shown, re.MULTILINE)
    assert re.search("exports   job-.* as gguf in q8_0$", run("show", running).out, re.MULTILINE)
    assert re.search("^step ", run("show", source).out, re.MULTILINE)


def test_following_an_export_shows_how_far_it_is(run: Run, online: FakeJobService) -> None:
    job = exported(online)
    for code, message in (("export_progress", "50% of the weights"), ("export", "8 of 8"), ("other", "not this")):
        online.add_event(job, "log", code=code, message=message)
    shown = run("watch", job).out.splitlines()
    assert [line for line in shown if line in ("50% of the weights", "8 of 8", "not this")] == [
        "50% of the weights",
        "8 of 8",
    ]


def test_report_is_saved_where_it_is_asked_for(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    record = online.put(make_record(), status=JobStatus.SUCCEEDED)
    online.add_artifact(record.id, "report.html", b"<html>")
    online.contents["/report.html"] = b"<html>"  # type: ignore[attr-defined]
    file = tmp_path / "mine.html"
    assert run("report", record.id, str(file), "--json").json["size"] == 6
    assert file.read_bytes() == b"<html>"
    online.contents["/report.html"] = b"<HTML>"  # type: ignore[attr-defined]
    assert "not what the service announced" in run("report", record.id, str(tmp_path / "other.html")).err


@pytest.mark.parametrize("command", ["report", "download"])
def test_a_misspelt_place_is_one_sentence_and_makes_nothing(
    run: Run, online: FakeJobService, tmp_path: Path, command: str
) -> None:
    record = online.put(make_record(), status=JobStatus.SUCCEEDED)
    online.add_artifact(record.id, "report.html", b"<html>")
    online.contents["/report.html"] = b"<html>"  # type: ignore[attr-defined]
    result = run(command, record.id, str(tmp_path / "nowhere" / "x"))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"there is no folder {tmp_path / 'nowhere'}" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_a_report_says_why(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    running = online.put(make_record(), status=JobStatus.RUNNING)
    result = run("report", running.id, str(tmp_path / "x.html"))
    assert (result.code, "has not ended" in result.err) == (1, True)


def rollout(**changes: Any) -> Rollout:
    usual: dict[str, Any] = {
        "step": 3,
        "epoch": 1,
        "prompt_id": "p7",
        "row": 7,
        "sample": 2,
        "seed": 1,
        "prompt": "6+6?",
        "answer": "12",
        "completion": "eleven\x1b[2J\n",
        "rewards": {"correctness": 0.0, "xml_count": None},
        "reward_total": -0.25,
        "advantage": -1.5,
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "finish_reason": "length",
        "adapter_version": 2,
    }
    return Rollout(**{**usual, **changes})


def test_rollouts_of_the_worst(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record())
    online.job_rollouts[record.id] = [rollout(), rollout(completion="", finish_reason="stop")]
    out = run("rollouts", record.id, "--worst", "2").out
    assert (online.rollout_queries[-1].order, out.count("── step 3")) == ("reward", 2)
    for text in ("p7", "9 tokens, cut off", "reward -0.25", "xml_count -", "asked: 6+6?", "│ eleven", "(nothing)"):
        assert text in out
    assert "\x1b" not in out


def test_rollouts_pass_every_filter_on(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record())
    words = "--step 3 --prompt p7 --finish length --reward-lt 1 --reward-gt -2 --order -length --limit 5".split()
    assert run("rollouts", record.id, *words, "--json").json["data"] == []
    query = online.rollout_queries[-1]
    assert (query.step, query.prompt, query.finish, query.reward_lt, query.reward_gt, query.order) == (
        *(3, "p7", "length", 1.0, -2.0),
        "-length",
    )
    assert run("rollouts", record.id, "--best", "1").out.startswith("No completion matches")
    assert online.rollout_queries[-1].order == "-reward"


@pytest.mark.parametrize(
    "words", ["--worst 2 --best 2", "--worst 2 --order step", "--best 2 --limit 3", "--worst 0", "--finish sometime"]
)
def test_rollouts_refuse_what_contradicts_itself(run: Run, online: FakeJobService, words: str) -> None:
    record = online.put(make_record())
    assert run("rollouts", record.id, *words.split()).code == 2


def evaluated(service: FakeJobService, before: float, after: float, spec: Any = None, questions: int = 200) -> str:
    """A finished job whose held-out questions were answered so."""
    record = service.put(make_record(spec=spec), status=JobStatus.SUCCEEDED)
    for step in range(1, 21):
        service.add_event(record.id, "metric", step=step, reward=step / 10, rewards={"correctness": step / 20})
    shares = (("before", before), ("after", after))
    said = {
        stage: {
            "stage": stage,
            "questions": questions,
            "strict_accuracy": share,
            "strict_interval": wilson_interval(round(share * questions), questions),
        }
        for stage, share in shares
    }
    change = {"difference": after - before, "p_value": 0.01, "verdict": "It rose."}
    service.add_event(record.id, "evaluation", **said["before"])
    service.add_event(record.id, "evaluation", **said["after"], paired={"strict": change})
    service.add_event(record.id, "evaluation", stage="selftest")
    return record.id


def asking(**sections: Any) -> JobSpec:
    return parse_spec({"evaluation": {"questions": 200}, **sections})


def test_compare_tells_what_differs_and_whether_it_is_chance(run: Run, online: FakeJobService) -> None:
    a = evaluated(online, 0.2, 0.5, asking())
    b = evaluated(online, 0.2, 0.8, asking(optimizer={"learning_rate": 1e-5}, name="faster"))
    found = run("compare", a, b, "--json").json
    assert found["differences"] == [{"field": "optimizer.learning_rate", "a": 5e-6, "b": 1e-5}]
    assert (found["comparable"], found["difference"]["clear"]) == (True, True)
    low, high = found["difference"]["interval"]
    assert 0.2 < low < 0.3 < high < 0.4
    out = run("compare", a, b).out
    for text in ("optimizer.learning_rate", "50.0% (43.1% to 56.9%) of 200", "B minus A: +30.0 points", "clearly"):
        assert text in out, text
    same = run("compare", a, evaluated(online, 0.2, 0.52, asking())).out
    assert "No setting differs." in same
    assert "no difference that could not be chance" in same


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (asking(data={"dataset": "another/one"}), "data.dataset differs"),
        (asking(evaluation={"questions": 100}), "Other questions were held out"),
        (asking(evaluation={"questions": 200, "split": "train"}), "Other questions were held out"),
    ],
)
def test_compare_tells_no_difference_of_other_questions(
    run: Run, online: FakeJobService, other: JobSpec, reason: str
) -> None:
    a, b = evaluated(online, 0.2, 0.5, asking()), evaluated(online, 0.2, 0.9, other)
    found = run("compare", a, b, "--json").json
    assert (found["comparable"], found["difference"]) == (False, None)
    assert reason in run("compare", a, b).out


def test_compare_explains_its_columns_and_what_one_job_has_not(run: Run, online: FakeJobService) -> None:
    a = evaluated(online, 0.2, 0.5, asking(model={"revision": "v1"}))
    b = online.put(make_record(spec=asking()), status=JobStatus.SUCCEEDED).id
    online.add_event(b, "metric", step=1, reward=1.0, rewards={"mine": 0.25})
    lines = [" ".join(line.split()) for line in run("compare", a, b).out.splitlines()]
    for line in (
        "model.revision v1 -",
        "reward first last all steps",
        f"total A 0.250 1.850 {sparkline([step / 10 for step in range(1, 21)], 48)}",
        "B 1.000 1.000 ▁",
        "B - -",
        "mine A - -",
        "B 0.250 0.250 ▁",
        "first, last: the mean over the first and the last fifth of the logged steps, 1 to 10 of them.",
    ):
        assert line in lines, line


def test_compare_warns_of_scales_and_of_jobs_that_have_not_ended(run: Run, online: FakeJobService) -> None:
    a = evaluated(online, 0.2, 0.5, asking())
    weights = JobSpec.model_validate({"rewards": {"weights": {"xml_count": 2.0}}})
    b = online.put(make_record(spec=weights), status=JobStatus.RUNNING).id
    out = run("compare", a, b).out
    for text in ("different scales", f"{b} is running", "B  not measured", "Not comparable: B has no answers"):
        assert text in out, text


def test_upload(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "6+6", "answer": "12"}\n')
    dataset = run("datasets", "upload", str(file), "--name", "sums", "--json").json
    assert (dataset["rows"], dataset["name"]) == (1, "sums")
    file.write_text("nonsense\n")
    result = run("datasets", "upload", str(file))
    assert result.code == 2
    assert "/lines/1: " in result.err


def test_what_others_wrote_cannot_steer_the_terminal(run: Run, online: FakeJobService) -> None:
    record = online.put(make_record(name="a\x1b[2Jb\u202e"))
    assert "\x1b" not in run("show", record.id).out
    assert "\u202e" not in run("list").out


def test_no_service_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GRPO_API_KEY", ALICE)
    result = run("list")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "http://127.0.0.1:9 cannot be reached" in result.err
    monkeypatch.delenv("GRPO_URL")
    assert "GRPO_URL" in run("list").err


# Keys, in the storage.


class FakeKeys:
    def __init__(self) -> None:
        self.records: list[KeyRecord] = []

    def create(self, owner: str, scopes: Any, *, name: str | None, expires_at: Any) -> tuple[str, KeyRecord]:
        if "bad" in scopes:
            raise ValueError("Unknown scopes ['bad']; use some of jobs:read.")
        record = key_record(owner, list(scopes))
        record = KeyRecord(**{**record.__dict__, "name": name, "expires_at": expires_at})
        self.records.append(record)
        return "grpo_new-key", record

    def list(self, owner: str | None) -> list[KeyRecord]:
        return [record for record in self.records if owner in (None, record.owner)]

    def revoke(self, key_id: str) -> KeyRecord:
        return next(record for record in self.records if record.id == key_id)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> FakeKeys:
    store = FakeKeys()

    monkeypatch.setattr("jobs.auth.api_keys.KeyStore", lambda _store, _job_store: store)
    return store


def test_keys(run: Run, keys: FakeKeys) -> None:
    made = run("keys", "create", "--owner", "carol", "--scope", "jobs:read", "--expires-in-days", "7", "--json").json
    assert (made["key"], made["owner"], made["scopes"]) == ("grpo_new-key", "carol", ["jobs:read"])
    assert made["expires_at"].endswith("Z")
    assert run("keys", "create", "--owner", "dave").out.startswith("grpo_new-key\n")
    assert keys.records[1].scopes == ["jobs:read", "jobs:write", "datasets:write"]
    listed = run("keys", "list", "--owner", "carol", "--json").json["data"]
    assert [key["owner"] for key in listed] == ["carol"]
    assert "key" not in listed[0]
    assert "carol" in run("keys", "list").out
    assert run("keys", "revoke", "key-carol", "--json").json["id"] == "key-carol"


def test_an_empty_list_is_said(run: Run, online: FakeJobService) -> None:
    assert run("list").err == "No jobs yet: submit one with grpo submit.\n"
    assert run("list", "--status", "failed").err == "No such job.\n"
    assert run("datasets", "list").err.startswith("No data sets yet")


def test_a_folder_that_cannot_be_made_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("up", "--data", str(tmp_path / "file" / "below"))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "Choose another folder with --data" in result.err


def test_a_bad_scope_is_refused(run: Run, keys: FakeKeys) -> None:
    result = run("keys", "create", "--owner", "carol", "--scope", "bad")
    assert (result.code, keys.records) == (2, [])
    assert "jobs:read" in result.err


def test_an_unknown_key_is_one_sentence(run: Run, keys: FakeKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key_id: str) -> KeyRecord:
        raise NotFound("key", key_id)

    monkeypatch.setattr(keys, "revoke", refuse)
    result = run("keys", "revoke", "key-x")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "There is no key key-x" in result.err


# The program itself.


def test_a_setting_that_cannot_be_used_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_API_PORT", "http")
    result = run("api")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "GRPO_API_PORT" in result.err


def test_a_work_folder_that_cannot_be_made_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("jobs.logs.configure", lambda: None)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        monkeypatch.setenv("GRPO_WORK_DIR", str(folder))
        result = run("worker")
        assert (result.code, result.err.count("\n")) == (2, 1), folder
        assert f"GRPO_WORK_DIR is {folder}, which cannot be made" in result.err


def test_a_stack_that_cannot_start_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    result = run("up", "--data", str(tmp_path))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "--data" in result.err
    assert run("down", "--data", str(tmp_path / "none"), "--json").json == {"stopped": False}


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_is_none_is_refused(run: Run, port: str) -> None:
    result = run("api", "--port", port)
    assert (result.code, f'Invalid value "{port}" for --port' in result.err) == (2, True)


def test_every_command_has_help(run: Run) -> None:
    for words, _function, sentence in (command for each in ALL for command in each.commands):
        result = run(*words.split(), "--help")
        assert (result.code, bool(sentence)) == (0, True)
        assert "Usage: grpo" in result.out
        if words not in ("api", "worker"):
            assert "--json" in result.out, words


def test_a_usage_error_exits_2(run: Run) -> None:
    assert run("bogus").code == 2
    assert run("show").code == 2


def test_it_starts_without_what_a_command_does_not_need() -> None:
    code = (
        "import sys; from grpo_client.cli import main\n"
        "try: main(['rewards', 'list'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('litestar', 'boto3', 'celery', 'redis', 'httpx', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([1.0], BLOCKS[0]),
        ([2.0, 2.0], BLOCKS[0] * 2),
        ([0.0, 1.0], BLOCKS[0] + BLOCKS[-1]),
        ([-1.0, 0.0, 1.0], BLOCKS[0] + BLOCKS[4] + BLOCKS[-1]),
    ],
)
def test_sparkline(values: list[float], text: str) -> None:
    assert sparkline(values) == text


def test_a_long_sparkline_keeps_its_width_and_shape() -> None:
    line = sparkline([float(step) for step in range(1000)], width=8)
    assert line == BLOCKS


# What a first user runs into.


def test_deleting_a_job_asks_first(run: Run, online: FakeJobService, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record(owner="alice")
    online.put(record, status=JobStatus.FAILED)
    refused = run("delete", record.id)
    assert (refused.code, "--yes" in refused.err, record.id in online.jobs) == (2, True, True)
    assert run("delete", record.id, "--yes", "--json").json == {"job": record.id, "deleted": True}
    assert record.id not in online.jobs
    gone = run("delete", record.id, "--yes")
    assert (gone.code, "There is no job" in gone.err) == (2, True)


@pytest.mark.parametrize(("answer", "deletes"), [("y\n", True), ("Yes\n", True), ("no\n", False), ("", False)])
def test_only_a_yes_deletes(answer: str, deletes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    if deletes:
        confirm("Delete?")
    else:
        with pytest.raises(CommandError, match="Nothing was deleted"):
            confirm("Delete?")


def test_data_sets_are_listed_and_deleted(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1", "solution text": 2}\n')
    uploaded = run("datasets", "upload", str(file), "--name", "sums")
    assert "--set data.question_column=prompt --set data.answer_column='solution text'" in uploaded.out
    dataset_id = uploaded.out.partition(":")[0]
    assert dataset_id in run("datasets", "list").out
    assert run("datasets", "list", "--json").json["data"][0]["id"] == dataset_id
    assert run("datasets", "delete", dataset_id).code == 2
    assert run("datasets", "delete", dataset_id, "--yes").out == f"{dataset_id}: deleted\n"
    assert run("datasets", "list").out == ""


def test_columns_that_are_named_as_expected_need_no_options(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": 2, "prompt": "1+1"}\n')
    assert run("datasets", "upload", str(file)).out.rstrip().endswith(" --set data.question_column=prompt")
    file.write_text('{"answer": 2, "question": "1+1", "id": 7}\n')
    assert "column" not in run("datasets", "upload", str(file)).out.splitlines()[1]


def test_chats_are_named_with_their_format(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = '[{"role": "user", "content": "1+1"}]'
    file.write_text(f'{{"messages": {turns}, "answer": 2}}\n')
    out = run("datasets", "upload", str(file)).out
    assert "with the columns answer, messages" in out
    assert out.rstrip().endswith(" --set data.format=messages")
    file.write_text(f'{{"chat": {turns}, "answer": 2}}\n')
    expected = " --set data.format=messages --set data.question_column=chat"
    assert run("datasets", "upload", str(file)).out.rstrip().endswith(expected)


def test_an_error_names_the_field_once_and_says_no_more_than_is_shown(run: Run, online: FakeJobService) -> None:
    result = run("list", "--status", "done")
    assert result.err.startswith("grpo: One thing is wrong with the query:\n  status: Invalid enum value 'done'. Give")
    assert "`errors`" not in result.err


def test_a_key_that_is_not_known_says_where_keys_are(
    run: Run, online: FakeJobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_API_KEY", "grpo_other")
    result = run("list")
    assert (result.code, "GRPO_API_KEY" in result.err, ".grpo/env" in result.err) == (2, True, True)
    assert run("list", "--json").json["error"]["code"] == "unauthorized"


def test_a_spec_may_have_a_byte_order_mark(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    result = run("submit", str(file), "--dry-run")
    assert (result.code, "nothing was stored" in result.err) == (0, True)


def test_data_in_place_of_a_spec_is_told(run: Run, online: FakeJobService, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1", "answer": 1}\n{"question": "2", "answer": 2}\n')
    assert "grpo datasets upload" in run("submit", str(file)).err
    file.write_text('{"lora": {},\n}')
    assert "datasets" not in run("submit", str(file)).err


def test_a_trial_is_submitted_and_its_result_shown(
    run: Run, online: FakeJobService, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "sentence": "Yes: it learns.",
        "will_learn": "yes",
        "prompts": 8,
        "completions": 48,
        "signal_share": 0.5,
        "reward_mean": 1.25,
        "reward_std": 0.5,
        "rewards": {"correctness": 1.0},
        "format_share": None,
        "completion_tokens_mean": 31.4,
        "completion_tokens_max": 64,
        "truncated_share": 0.25,
        "duplicate_share": 0.0,
        "unscored_share": None,
        "step_seconds": 0.52,
    }
    ends(monkeypatch, online, JobStatus.SUCCEEDED)
    monkeypatch.setattr(online, "trial_result", lambda record: found)
    result = run("try", spec, "--rows", "8")
    assert result.code == 0
    (record,) = online.jobs.values()
    assert (record.spec["kind"], record.spec["trial"], record.spec["training"]["steps"]) == ("try", {"rows": 8}, 8)
    assert "Yes: it learns." in result.out
    assert re.search(r"groups with a signal +50%", result.out)
    assert "format" not in result.out.partition("Yes")[2]
    assert f"grpo rollouts {record.id}" in result.out
    assert "Yes: it learns." in run("show", record.id).out
    assert run("try", spec, "--no-wait").out.endswith("queued\n")


def test_a_sweep_is_submitted_listed_compared_and_cancelled_as_one(run: Run, online: FakeJobService, spec: str) -> None:
    words = ("--repeat", "3", "--grid", "lr=1e-5,3e-5", "--idempotency-key", "mine")
    out = run("submit", spec, *words).out
    group = re.findall(r"(group-\w+): 6 jobs", out)[0]
    assert run("submit", spec, *words).out == out, "sent again, it stays one group"
    assert len(online.jobs) == 6
    listed = run("list", "--group", group, "--json").json["data"]
    assert [job["group"] for job in listed] == [group] * 6
    assert run("list", "--group", "group-01ARZ3NDEKTSV4RRFFQ69G5FAV").out == ""

    for place, record in enumerate(online.group(group, "alice")[:5]):
        online.put(record, status=JobStatus.SUCCEEDED)
        share = 0.5 + place / 10
        strict = {"after": share, "difference": share - 0.25, "verdict": "It rose."}
        online.add_event(record.id, "evaluation", stage="after", paired={"strict": strict})
    table = run("compare", "--group", group).out.splitlines()
    assert table[0].split("  ")[0] == "optimizer.learning_rate"
    assert "60.0% ± 10.0%" in table[1]
    assert "85.0% ± 7.1% (2)" in table[2]
    assert "Careful: 1 of 6 have not ended." in table
    ids = [job["id"] for job in listed]
    assert "strict after" in run("compare", *ids[:3]).out
    assert len(run("compare", *ids[:3], "--json").json["rows"]) == 1

    cancelled = run("cancel", "--group", group).out
    assert cancelled.count("succeeded") == 5
    assert cancelled.count("cancelled") == 1
    assert f"group     {group}" in run("show", ids[0]).out


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "SPEC", "--grid", "lr"),
        ("submit", "SPEC", "--grid", "lr="),
        ("submit", "SPEC", "--grid", "lr=[1e-5"),
        ("submit", "SPEC", "--grid", "lr=1", "--grid", "lr=2"),
        ("submit", "SPEC", "--grid", "lr=1e-5", "--wait"),
        ("submit", "SPEC", "--grid", "no.such=1"),
        ("submit", "SPEC", "--repeat", "0"),
        ("compare",),
        ("compare", "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        ("cancel",),
        ("cancel", "job-01ARZ3NDEKTSV4RRFFQ69G5FAV", "--group", "group-01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        ("cancel", "--group", "group-01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        ("cancel", "--group", "../jobs"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(run: Run, online: FakeJobService, spec: str, words: tuple[str, ...]) -> None:
    assert run(*(spec if word == "SPEC" else word for word in words)).code == 2
    assert not online.jobs
