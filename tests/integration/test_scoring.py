"""Graders tried on given completions: the requests, OpenAI's answers, and that no grader reads a secret of the API."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from litestar import Litestar
from litestar.testing import TestClient

import grpo_client.client
from api.app import create_app
from grpo_client.cli import main
from grpo_core.rewards.graders.confined import Outcome as ProcessOutcome
from grpo_core.rewards.graders.confined import RowFailure, why_not_confined
from grpo_core.rewards.graders.proof import Proof
from grpo_core.scoring import process
from grpo_core.scoring.process import ScoringFailed, score_apart
from grpo_core.scoring.requests import MAX_ROWS, read_rows, read_run
from grpo_core.spec import SpecError
from tests.grader_attacks import ATTACKS, bait, got_through
from tests.integration.test_judges import KEY, Server, judge, serving
from tests.integration.test_judges import environment as judge_environment
from tests.unit.fakes import ALICE, READER, FakeJobService, bearer

Client = TestClient[Litestar]
Grpo = Callable[..., tuple[int, str, str]]
needs_confinement = pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())

EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
JUDGE = {"type": "score_model", "model": "main", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
SECRETS = {
    "GRPO_S3_SECRET_KEY": "the store's key",
    "AWS_SECRET_ACCESS_KEY": "the store's key",
    "GRPO_REDIS_URL": "redis://:password@valkey",
    "JUDGE_MAIN_KEY": "the judge's key",
    "GRPO_GRADERS_UNCONFINED": "1",
}


@pytest.fixture(scope="module")
def _app() -> Iterator[tuple[Client, FakeJobService]]:
    service = FakeJobService()
    with TestClient(create_app(service), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        client.headers.update(bearer())
        yield client, service


@pytest.fixture
def client(_app: tuple[Client, FakeJobService]) -> Client:
    return _app[0]


@pytest.fixture
def service(_app: tuple[Client, FakeJobService]) -> FakeJobService:
    return _app[1]


def python(body: str, head: str = "") -> dict[str, Any]:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return {"type": "python", "source": f"{head}\ndef grade(sample, item):\n{lines}"}


def test_a_grader_is_run_as_openai_runs_it(client: Client) -> None:
    body = {"grader": EXACT, "item": {"answer": "12"}, "model_sample": "12"}
    answer = client.post("/graders/run", json=body)
    assert answer.status_code == 200
    found = answer.json()
    assert found["metadata"].pop("execution_time") >= 0
    flags = found["metadata"].pop("errors")
    assert not any(flags.values())
    assert {"python_grader_runtime_error", "model_grader_server_error_details", "truncated_observation_error"} < set(
        flags
    )
    assert found == {
        "reward": 1.0,
        "metadata": {
            "name": "exact",
            "type": "string_check",
            "scores": {},
            "token_usage": None,
            "sampled_model_name": None,
            "messages": [],
            "printed": "",
        },
        "sub_rewards": {},
        "model_grader_token_usage_per_model": {},
    }


def test_a_multi_shows_the_scores_of_its_members(client: Client) -> None:
    long = {"type": "length", "minimum": 5}
    grader = {"type": "multi", "graders": {"a": EXACT, "b": long}, "calculate_output": "2 * a + b"}
    found = client.post("/graders/run", json={"grader": grader, "item": {"answer": "x"}, "model_sample": "x"}).json()
    assert found["reward"] == 2.0
    assert found["sub_rewards"] == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_l"])
def test_a_similarity_is_measured_in_the_confined_process(client: Client, metric: str) -> None:
    grader = {
        "type": "text_similarity",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
        "evaluation_metric": metric,
    }
    text = "the quick brown fox jumps"
    found = client.post("/graders/run", json={"grader": grader, "item": {"answer": text}, "model_sample": text})
    assert found.json()["reward"] == pytest.approx(1.0)


def test_a_completion_that_is_json_is_read_as_json(client: Client) -> None:
    grader = {**EXACT, "input": "{{sample.output_json.city}}"}
    body = {"grader": grader, "item": {"answer": "Bonn"}, "model_sample": '{"city": "Bonn"}'}
    assert client.post("/graders/run", json=body).json()["reward"] == 1.0
    found = client.post("/graders/run", json={**body, "model_sample": "Bonn"}).json()
    assert (found["reward"], found["metadata"]["errors"]["sample_parse_error"]) == (0.0, True)


def test_a_missing_column_is_a_flag_and_a_sentence(client: Client) -> None:
    found = client.post("/graders/run", json={"grader": EXACT, "model_sample": "x"}).json()
    assert found["metadata"]["errors"]["invalid_variable_error"]
    assert "item.answer" in found["metadata"]["messages"][0]


@needs_confinement
def test_python_runs_confined_and_its_errors_are_flags(client: Client) -> None:
    body = {"grader": python("print('seen')\nreturn float(item['n'])"), "item": {"n": 3}, "model_sample": ""}
    found = client.post("/graders/run", json=body).json()
    assert (found["reward"], found["metadata"]["printed"]) == (3.0, "seen\n")
    found = client.post("/graders/run", json={**body, "item": {}}).json()
    assert found["metadata"]["errors"]["python_grader_runtime_error"]
    assert "KeyError" in found["metadata"]["errors"]["python_grader_runtime_error_details"]
    found = client.post("/graders/run", json={**body, "grader": python("return 1.0", "import torch")}).json()
    assert "torch" in found["metadata"]["errors"]["python_grader_runtime_error_details"]


@needs_confinement
def test_math_runs_too(client: Client) -> None:
    grader = {"type": "math", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    body = {"grader": grader, "item": {"answer": "0.5"}, "model_sample": "\\boxed{\\frac{3}{6}}"}
    assert client.post("/graders/run", json=body).json()["reward"] == 1.0


def test_judges_are_refused_with_a_remedy(client: Client) -> None:
    answer = client.post("/graders/run", json={"grader": JUDGE, "model_sample": "x"})
    assert (answer.status_code, answer.json()["code"]) == (409, "grader_unavailable")
    (problem,) = answer.json()["errors"]
    assert (problem["pointer"], problem["code"]) == ("/grader", "runs_on_workers")
    assert "grpo try" in problem["remedy"]


@pytest.fixture
def judges(service: FakeJobService, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A judge and an endpoint, registered for the API as for a worker."""
    service.judged_runs.clear()
    with serving() as server:
        for name, value in judge_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_registered_judge_is_asked(client: Client, judges: Server) -> None:
    body = {"grader": judge(), "model_sample": "right"}
    found = client.post("/graders/run", json=body).json()
    assert (found["reward"], found["metadata"]["token_usage"]) == (7.0, 100)
    assert found["metadata"]["sampled_model_name"] == "m-1"
    assert found["model_grader_token_usage_per_model"] == {"judge-main": {"total_tokens": 100}}
    ((path, _, key),) = judges.seen
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert KEY not in json.dumps(found)


