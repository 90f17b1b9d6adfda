"""OpenAI's error object, for the routes of its API; every other route answers RFC 9457 (`api.problems`).

Owns the form of these answers; what is wrong, and in which words, is decided by `api.problems` and by the routes.
Invariants: every error of a path below /v1 has this form, except the copies of native routes, with an
`x-request-id`; and OpenAI's SDK repeats a refused request only if a repetition may succeed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from litestar import Request, Response
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example
from msgspec.structs import asdict

from api import problems
from api.openai.objects import OpenAIError, OpenAIErrorBody
from api.problems import EVERY_ROUTE, PROBLEMS, ApiError
from api.schemas import FieldProblem
from grpo_core.strict_json import parts_of

PREFIX: Final = "/v1/"
"""`api.edge` has taken it away from the paths of native routes."""

_CODES: Final = {
    "unauthorized": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "gpu_quota": "insufficient_quota",
    "storage_quota": "insufficient_quota",
}
"""Our codes that have a name of OpenAI's; the others keep theirs."""
_AGAIN: Final = frozenset({408, 409, 429})
"""Answers below 500 that OpenAI's SDK repeats by itself."""
_WORTH_REPEATING: Final = frozenset(
    {
        *("too_slow", "idempotency_in_progress", "rate_limited", "too_many_requests", "too_many_searches"),
        *("too_many_grader_runs", "too_many_uploads", "overloaded"),
    }
)
_SHOWN: Final = 5
"""Wrong fields that a message names."""


def has_openai_face(path: str) -> bool:
    """Whether errors of this path have OpenAI's form. The path is the router's, after `api.edge`."""
    return path.startswith(PREFIX)


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer any exception raised while serving a request, in the form of the request's path."""
    if not has_openai_face(request.scope["path"]):
        return problems.handle(request, error)
    problem = problems.describe(error, request)
    status = _status(problem)
    headers = dict(problem.headers)
    if status in _AGAIN:
        headers["x-should-retry"] = "true" if problem.code in _WORTH_REPEATING else "false"
    return Response(OpenAIError(error=body_of(problem)), status_code=status, headers=headers)


def body_of(problem: ApiError) -> OpenAIErrorBody:
    """The content of the error object. `param` is the first wrong field, as a path with dots."""
    first = problem.errors[0] if problem.errors else None
    return OpenAIErrorBody(
        message=_message(problem),
        type=_type(PROBLEMS[problem.code].status),
        param=None if first is None else param_of(first),
        code=_CODES.get(problem.code, problem.code if first is None else first.code),
    )


def param_of(problem: FieldProblem) -> str | None:
    """The name of a wrong field or parameter: `method.reinforcement.grader`; None for the whole body."""
    return problem.parameter or ".".join(map(str, parts_of(problem.pointer))) or None


def responses(*codes: str) -> dict[int, ResponseSpec]:
    """The errors of a route for OpenAPI, as `api.problems.responses` has them elsewhere."""
    found: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, *EVERY_ROUTE)):
        found.setdefault(_status(ApiError(code, "")), []).append(code)
    return {
        status: ResponseSpec(
            OpenAIError,
            generate_examples=False,
            description="; or: ".join(PROBLEMS[code].title for code in each),
            examples=[_example_of(code) for code in each],
        )
        for status, each in found.items()
    }


def _example_of(code: str) -> Example:
    title = PROBLEMS[code].title
    body = body_of(ApiError(code, f"{title}."))
    return Example(id=code, summary=title, value={"error": asdict(body)})


def _status(problem: ApiError) -> int:
    """OpenAI answers 400 to whatever is wrong with a request and 409 to nothing that a job's state forbids."""
    if problem.code == "conflict":
        return 400
    status = PROBLEMS[problem.code].status
    return 400 if status == 422 else status


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def _message(problem: ApiError) -> str:
    """The wrong fields with their remedies, or what is wrong with the request as a whole."""
    if not problem.errors:
        return problem.detail
    lines = [_line(one) for one in problem.errors[:_SHOWN]]
    left = len(problem.errors) - len(lines)
    return "\n".join([*lines, *([f"{left} more fields are wrong."] if left else [])])


def _line(problem: FieldProblem) -> str:
    detail = problem.detail if problem.parameter else ": ".join(filter(None, (param_of(problem), problem.detail)))
    return f"{detail.rstrip('.')}. {problem.remedy}".rstrip()


def refusal(param: str, code: str, detail: str, remedy: str) -> ApiError:
    """One wrong field of a request, by its path with dots."""
    return refusals([FieldProblem(pointer="", parameter=param, code=code, detail=f"{param}: {detail}", remedy=remedy)])


def refusals(errors: Iterable[FieldProblem]) -> ApiError:
    """Several wrong fields."""
    return ApiError("rejected", "The request cannot be accepted.", errors=errors)


def missing(param: str, message: str) -> ApiError:
    """What a path or a parameter names does not exist, or belongs to someone else."""
    error = FieldProblem(pointer="", parameter=param, code="not_found", detail=message, remedy="Check the id.")
    return ApiError("not_found", message, errors=[error])
