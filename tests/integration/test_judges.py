"""Judges and endpoints against a real server on loopback that fails in every way a server does."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import JsonValue

from grpo_core.errors import JobFailure
from grpo_core.grading import Graded, Grading
from grpo_core.rewards.graders import calls
from grpo_core.rewards.graders.models import GraderLimits, Message, ScoreModel
from grpo_core.rewards.graders.operator import environment_for, hosts_for, unregistered
from grpo_core.rewards.graders.protocol import GraderContext, GraderRow
from grpo_core.rewards.graders.registry import GraderUnavailable, make_grader
from grpo_core.spec import parse_spec
from tests.clock import patience

KEY = "a-key-of-the-operators"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server and an endpoint; `faults` are drawn for each request."""

    daemon_threads = True
    faults: tuple[str, ...] = ()
    share = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, Any], str]] = []
        self.random = random.Random(1)
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.seen.append((self.path, body, self.headers.get("authorization", "")))
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.random.choice(server.faults) if server.random.random() < server.share else ""
        try:
            time.sleep(0.002)
            self._fail(fault) if fault else self._answer(body)
        finally:
            with server.lock:
                server.now -= 1

    def _fail(self, fault: str) -> None:
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
        elif fault == "slow":
            time.sleep(0.5)
            self._send(500, {})
        elif fault == "flood":
            self._send(200, {"choices": [], "x": "y" * 2_000_000})
        elif fault == "words":
            self._judged("I would say seven.")
        elif fault == "outside":
            self._judged('{"reason": "", "score": 70}')
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(int(fault), {"error": {"message": "no"}}, {"Retry-After": "0.01"})

    def _answer(self, body: dict[str, Any]) -> None:
        if "messages" not in body:
            self._send(200, {"score": float(len(body["sample"]["output_text"]))})
            return
        text = body["messages"][-1]["content"]
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        if "label" in schema:
            self._judged(json.dumps({"reason": "r", "label": "good" if "right" in text else "bad"}))
        else:
            self._judged(json.dumps({"reason": "because", "score": 7 if "right" in text else 3}))

    def _judged(self, content: str) -> None:
        message = {"role": "assistant", "content": content}
        self._send(200, {"model": "m-1", "choices": [{"message": message}], "usage": {"total_tokens": 100}})

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base has it
        """Quiet."""


@contextmanager
def serving(*faults: str, share: float = 1.0) -> Generator[Server]:
    server = Server()
    server.faults, server.share = faults, share if faults else 0.0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIRST_WAIT", 0.01)


def environment(server: Server, **fields: Any) -> dict[str, str]:
    judge = {"base_url": f"{server.url}/v1", "model": "m", "key": "JUDGE_KEY", **fields}
    return {
        "GRPO_JUDGES": json.dumps({"judge-main": judge, "other": {"base_url": "http://other.example", "model": "o"}}),
        "JUDGE_KEY": KEY,
        "OTHER_KEY": "never-given",
        "GRPO_GRADER_ENDPOINT_HOSTS": f"127.0.0.1:{server.server_address[1]}",
        "GRPO_GRADER_SECRETS": json.dumps({"tests": "TESTS_TOKEN", "unused": "OTHER_KEY"}),
        "TESTS_TOKEN": "Bearer t",
    }