def test_a_registered_endpoint_is_called_and_code_beside_it_stays_confined(client: Client, judges: Server) -> None:
    curious = python("import os\nreturn float(any('KEY' in name or 'JUDGE' in name for name in os.environ))")
    graders = {"e": {"type": "endpoint", "url": f"{judges.url}/score"}, "j": judge(), "curious": curious}
    for name, attack in {"t": "connect by TCP", "p": "read its supervisor's memory"}.items():
        graders[name] = {"type": "python", "source": ATTACKS[attack].source}
    rows = [{"item": {"answer_only": "1", "port": judges.server_address[1]}, "model_sample": "four"}]
    found = client.post("/graders/score", json={"spec": {"rewards": {"graders": graders}}, "rows": rows}).json()
    scores = found["data"][0]["rewards"]
    assert [scores[name] for name in ("e", "j", "curious", "t", "p")] == [4.0, 3.0, 0.0, None, None]
    assert len(judges.seen) == 2


def test_a_judge_is_asked_within_a_budget_and_a_rate(
    client: Client, judges: Server, service: FakeJobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "most_judged_runs", 2)
    spec = {"rewards": {"graders": {"j": judge()}, "limits": {"j": {"budget_tokens": 150}}}}
    rows = [{"item": {"answer_only": "1"}, "model_sample": f"text {n}"} for n in range(200)]
    found = client.post("/graders/score", json={"spec": spec, "rows": rows}).json()
    assert len(judges.seen) < 60, "calls that were under way when it was spent are the only ones beyond it"
    assert any("budget" in row["errors"]["j"]["message"] for row in found["data"] if row["errors"])
    assert client.post("/graders/run", json={"grader": judge(), "model_sample": "x"}).status_code == 200
    answer = client.post("/graders/run", json={"grader": judge(), "model_sample": "x"})
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert client.post("/graders/run", json={"grader": EXACT, "item": {"answer": ""}, "model_sample": ""}).is_success


