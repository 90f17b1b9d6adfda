"""Turns every error into an RFC 9457 problem document, and has the table of all codes.

Owns status, title and wording of the API's errors, not what is an error. Invariants: whatever is raised, the answer is
`application/problem+json` with a code from `PROBLEMS`, and an unforeseen error tells the client nothing but its request
id.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any
from urllib.parse import quote

import structlog
from litestar import Request, Response
from litestar.exceptions import (
    ClientException,
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example

from api.compat import body_limit
from api.parameters import declared
from api.requests import allowed_methods, is_client_gone, request_id, stack_of
from api.schemas import FieldProblem, ProblemDocument
from grpo_core.datasets import DatasetError, DatasetTooLargeError
from grpo_core.scoring.process import ScoringFailed
from grpo_core.spec import Problem, SpecError
from grpo_core.strict_json import StrictJsonError
from jobs.auth.rate_limit import RateLimited
from jobs.errors import BadCursor, Conflict, InUse, NotFound, Rejected, TooManyKeys, Unavailable, Unreadable
from jobs.lifecycle.admission import InProgress, KeyReused, TooManyJobs
from jobs.read.fleet import CannotDrain
from jobs.usage.quotas import GpuQuotaUsedUp, StorageQuotaUsedUp

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 2
FULL_SECONDS = 30
"""Seconds until a place in the queue may be free: jobs last minutes to hours."""


@dataclass(frozen=True)
class ProblemType:
    """One row of the table: the meaning of a code."""

    status: int
    title: str


PROBLEMS: dict[str, ProblemType] = {
    "bad_request": ProblemType(400, "The request cannot be read"),
    "empty_body": ProblemType(400, "The body is empty"),
    "invalid_json": ProblemType(400, "The body is not valid JSON"),
    "bad_query": ProblemType(400, "A query parameter is wrong"),
    "unauthorized": ProblemType(401, "A valid API key is required"),
    "forbidden": ProblemType(403, "The API key does not allow this"),
    "not_found": ProblemType(404, "Not found"),
    "no_such_route": ProblemType(404, "There is no such address"),
    "method_not_allowed": ProblemType(405, "Method not allowed"),
    "too_slow": ProblemType(408, "The request is too slow"),
    "conflict": ProblemType(409, "The present state does not allow this"),
    "grader_unavailable": ProblemType(409, "A grader cannot run on the service's machine"),
    "not_serving": ProblemType(409, "Nothing serves this model now"),
    "idempotency_in_progress": ProblemType(409, "A request with this Idempotency-Key is being served"),
    "body_too_large": ProblemType(413, "The body is too large"),
    "unsupported_media_type": ProblemType(415, "The body has the wrong type or encoding"),
    "invalid_spec": ProblemType(422, "The job spec has problems"),
    "invalid_body": ProblemType(422, "The body has problems"),
    "invalid_grader": ProblemType(422, "The grader or what it is given has problems"),
    "grader_failed": ProblemType(422, "The graders did not finish within their limits"),
    "unknown_field": ProblemType(422, "A field that `fields` names does not exist"),
    "unreadable": ProblemType(422, "A file of the training is too large to be read here"),
    "rejected": ProblemType(422, "The request cannot be accepted"),
    "invalid_dataset": ProblemType(422, "The data set has problems"),
    "idempotency_key_reused": ProblemType(422, "The Idempotency-Key belongs to another request"),
    "rate_limited": ProblemType(429, "Too many requests in a short time"),
    "too_many_requests": ProblemType(429, "Too many requests wait to be served"),
    "too_many_searches": ProblemType(429, "Too many lists are being searched"),
    "too_many_grader_runs": ProblemType(429, "Too many graders are being run"),
    "too_many_uploads": ProblemType(429, "Too many uploads are in progress"),
    "overloaded": ProblemType(429, "Too many requests wait for this model"),
    "too_many_jobs": ProblemType(429, "Too many jobs are waiting or running"),
    "gpu_quota": ProblemType(429, "Your GPU-hours are used up"),
    "storage_quota": ProblemType(403, "Your storage is used up"),
    "too_many_streams": ProblemType(429, "Too many event streams are open"),
    "headers_too_large": ProblemType(431, "Address and headers are too large"),
    "client_gone": ProblemType(499, "The client has gone"),
    "internal": ProblemType(500, "The service failed"),
    "no_room": ProblemType(503, "There is no room for an upload now"),
    "session_ended": ProblemType(503, "The session that answered has ended"),
    "unavailable": ProblemType(503, "A server this service depends on did not answer"),
}
"""Every problem code of the API."""


class ApiError(Exception):
    """A refusal by the API itself, with its code and the content of the answer."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Iterable[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


