"""A client that a generator makes from the OpenAPI document calls every route of the running service.

The cases come from the document: a new route without a call here fails, unless it is a GET whose parameters are known.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from grpo_core.spec import parse_spec
from jobs.auth.api_keys import SCOPES
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.serving import ServedModels, ServingStore
from jobs.store.workers import WorkerInfo
from tests.integration.running import RunningApi, wait_until
from tests.integration.test_service import upload
from tests.unit.test_openapi_document import document, operations

PACKAGE = "generated_grpo_client"
CONFIG = """\
post_hooks: ["ruff format ."]
content_type_overrides:
  application/x-ndjson: application/octet-stream
  application/jsonl: application/octet-stream
"""
SPEC = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
RUN = {"grader": GRADER, "item": {"answer": "12"}, "model_sample": "12"}


class World:
    """A running service, with one of each thing."""

    def __init__(self, api: RunningApi, folder: Path) -> None:
        self.api, self.service, self.folder = api, api.service, folder
        self.key, _ = self.service.keys.create("ann", scopes=list(SCOPES))
        self.uploads = 0
        self.hook = self.service.webhooks.create("ann", "https://example.com/hooks", None).id
        self.service.workers.announce(WorkerInfo(name="w", queues=["grpo.cpu"], device="cpu", drain="", busy=False))
        self.group_id, _, _ = self.service.submit_group([parse_spec(SPEC)], "ann")
        self.session = Session(self.service, self.job())

    def job(self) -> str:
        """A queued job."""
        return self.service.submit(parse_spec(SPEC), "ann").id

    def paused(self) -> str:
        """A paused job."""
        return self.service.pause(self.job(), "ann").id

    def ended(self) -> str:
        """A cancelled job."""
        return self.service.cancel(self.job(), "ann").id

    def dataset(self) -> str:
        """An upload."""
        self.uploads += 1
        folder = self.folder / str(self.uploads)
        folder.mkdir()
        return upload(self.service, folder).id

    def given(self, name: str) -> Any:
        """A value for a path parameter of any route."""
        known: dict[str, Callable[[], str]] = {
            "job_id": self.job,
            "dataset_id": self.dataset,
            "file_id": self.dataset,
            "group": lambda: self.group_id,
            "webhook_id": lambda: self.hook,
            "name": lambda: "w",
            "model": lambda: self.session.model,
        }
        return known[name]()


class Session:
    """A session that answers every question with 7, as its worker would."""

    def __init__(self, service: JobService, job: str) -> None:
        self.model, self._store, self._ended = job, ServingStore(service.job_store), threading.Event()
        self._served = ServedModels(
            session=service.submit(parse_spec(SPEC), "ann").id,
            owner="ann",
            source=job,
            model="tiny",
            epoch=1,
            models=("main",),
            steps={"main": 5},
            engine="native",
            context=256,
        )
        self._store.announce(self._served)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        after = "0"
        while not self._ended.is_set():
            after, orders = self._store.asked(self._served.session, 1, after, block_ms=200)
            self._store.announce(self._served)
            for order in (one for one in orders if "ask" in one):
                said = {"id": order["ask"]["id"], "k": 1, "index": 0, "text": "7", "finish": "stop"}
                done = {"id": said["id"], "k": 2, "done": {"prompt_tokens": 4, "completion_tokens": 1}}
                self._store.answer([(order["reader"], [said, done])])

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    "submitJob": lambda _: {"body": SPEC},
    "actOnJobs": lambda world: {"body": {"action": "cancel", "jobs": [world.job()]}},
    "deleteJob": lambda world: {"job_id": world.ended()},
    "changeJob": lambda world: {"job_id": world.job(), "body": {"priority": "high"}},
    "cancelJob": lambda world: {"job_id": world.job()},
    "pauseJob": lambda world: {"job_id": world.job()},
    "resumeJob": lambda world: {"job_id": world.paused()},
    "submitExport": lambda world: {"body": {"job": finished(world), "format": "merged"}},
    "submitGroup": lambda _: {"body": {"spec": SPEC, "grid": {"optimizer.learning_rate": [1e-5, 3e-5]}}},
    "cancelGroup": lambda world: {"group": world.group_id},
    "compareJobs": lambda world: {"job": [world.job(), world.job()]},
    "uploadDataset": lambda _: {"body": b'{"question": "6+6=?", "answer": "12"}\n'},
    "previewDataset": lambda world: {"body": {**SPEC, "data": columns(world.dataset())}},
    "deleteDataset": lambda world: {"dataset_id": world.dataset()},
    "runGrader": lambda _: {"body": RUN},
    "validateGrader": lambda _: {"body": {"grader": GRADER}},
    "scoreRows": lambda _: {
        "body": {
            "spec": {"rewards": {"graders": {"exact": GRADER}}, "data": {"answer_column": "answer"}},
            "rows": [{"item": {"answer": "12"}, "model_sample": "12"}],
        }
    },
    "serve": lambda _: {"body": {"model": "tiny-arithmetic", "resources": {"gpus": 0}}},
    "createChatCompletion": lambda world: {
        "body": {"model": world.session.model, "messages": [{"role": "user", "content": "3+4="}]}
    },
    "createOpenAIFile": lambda _: {"body": {"purpose": "fine-tune", "file": b'{"messages": [], "answer": "12"}\n'}},
    "deleteOpenAIFile": lambda world: {"file_id": world.dataset()},
    "createFineTuningJob": lambda world: {
        "body": {
            "model": "tiny-arithmetic",
            "training_file": world.dataset(),
            "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER}},
            "grpo": {**SPEC, "data": {"prompt_column": "question", "format": "qa"}},
        }
    },
    "cancelFineTuningJob": lambda world: {"job_id": world.job()},
    "pauseFineTuningJob": lambda world: {"job_id": world.job()},
    "resumeFineTuningJob": lambda world: {"job_id": world.paused()},
    "runOpenAIGrader": lambda _: {"body": RUN},
    "validateOpenAIGrader": lambda _: {"body": {"grader": GRADER}},
    "createKey": lambda _: {"body": {"name": "another", "scopes": ["jobs:read"]}},
    "revokeKey": lambda world: {"key": world.service.keys.create("ann")[1].id},
    "createWebhook": lambda _: {"body": {"url": "https://example.com/hooks"}},
    "deleteWebhook": lambda world: {
        "webhook_id": world.service.webhooks.create("ann", "https://example.com/other", None).id
    },
    "testWebhook": lambda world: {"webhook_id": world.hook},
    "drainWorker": lambda _: {"name": "w", "body": {"mode": "finish"}},
    "undrainWorker": lambda world: {"name": drained(world)},
}
"""What each route is called with, by its operation; GETs without an entry get what `World.given` has."""


def columns(dataset: str) -> dict[str, Any]:
    return {"source": "upload", "dataset": dataset}


def finished(world: World) -> str:
    """An ended job with the checkpoint of a step."""
    job = world.ended()
    world.service.write_once.allocate_epoch(job, "w", "2026-01-01T00:00:00+00:00")
    folder = f"{object_keys.run(job, 1)}checkpoints/step-000025/"
    files = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}
    for name, body in files.items():
        world.service.store.put(folder + name, body)
    listed = [
        {"path": name, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    ]
    world.service.store.put_json(folder + "manifest.json", {"files": listed})
    return job


def drained(world: World) -> str:
    world.service.drain_worker("w", "finish", by="ann")
    return "w"


@pytest.fixture(scope="module")
def world(valkey: Any, seaweedfs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-generated"})
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
        wait_until(lambda: all(found == "ok" for found in api.service.health().values()))
        world = World(api, tmp_path_factory.mktemp("uploads"))
        try:
            yield world
        finally:
            world.session.close()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of the generated package, while it can be imported."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document()))
    (folder / "config.yaml").write_text(CONFIG)
    made = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning"),
            *("--path", "openapi.json", "--config", "config.yaml", "--output-path", PACKAGE),
        ],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    sys.path.insert(0, str(folder))
    try:
        yield PACKAGE
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


def arguments_of(world: World, operation: dict[str, Any]) -> dict[str, Any]:
    call = CALLS.get(operation["operationId"])
    if call is not None:
        return call(world)
    required = [one["name"] for one in operation["parameters"] if one.get("required")]
    return {name: world.given(name) for name in required}


def module_of(package: str, operation: dict[str, Any]) -> Any:
    """The generated module with a route's function."""
    snake = re.sub(r"(?<!^)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", operation["operationId"]).lower()
    folder = Path(importlib.import_module(f"{package}.api").__path__[0])
    (found,) = folder.glob(f"*/{snake}.py")
    return importlib.import_module(f"{package}.api.{found.parent.name}.{snake}")


