"""OpenAI's own package, in three majors, against the real service: every call of the routes below /v1.

The package of the environment is the current major; the two before it are installed from PyPI, pinned by hash, into
pytest's cache, and are left out with a word where PyPI cannot be reached.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from grpo_core.reasons import Phase
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job_store import JobEvent
from tests.clock import patience
from tests.integration.openai_calls import EXACT, MULTI, rows
from tests.integration.openai_packages import OLDER, older_package, run_calls
from tests.integration.running import RunningApi


@pytest.fixture(scope="module")
def running(valkey: Any, seaweedfs: Any) -> Iterator[tuple[RunningApi, str]]:
    """A service, and a key of it."""
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-openai-face"})
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    api = RunningApi(JobService(storage, queue))
    with api.run():
        api.service.check_storage()
        yield api, api.service.keys.create("ann")[0]


def check(found: dict[str, Any], major: str) -> None:
    """What every major must have read."""
    assert found["version"].split(".")[0] == major
    assert found["file"] == ["processed", "train.jsonl", "fine-tune", True]
    assert found["files"]
    assert found["content"]
    assert found["deleted"] == [True, True]
    assert found["job"] == ["fine_tuning.job", "queued", "tiny-arithmetic", 11, True]
    assert found["grader"]
    assert found["hyperparameters"] == {
        "batch_size": 4,
        "compute_multiplier": 2,
        "eval_interval": 5,
        "learning_rate_multiplier": 1.5,
        "n_epochs": 2,
    }
    assert {"ignored", "interpreted", "no_worker"} <= set(found["warnings"])
    assert found["retrieved"] == [True, {"lora": {"rank": 16}}, "wandb"]
    assert found["listed"]
    assert found["orders"] == ["paused", "queued", "cancelled"]
    assert found["events"][-5:-1] == [["warn", "message"]] * 4
    assert found["events"][-1] == ["info", "message"]
    assert found["checkpoints"] == []
    assert found["run"] == [1.0, {"exact": 1.0, "similar": 1.0}, False]
    assert found["validated"]
    assert found["typed"] == {"exact": 1.0, "similar": 1.0}
    bad, request_error = "BadRequestError", "invalid_request_error"
    hyper = "method.reinforcement.hyperparameters"
    assert found["errors"] == [
        ["NotFoundError", 404, "not_found", "fine_tuning_job_id", request_error, True],
        [bad, 400, "conflict", None, request_error, True],
        [bad, 400, "unsupported_method", "method.type", request_error, True],
        [bad, 400, "bad_value", "seed", request_error, True],
        [bad, 400, "conflict", "grpo.sampling.prompts_per_step", request_error, True],
        ["NotFoundError", 404, "not_found", "id", request_error, True],
        [bad, 400, "bad_json", "file", request_error, True],
        [bad, 400, "bad_value", "grader.operation", request_error, True],
    ], hyper


def call(running: tuple[RunningApi, str], which: str, folder: Path | None = None) -> dict[str, Any]:
    api, key = running
    return run_calls("openai_calls.py", api.url, key, which, folder=folder)


def test_the_current_package_makes_every_call(running: tuple[RunningApi, str]) -> None:
    check(call(running, "sync"), openai.__version__.split(".")[0])


def test_the_current_package_makes_every_call_asynchronously(running: tuple[RunningApi, str]) -> None:
    check(call(running, "async"), openai.__version__.split(".")[0])


@pytest.mark.long
@pytest.mark.parametrize("which", ["sync", "async"])
@pytest.mark.parametrize("version", OLDER)
def test_earlier_majors_make_every_call(
    running: tuple[RunningApi, str], request: pytest.FixtureRequest, version: str, which: str
) -> None:
    folder = older_package(version, request)
    check(call(running, which, folder), version.split(".")[0])


NODE_VERSION = "7.59.0"
NODE_HASH = "sha512-wPYKJkLPFEdNJ2tThSg4jE1Ptsv4X3u8g8LIvu0Qz/UIhsKeCzl73rl48PtQsDVrJL/ku0liXOsbyd2TsRsPJw=="


def node_package(request: pytest.FixtureRequest) -> Path:
    """The folder with OpenAI's package for JavaScript, installed once."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm")
    folder = request.config.cache.mkdir(f"openai-node-{NODE_VERSION}")
    if (folder / "node_modules/openai/index.mjs").is_file():
        return folder
    wanted = {"dependencies": {"openai": NODE_VERSION}}
    package = {
        "version": NODE_VERSION,
        "resolved": f"https://registry.npmjs.org/openai/-/openai-{NODE_VERSION}.tgz",
        "integrity": NODE_HASH,
    }
    lock = {"lockfileVersion": 3, "packages": {"": wanted, "node_modules/openai": package}}
    (folder / "package.json").write_text(json.dumps(wanted))
    (folder / "package-lock.json").write_text(json.dumps(lock))
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patience(120), check=False)
    if done.returncode:
        pytest.skip(f"OpenAI's package for JavaScript cannot be fetched: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.long
def test_the_package_for_javascript_makes_its_calls(
    running: tuple[RunningApi, str], request: pytest.FixtureRequest
) -> None:
    folder = node_package(request)
    api, key = running
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("openai_calls.mjs")), str(folder), api.url, key],
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "version": NODE_VERSION,
        "file": ["processed", "train.jsonl", "fine-tune"],
        "content": True,
        "job": ["queued", 11, 2],
        "listed": 4,
        "orders": ["paused", "queued", "cancelled"],
        "events": [
            "The job is cancelled",
            "The job is queued",
            "The job is paused",
            "The job is queued",
        ],
        "checkpoints": [],
        "reward": 1,
        "error": ["BadRequestError", 400, "seed", True],
    }


