"""Served models end to end: the real API, a worker process, Valkey and object storage, with OpenAI's own package.

One worker serves one session for most tests; the source job has two checkpoints with random adapters, so that they and
the base model answer differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pydantic
import pytest

from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.job import TERMINAL, JobRecord
from tests.clock import patience
from tests.conftest import SeaweedFSServer, ValkeyServer
from tests.integration.children import MODELS
from tests.integration.openai_packages import OLDER, older_package, run_calls
from tests.integration.running import RunningApi, in_environment, wait_until
from tests.lazy import lazy

torch = lazy("torch")

ROOT = Path(__file__).resolve().parents[2]
RANK = 8
SPEC: dict[str, Any] = {
    "model": {"name": "tiny-arithmetic", "max_sequence": 256},
    "lora": {"rank": RANK, "alpha": RANK},
    "optimizer": {"name": "adamw_torch"},
    "sampling": {"max_prompt_tokens": 64, "max_completion_tokens": 12},
    "data": {"system_prompt": "请回答。"},
    "resources": {"gpus": 0},
}
QUESTION: Any = [{"role": "user", "content": "3+4="}]


@dataclass
class Stack:
    """Everything that runs, and the job whose adapters are served."""

    api: RunningApi
    service: JobService
    environment: dict[str, str]
    folder: Path
    source: str
    key: str
    session: str = ""
    worker: subprocess.Popen[bytes] | None = None
    workers: int = 0
    clients: dict[str, openai.OpenAI] = field(default_factory=dict[str, openai.OpenAI])

    def client(self, key: str = "") -> openai.OpenAI:
        key = key or self.key
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(api_key=key, base_url=f"{self.api.url}/v1", max_retries=0)
        return self.clients[key]

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.request(method, self.api.url + path, headers=headers, timeout=patience(30), **options)

    def start_worker(self, name: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            **self.environment,
            "GRPO_MODEL_DIR": str(MODELS),
            "GRPO_WORKER_NAME": name,
            "GRPO_WORK_DIR": str(self.folder / name),
            "GRPO_CACHE_DIR": str(self.folder / "caches"),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "jobs"], env=environment, stdout=log, stderr=log, cwd=ROOT)

    def ensure_worker(self) -> None:
        if self.worker is None or self.worker.poll() is not None:
            self.workers += 1
            self.worker = self.start_worker(f"w{self.workers}")

    def kill_worker(self) -> None:
        if self.worker is not None:
            self.worker.send_signal(signal.SIGKILL)
            self.worker.wait()

    def end_sessions(self) -> None:
        for job in self.service.list_jobs("ann", limit=100).items:
            if job.status not in TERMINAL:
                self.service.cancel(job.id, "ann")
                self.wait_for_end(job.id)

    def serve(self, **fields: Any) -> str:
        answer = self.http("POST", "/serving", json={"job": self.source, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def wait_until_served(self, session: str) -> None:
        def is_served() -> bool:
            record = self.service.get(session, "ann")
            assert record.status not in TERMINAL, record.error
            return self.service.session(session) is not None

        wait_until(is_served, 60)

    def wait_for_end(self, session: str) -> JobRecord:
        wait_until(lambda: self.service.get(session, "ann").status in TERMINAL, 30)
        return self.service.get(session, "ann")

    def reason(self, session: str) -> str:
        logs = self.service.events(session, "ann", types={"log"})
        return next(event["data"]["reason"] for event in logs if event["data"].get("code") == "serving_ended")


def put_checkpoint(service: JobService, job: str, step: int) -> None:
    """A checkpoint with a random adapter, as a training process writes it; made without torch, which takes seconds."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save

    random = np.random.default_rng(step)
    shapes: dict[str, tuple[int, int]] = {}
    with safe_open(MODELS / "tiny-arithmetic" / "model.safetensors", "numpy") as base:
        for name in base.keys():  # noqa: SIM118 - no mapping
            if name.endswith("_proj.weight"):
                out, into = base.get_slice(name).get_shape()
                module = f"base_model.model.{name.removesuffix('.weight')}"
                shapes |= {f"{module}.lora_A.weight": (RANK, into), f"{module}.lora_B.weight": (out, RANK)}
    weights = save({name: (0.4 * random.standard_normal(shape)).astype("float32") for name, shape in shapes.items()})
    folder = f"{object_keys.run(job, 1)}checkpoints/step-{step:06d}/"
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    for name, body in files.items():
        service.store.put(folder + name, body)
    listed = [
        {"path": name, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    ]
    service.store.put_json(folder + "manifest.json", {"files": listed})


@pytest.fixture(scope="module")
def stack(
    valkey: ValkeyServer, seaweedfs: SeaweedFSServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    queue = QueueSettings.model_validate(
        {"redis_url": valkey.url, "prefix": f"t-serving-{os.getpid()}", "lease_seconds": 3.0}
    )
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    service = JobService(storage, queue)
    api = RunningApi(service)
    with api.run():
        wait_until(lambda: service.storage_is_up() and service.valkey.state())
        source = service.submit(parse_spec(SPEC), "ann").id
        service.cancel(source, "ann")
        service.write_once.allocate_epoch(source, "w", "2026-01-01T00:00:00+00:00")
        for step in (25, 50):
            put_checkpoint(service, source, step)
        key = service.keys.create("ann")[0]
        folder = tmp_path_factory.mktemp("serving")
        environment = in_environment(storage, queue) | {"GRPO_LEASE_SECONDS": "3"}
        stack = Stack(api, service, environment, folder, source, key)
        yield stack
        stack.kill_worker()
        for client in stack.clients.values():
            client.close()


@pytest.fixture
def served(stack: Stack) -> Stack:
    """A stack whose session answers: the one of the test before, unless that ended it."""
    stack.ensure_worker()
    if not stack.session or stack.service.session(stack.session) is None:
        stack.end_sessions()
        stack.session = stack.serve(steps=[25], ttl_seconds=3600, idle_seconds=3600)
        torch.device("cpu")  # imported while the session's process imports it too
        stack.wait_until_served(stack.session)
    return stack


@pytest.fixture
def idle(stack: Stack) -> Stack:
    """A stack whose worker has nothing to do."""
    stack.ensure_worker()
    stack.end_sessions()
    return stack


def say(stack: Stack, model: str = "", **options: Any) -> str:
    asked: dict[str, Any] = {"model": model or stack.source, "messages": QUESTION, "temperature": 0, **options}
    answer = stack.client().chat.completions.create(**asked)
    return answer.choices[0].message.content or ""


def test_the_session_serves_the_last_adapter_a_step_and_the_base(served: Stack) -> None:
    names = [model.id for model in served.client().models.list()]
    assert names == [f"{served.source}:step-25", served.source, f"{served.source}:base"]
    main = served.client().models.retrieve(served.source)
    assert getattr(main, "step", None) == 50
    assert len({say(served, name) for name in names}) == 3


def test_a_greedy_answer_is_that_of_the_evaluations_decoder(served: Stack) -> None:
    from safetensors.torch import load

    from grpo_core.datasets.templates import encode
    from grpo_core.engines.native.adapter import Adapter
    from grpo_core.engines.native.architecture import read_architecture
    from grpo_core.engines.native.decode import Decoder, Request
    from grpo_core.engines.native.weights import load_weights
    from grpo_core.engines.pretrained import load_tokenizer, stop_tokens
    from grpo_core.hardware.models import ModelFiles
    from grpo_core.spec.sections import PROJECTIONS

    folder = MODELS / "tiny-arithmetic"
    files = ModelFiles("tiny-arithmetic", None, "folder", folder, 0)
    tokenizer, architecture = load_tokenizer(files), read_architecture(folder)
    ends = stop_tokens(files, tokenizer)
    weights = load_weights(architecture, folder, device=torch.device("cpu"), dtype=torch.float32)
    decoder = Decoder(weights, stops=[ends] if isinstance(ends, int) else ends)
    adapter = Adapter(architecture, rank=RANK, scale=1.0, targets=PROJECTIONS, device=torch.device("cpu"))
    prefix = f"{object_keys.run(served.source, 1)}checkpoints/step-000025/"
    stored = load(served.service.store.get(prefix + "adapter_model.safetensors") or b"")
    for layer in range(architecture.layers):
        for name, view in adapter.named(layer).items():
            view.copy_(stored[name])
    decoder.set_adapter(adapter)
    (prompt,) = encode(tokenizer, [[{"role": "system", "content": "请回答。"}, *QUESTION]])
    (drawn,) = decoder.generate([Request(prompt, 0)], tokens=24, temperature=0)
    assert say(served, f"{served.source}:step-25") == tokenizer.decode(drawn.tokens, skip_special_tokens=True)


def test_a_stream_has_the_same_text_and_its_usage(served: Stack) -> None:
    chunks = list(
        served.client().chat.completions.create(
            model=served.source,
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == say(served)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def check_calls(served: Stack, found: dict[str, Any], major: str) -> None:
    """What every major of OpenAI's package must have read."""
    expected = say(served, max_tokens=12)
    assert found["version"].split(".")[0] == major
    assert set(found["models"]) == {served.source, f"{served.source}:step-25", f"{served.source}:base"}
    assert found["model"] == served.source
    assert found["answer"] == expected
    assert found["finish"] in ("stop", "length")
    assert found["choices"] == 2
    assert set(found["top"]) == {2}
    assert found["streamed"] == [expected, found["usage"]]
    assert found["async"] == [expected, expected]
    assert found["refused"][0] == "BadRequestError"
    assert found["refused"][2] == "temperature"
    assert found["unknown"][0] == "NotFoundError"


def test_the_current_package_reads_all_of_it(served: Stack) -> None:
    found = run_calls("openai_chat.py", served.api.url, served.key, served.source)
    check_calls(served, found, openai.__version__.split(".")[0])


@pytest.mark.long
@pytest.mark.parametrize("version", OLDER)
def test_earlier_majors_read_all_of_it(served: Stack, request: pytest.FixtureRequest, version: str) -> None:
    folder = older_package(version, request)
    found = run_calls("openai_chat.py", served.api.url, served.key, served.source, folder=folder)
    check_calls(served, found, version.split(".")[0])


def test_the_same_seed_gives_the_same_choices(served: Stack) -> None:
    def texts(seed: int) -> list[str | None]:
        answer = served.client().chat.completions.create(
            model=served.source, messages=QUESTION, n=3, seed=seed, max_tokens=16
        )
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first
    assert texts(8) != first


def test_log_probabilities_are_those_of_the_tokens(served: Stack) -> None:
    answer = served.client().chat.completions.create(
        model=served.source, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2, max_tokens=5
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    assert all(one.token == one.top_logprobs[0].token for one in content)
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in content)


class Verdict(pydantic.BaseModel):
    steps: Annotated[list[Literal["a", "b"]], pydantic.Field(max_length=2)]
    is_right: bool
    unit: Literal["个", "kg"] | None


def form_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


def test_answers_match_the_schema_that_was_sent(served: Stack) -> None:
    chat = served.client().chat.completions
    asked: Any = {"model": served.source, "messages": QUESTION, "max_tokens": 80, "seed": 3}
    choices = chat.parse(response_format=Verdict, n=3, **asked).choices
    assert [type(choice.message.parsed) for choice in choices] == [Verdict] * 3
    with chat.stream(response_format=Verdict, **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        (streamed,) = stream.get_final_completion().choices
    assert len(deltas) > 3
    assert streamed.message.parsed == choices[0].message.parsed
    assert (say(served, response_format={"type": "json_object"}, max_tokens=8) or "").startswith("{")
    assert say(served, response_format={"type": "text"}) == say(served)


def test_an_answer_ends_before_a_stop_text(served: Stack) -> None:
    whole = say(served)
    stop = whole[len(whole) // 2 :][:2]
    cut = served.client().chat.completions.create(
        model=served.source, messages=QUESTION, temperature=0, stop=[stop], stream=True
    )
    chunks = list(cut)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_nul_that_the_model_writes_is_passed_on(served: Stack) -> None:
    """Every byte is a token of its own, and the worker's strict JSON refused this one: the session hung for all."""
    options: Any = {"model": served.source, "messages": QUESTION, "temperature": 2, "n": 16, "max_tokens": 150}
    told = (served.client().chat.completions.create(**options, seed=seed) for seed in range(4))
    assert any("\0" in (choice.message.content or "") for answer in told for choice in answer.choices)


def test_a_system_message_replaces_the_jobs_prompt(served: Stack) -> None:
    def prompt_tokens(messages: Any) -> int:
        answer = served.client().chat.completions.create(model=served.source, messages=messages, max_tokens=1)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    own = prompt_tokens(QUESTION)
    assert prompt_tokens([{"role": "system", "content": "请回答。"}, *QUESTION]) == own
    assert prompt_tokens([{"role": "developer", "content": "x"}, *QUESTION]) != own


def test_twenty_clients_at_once_get_what_each_gets_alone(served: Stack) -> None:
    names = [served.source, f"{served.source}:step-25", f"{served.source}:base"]
    alone = {name: say(served, name) for name in names}
    asked = [names[at % 3] for at in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(partial(say, served), asked))
    assert answers == [alone[name] for name in asked]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": form_of({"type": "word"})}, "response_format"),
        ({"response_format": form_of({"type": "array", "minItems": 10**9})}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(served: Stack, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        say(served, **change)
    assert error.value.param == param


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "tiny-arithmetic", "job-x", "job-01:../..", ""])
def test_a_name_that_is_not_listed_reaches_nothing(served: Stack, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        served.client().chat.completions.create(model=name, messages=QUESTION)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_a_name_may_begin_as_those_of_openais_tuned_models(served: Stack) -> None:
    assert say(served, f"ft:{served.source}") == say(served)
    assert served.client().models.retrieve(f"ft:{served.source}:step-25").id == f"{served.source}:step-25"


def test_a_session_is_warned_of_what_its_job_needs(served: Stack) -> None:
    """Not of the recipe's GPU: the job, and so its session, runs on a CPU."""
    session = served.http("POST", "/serving", json={"job": served.source}).json()
    served.service.cancel(session["id"], "ann")
    assert session["warnings"] == []


def test_a_model_that_nothing_serves_says_how_to_serve_it(served: Stack) -> None:
    with pytest.raises(openai.ConflictError) as error:
        say(served, f"{served.source}:step-50")
    assert (error.value.code, error.value.param) == ("not_serving", "model")
    assert "grpo serve" in error.value.message
    assert "--steps 50" in error.value.message


def test_a_model_whose_session_is_starting_names_the_session(served: Stack) -> None:
    session = served.http("POST", "/serving", json={"job": served.source, "steps": [50]}).json()
    try:
        with pytest.raises(openai.ConflictError, match=f"{session['id']} .* is starting"):
            say(served, f"{served.source}:step-50")
    finally:
        served.service.cancel(session["id"], "ann")


def test_another_owner_sees_and_reaches_nothing(served: Stack) -> None:
    stranger = served.client(served.service.keys.create("bob")[0])
    assert list(stranger.models.list()) == []
    with pytest.raises(openai.NotFoundError):
        stranger.chat.completions.create(model=served.source, messages=QUESTION)
    answer = httpx.post(
        f"{served.api.url}/serving",
        json={"job": served.source},
        headers={"Authorization": f"Bearer {stranger.api_key}"},
        timeout=patience(10),
    )
    assert answer.status_code == 404


def test_a_step_that_was_not_kept_names_those_that_were(served: Stack) -> None:
    answer = served.http("POST", "/serving", json={"job": served.source, "steps": [7]})
    assert answer.status_code == 422
    (problem,) = answer.json()["errors"]
    assert (problem["pointer"], problem["remedy"]) == ("/steps/0", "Use one of 25, 50.")


def test_a_client_that_goes_away_ends_its_answer(served: Stack) -> None:
    stream = served.client().chat.completions.create(
        model=served.source, messages=QUESTION, stream=True, max_tokens=180, temperature=2, n=16, seed=1
    )
    next(iter(stream))
    stream.close()

    def is_free() -> bool:
        session = served.service.session(served.session)
        return session is not None and not session.active

    wait_until(is_free, 20)


def test_no_key_is_left_of_an_answer(served: Stack) -> None:
    say(served)
    client = served.service.job_store.client
    prefix = served.service.job_store.prefix
    streams = [*client.scan_iter(f"{prefix}:ask:*"), *client.scan_iter(f"{prefix}:answers:*")]
    assert all(client.ttl(key) > 0 for key in streams)
    assert sum(client.xlen(key) for key in streams) == 0


def run_grpo(stack: Stack, *words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GRPO_URL": stack.api.url, "GRPO_API_KEY": stack.key, "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "grpo_client", *words]
    return subprocess.run(
        command, env=environment, input=lines, capture_output=True, text=True, timeout=patience(60), check=False
    )


@pytest.mark.long
def test_the_terminal_prints_an_answer_and_remembers_a_conversation(served: Stack) -> None:
    answer = say(served)
    assert run_grpo(served, "chat", served.source, "--prompt", "3+4=").stdout == f"{answer}\n"
    body = json.loads(run_grpo(served, "chat", served.source, "--base", "--prompt", "3+4=", "--json").stdout)
    assert body["choices"][0]["message"]["content"] == say(served, f"{served.source}:base")
    done = run_grpo(served, "chat", served.source, lines="3+4=\n/reset\n3+4=\n5+5=\n")
    history: Any = [*QUESTION, {"role": "assistant", "content": answer}, {"role": "user", "content": "5+5="}]
    assert done.stdout == f"{answer}\n{answer}\n{say(served, messages=history)}\n"


@pytest.mark.long
def test_the_terminal_starts_a_session_where_none_serves(idle: Stack) -> None:
    done = run_grpo(idle, "chat", idle.source, "--step", "25", "--prompt", "3+4=")
    assert "starting a session" in done.stderr
    assert done.stdout == say(idle, f"{idle.source}:step-25") + "\n"
    assert run_grpo(idle, "chat", "job-01ARZ3NDEKTSV4RRFFQ69G5FAV", "--prompt", "x").returncode == 2


@pytest.mark.last
def test_a_session_ends_for_a_job_that_waits(served: Stack) -> None:
    waiting = served.service.submit(parse_spec(SPEC), "ann")
    wait_until(lambda: served.service.session(served.session) is None, 20)
    served.service.cancel(waiting.id, "ann")  # it could not be trained here
    record = served.wait_for_end(served.session)
    assert (record.status, record.error) == ("succeeded", None)
    assert served.reason(served.session) == "job_waits"
    with pytest.raises(openai.ConflictError):
        say(served)


@pytest.mark.long
def test_a_session_ends_when_nobody_asks(idle: Stack) -> None:
    session = idle.serve(idle_seconds=2)
    assert idle.wait_for_end(session).status == "succeeded"
    assert idle.reason(session) == "idle"


@pytest.mark.long
def test_a_session_ends_at_its_time_and_finishes_what_is_under_way(idle: Stack) -> None:
    session = idle.serve(ttl_seconds=5)
    idle.wait_until_served(session)
    answers: list[str] = []
    refused = threading.Event()

    def keep_asking() -> None:
        with suppress(openai.ConflictError):
            while True:
                answers.append(say(idle))
        refused.set()

    asking = threading.Thread(target=keep_asking)
    asking.start()
    assert idle.wait_for_end(session).status == "succeeded"
    asking.join(patience(20))
    assert refused.is_set()
    assert idle.reason(session) == "ttl"
    assert len(set(answers)) == 1


@pytest.mark.long
def test_a_stream_whose_worker_dies_ends_with_an_error_and_the_session_comes_back(served: Stack) -> None:
    stream = served.client().chat.completions.create(
        model=served.source, messages=QUESTION, stream=True, n=16, max_tokens=190, temperature=2, seed=3
    )
    next(iter(stream))
    began = time.monotonic()
    served.kill_worker()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    stream.close()
    assert time.monotonic() - began < patience(10)
    served.ensure_worker()
    wait_until(lambda: served.service.get(served.session, "ann").epoch == 2, 60)
    served.wait_until_served(served.session)
    assert say(served)
    served.service.cancel(served.session, "ann")
    assert served.wait_for_end(served.session).status == "cancelled"