def body_of(package: str, function: Any, body: Any) -> Any:
    """A body as the type that the generated function takes."""
    kind: Any = get_type_hints(function)["body"]
    if isinstance(body, bytes):
        return importlib.import_module(f"{package}.types").File(payload=BytesIO(body), file_name="rows.jsonl")
    kinds: list[Any] = [one for one in (kind, *get_args(kind)) if hasattr(one, "from_dict")]
    return kinds[0].from_dict(body)


def test_every_route_has_a_call() -> None:
    known = {"job_id", "dataset_id", "file_id", "group", "webhook_id", "name", "model"}
    for name, operation in operations():
        if operation["operationId"] not in CALLS:
            required = {one["name"] for one in operation["parameters"] if one.get("required")}
            assert name.startswith("GET "), f"Add a call for {name} to CALLS."
            assert required <= known, f"Add a call for {name} to CALLS, or its parameters to World.given."


@pytest.mark.long
@pytest.mark.parametrize(
    "operation",
    [pytest.param({**one, "method": name.partition(" ")[0]}, id=one["operationId"]) for name, one in operations()],
)
def test_a_generated_client_calls_every_route(generated: str, world: World, operation: dict[str, Any]) -> None:
    function = module_of(generated, operation).sync_detailed
    arguments = arguments_of(world, operation)
    if "body" in arguments:
        arguments["body"] = body_of(generated, function, arguments["body"])
    client_type = importlib.import_module(f"{generated}.client").AuthenticatedClient
    client = client_type(base_url=world.api.url, token=world.key, raise_on_unexpected_status=True, timeout=60)
    with client:
        answer = function(client=client, **arguments)
    assert answer.status_code < 300, answer.content
    expected = operation["responses"][str(int(answer.status_code))].get("content", {})
    if "application/json" in expected:
        assert answer.parsed is not None