class _CutsOnce:
    """A proxy that hands the first matching request on, waits for its answer, and closes instead of passing it on."""

    def __init__(self, port: int, marked: bytes) -> None:
        self._port, self._marked = port, marked
        self.answers: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with closing(connection), closing(socket.create_connection(("127.0.0.1", self._port))) as service:
            request = _message(connection)
            head, _, rest = request.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            service.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + rest)
            answer = b"".join(iter(lambda: service.recv(65536), b""))
            is_first = self._marked in request.partition(b"\r\n")[0] and not self.answers
            if self._marked in request.partition(b"\r\n")[0]:
                self.answers.append(answer)
            if not is_first:
                connection.sendall(answer)


def _message(connection: socket.socket) -> bytes:
    """One whole request."""
    held = b""
    while b"\r\n\r\n" not in held:
        held += connection.recv(65536)
    head, _, rest = held.partition(b"\r\n\r\n")
    sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    size = int(sizes[0].split(b":")[1]) if sizes else 0
    while len(rest) < size:
        rest += connection.recv(65536)
    return head + b"\r\n\r\n" + rest


@pytest.fixture
def through_proxy(running: tuple[RunningApi, str]) -> Iterator[Any]:
    """Makes a client of the package whose first request to a path loses its answer."""
    made: list[Any] = []

    def make(marked: bytes) -> tuple[openai.OpenAI, _CutsOnce]:
        proxy = _CutsOnce(running[0].port, marked)
        client = openai.OpenAI(
            base_url=f"{proxy.url}/v1", api_key=running[1], http_client=httpx2.Client(headers={"Connection": "close"})
        )
        made.extend((client, proxy))
        return client, proxy

    yield make
    for one in made:
        one.close()


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(
    running: tuple[RunningApi, str], through_proxy: Any
) -> None:
    client, proxy = through_proxy(b"POST /v1/fine_tuning/jobs")
    file = client.files.create(file=("t.jsonl", io.BytesIO(rows(0, 20))), purpose="fine-tune")
    asked: Any = {
        "model": "tiny-arithmetic",
        "training_file": file.id,
        "metadata": {"lost": file.id},
        "method": {"type": "reinforcement", "reinforcement": {"grader": EXACT}},
    }
    job = client.fine_tuning.jobs.create(**asked)
    assert len(proxy.answers) == 2
    assert all(answer.startswith(b"HTTP/1.1 200") and job.id.encode() in answer for answer in proxy.answers)
    assert b"idempotent-replayed: true" in proxy.answers[1].lower()
    found = running[0].service.list_jobs("ann", limit=10, metadata={"lost": file.id}).items
    assert [record.id for record in found] == [job.id]
    assert client.fine_tuning.jobs.create(**asked).id != job.id, "a new request is a new job"


def test_a_file_whose_answer_was_lost_is_not_stored_twice(running: tuple[RunningApi, str], through_proxy: Any) -> None:
    client, proxy = through_proxy(b"POST /v1/files")
    before = len(list(client.files.list()))
    file = client.files.create(file=("t.jsonl", io.BytesIO(rows(7000, 20))), purpose="evals")
    assert len(proxy.answers) == 2
    assert all(file.id.encode() in answer for answer in proxy.answers)
    assert len(list(client.files.list())) == before + 1


def test_events_and_checkpoints_of_a_run_are_read_by_the_package(running: tuple[RunningApi, str]) -> None:
    api, key = running
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key) as client:
        file = client.files.create(file=("t.jsonl", io.BytesIO(rows(0, 20))), purpose="fine-tune")
        grader: Any = MULTI
        job = client.fine_tuning.jobs.create(
            model="tiny-arithmetic",
            training_file=file.id,
            method={"type": "reinforcement", "reinforcement": {"grader": grader}},
        )
        assert api.service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=600)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
        api.service.job_store.change(job.id, epoch=1, fields={"phase": Phase.TRAINING.value})
        for step in range(1, 46):
            event = JobEvent(type="metric", step=step, data={"reward": step / 45, "loss": 0.5})  # type: ignore[arg-type]
            sample = JobEvent(type="sample", step=step, data={"prompt": "p"})  # type: ignore[arg-type]
            api.service.job_store.change(job.id, epoch=1, events=[event, sample])
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        found = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
        metrics = [one.data for one in found if one.type == "metrics"]
        assert [one["step"] for one in metrics] == list(range(45, 0, -1))  # type: ignore[index]
        assert metrics[0] == {"step": 45, "train_reward_mean": 1.0, "train_loss": 0.5}
        assert found[0].message == "Step 45/250: train_reward_mean=1"
        stopped = client.fine_tuning.jobs.cancel(job.id)
        assert stopped.status == "cancelling"
