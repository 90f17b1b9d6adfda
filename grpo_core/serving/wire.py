"""The messages between API, worker and serving process: requests, and the pieces of their answers.

Owns their JSON form and their limits. The API makes a `ChatRequest` from a request that it has checked; the worker
passes it on as it is; the process answers with pieces. Invariant: every request that the process accepted ends with
exactly one `done` or one `error`, and its pieces are numbered from 1 without a gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Final

from grpo_core import strict_json
from grpo_core.adapters import NAME

BASE: Final = "base"
"""The name of the model without an adapter."""
FORMAT: Final = "response_format"
"""The parameter that a `schema` comes from; sessions that announce it serve it."""
SOCKET_VARIABLE: Final = "GRPO_SERVING_FD"
"""Number of the inherited socket over which the process talks to its worker."""
MAX_LINE_BYTES: Final = 1024**2
"""Largest size of a message."""
MAX_REQUEST_BYTES: Final = 256 * 1024
MAX_CHOICES: Final = 16
MAX_STOPS: Final = 4
MAX_TOP_LOGPROBS: Final = 20
CPU_ROWS: Final = 32
"""Answers that are generated at the same time on a CPU, or one by one."""
GPU_ROWS: Final = 128
WAITING_PER_ROW: Final = 6
"""Requests that wait for a place among them, for each place; further ones are refused."""


Piece = dict[str, Any]
"""One message about one request, with its `id` and `k`, its number from 1.

A choice has `index`, `text`, `logprobs` (OpenAI's form, for each token), and with its last piece `finish` (`stop` or
`length`). The last one of a request has `done` (`prompt_tokens` and `completion_tokens`) or `error` (`code`,
`message`, `param`).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One chat request, with every setting explicit."""

    id: str
    adapter: str
    """`main`, `step-50` or `base`."""
    messages: tuple[Mapping[str, str], ...]
    """Each with `role` (`system`, `user` or `assistant`) and `content`."""
    n: int = 1
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    """None: the session's default."""
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Number of alternatives for each token; None: no log-probabilities."""
    schema: Mapping[str, Any] | None = None
    """The JSON Schema that answers must match."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, without what is None: sessions of the previous release do not know every field."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ChatRequest:
        """Read what `as_dict` returned. Raises `ValueError` for an adapter's name that no session has."""
        lists: dict[str, Any] = {name: tuple(body[name]) for name in ("messages", "stop")}
        given: dict[str, Any] = {**body, **lists}
        request = cls(**given)
        if request.adapter != BASE and not NAME.fullmatch(request.adapter):
            raise ValueError("it names no adapter")
        return request


def error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The `error` of a piece."""
    return {"code": code, "message": message, "param": param}


def messages(lines: BinaryIO) -> Iterator[Any]:
    """Yield the messages of the other side until it ends. Raises `ValueError` for anything else.

    Unlike what clients send, they may hold NUL, because a model writes every character.
    """
    while line := lines.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError("it is too long")
        if not line.endswith(b"\n"):
            return
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        strict_json.dumps(message).encode()  # refuses NaN and halves of surrogate pairs
        yield message
