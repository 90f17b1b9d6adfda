"""The requests that are being answered: who waits, whose turn it is, and the pieces that come of a step.

Owns the order: requests begin in the order they came, one prompt is read between two steps, and every row of all
requests gets one token in each step. Invariants: at most `MAX_ROWS` rows at once, and a request ends with one `done` or
one `error`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_core.datasets.templates import encode
from grpo_core.errors import JobFailure
from grpo_core.reasons import FinishReason
from grpo_core.serving.completion import Text, logprobs_of
from grpo_core.serving.model import Model, Sampling, Token, sample
from grpo_core.serving.wire import BASE, MAX_ROWS, MAX_WAITING, ChatRequest, Piece, error

Conversation = Sequence[dict[str, str]]


@dataclass(slots=True, kw_only=True)
class _Row:
    """One choice of one request."""

    index: int
    sampling: Sampling
    text: Text
    cache: Any
    next: int = 0
    """The token that it was given last."""
    count: int = 0


@dataclass(slots=True)
class _Asked:
    """One request."""

    request: ChatRequest
    prompt: list[int] = field(default_factory=list[int])
    tokens: int = 0
    """Largest number of tokens of an answer."""
    rows: list[_Row] = field(default_factory=list[_Row])
    pieces: int = 0
    generated: int = 0


class Batch:
    """All requests of one session. Used from one thread."""

    def __init__(
        self,
        model: Model,
        adapters: Sequence[str],
        *,
        default_tokens: int,
        prompt: Callable[[ChatRequest], Conversation],
    ) -> None:
        """`prompt` returns the conversation as the model reads it."""
        self._model, self._adapters, self._default_tokens = model, {*adapters, BASE}, default_tokens
        self._prompt = prompt
        self._waiting: deque[_Asked] = deque()
        self._active: list[_Asked] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._active

    def add(self, request: ChatRequest) -> list[Piece]:
        """Accept a request, or return the piece that refuses it."""
        asked = _Asked(request)
        if request.adapter not in self._adapters:
            return [_refused(asked, error("not_serving", f"This session has no {request.adapter}.", "model"))]
        if len(self._waiting) >= MAX_WAITING:
            message = f"{MAX_WAITING} requests wait for an answer, which is the limit. Send it again shortly."
            return [_refused(asked, error("overloaded", message))]
        self._waiting.append(asked)
        return []

    def cancel(self, request_id: str) -> None:
        """Forget a request whose client has gone."""
        self._waiting = deque(asked for asked in self._waiting if asked.request.id != request_id)
        self._active = [asked for asked in self._active if asked.request.id != request_id]

    def fail(self, fault: dict[str, Any]) -> list[Piece]:
        """End every request with an error."""
        ended = [_refused(asked, fault) for asked in (*self._active, *self._waiting)]
        self._active, self._waiting = [], deque()
        return ended

    def step(self) -> list[Piece]:
        """Read a prompt if there is room, then give every row its next token."""
        pieces = list(self._admit())
        pieces += self._advance([(asked, row) for asked in self._active for row in asked.rows])
        self._active = [asked for asked in self._active if asked.rows]
        return pieces

    def _admit(self) -> Iterator[Piece]:
        rows = sum(len(asked.rows) for asked in self._active)
        if not self._waiting or (rows and rows + self._waiting[0].request.n > MAX_ROWS):
            return
        asked = self._waiting.popleft()
        fault = self._encode(asked)
        if fault is not None:
            yield _refused(asked, fault)
            return
        yield from self._begin(asked)
        if asked.rows:
            self._active.append(asked)

    def _encode(self, asked: _Asked) -> dict[str, Any] | None:
        """Fill in the prompt. Returns what is wrong with the request, or None."""
        request = asked.request
        try:
            (asked.prompt,) = encode(self._model.tokenizer, [self._prompt(request)])
        except JobFailure as failure:
            return error("chat_template_failed", failure.report.message, "messages")
        room = self._model.context - len(asked.prompt)
        if room < 1 or (request.max_tokens or 0) > room:
            wants = f" and {request.max_tokens} for the answer" if room > 0 else ""
            message = (
                f"This model reads {self._model.context} tokens, and the conversation has {len(asked.prompt)}{wants}. "
                "Shorten the messages or max_tokens."
            )
            return error("context_length_exceeded", message, "messages" if room < 1 else "max_tokens")
        asked.tokens = request.max_tokens or min(room, self._default_tokens)
        return None

    def _begin(self, asked: _Asked) -> Iterator[Piece]:
        """Read the prompt and give each choice its first token."""
        request = asked.request
        cache, logits = self._model.prefill(request.adapter, asked.prompt, asked.tokens)
        for index in range(request.n):
            own = cache if index == request.n - 1 else self._model.fork(cache)
            sampling = Sampling(request.temperature, request.top_p, _seed(request.seed, index))
            row = _Row(index=index, sampling=sampling, text=Text(self._model.tokenizer, request.stop), cache=own)
            asked.rows.append(row)
        rows = list(asked.rows)
        tokens = sample(
            logits.expand(len(rows), -1),
            [row.sampling for row in rows],
            [0] * len(rows),
            [request.logprobs] * len(rows),
        )
        for row, token in zip(rows, tokens, strict=True):
            yield from self._take(asked, row, token)

    def _advance(self, rows: Sequence[tuple[_Asked, _Row]]) -> list[Piece]:
        by_adapter: defaultdict[str, list[tuple[_Asked, _Row]]] = defaultdict(list)
        for asked, row in rows:
            if row.count > 0:
                by_adapter[asked.request.adapter].append((asked, row))
        pieces: list[Piece] = []
        for adapter, some in by_adapter.items():
            logits = self._model.step(adapter, [(row.next, row.cache) for _, row in some])
            tokens = sample(
                logits,
                [row.sampling for _, row in some],
                [row.count for _, row in some],
                [asked.request.logprobs for asked, _ in some],
            )
            for (asked, row), token in zip(some, tokens, strict=True):
                pieces += self._take(asked, row, token)
        return pieces

    def _take(self, asked: _Asked, row: _Row, token: Token) -> Iterator[Piece]:
        """Add a token to a choice, and end the choice and the request where it is the last."""
        row.next, row.count = token.id, row.count + 1
        asked.generated += 1
        is_stop = token.id in self._model.stops
        text = "" if is_stop else row.text.add(token.id)
        has_ended = is_stop or row.text.stopped or row.count >= asked.tokens
        if has_ended and not row.text.stopped:
            text += row.text.end()
        piece = Piece(index=row.index, text=text)
        if asked.request.logprobs is not None and not is_stop:
            piece["logprobs"] = [logprobs_of(self._model.tokenizer, token)]
        if has_ended:
            piece["finish"] = FinishReason.of(is_stop or row.text.stopped).value
        if text or has_ended or "logprobs" in piece:
            yield _numbered(asked, piece)
        if has_ended:
            asked.rows.remove(row)
            if not asked.rows:
                yield _numbered(
                    asked, Piece(done={"prompt_tokens": len(asked.prompt), "completion_tokens": asked.generated})
                )


def _seed(seed: int, index: int) -> int:
    """The seed of a choice; the first one's is the request's."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"choice/{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _refused(asked: _Asked, fault: dict[str, Any]) -> Piece:
    return _numbered(asked, Piece(error=fault))


def _numbered(asked: _Asked, piece: Piece) -> Piece:
    asked.pieces += 1
    piece["id"], piece["k"] = asked.request.id, asked.pieces
    return piece
