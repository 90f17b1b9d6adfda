"""The OpenAPI document is kept to: schemathesis sends what it allows and what it does not, to the real service.

Checked of every answer: no 5xx, a documented status, a documented content type, the documented shape, and that no key
means no answer. Not checked: that what the document allows is accepted, since rules across fields refuse more, and
that all it forbids is refused, since a client may send headers and parameters of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
)

from api import openapi
from api.app import create_app
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job_store import JobEvent
from tests.integration.running import RunningApi
from tests.integration.test_service import upload
from tests.unit.fakes import FakeJobService

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    ignored_auth,
]
SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


@schemathesis.serializer("application/x-ndjson", "application/jsonl")
def as_lines(ctx: Any, value: Any) -> bytes:
    """A body of one of these types is text as it is."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def target(
    valkey: Any, seaweedfs: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningApi, dict[str, str], dict[str, list[str]]]]:
    """A running service with jobs and a data set in it, a key, and the ids of what there is."""
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-contract"})
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
        key, _ = api.service.keys.create("ann")
        ids = {"job_id": [api.service.submit(SPEC, "ann").id for _ in range(4)]}
        api.service.job_store.claim(ids["job_id"][0], epoch=1, worker="w", lease_seconds=600)
        api.service.job_store.change(
            ids["job_id"][0], epoch=1, events=[JobEvent(type="metric", step=1, data={"reward": 0.5})]
        )
        api.service.cancel(ids["job_id"][1], "ann")
        ids["file_id"] = ids["dataset_id"] = [upload(api.service, tmp_path_factory.mktemp("upload")).id]
        yield api, {"Authorization": f"Bearer {key}"}, ids


def document() -> dict[str, Any]:
    """The document as it is served; made here, since tests are collected before a server runs."""
    app = create_app(FakeJobService())  # type: ignore[arg-type]
    return openapi.complete(app.openapi_schema.to_schema())


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_dict(document())


# Not by schemathesis' own `parametrize`: with pytest 9 its tests all have one name, of which processes that share the
# work run the first only.
OPERATIONS = [
    pytest.param(path, method, id=f"{method.upper()} {path}")
    for path, methods in document()["paths"].items()
    for method in methods
]


# Threads of the service draw random numbers while strategies are asked, as for the waits of webhooks.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_service_answers_as_its_document_says(
    path: str, method: str, schema: Any, target: tuple[RunningApi, dict[str, str], dict[str, list[str]]]
) -> None:
    operation = schema[path][method]

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]))
    def answers(case: Any) -> None:
        check(case, *target)

    answers()


def check(case: Any, api: RunningApi, headers: dict[str, str], ids: dict[str, list[str]]) -> None:
    for name, known in ids.items():
        made_up = case.path_parameters.get(name) if case.path_parameters else None
        # Made-up ids are all unknown: of three, two are replaced by some that there are.
        if isinstance(made_up, str) and (place := zlib.crc32(made_up.encode("utf-8", "replace"))) % 3:
            case.path_parameters[name] = known[place % len(known)]
    if case.operation.path == "/datasets/preview" and isinstance(case.body, dict):
        # Not one of the hub, which is asked for seconds each time.
        case.body["data"] = {"source": "upload", "dataset": ids["dataset_id"][0]}
    # With `fields`, an answer has only what was asked for, so it has not all that its schema requires.
    whole = not (case.query or {}).get("fields")
    checks = [one for one in CHECKS if whole or one is not response_schema_conformance]
    case.call_and_validate(base_url=api.url, headers=headers, checks=checks, timeout=20)