def test_what_the_operator_has_not_set_is_named(
    client: Client, judges: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    answer = client.post("/graders/run", json={"grader": judge(), "model_sample": "x"}).json()
    assert (answer["code"], answer["errors"][0]["code"]) == ("grader_unavailable", "runs_on_workers")
    assert "JUDGE_KEY" in answer["errors"][0]["remedy"]
    elsewhere = {"type": "endpoint", "url": "https://elsewhere.example/score"}
    answer = client.post("/graders/run", json={"grader": elsewhere, "model_sample": "x"}).json()
    assert "GRPO_GRADER_ENDPOINT_HOSTS" in answer["errors"][0]["remedy"]
    assert not judges.seen


def test_without_confinement_no_code_of_a_grader_runs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_proof", Proof("none", "the kernel's Landlock is off"))
    monkeypatch.setenv("GRPO_GRADERS_UNCONFINED", "1")
    answer = client.post("/graders/run", json={"grader": python("return 1.0"), "model_sample": "x"})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (409, "graders_not_confined")
    assert "Landlock" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ([], ""),
        ({"model_sample": "x"}, "/grader"),
        ({"grader": {}, "model_sample": "x"}, "/grader"),
        ({"grader": {**EXACT, "operation": "neq"}, "model_sample": "x"}, "/grader/operation"),
        ({"grader": {**EXACT, "input": "{{row.a}}"}, "model_sample": "x"}, "/grader/input"),
        ({"grader": EXACT, "model_sample": 1}, "/model_sample"),
        ({"grader": EXACT, "model_sample": "x", "item": []}, "/item"),
        ({"grader": EXACT, "model_sample": "x", "row": {}}, "/row"),
    ],
)
def test_what_is_wrong_with_a_run_is_named(client: Client, body: Any, pointer: str) -> None:
    answer = client.post("/graders/run", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_grader")
    assert pointer in [problem["pointer"] for problem in answer.json()["errors"]]
    assert all(problem["remedy"] for problem in answer.json()["errors"])


def test_a_grader_is_validated(client: Client) -> None:
    assert client.post("/graders/validate", json={"grader": EXACT}).json() == {"grader": EXACT}
    answer = client.post("/graders/validate", json={"grader": {**EXACT, "extra": 1}})
    assert answer.json()["errors"][0]["pointer"] == "/grader/extra"
    answer = client.post("/graders/validate", json={"grader": JUDGE})
    assert [(one["pointer"], one["code"]) for one in answer.json()["errors"]] == [("/grader/model", "not_registered")]


@needs_confinement
def test_validation_loads_python(client: Client) -> None:
    assert client.post("/graders/validate", json={"grader": python("return 1.0", "import json")}).status_code == 200
    answer = client.post("/graders/validate", json={"grader": python("return 1.0", "1 / 0")})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, "grader_not_loaded")
    assert "ZeroDivisionError" in answer.json()["detail"]


def test_rows_are_scored_as_a_job_would_score_them(client: Client) -> None:
    spec = {
        "rewards": {"graders": {"exact": EXACT, "judge": JUDGE}, "weights": {"correctness": 1.0}},
        "data": {"answer_column": "answer", "answer_pattern": "#### *(.+)"},
    }
    rows = [
        {"item": {"answer": "6+6 #### 12"}, "model_sample": "<answer>12</answer>"},
        {"item": {"answer": "6+6 #### 12"}, "model_sample": "12"},
    ]
    found = client.post("/graders/score", json={"spec": spec, "rows": rows}).json()
    assert [row["rewards"]["correctness"] for row in found["data"]] == [2.0, 0.0]
    assert [row["rewards"]["exact"] for row in found["data"]] == [0.0, 1.0]
    assert [row["reward_total"] for row in found["data"]] == [None, None]
    assert [(one["grader"], one["code"]) for one in found["unavailable"]] == [("judge", "runs_on_workers")]
    del spec["rewards"]["graders"]["judge"]  # type: ignore[attr-defined]
    found = client.post("/graders/score", json={"spec": spec, "rows": rows}).json()
    assert [row["reward_total"] for row in found["data"]] == [2.0, 1.0]
    assert set(found["seconds"]) == {"exact"}


