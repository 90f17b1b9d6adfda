"""The body of POST /v1/chat/completions: which of OpenAI's parameters are served, and the request that a session gets.

Owns the meaning of each parameter. Invariant: a parameter that would change the answer and is not served is refused by
its name; only those in `_NO_EFFECT`, which say who asks, are accepted without effect.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from api.openai.errors import refusals
from api.schemas import FieldProblem
from grpo_core.serving.wire import FORMAT, MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, ChatRequest
from grpo_core.spec import SpecError, parse_spec
from grpo_core.strict_json import parts_of

MAX_MESSAGES: Final = 1000
MAX_TOKENS: Final = 131_072
_NO_EFFECT: Final[dict[str, type]] = {
    "user": str,
    "metadata": dict,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "service_tier": str,
}
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
}
"""Values of parameters that are not served with which they have no effect."""
_LEAST_TOP_P: Final = 1e-6
"""With it, as with 0, the likeliest token alone is left."""
_SEED_MASK: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants, and in which form."""

    model: str
    stream: bool
    include_usage: bool
    request: ChatRequest
    """With an empty id and adapter, which are filled in when its session is known."""


def parse(body: Any) -> Asked:
    """Read a body. Raises `ApiError` with every parameter that is refused."""
    if not isinstance(body, dict):
        raise refusals(
            [_problem("", "bad_type", "The body is not an object", 'Send {"model": ..., "messages": [...]}.')]
        )
    fields = _Fields({name: value for name, value in cast("dict[str, Any]", body).items() if value is not None})
    asked = _read(fields)
    for name, kind in _NO_EFFECT.items():
        fields.take(name, lambda value, kind=kind: isinstance(value, kind), "Send a text; metadata is an object.")
    for name, value in fields.left.items():
        if any(value == neutral for neutral in _NEUTRAL.get(name, ())):
            continue
        fields.refuse(name, "unsupported_parameter", "is not supported by served models", "Leave it out.")
    if fields.problems:
        raise refusals(fields.problems)
    return asked