def judge(text: str = "{{sample.output_text}}", **fields: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": f"Rate it: {text}"}
    return {"type": "score_model", "model": "judge-main", "range": [0, 10], "input": [turn], **fields}


def rows(*texts: str) -> list[GraderRow]:
    samples = [{"output_text": text} for text in texts]
    return [GraderRow(sample=sample, item={"a": 1}, prompt_id="p", number=n) for n, sample in enumerate(samples)]


def made(grader: dict[str, Any], env: dict[str, str], **limits: Any) -> Any:
    model = parse_spec({"rewards": {"graders": {"g": grader}}}).rewards.graders["g"]
    return make_grader(model, GraderContext(name="g", limits=GraderLimits(**limits), environment=env, seed=5))


def test_a_thousand_rows_with_every_fault_and_none_is_lost() -> None:
    with serving("429", "500", "503", "408", "reset", "words", "outside", "flood", share=0.08) as server:
        grader = made(judge(), environment(server, attempts=8, concurrency=16))
        texts = [f"{n} right" if n % 2 else f"{n} wrong" for n in range(1000)]
        grades = grader.grade(rows(*texts))
    assert [grade.score for grade in grades] == [7.0 if n % 2 else 3.0 for n in range(1000)]
    assert server.most <= 16
    assert 1000 < len(server.seen) < 1300
    assert {auth for _, _, auth in server.seen} == {f"Bearer {KEY}"}
    details = grades[1].details
    assert (details["reason"], details["model"]) == ("because", "m-1")
    assert details["tokens"] >= 100  # type: ignore[operator]
    assert {"seconds", "tries", "answer"} <= set(details)
    assert KEY not in json.dumps([dict(grade.details) for grade in grades])


def test_what_the_judge_is_sent() -> None:
    sampling = {"temperature": 0.5, "max_completions_tokens": 64, "top_p": 0.9}
    with serving() as server:
        made(judge(sampling_params=sampling), environment(server)).grade(rows("{{item.secret}} right"))
    (path, body, _) = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Rate it: {{item.secret}} right"}]  # never a template
    sent = {name: body[name] for name in ("model", "temperature", "max_tokens", "top_p", "seed")}
    assert sent == {"model": "m", "temperature": 0.5, "max_tokens": 64, "top_p": 0.9, "seed": 5}


def test_equal_requests_are_sent_once() -> None:
    with serving() as server:
        grader = made(judge(), environment(server))
        assert [grade.score for grade in grader.grade(rows("right", "right", "wrong"))] == [7.0, 7.0, 3.0]
        assert [grade.details.get("cached") for grade in grader.grade(rows("right"))] == [True]
    assert len(server.seen) == 2


def test_a_label_passes_or_not() -> None:
    grader = {"type": "label_model", "model": "judge-main", "labels": ["good", "bad"], "passing_labels": ["good"]}
    grader["input"] = judge()["input"]
    multi = {"type": "multi", "graders": {"l": grader}, "calculate_output": "l"}
    with serving() as server:
        spec = parse_spec({"rewards": {"graders": {"m": multi}}})
        grading = Grading(spec, environment(server))
        paid = grading.grade([Graded(text="right", answer=""), Graded(text="wrong", answer="")])
        grading.close()
    assert [payment.rewards["m"] for payment in paid] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("fault", "kind", "tries"),
    [
        ("401", "model_grader_server_error", 1),
        ("404", "model_grader_server_error", 1),
        ("redirect", "model_grader_server_error", 1),
        ("500", "model_grader_server_error", 3),
        ("reset", "model_grader_server_error", 3),
        ("words", "model_grader_parse_error", 3),
        ("outside", "model_grader_parse_error", 3),
    ],
)
def test_a_judge_that_always_fails_gives_no_score(fault: str, kind: str, tries: int) -> None:
    with serving(fault) as server:
        (grade,) = made(judge(), environment(server, attempts=3)).grade(rows("right"))
    assert grade.score is None
    assert (grade.error.kind, grade.error.of_completion) == (kind, False)
    assert (grade.details["tries"], len(server.seen)) == (tries, tries)
    assert all(path == "/v1/chat/completions" for path, _, _ in server.seen)


def test_a_slow_judge_ends_with_the_steps_time() -> None:
    with serving("slow") as server:
        grader = made(judge(), environment(server, attempts=9, concurrency=2), step_seconds=0.6)
        began = time.perf_counter()
        grades = grader.grade(rows(*map(str, range(50))))
        assert time.perf_counter() - began < patience(5)
    assert {grade.error.kind for grade in grades} <= {"unresponsive_reward_error", "model_grader_server_error"}
    assert len(grades) == 50


def test_the_budget_stops_the_spending() -> None:
    with serving() as server:
        grader = made(judge(), environment(server, concurrency=4), budget_tokens=1000)
        grades = grader.grade(rows(*map(str, range(100))))
    scored = [grade for grade in grades if grade.score is not None]
    assert 10 <= len(scored) <= 13
    assert "budget" in grades[-1].error.message


def test_what_a_judge_said_and_cost_can_be_restored() -> None:
    with serving() as server:
        first = made(judge(), environment(server), budget_tokens=200)
        first.grade(rows("right", "wrong"))
        state = json.loads(json.dumps(first.state()))
        second = made(judge(), environment(server), budget_tokens=200)
        second.restore(state)
        known, new = second.grade(rows("right", "another"))
    assert len(server.seen) == 2
    assert (known.score, known.details["cached"], known.details["reason"]) == (7.0, True, "because")
    assert "budget of 200 tokens" in new.error.message


