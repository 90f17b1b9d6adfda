"""OpenAI's own package sends graders to this service and reads its answers, each field by the package's own types.

Its path is `/fine_tuning/alpha/graders`, and here it is `/graders`: that is all that is translated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from litestar import Litestar
from litestar.testing import TestClient
from openai.types.fine_tuning.alpha import GraderRunResponse, GraderValidateResponse

from api.app import create_app
from tests.integration.test_judges import Server, judge, serving
from tests.integration.test_judges import environment as judge_environment
from tests.unit.fakes import ALICE, FakeJobService

EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
LABEL = {
    "type": "label_model",
    "name": "good",
    "model": "judge-main",
    "labels": ["good", "bad"],
    "passing_labels": ["good"],
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
}


@pytest.fixture(scope="module")
def service_client() -> Iterator[TestClient[Litestar]]:
    with TestClient(create_app(FakeJobService()), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture
def graders(service_client: TestClient[Litestar]) -> Any:
    """`client.fine_tuning.alpha.graders` of the package."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        path = str(request.url.raw_path, "ascii").replace("/fine_tuning/alpha/", "/")
        found = service_client.request(request.method, path, content=request.read(), headers=dict(request.headers))
        return httpx2.Response(found.status_code, content=found.content, headers=dict(found.headers))

    client = openai.OpenAI(
        api_key=ALICE,
        base_url="http://testserver/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
    )
    return client.fine_tuning.alpha.graders


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as server:
        for name, value in judge_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


def strictly_read(run: GraderRunResponse) -> GraderRunResponse:
    """The package builds results without validating them; this validates every field of its types."""
    GraderRunResponse.model_validate(run.to_dict(mode="json"))
    assert {"messages", "printed"} == set(run.metadata.model_extra or ()), "the only fields that it does not know"
    for part in (run, run.metadata.errors):
        renamed = {field.alias for field in type(part).model_fields.values() if field.alias}
        assert set(part.model_extra or ()) <= renamed, "it keeps these under both names"
    return run


def test_a_run_is_read_by_openais_types(graders: Any) -> None:
    run = strictly_read(graders.run(grader=EXACT, model_sample="12", item={"answer": "12"}))
    assert (run.reward, run.metadata.name, run.metadata.type) == (1.0, "exact", "string_check")
    assert not any(flag for flag in run.metadata.errors.to_dict().values())


def test_an_error_is_a_flag_of_openais(graders: Any) -> None:
    run = strictly_read(graders.run(grader=EXACT, model_sample="12"))
    assert (run.reward, run.metadata.errors.invalid_variable_error) == (0.0, True)


def test_a_multi_has_sub_rewards(graders: Any) -> None:
    multi = {"type": "multi", "name": "both", "graders": {"a": EXACT, "b": EXACT}, "calculate_output": "a + b"}
    run = strictly_read(graders.run(grader=multi, model_sample="12", item={"answer": "12"}))
    assert (run.reward, run.sub_rewards, run.metadata.scores) == (2.0, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})


def test_a_judges_tokens_are_read(graders: Any, judges: Server) -> None:
    run = strictly_read(graders.run(grader=judge(name="rating"), model_sample="right"))
    assert (run.reward, run.metadata.token_usage, run.metadata.sampled_model_name) == (7.0, 100, "m-1")
    assert run.api_model_grader_token_usage_per_model == {"judge-main": {"total_tokens": 100}}
    multi = {"type": "multi", "name": "m", "graders": {"label": LABEL}, "calculate_output": "label"}
    assert strictly_read(graders.run(grader=multi, model_sample="right")).metadata.token_usage == 100


def test_a_validation_is_read_and_a_refusal_is_an_error(graders: Any) -> None:
    found = graders.validate(grader=EXACT)
    assert isinstance(found, GraderValidateResponse)
    GraderValidateResponse.model_validate(found.to_dict(mode="json"))
    assert found.grader is not None
    assert found.grader.to_dict() == EXACT
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        graders.validate(grader={**EXACT, "operation": "neq"})
    assert "operation" in str(refused.value.body)
