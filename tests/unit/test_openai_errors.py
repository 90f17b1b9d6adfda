"""Errors of the routes with OpenAI's API have OpenAI's form; all others stay problem documents."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.openai.errors import body_of, handle, param_of, refusal, responses
from api.problems import PROBLEMS, ApiError, bad_parameter
from api.schemas import FieldProblem

Client = TestClient[Litestar]


class _Request:
    """As much of a request as an error needs."""

    def __init__(self, path: str) -> None:
        self.scope = {"path": path, "state": {}, "headers": []}


def answer(code: str, path: str = "/v1/files") -> Any:
    return handle(_Request(path), ApiError(code, "It is so."))  # type: ignore[arg-type]


def field(pointer: str, **changes: str) -> FieldProblem:
    return FieldProblem(**{"pointer": pointer, "code": "bad_value", "detail": "is 0", "remedy": "Give 1.", **changes})


def test_an_unknown_address_below_v1_answers_openais_object(client: Client) -> None:
    found = client.get("/v1/embeddings")
    assert found.status_code == 404
    assert found.headers["content-type"] == "application/json"
    assert found.headers["x-request-id"].startswith("req-")
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "no_such_route")
    assert "/v1/embeddings" in error["message"]


def test_our_own_routes_keep_problem_documents_below_v1_too(client: Client) -> None:
    for path in ("/jobs/job-x", "/v1/jobs/job-x"):
        found = client.get(path)
        assert found.headers["content-type"].startswith("application/problem+json")
        assert found.json()["code"] == "not_found"


@pytest.mark.parametrize("code", PROBLEMS)
def test_every_problem_has_a_status_that_the_sdk_reads(code: str) -> None:
    status = answer(code).status_code
    assert status == (400 if PROBLEMS[code].status == 422 or code == "conflict" else PROBLEMS[code].status)
    assert answer(code, "/jobs").status_code == PROBLEMS[code].status


def test_the_sdk_repeats_only_what_may_succeed() -> None:
    assert answer("rate_limited").headers["x-should-retry"] == "true"
    assert answer("idempotency_in_progress").headers["x-should-retry"] == "true"
    assert answer("gpu_quota").headers["x-should-retry"] == "false"
    assert answer("too_many_jobs").headers["x-should-retry"] == "false"
    assert "x-should-retry" not in answer("unavailable").headers
    assert "x-should-retry" not in answer("conflict").headers


def test_codes_have_openais_names_where_it_has_one() -> None:
    assert body_of(ApiError("unauthorized", "")).code == "invalid_api_key"
    assert body_of(ApiError("gpu_quota", "")).code == "insufficient_quota"
    assert body_of(ApiError("internal", "")).type == "server_error"
    assert body_of(ApiError("rate_limited", "")).type == "rate_limit_error"


def test_the_first_wrong_field_is_the_param_and_the_message_names_several() -> None:
    errors = [field(f"/method/reinforcement/{n}") for n in range(7)]
    body = body_of(ApiError("invalid_spec", "Seven things are wrong.", errors=errors))
    assert (body.param, body.code) == ("method.reinforcement.0", "bad_value")
    lines = body.message.splitlines()
    assert lines[0] == "method.reinforcement.0: is 0. Give 1."
    assert lines[-1] == "2 more fields are wrong."
    assert len(lines) == 6


def test_a_param_may_be_a_parameter_or_nothing() -> None:
    assert param_of(bad_parameter("limit", "is 0", "Give 1.")) == "limit"
    assert param_of(field("")) is None
    assert param_of(field("/metadata/a~1b")) == "metadata.a/b"
    body = body_of(refusal("method.type", "unsupported_method", "is dpo", "Use reinforcement."))
    assert (body.param, body.code) == ("method.type", "unsupported_method")
    assert body.message == "method.type: is dpo. Use reinforcement."


def test_openapi_has_each_status_once() -> None:
    found = responses("conflict", "rejected", "not_found")
    assert {400, 401, 403, 404, 429, 500, 503} == set(found)