def test_recent_failures_can_be_restored() -> None:
    spec = {"rewards": {"graders": {"j": judge()}, "on_error": {"max_share": 0.5, "window_steps": 2}}}
    with serving("500") as server:
        first = Grading(
            parse_spec(spec | {"rewards": spec["rewards"] | {"on_error": {"max_share": 1.0}}}),
            environment(server, attempts=1),
        )
        first.pay([Graded(text="right", answer="")] * 6)
        second = Grading(parse_spec(spec), environment(server, attempts=1))
        second.restore(json.loads(json.dumps(first.state())))
        with pytest.raises(JobFailure, match="last 2 steps"):
            second.pay([Graded(text="right", answer="")] * 6)
        first.close()
        second.close()


def test_a_dead_judge_is_said_and_not_a_zero() -> None:
    with serving() as server:
        env = environment(server, attempts=2)
    (grade,) = made(judge(), env).grade(rows("right"))
    assert (grade.score, grade.error.kind) == (None, "model_grader_server_error")


def test_a_failed_judge_pays_the_whole_group_the_same_and_then_fails_the_job() -> None:
    spec = {"rewards": {"graders": {"j": judge()}, "on_error": {"max_share": 0.9}}, "sampling": {"generations": 2}}
    with serving("500", share=0.0) as server:
        grading = Grading(parse_spec(spec), environment(server, attempts=1))
        good = grading.pay([Graded(text="right", answer=""), Graded(text="wrong", answer="")])
        assert [payment.total for payment in good] == [7.0, 3.0]
        server.share, server.faults = 1.0, ("500",)
        bad = grading.pay([Graded(text="1 right", answer=""), Graded(text="wrong", answer="")])
        assert bad[0].total == bad[1].total
        assert [payment.rewards["j"] for payment in bad] == [None, 3.0]
        assert [payment.skipped for payment in bad] == [True, True]
        grading.close()


def test_an_endpoint_is_sent_the_row_and_the_secret() -> None:
    with serving("503", share=0.2) as server:
        grader = {"type": "endpoint", "url": f"{server.url}/grade", "headers": {"Authorization": "secret://tests"}}
        grades = made(grader, environment(server)).grade(rows("abc", "abcde"))
    assert [grade.score for grade in grades] == [3.0, 5.0]
    bodies = {body["trace_id"]: body for _, body, _ in server.seen}
    assert bodies["0/p/0"] == {"sample": {"output_text": "abc"}, "item": {"a": 1}, "trace_id": "0/p/0"}
    assert {auth for _, _, auth in server.seen} == {"Bearer t"}


@pytest.mark.parametrize("url", ["http://169.254.169.254/x", "http://a@127.0.0.1:1/x", "http://127.0.0.1:1/x"])
def test_an_endpoint_of_another_host_is_refused(url: str) -> None:
    with serving() as server, pytest.raises(GraderUnavailable):
        made({"type": "endpoint", "url": url}, environment(server))


def test_a_training_process_gets_the_keys_of_its_own_graders_only() -> None:
    with serving() as server:
        env = environment(server)
        graders = parse_spec({"rewards": {"graders": {"j": judge()}}}).rewards.graders
        given = environment_for(graders, env)
        assert set(given) == {"GRPO_JUDGES", "JUDGE_KEY"}
        assert set(json.loads(given["GRPO_JUDGES"])) == {"judge-main"}
        hosts = [(host.pattern, host.port) for host in hosts_for(graders, env)]
        assert hosts == [("127.0.0.1", server.server_address[1])]
        endpoint = {"type": "endpoint", "url": f"{server.url}/grade", "headers": {"A": "secret://tests"}}
        given = environment_for(parse_spec({"rewards": {"graders": {"e": endpoint}}}).rewards.graders, env)
        assert set(given) == {"GRPO_GRADER_ENDPOINT_HOSTS", "GRPO_GRADER_SECRETS", "TESTS_TOKEN"}
        assert environment_for({}, env) == {}


def test_what_is_not_registered_is_named() -> None:
    with serving() as server:
        graders = {"j": judge(model="nobody"), "e": {"type": "endpoint", "url": "http://evil.example/"}}
        found = list(unregistered(parse_spec({"rewards": {"graders": graders}}).rewards.graders, environment(server)))
    assert [pointer for pointer, _, _ in found] == ["/rewards/graders/j/model", "/rewards/graders/e/url"]


def test_messages_in_blocks_are_joined() -> None:
    blocks: list[JsonValue] = [
        {"type": "input_text", "text": "a {{sample.output_text}}"},
        {"type": "input_text", "text": "b"},
    ]
    model = ScoreModel(type="score_model", model="judge-main", input=(Message(role="developer", content=blocks),))
    with serving() as server:
        context = GraderContext(name="g", environment=environment(server))
        make_grader(model, context).grade(rows("right"))
    assert server.seen[0][1]["messages"] == [{"role": "system", "content": "a right\nb"}]
