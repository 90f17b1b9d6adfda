"""The requests that a session has accepted: what each asks for, and what was said to it so far.

Owns the checks of a request against the session's model, the seeds of its choices, the tokens that a choice takes and
the numbers of pieces. Knows no engine. Invariant: a request ends with one `done` or one `error`, and its pieces are
numbered from 1 without a gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from grpo_core.datasets.templates import encode
from grpo_core.errors import JobFailure
from grpo_core.reasons import FinishReason
from grpo_core.serving.completion import Text, logprobs_of
from grpo_core.serving.guide import Guide, GuideError, Guides
from grpo_core.serving.model import Token
from grpo_core.serving.wire import BASE, FORMAT, ChatRequest, Piece, error

Conversation = Sequence[dict[str, str]]


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """One choice of one request."""

    index: int
    seed: int
    text: Text
    count: int = 0
    """The number of its tokens so far."""


C = TypeVar("C", bound=Choice)


@dataclass(slots=True, kw_only=True, eq=False)
class Asked(Generic[C]):
    """One request."""

    request: ChatRequest
    prompt: list[int] = field(default_factory=list[int])
    tokens: int = 0
    """Largest number of tokens of an answer."""
    guide: Guide | None = None
    """At the beginning of an answer that must match a schema."""
    choices: list[C] = field(default_factory=list[C])
    """Those that have not ended."""
    pieces: int = 0
    generated: int = 0

    @property
    def room(self) -> int:
        """The tokens of its prompt and of one answer."""
        return len(self.prompt) + self.tokens

    def seed(self, index: int) -> int:
        """The seed of a choice; the first one's is the request's."""
        if index == 0:
            return self.request.seed
        digest = hashlib.sha256(f"choice/{self.request.seed}/{index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def refused(self, fault: dict[str, Any]) -> Piece:
        """The piece that ends it with an error."""
        return self._numbered(Piece(error=fault))

    def take(self, choice: C, token: Token, desk: Desk) -> Iterator[Piece]:
        """Add a token to a choice, and end the choice and the request where it is the last."""
        choice.count += 1
        self.generated += 1
        is_stop = token.id in desk.stops
        text = "" if is_stop else choice.text.add(token.id)
        has_ended = is_stop or choice.text.stopped or choice.count >= self.tokens
        if has_ended and not choice.text.stopped:
            text += choice.text.end()
        piece = Piece(index=choice.index, text=text)
        if self.request.logprobs is not None and not is_stop:
            piece["logprobs"] = [logprobs_of(desk.tokenizer, token)]
        if has_ended:
            piece["finish"] = FinishReason.of(is_stop or choice.text.stopped).value
        if text or has_ended or "logprobs" in piece:
            yield self._numbered(piece)
        if has_ended:
            self.choices.remove(choice)
            if not self.choices:
                used = {"prompt_tokens": len(self.prompt), "completion_tokens": self.generated}
                yield self._numbered(Piece(done=used))

    def _numbered(self, piece: Piece) -> Piece:
        self.pieces += 1
        piece["id"], piece["k"] = self.request.id, self.pieces
        return piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What requests are checked against."""

    tokenizer: Any
    stops: frozenset[int]
    context: int
    """Largest number of tokens of prompt and answer together."""
    adapters: Sequence[str]
    """The names that are served."""
    default_tokens: int
    """Largest number of tokens of an answer for which none was asked."""
    prompt: Callable[[ChatRequest], Conversation]
    """Returns the conversation as the model reads it."""
    waiting: int
    """Largest number of requests that wait."""
    cache_tokens: int | None = None
    """Tokens of all answers of one request together; None: as many as it may ask for."""
    guides: Guides | None = None
    """None: no answer can be made to match a schema."""

    def read(self, asked: Asked[Any], waiting: int) -> dict[str, Any] | None:
        """Fill in the prompt, the length and the guide of a request beside `waiting` ones. Returns what is wrong with
        it, or None."""
        request = asked.request
        if request.adapter not in (*self.adapters, BASE):
            return error("not_serving", f"This session has no {request.adapter}.", "model")
        if waiting >= self.waiting:
            return error(
                "overloaded", f"{self.waiting} requests wait for an answer, which is the limit. Send it again shortly."
            )
        try:
            (asked.prompt,) = encode(self.tokenizer, [self.prompt(request)])
        except JobFailure as failure:
            return error("chat_template_failed", failure.report.message, "messages")
        return self._too_long(asked) or self._too_many(asked) or self._unguided(asked)

    def _too_long(self, asked: Asked[Any]) -> dict[str, Any] | None:
        request, room = asked.request, self.context - len(asked.prompt)
        if room < 1 or (request.max_tokens or 0) > room:
            wants = f" and {request.max_tokens} for the answer" if room > 0 else ""
            message = (
                f"This model reads {self.context} tokens, and the conversation has {len(asked.prompt)}{wants}. "
                "Shorten the messages or max_tokens."
            )
            return error("context_length_exceeded", message, "messages" if room < 1 else "max_tokens")
        asked.tokens = request.max_tokens or min(room, self.default_tokens)
        return None

    def _too_many(self, asked: Asked[Any]) -> dict[str, Any] | None:
        need = asked.request.n * asked.room
        if self.cache_tokens is None or need <= self.cache_tokens:
            return None
        message = (
            f"The GPU has memory for {self.cache_tokens} tokens of conversations, and the answers to this request need "
            f"{need}. Ask for fewer choices (n) or a lower max_tokens."
        )
        return error("context_length_exceeded", message, "n")

    def _unguided(self, asked: Asked[Any]) -> dict[str, Any] | None:
        schema = asked.request.schema
        if schema is None:
            return None
        if self.guides is None:
            return error("unsupported_parameter", "This session cannot make answers match a schema.", FORMAT)
        try:
            asked.guide = self.guides.make(schema)
        except GuideError as fault:
            return error("bad_schema", f"{fault}.", FORMAT)
        return None