def type_uri(code: str) -> str:
    """The stable name of a problem type."""
    return f"urn:grpo:problem:{code}"


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[ProblemDocument]:
    """Answer any exception raised while serving a request."""
    problem = describe(error, request)
    kind = PROBLEMS[problem.code]
    document = ProblemDocument(
        type=type_uri(problem.code),
        title=kind.title,
        status=kind.status,
        detail=problem.detail,
        code=problem.code,
        # `quote`: the path was decoded, and an instance is a URI reference.
        instance=quote(request.scope["path"]),
        request_id=request_id(request.scope),
        errors=problem.errors,
    )
    return Response(document, status_code=kind.status, media_type=MEDIA_TYPE, headers=problem.headers)


@singledispatch
def describe(error: Exception, _request: Request[Any, Any, Any]) -> ApiError:
    """The problem for an error; one function for each family of errors is registered below."""
    # The message is left out: it may quote a prompt or a key.
    log.error("request.failed", error=type(error).__qualname__, stack=stack_of(error))
    return ApiError(
        "internal",
        "An unexpected error occurred. Try again; if it persists, report the request id to the operator.",
    )


@describe.register
def _(error: ApiError, _request: Request[Any, Any, Any]) -> ApiError:
    return error


@describe.register
def _(error: SpecError, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("invalid_spec", _count(error.problems, "the spec"), errors=map(field_problem, error.problems))


@describe.register
def _(error: ScoringFailed, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("grader_failed", f"{error} Send fewer or shorter rows, or a faster grader.")


@describe.register
def _(error: Rejected, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("rejected", _count(error.problems, "the request"), errors=map(field_problem, error.problems))


@describe.register
def _(error: DatasetError, _request: Request[Any, Any, Any]) -> ApiError:
    detail = _count(error.problems, "the file", more=error.more)
    return ApiError("invalid_dataset", detail, errors=map(field_problem, error.problems))


@describe.register
def _(error: DatasetTooLargeError, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError(
        "body_too_large",
        _count(error.problems, "the file"),
        errors=map(field_problem, error.problems),
        headers={"Connection": "close"},
    )


@describe.register
def _(error: StrictJsonError, _request: Request[Any, Any, Any]) -> ApiError:
    if not error.path:
        return ApiError("invalid_json", str(error))
    problem = FieldProblem(pointer=error.pointer, code="bad_json", detail=error.detail, remedy=error.remedy)
    return ApiError("invalid_json", _count([problem], "the body"), errors=[problem])


@describe.register
def _(error: NotFound, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("not_found", str(error))


@describe.register
def _(error: Unreadable, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("unreadable", str(error))


@describe.register
def _(error: BadCursor, _request: Request[Any, Any, Any]) -> ApiError:
    remedy = "Send the next_cursor of the previous page, with the same filters and order; or none, to start again."
    errors = [bad_parameter("cursor", error.detail, remedy)]
    return ApiError("bad_query", _count(errors, "the query"), errors=errors)


@describe.register
def _(error: InUse, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("conflict", str(error))


@describe.register
def _(error: Conflict, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("conflict", str(error))


@describe.register
def _(error: TooManyKeys, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("conflict", str(error))


@describe.register
def _(error: CannotDrain, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("conflict", str(error))


@describe.register
def _(error: KeyReused, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("idempotency_key_reused", str(error))


@describe.register
def _(error: InProgress, _request: Request[Any, Any, Any]) -> ApiError:
    # Most finish in a moment. If the process died, the request may be continued after `error.seconds`.
    return ApiError("idempotency_in_progress", str(error), headers={"Retry-After": "1"})


@describe.register
def _(error: RateLimited, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("rate_limited", str(error), headers={"Retry-After": str(math.ceil(error.seconds))})


@describe.register
def _(error: TooManyJobs, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("too_many_jobs", str(error), headers={"Retry-After": str(FULL_SECONDS)})


@describe.register
def _(error: GpuQuotaUsedUp, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("gpu_quota", str(error), headers={"Retry-After": str(math.ceil(error.seconds))})


@describe.register
def _(error: StorageQuotaUsedUp, _request: Request[Any, Any, Any]) -> ApiError:
    return ApiError("storage_quota", str(error))


@describe.register
def _(error: Unavailable, _request: Request[Any, Any, Any]) -> ApiError:
    log.warning("dependency.unavailable", server=error.server)
    detail = f"{error.server} did not answer, so nothing was decided. Send the same request again."
    return ApiError("unavailable", detail, headers={"Retry-After": str(RETRY_SECONDS)})


@describe.register
def _(error: HTTPException, request: Request[Any, Any, Any]) -> ApiError:
    """Errors that Litestar raises itself and no function below handles, including its 5xx."""
    if is_client_gone(request.scope):
        return ApiError("client_gone", "The connection was closed before the request was complete.")
    if isinstance(error, ClientException) or 400 <= error.status_code < 500:
        return ApiError("bad_request", f"{error.detail.rstrip('.')}. Correct the request and send it again.")
    return describe.dispatch(Exception)(error, request)


@describe.register
def _(_error: NotFoundException, request: Request[Any, Any, Any]) -> ApiError:
    detail = f"Nothing is served at {request.scope['path']}. GET /schema/openapi.json lists every address."
    return ApiError("no_such_route", detail)


@describe.register
def _(_error: MethodNotAllowedException, request: Request[Any, Any, Any]) -> ApiError:
    methods = ", ".join(allowed_methods(request.scope))
    detail = f"{request.scope['path']} does not take {request.method}. Use one of {methods}."
    return ApiError("method_not_allowed", detail, headers={"Allow": methods})


@describe.register
def _(_error: RequestEntityTooLarge, request: Request[Any, Any, Any]) -> ApiError:
    limit = body_limit(request.route_handler)
    # The rest of the body stays unread, so the connection cannot be reused.
    return ApiError(
        "body_too_large",
        f"The body is larger than the {limit} bytes accepted here. Send less.",
        headers={"Connection": "close"},
    )


@describe.register
def _(error: ValidationException, request: Request[Any, Any, Any]) -> ApiError:
    """Invalid values of declared parameters, as Litestar reports them."""
    known = declared(request.route_handler)
    extra: Any = error.extra or []
    errors = [
        bad_parameter(item["key"], item["message"], f"Give {known[item['key']].expected}.")
        for item in extra
        if item.get("key") in known
    ]
    return ApiError("bad_query", _count(errors, "the query"), errors=errors)


def field_problem(problem: Problem) -> FieldProblem:
    """A problem of the spec, a data set or a request, as the answer has it."""
    return FieldProblem(pointer=problem.pointer, code=problem.code, detail=problem.detail, remedy=problem.remedy)


def invalid_body(pointer: str, detail: str, remedy: str, *, code: str = "bad_value") -> ApiError:
    """The problem of one field of a body that is no job spec."""
    errors = [FieldProblem(pointer=pointer, code=code, detail=detail, remedy=remedy)]
    return ApiError("invalid_body", _count(errors, "the body"), errors=errors)


def bad_parameter(name: str, message: str, remedy: str) -> FieldProblem:
    """A query parameter with an invalid value."""
    return FieldProblem(pointer="", parameter=name, code="bad_parameter", detail=f"{name}: {message}", remedy=remedy)


def unknown_parameter(name: str, known: Iterable[str]) -> FieldProblem:
    """An unknown query parameter: a typing mistake must not be ignored."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        remedy = f"Did you mean {close[0]}?"
    else:
        remedy = f"Remove it; the parameters here are {', '.join(names)}." if names else "Remove it."
    return FieldProblem(
        pointer="", parameter=name, code="unknown_parameter", detail=f"{name}: is not a parameter here", remedy=remedy
    )


EVERY_ROUTE = ("unauthorized", "forbidden", "rate_limited", "too_many_requests", "internal", "unavailable")
"""Problems of each route that requires a key."""


def responses(*codes: str) -> dict[int, ResponseSpec]:
    """The errors of a route for OpenAPI: the named ones, and those of every route that requires a key.

    Each status has an example for each of its problem types.
    """
    found: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, *EVERY_ROUTE)):
        found.setdefault(PROBLEMS[code].status, []).append(code)
    return {
        status: ResponseSpec(
            ProblemDocument,
            generate_examples=False,
            description="; or: ".join(PROBLEMS[code].title for code in each),
            media_type=MEDIA_TYPE,
            examples=[_example_of(code) for code in each],
        )
        for status, each in found.items()
    }


def _example_of(code: str) -> Example:
    kind = PROBLEMS[code]
    document = {
        "type": type_uri(code),
        "title": kind.title,
        "status": kind.status,
        "detail": f"{kind.title}.",
        "code": code,
        "instance": "/jobs",
        "request_id": "req-01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "errors": [],
    }
    return Example(id=code, summary=kind.title, value=document)


def _count(problems: list[Any], where: str, *, more: bool = False) -> str:
    """The number of errors, and where they are; with `more`, there are further ones."""
    if more:
        return f"More than {len(problems)} things are wrong with {where}; `errors` names the first {len(problems)}."
    number = "One thing is" if len(problems) == 1 else f"{len(problems)} things are"
    return f"{number} wrong with {where}; `errors` names each field and its remedy."
