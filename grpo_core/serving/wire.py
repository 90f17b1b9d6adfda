"""The messages between API, worker and serving process: requests, and the pieces of their answers.

Owns their JSON form and their limits. The API makes a `ChatRequest` from a request that it has checked; the worker
passes it on as it is; the process answers with pieces. Invariant: every request that the process accepted ends with
exactly one `done` or one `error`, and its pieces are numbered from 1 without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, TypedDict

from grpo_core.adapters import NAME

BASE: Final = "base"
"""The name of the model without an adapter."""
SOCKET_VARIABLE: Final = "GRPO_SERVING_FD"
"""Number of the inherited socket over which the process talks to its worker."""
MAX_LINE_BYTES: Final = 1024**2
"""Largest size of a message."""
MAX_REQUEST_BYTES: Final = 256 * 1024
MAX_CHOICES: Final = 16
MAX_STOPS: Final = 4
MAX_TOP_LOGPROBS: Final = 20
MAX_ROWS: Final = 32
"""Answers that are generated at the same time."""
MAX_WAITING: Final = 64
"""Requests that wait for a place among them; further ones are refused."""


class Piece(TypedDict, total=False):
    """One message about one request."""

    id: str
    k: int
    """Its number, from 1."""
    index: int
    """The choice that it belongs to."""
    text: str
    logprobs: list[dict[str, Any]]
    """In OpenAI's form, one for each token."""
    finish: str
    """`stop` or `length`; the last piece of this choice."""
    done: dict[str, int]
    """`prompt_tokens` and `completion_tokens`; the last piece of the request."""
    error: dict[str, Any]
    """`code`, `message`, `param`; the last piece of the request."""


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

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ChatRequest:
        """Read what `as_dict` returned. Raises `ValueError` for an adapter's name that no session has."""
        request = cls(**{**body, "messages": tuple(body["messages"]), "stop": tuple(body["stop"])})
        if request.adapter != BASE and not NAME.fullmatch(request.adapter):
            raise ValueError("it names no adapter")
        return request


def error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The `error` of a piece."""
    return {"code": code, "message": message, "param": param}