def test_rows_have_a_limit_and_pointers(client: Client) -> None:
    rows = [{"item": {}, "model_sample": "x"}] * (MAX_ROWS + 1)
    answer = client.post("/graders/score", json={"spec": {}, "rows": rows})
    assert answer.json()["errors"][0]["pointer"] == "/rows"
    answer = client.post("/graders/score", json={"spec": {"rewards": {"mod": 1}}, "rows": [{"item": {}}]})
    assert [one["pointer"] for one in answer.json()["errors"]] == ["/spec/rewards/mod", "/rows/0/model_sample"]
    answer = client.post("/graders/score", json={"spec": {}, "rows": [{"item": {"a": 1}, "model_sample": "x"}]})
    assert answer.json()["errors"][0]["pointer"] == "/rows/0/item"


def test_who_may_only_read_may_run_no_grader(client: Client) -> None:
    answer = client.post("/graders/run", json={"grader": EXACT, "model_sample": "x"}, headers=bearer(READER))
    assert answer.status_code == 403


def test_an_owner_runs_few_at_a_time(client: Client) -> None:
    runs = client.app.state.grader_runs
    with runs.take("alice"), runs.take("alice"):
        answer = client.post("/graders/run", json={"grader": EXACT, "model_sample": "x"})
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_grader_runs")
    assert "GRPO_MAX_OWNER_GRADER_RUNS" in answer.json()["detail"]


def test_the_routes_are_served_under_v1_too(client: Client) -> None:
    assert client.post("/v1/graders/validate", json={"grader": EXACT}).status_code == 200


@needs_confinement
def test_what_takes_too_long_is_ended() -> None:
    request = read_run({"grader": python("while True: pass"), "model_sample": "x"})
    with pytest.raises(ScoringFailed, match="more than 2 s"):
        score_apart(request.spec, request.rows, seconds=2.0)


@needs_confinement
def test_a_grader_that_hangs_costs_its_own_row_only() -> None:
    slow = python("while item['hang']: pass\nreturn 1.0")
    spec = {"rewards": {"graders": {"slow": slow}, "limits": {"slow": {"row_seconds": 0.5}}}}
    rows = [{"item": {"hang": hang, "answer_only": "1"}, "model_sample": ""} for hang in (False, True, False)]
    request = read_rows({"spec": spec, "rows": rows})
    found = score_apart(request.spec, request.rows)
    assert [row["rewards"]["slow"] for row in found["rows"]] == [1.0, None, 1.0]
    assert found["rows"][1]["errors"]["slow"]["kind"] == "unresponsive_reward_error"


