"""What clients ask of served models: every parameter is served, without effect, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from api.openai.chat_request import parse
from api.problems import ApiError
from api.routes import serving
from grpo_core.spec import SpecError

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
