"""What clients ask of served models: every parameter is served, without effect, or refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.openai.chat_request import parse
from api.openai.served import require_schema
from api.problems import ApiError
from api.routes import serving
from grpo_core.spec import SpecError
from jobs.store.serving import ServedModels

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "3+4"}]}
JOB = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.mark.parametrize(
    "given",
    [
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"top_p": 0},
        {"store": False, "parallel_tool_calls": True, "tools": [], "prompt_cache_retention": "24h"},
        {"service_tier": "flex", "metadata": {"a": "b"}, "user": "u"},
    ],
)
def test_what_clients_send_without_a_wish_is_accepted(given: dict[str, Any]) -> None:
    assert parse(ASKED | given).request.top_p > 0


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"store": True}, "store"),
        ({"metadata": 5}, "metadata"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"else": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema"),
    ],
)
def test_what_would_not_be_done_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ASKED | given)
    assert [one.parameter for one in refused.value.errors] == [param]


@pytest.mark.parametrize("body", [{"job": None}, {"model": None}, {}, {"job": JOB, "model": "m"}, []])
def test_a_session_is_of_a_job_or_of_a_model(body: Any) -> None:
    with pytest.raises(SpecError):
        serving.parse(body)


@pytest.mark.parametrize("model", [JOB, f"{JOB}:step-5"])
def test_a_job_is_no_base_model(model: str) -> None:
    with pytest.raises(SpecError) as refused:
        serving.parse({"model": model})
    (problem,) = refused.value.problems
    assert problem.pointer == "/model"
    assert "as job" in problem.remedy


def test_null_is_a_field_that_was_left_out() -> None:
    assert serving.parse({"job": JOB, "model": None, "ttl_seconds": None}).serving.ttl_seconds == 900


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"b": 1, "a": 2}}},
            '{"b": 1, "a": 2}',
        ),
    ],
)
def test_a_response_format_is_a_schema_or_none(given: Any, schema: Any) -> None:
    found = parse(ASKED | {"response_format": given}).request.schema
    assert (json.dumps(found) if isinstance(schema, str) else found) == schema, "in the order in which it was sent"


def test_a_session_that_announces_no_schemas_is_sent_none() -> None:
    before = {"session": JOB, "owner": "ann", "source": None, "model": "m", "epoch": 1, "models": ["base"]}
    with pytest.raises(ApiError) as refused:
        require_schema(ServedModels.read(before), {"type": "object"})
    assert [one.parameter for one in refused.value.errors] == ["response_format"]
    require_schema(ServedModels.read({**before, "accepts": ["response_format"]}), {"type": "object"})