def test_the_process_gets_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert set(process._environment()) <= {
        *("PATH", "LANG", "GRPO_GRADER_PYTHON"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"),
    }


def test_a_process_serves_one_request_and_another_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    original = process._start

    def start() -> process.Process:
        started.append((made := original()).pid)
        return made

    processes = process._Processes()
    monkeypatch.setattr(process, "_start", start)
    monkeypatch.setattr(process, "_PROCESSES", processes)
    request = read_run({"grader": EXACT, "item": {"answer": ""}, "model_sample": ""})
    try:
        for number in range(1, 4):
            score_apart(request.spec, request.rows)
            assert processes._ahead is not None
            processes._ahead.result()
            assert len(started) == number + 1
            assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == started[-1:], "the one that waits"
        assert processes._ahead is not None
        os.kill(started[-1], signal.SIGKILL)
        processes._ahead.result().wait()
        assert score_apart(request.spec, request.rows)["rows"]
    finally:
        processes.close()
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


NAMES = [name for name, attack in ATTACKS.items() if not attack.at_load]


@needs_confinement
@pytest.mark.parametrize("first", range(0, len(NAMES), 4))
def test_no_attack_reaches_what_the_api_has(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All attacks on a worker's graders, on the path of the API: its environment, memory, files and network."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    names = NAMES[first : first + 4]
    graders = {f"a{n}": {"type": "python", "source": ATTACKS[name].source} for n, name in enumerate(names)}
    limits = {grader: {"row_seconds": 1.0, "memory_mb": 512} for grader in graders}
    with bait() as item:
        assert item["pid"] == os.getpid()
        rows = [{"item": {**item, "answer_only": "1"}, "model_sample": ""}]
        request = read_rows({"spec": {"rewards": {"graders": graders, "limits": limits}}, "rows": rows})
        found = score_apart(request.spec, request.rows)
    assert not found["unavailable"]
    for grader, name in zip(graders, names, strict=True):
        row = found["rows"][0]
        result = row["rewards"][grader]
        if result is None:
            kind, _, message = row["errors"][grader]["message"].partition(": ")
            result = RowFailure(re.sub(r"\W.*", "", kind), message)
        assert not got_through(ATTACKS[name], ProcessOutcome([result], "")), name


@needs_confinement
def test_a_grader_that_hangs_while_it_loads_is_named() -> None:
    request = read_run({"grader": python("return 1.0", "while True: pass"), "model_sample": "x"})
    found = score_apart(request.spec, request.rows)
    assert [one["code"] for one in found["unavailable"]] == ["grader_not_loaded"]
    assert "10 s" in found["unavailable"][0]["message"]


def test_requests_raise_nothing_but_spec_errors() -> None:
    for body in (None, 1, "x", [], {}, {"rows": 1, "spec": 1}, {"spec": {}, "rows": [1]}):
        with pytest.raises(SpecError):
            read_rows(body)
        with pytest.raises(SpecError):
            read_run(body)


@pytest.fixture
def grpo(client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grpo:
    """Runs `grpo` against the application: exit code, standard output, standard error."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = str(request.url.raw_path, "ascii")
        found = client.request(request.method, path, content=request.read(), headers=dict(request.headers))
        return httpx.Response(found.status_code, content=found.content, headers=found.headers)

    original = grpo_client.client.GrpoClient
    monkeypatch.setattr(grpo_client.client, "GrpoClient", lambda: original(transport=httpx.MockTransport(answer)))
    monkeypatch.setenv("GRPO_URL", "http://api.test")
    monkeypatch.setenv("GRPO_API_KEY", ALICE)

    def run(*words: str) -> tuple[int, str, str]:
        with structlog.testing.capture_logs(), pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_the_command_scores_completions_of_one_row(grpo: Grpo, tmp_path: Path) -> None:
    file = tmp_path / "grader.json"
    file.write_text(json.dumps(EXACT))
    assert grpo("graders", "run", str(file), "--row", '{"answer": "a"}', "--completion", "a")[:2] == (0, "reward 1\n")
    code, out, _ = grpo("graders", "run", str(file), "--completion", "a")
    assert code == 1
    assert "item.answer" in out
    code, out, _ = grpo(
        "graders", "run", str(file), "--row", '{"answer": "a"}', "--completion", "a", "--completion", "b"
    )
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["1", "1", "1"], ["2", "0", "0"]]
    (tmp_path / "text").write_text("a")
    code, out, _ = grpo(
        *("graders", "run", str(file), "--json", "--row", '{"answer": "a"}', "--completion", f"@{tmp_path / 'text'}")
    )
    assert json.loads(out)["reward"] == 1.0


def test_the_command_scores_a_file_with_a_spec(grpo: Grpo, tmp_path: Path) -> None:
    spec, data = tmp_path / "job.json", tmp_path / "rows.jsonl"
    rewards = {"graders": {"exact": EXACT, "judge": JUDGE}, "weights": {"exact": 2.0}}
    spec.write_text(json.dumps({"rewards": rewards}))
    data.write_text('{"answer": "a", "completion": "a"}\n{"answer": "a", "completion": "b"}\n')
    code, out, _ = grpo("graders", "run", str(spec), "--data", str(data))
    assert code == 1
    assert "grpo try" in out
    code, out, _ = grpo("graders", "run", str(spec), "--data", str(data), "--json")
    assert [row["rewards"]["exact"] for row in json.loads(out)["data"]] == [1.0, 0.0]
    code, _, err = grpo("graders", "run", str(spec), "--data", str(data), "--completion-column", "text")
    assert code == 2
    assert "--completion-column" in err


def test_the_command_validates(grpo: Grpo, tmp_path: Path) -> None:
    file = tmp_path / "grader.json"
    file.write_text(json.dumps(EXACT))
    assert grpo("graders", "validate", str(file))[0] == 0
    file.write_text(json.dumps({**EXACT, "operation": "neq"}))
    code, _, err = grpo("graders", "validate", str(file))
    assert code == 2
    assert "/grader/operation" in err


def test_the_command_uploads_tables(grpo: Grpo, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\n1+1,2\n")
    code, out, _ = grpo("datasets", "upload", str(file))
    assert code == 0
    assert "1 row with the columns question, answer" in out