def _read(fields: _Fields) -> Asked:
    model = fields.text("model")
    messages = tuple(_messages(fields))
    limits = [fields.number("max_tokens", 1, MAX_TOKENS), fields.number("max_completion_tokens", 1, MAX_TOKENS)]
    given = [limit for limit in limits if limit is not None]
    if len(set(given)) > 1:
        fields.refuse("max_tokens", "conflict", "differs from max_completion_tokens", "Send only one of them.")
    wants, top = fields.flag("logprobs"), fields.number("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants:
        fields.refuse("top_logprobs", "bad_value", "needs logprobs", "Set logprobs to true.")
    seed, stream = fields.number("seed", -(2**63), 2**63 - 1), fields.flag("stream")
    return Asked(
        model=model,
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
        request=ChatRequest(
            id="",
            adapter="",
            messages=messages,
            n=fields.number("n", 1, MAX_CHOICES) or 1,
            seed=secrets.randbits(63) if seed is None else seed & _SEED_MASK,
            temperature=fields.real("temperature", 0, 2, 1.0),
            top_p=max(fields.real("top_p", 0, 1, 1.0), _LEAST_TOP_P),
            max_tokens=given[0] if given else None,
            stop=tuple(_stops(fields)),
            logprobs=(top or 0) if wants else None,
            schema=_schema(fields),
        ),
    )


class _Fields:
    """The parameters of a body, which are taken one by one."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.left = given
        self.problems: list[FieldProblem] = []

    def refuse(self, name: str, code: str, detail: str, remedy: str) -> None:
        self.problems.append(_problem(name, code, f"{name} {detail}", remedy))

    def take(self, name: str, is_right: Callable[[Any], bool], remedy: str) -> Any:
        """Return a parameter; None if it was not given, or is wrong and was reported."""
        value = self.left.pop(name, None)
        if value is None or is_right(value):
            return value
        self.refuse(name, "bad_value", "has a wrong value", remedy)
        return None

    def text(self, name: str) -> str:
        if name not in self.left:
            self.refuse(name, "missing_field", "is missing", "GET /v1/models lists what is served.")
            return ""
        return self.take(name, lambda value: isinstance(value, str), "Send a text.") or ""

    def flag(self, name: str) -> bool:
        return bool(self.take(name, lambda value: isinstance(value, bool), "Send true or false."))

    def number(self, name: str, least: int, most: int) -> int | None:
        remedy = f"Send a whole number from {least} to {most}."
        return self.take(name, lambda value: type(value) is int and least <= value <= most, remedy)

    def real(self, name: str, least: float, most: float, default: float) -> float:
        def is_right(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

        value = self.take(name, is_right, f"Send a number from {least:g} to {most:g}.")
        return default if value is None else float(value)


def _messages(fields: _Fields) -> Iterator[dict[str, str]]:
    if "messages" not in fields.left:
        fields.refuse("messages", "missing_field", "is missing", 'Send [{"role": "user", "content": "..."}].')
        return
    remedy = f"Send a list of 1 to {MAX_MESSAGES} messages."
    given = fields.take("messages", lambda value: isinstance(value, list) and 0 < len(value) <= MAX_MESSAGES, remedy)
    for place, message in enumerate(cast("list[Any]", given or [])):
        name = f"messages.{place}"
        if not isinstance(message, dict):
            fields.refuse(name, "bad_type", "is not an object", "Give role and content.")
            continue
        turn = cast("dict[str, Any]", message)
        role, text = _ROLES.get(str(turn.get("role"))), _text_of(turn.get("content"))
        if role is None:
            fields.refuse(f"{name}.role", "bad_value", "has a wrong value", f"Use one of {', '.join(_ROLES)}.")
        if text is None:
            remedy = "Send a text, or a list of parts of type text."
            fields.refuse(f"{name}.content", "bad_value", "is not text", remedy)
        more = {key for key, value in turn.items() if value not in (None, [])} - {"role", "content", "name", "refusal"}
        for other in sorted(more):
            fields.refuse(f"{name}.{other}", "unsupported_parameter", "is not supported", "Leave it out.")
        if role is not None and text is not None:
            yield {"role": role, "content": text}


def _text_of(content: Any) -> str | None:
    """The text of a message's content, which may be a list of parts; None if it has anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    parts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in cast("list[Any]", content)
    ]
    texts = [text for text in parts if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _stops(fields: _Fields) -> list[str]:
    def is_right(value: Any) -> bool:
        several = cast("list[Any]", value) if isinstance(value, list) else [value]
        return len(several) <= MAX_STOPS and all(isinstance(one, str) and 0 < len(one) <= 200 for one in several)

    given = fields.take("stop", is_right, f"Send a text, or up to {MAX_STOPS}, each of 1 to 200 characters.")
    return [given] if isinstance(given, str) else list(given or ())


def _schema(fields: _Fields) -> dict[str, Any] | None:
    """The JSON Schema of a `response_format`, which is read as a job's is."""
    given = fields.left.pop(FORMAT, None)
    if given in (None, {"type": "text"}):
        return None
    try:
        wanted = parse_spec({"sampling": {FORMAT: given}}).sampling.response_format
    except SpecError as error:
        for one in error.problems:
            name = ".".join(map(str, parts_of(one.pointer)[1:]))
            fields.refuse(name, one.code, one.detail, one.remedy)
        return None
    named = wanted and wanted.json_schema
    return named.json_schema if named else {"type": "object"}


def _include_usage(fields: _Fields, *, stream: bool) -> bool:
    def is_right(value: Any) -> bool:
        flags = cast("dict[str, Any]", value) if isinstance(value, dict) else {"": None}
        return set(flags) <= {"include_usage", "include_obfuscation"} and all(type(v) is bool for v in flags.values())

    given = fields.take("stream_options", is_right, 'Send {"include_usage": true}.') or {}
    if given and not stream:
        fields.refuse("stream_options", "bad_value", "needs stream", "Set stream to true.")
    if given.get("include_obfuscation"):
        fields.refuse(
            "stream_options.include_obfuscation", "unsupported_parameter", "is not supported", "Set it to false."
        )
    return bool(given.get("include_usage"))


def _problem(name: str, code: str, detail: str, remedy: str) -> FieldProblem:
    return FieldProblem(pointer="", parameter=name, code=code, detail=detail, remedy=remedy)
