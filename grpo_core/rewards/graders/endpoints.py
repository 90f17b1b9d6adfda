"""The grader `endpoint`: a server of the job's owner scores each completion.

    POST url  {"sample": {...}, "item": {...}, "trace_id": "step/prompt/number"}  ->  {"score": 0.5}

Owns the request and its answer, in Azure's format. `calls` sends and retries requests; `operator` decides which hosts
may be called. Invariant: only hosts that the operator allows are called, so no redirect is followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx

from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.calls import Caller, CallFailed, CallLog, Patience, post_json
from grpo_core.rewards.graders.models import AnyGrader, Endpoint
from grpo_core.rewards.graders.operator import BadRegistration, may_call, secret
from grpo_core.rewards.graders.protocol import Grade, Grader, GraderContext, GraderRow
from grpo_core.rewards.graders.registry import GraderUnavailable

STEP_SECONDS: Final = 300.0
CONCURRENCY: Final = 32
ATTEMPTS: Final = 4
CALL_SECONDS: Final = 120.0


class EndpointGrader:
    """One endpoint of a job's graders."""

    waits = True

    def __init__(self, model: Endpoint, headers: Mapping[str, str], context: GraderContext) -> None:
        self._url, self._headers = model.url, dict(headers)
        patience = Patience(
            concurrency=CONCURRENCY,
            timeout=CALL_SECONDS,
            attempts=ATTEMPTS,
            deadline=context.limits.step_seconds or STEP_SECONDS,
            rate=None if model.rate_limit is None else float(model.rate_limit),
        )
        self._caller = Caller({}, patience)

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        grades: list[Grade] = []
        for outcome in self._caller.all(rows, self._ask):
            log = outcome.log
            details = {"seconds": log.seconds, "tries": log.tries, **log.more}
            failed = outcome.failure and Grade.failed(outcome.failure.kind, str(outcome.failure))
            grades.append(
                Grade(error=failed.error, details=details) if failed else Grade(score=outcome.value, details=details)
            )
        return grades

    def close(self) -> None:
        """Do nothing: connections are closed after each step."""

    async def _ask(self, client: httpx.AsyncClient, row: GraderRow, log: CallLog) -> float:
        body = {
            "sample": dict(row.sample),
            "item": dict(row.item),
            "trace_id": f"{row.step}/{row.prompt_id}/{row.number}",
        }
        answer: dict[str, Any] = await post_json(client, self._url, body, self._headers)
        score = answer.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            log.more = {"answer": str(answer)[:500]}
            raise CallFailed("model_grader_parse_error", "the score in the endpoint's answer is not a number")
        return float(score)


def make(model: AnyGrader, context: GraderContext) -> Grader:
    """Return the grader. Raises `GraderUnavailable` if its host is not allowed or a secret is missing."""
    assert isinstance(model, Endpoint), "the registry's table"
    try:
        if not may_call(model.url, context.environment):
            raise GraderUnavailable(
                FailureCode.ENDPOINT_NOT_ALLOWED,
                f"This worker may not call the host of the endpoint of grader {context.name}.",
                "Ask the operator to list it in GRPO_GRADER_ENDPOINT_HOSTS.",
            )
        headers: dict[str, str] = {}
        for name, reference in (model.headers or {}).items():
            value = secret(reference, context.environment)
            if value is None:
                message = f"The grader {context.name} needs {reference}, which is not set on this worker."
                raise GraderUnavailable(
                    FailureCode.NO_GRADER_SECRET, message, "Ask the operator to set GRPO_GRADER_SECRETS."
                )
            headers[name] = value
    except BadRegistration as error:
        raise GraderUnavailable(FailureCode.BAD_REGISTRATION, str(error), "Ask the operator to correct it.") from error
    return EndpointGrader(model, headers, context)
