"""The graders `score_model` and `label_model`: a model behind an OpenAI-compatible API judges each completion.

Owns the request to the judge and the reading of its answer. `calls` sends and retries requests; `operator` decides
which judges may be used. Invariant: a judge that fails gives no score, never a zero, and the tokens, time and text of
each call are recorded with the row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import httpx

from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.calls import Caller, CallFailed, CallLog, Outcome, Patience, post_json
from grpo_core.rewards.graders.models import AnyGrader, LabelModel, Message, ScoreModel, texts_of
from grpo_core.rewards.graders.operator import BadRegistration, JudgeRegistration, judges
from grpo_core.rewards.graders.protocol import Grade, Grader, GraderContext, GraderRow
from grpo_core.rewards.graders.registry import GraderUnavailable
from grpo_core.rewards.graders.rows import render
from grpo_core.rewards.graders.templates import Template

STEP_SECONDS: Final = 300.0
MAX_CACHED: Final = 50_000
MAX_REASON: Final = 500
MAX_SAVED: Final = 5_000
"""Number of judgements in a checkpoint."""
SAVED_REASON: Final = 120
"""Characters of each reason in it."""
MAX_TOKENS: Final = 512
_ROLES: Final = {"developer": "system"}


class Judge:
    """One judge of a job's graders."""

    waits = True

    def __init__(
        self, model: ScoreModel | LabelModel, registered: JudgeRegistration, key: str | None, context: GraderContext
    ) -> None:
        self._model, self._registered, self._context = model, registered, context
        self._templates = [[Template(text) for _, text in texts_of(message.content)] for message in model.input]
        self._url = f"{registered.base_url.rstrip('/')}/chat/completions"
        self._cache: OrderedDict[str, tuple[float, dict[str, object]]] = OrderedDict()
        self._spent = 0
        patience = Patience(
            concurrency=registered.concurrency,
            timeout=registered.timeout_seconds,
            attempts=registered.attempts,
            deadline=context.limits.step_seconds or STEP_SECONDS,
        )
        self._caller = Caller({"Authorization": f"Bearer {key}"} if key else {}, patience)

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        bodies = [self._body(row) for row in rows]
        keys = [None if isinstance(body, Grade) else _key(body) for body in bodies]
        new: dict[str, dict[str, Any]] = {}
        for key, body in zip(keys, bodies, strict=True):
            if key is not None and key not in self._cache and not isinstance(body, Grade):
                new.setdefault(key, body)
        outcomes = dict(zip(new, self._caller.all(list(new.values()), self._ask), strict=True))
        told: set[str] = set()
        grades: list[Grade] = []
        for key, body in zip(keys, bodies, strict=True):
            if isinstance(body, Grade) or key is None:
                grades.append(cast("Grade", body))
                continue
            outcome = outcomes.get(key)
            grades.append(self._known(key) if outcome is None or key in told else self._grade(key, outcome))
            if outcome is not None and outcome.failure is None:
                told.add(key)
        return grades

    def close(self) -> None:
        """Do nothing: connections are closed after each step."""

    def state(self) -> dict[str, Any]:
        """The tokens that were spent, and the newest judgements with a short form of what is recorded of them."""
        newest = list(self._cache.items())[-MAX_SAVED:]
        kept = [[key, score, _shortened(more)] for key, (score, more) in newest]
        return {"spent_tokens": self._spent, "judgements": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on spending where an earlier run stopped, and know its judgements."""
        self._spent = int(state["spent_tokens"])
        self._cache = OrderedDict((str(key), (float(score), dict(more))) for key, score, more in state["judgements"])

    def _body(self, row: GraderRow) -> dict[str, Any] | Grade:
        """Return the request, or the grade of a row for which a template has no value."""
        messages: list[dict[str, str]] = []
        for message, templates in zip(self._model.input, self._templates, strict=True):
            texts = render(templates, row)
            if isinstance(texts, Grade):
                return texts
            messages.append({"role": _ROLES.get(message.role, message.role), "content": _content(message, texts)})
        schema = self._schema()
        sampling = self._model.sampling_params
        most = (sampling and sampling.max_completions_tokens) or MAX_TOKENS
        body: dict[str, Any] = {
            "model": self._registered.model,
            "messages": messages,
            "temperature": (sampling and sampling.temperature) or 0,
            "seed": self._context.seed if sampling is None or sampling.seed is None else sampling.seed,
            self._registered.max_tokens_field: most,
        }
        if sampling is not None and sampling.top_p is not None:
            body["top_p"] = sampling.top_p
        if sampling is not None and sampling.reasoning_effort is not None:
            body["reasoning_effort"] = sampling.reasoning_effort
        if self._registered.response_format:
            named = {"name": "grade", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        else:
            wanted = f"Answer with JSON alone that fits this schema: {json.dumps(schema, ensure_ascii=False)}"
            messages.append({"role": "user", "content": wanted})
        return body

    def _schema(self) -> dict[str, Any]:
        if isinstance(self._model, LabelModel):
            answer: dict[str, Any] = {"label": {"type": "string", "enum": list(self._model.labels)}}
        else:
            answer = {"score": {"type": "number"}}
        return {
            "type": "object",
            "properties": {"reason": {"type": "string"}, **answer},
            "required": ["reason", *answer],
            "additionalProperties": False,
        }

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any], log: CallLog) -> float:
        budget = self._context.limits.budget_tokens
        if budget is not None and self._spent >= budget:
            raise CallFailed("other_error", f"the judge's budget of {budget} tokens is used up")
        answer = await post_json(client, self._url, body, {})
        tokens = _tokens(answer)
        self._spent += tokens
        log.tokens += tokens
        log.more = {"model": str(answer.get("model", ""))[:256]}
        text = _said(answer)
        log.more["answer"] = text[: 4 * MAX_REASON]
        return self._score(text, log)

    def _score(self, text: str, log: CallLog) -> float:
        found = _json_in(text)
        if found is None:
            raise CallFailed("model_grader_parse_error", "the judge's answer has no JSON object", again=True)
        log.more["reason"] = str(found.get("reason", ""))[:MAX_REASON]
        if isinstance(self._model, LabelModel):
            label = found.get("label")
            if label not in self._model.labels:
                raise CallFailed("model_grader_parse_error", "the judge's label is not one of the labels", again=True)
            log.more["label"] = label
            return float(label in self._model.passing_labels)
        score, (low, high) = found.get("score"), self._model.bounds
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise CallFailed("model_grader_parse_error", "the judge's score is not a number", again=True)
        assert low is not None
        assert high is not None
        if not low <= score <= high:
            message = f"the judge's score {score:g} is not between {low:g} and {high:g}"
            raise CallFailed("model_grader_parse_error", message, again=True)
        return float(score)

    def _grade(self, key: str, outcome: Outcome) -> Grade:
        log = outcome.log
        details = {"tokens": log.tokens, "seconds": log.seconds, "tries": log.tries, **log.more}
        if outcome.failure is not None:
            failed = Grade.failed(outcome.failure.kind, str(outcome.failure))
            return Grade(error=failed.error, details=details)
        self._cache[key] = (outcome.value, dict(log.more))
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return Grade(score=outcome.value, details=details)

    def _known(self, key: str) -> Grade:
        self._cache.move_to_end(key)
        score, more = self._cache[key]
        return Grade(score=score, details={"tokens": 0, "seconds": 0.0, "tries": 0, "cached": True, **more})


def make(model: AnyGrader, context: GraderContext) -> Grader:
    """Return the judge. Raises `GraderUnavailable` if the operator has not registered it."""
    assert isinstance(model, ScoreModel | LabelModel), "the registry's table"
    try:
        registered = judges(context.environment).get(model.model)
    except BadRegistration as error:
        raise GraderUnavailable(FailureCode.BAD_REGISTRATION, str(error), "Ask the operator to correct it.") from error
    if registered is None:
        raise GraderUnavailable(
            FailureCode.NO_SUCH_JUDGE,
            f"The judge {model.model!r} of the grader {context.name} is not registered on this worker.",
            "Ask the operator to add it to GRPO_JUDGES, or name another.",
        )
    key = None if registered.key is None else context.environment.get(registered.key)
    if registered.key is not None and not key:
        message = f"The key of the judge {model.model!r} is not set on this worker."
        raise GraderUnavailable(FailureCode.NO_JUDGE_KEY, message, f"Ask the operator to set {registered.key}.")
    return Judge(model, registered, key, context)


def _content(message: Message, texts: Sequence[str]) -> str:
    """Return the text of a turn. Blocks without text, such as images, are not sent."""
    return texts[0] if isinstance(message.content, str) else "\n".join(texts)


def _shortened(more: Mapping[str, object]) -> dict[str, object]:
    kept = {name: more[name] for name in ("model", "label") if name in more}
    return {**kept, "reason": str(more.get("reason", ""))[:SAVED_REASON]}


def _key(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _tokens(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    total = cast("dict[str, Any]", usage).get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and not isinstance(total, bool) and total > 0 else 0


def _said(answer: Mapping[str, Any]) -> str:
    """Return the text of the judge's answer; raises `CallFailed`."""
    try:
        said = answer["choices"][0]["message"]
        refusal, content = said.get("refusal"), said.get("content")
    except (LookupError, TypeError, AttributeError):
        message = "the answer of the judge's server is not a chat completion"
        raise CallFailed("model_grader_server_error", message, again=True) from None
    if refusal:
        raise CallFailed("model_grader_refusal_error", f"the judge refused: {str(refusal)[:200]}")
    if not isinstance(content, str):
        raise CallFailed("model_grader_parse_error", "the judge's answer is empty", again=True)
    return content


def _json_in(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, which may have a fence or other words around it."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
