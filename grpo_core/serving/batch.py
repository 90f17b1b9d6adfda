"""The requests that are being answered: who waits, whose turn it is, and the pieces that come of a step.

Owns the order: requests begin in the order they came, prompts are read between two steps, and every row of all requests
gets one token in each step. Invariant: at most the model's number of rows at once, and each has room for all of its
tokens before it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_core.serving.asked import Asked, Choice, Desk
from grpo_core.serving.completion import Text
from grpo_core.serving.guide import Guide, GuideError
from grpo_core.serving.model import Model, Sampling, Token, sample
from grpo_core.serving.wire import FORMAT, ChatRequest, Piece, error


@dataclass(slots=True, kw_only=True, eq=False)
class _Row(Choice):
    cache: Any
    guide: Guide | None
    next: int = 0
    """The token that it was given last."""


class Batch:
    """All requests of one session. Used from one thread."""

    def __init__(self, model: Model, desk: Desk) -> None:
        self.engine, self.context = model.name, desk.context
        self.accepts = () if desk.guides is None else (FORMAT,)
        self._model, self._desk = model, desk
        self._waiting: deque[Asked[_Row]] = deque()
        self._active: list[Asked[_Row]] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._active

    def add(self, request: ChatRequest) -> list[Piece]:
        """Accept a request, or return the piece that refuses it."""
        asked = Asked[_Row](request=request)
        if fault := self._desk.read(asked, len(self._waiting)):
            return [asked.refused(fault)]
        self._waiting.append(asked)
        return []

    def cancel(self, request_id: str) -> None:
        """Forget a request whose client has gone."""
        self._waiting = deque(asked for asked in self._waiting if asked.request.id != request_id)
        for asked in self._active:
            if asked.request.id == request_id:
                self._release(asked)
        self._active = [asked for asked in self._active if asked.choices]

    def fail(self, fault: dict[str, Any]) -> list[Piece]:
        """End every request with an error."""
        ended = [asked.refused(fault) for asked in (*self._active, *self._waiting)]
        for asked in self._active:
            self._release(asked)
        self._active, self._waiting = [], deque()
        return ended

    def step(self) -> list[Piece]:
        """Read prompts if there is room, then give every row its next token."""
        pieces = list(self._begin(self._admit()))
        pieces += self._advance([(asked, row) for asked in self._active for row in asked.choices])
        self._active = [asked for asked in self._active if asked.choices]
        return pieces

    def _admit(self) -> list[Asked[_Row]]:
        """The next requests whose rows have places and room."""
        admitted: list[Asked[_Row]] = []
        rows, tokens = sum(len(asked.choices) for asked in self._active), 0
        while self._waiting:
            asked = self._waiting[0]
            rows, tokens = rows + asked.request.n, tokens + len(asked.prompt)
            has_others = bool(self._active or admitted)
            if admitted and tokens > self._model.prompt_tokens:
                break
            if (has_others and rows > self._model.rows) or not self._reserve(asked):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _reserve(self, asked: Asked[_Row]) -> bool:
        for index in range(asked.request.n):
            cache = self._model.reserve(asked.room)
            if cache is None:
                self._release(asked)
                return False
            text = Text(self._desk.tokenizer, asked.request.stop)
            guide = asked.guide and asked.guide.copy()
            asked.choices.append(_Row(index=index, seed=asked.seed(index), text=text, cache=cache, guide=guide))
        return True

    def _release(self, asked: Asked[_Row]) -> None:
        for row in asked.choices:
            self._model.release(row.cache)
        asked.choices.clear()

    def _begin(self, admitted: Sequence[Asked[_Row]]) -> Iterator[Piece]:
        """Read the prompts and give each choice its first token."""
        if not admitted:
            return
        self._active += admitted
        logits = self._model.prefill(
            [(asked.request.adapter, asked.prompt, asked.choices[0].cache) for asked in admitted]
        )
        rows = [(asked, row) for asked in admitted for row in asked.choices]
        for asked in admitted:
            for row in asked.choices[1:]:
                self._model.copy(asked.choices[0].cache, row.cache)
        of = [at for at, asked in enumerate(admitted) for _ in asked.choices]
        yield from self._draw(logits[of] if len(of) > len(admitted) else logits, rows)

    def _advance(self, rows: Sequence[tuple[Asked[_Row], _Row]]) -> list[Piece]:
        if not rows:
            return []
        logits = self._model.step([(asked.request.adapter, row.next, row.cache) for asked, row in rows])
        return self._draw(logits, rows)

    def _draw(self, logits: Any, rows: Sequence[tuple[Asked[_Row], _Row]]) -> list[Piece]:
        tokens = sample(
            logits,
            [Sampling(asked.request.temperature, asked.request.top_p, row.seed, row.guide) for asked, row in rows],
            [row.count for _, row in rows],
            [asked.request.logprobs for asked, _ in rows],
        )
        return [piece for pair, token in zip(rows, tokens, strict=True) for piece in self._take(*pair, token)]

    def _take(self, asked: Asked[_Row], row: _Row, token: Token) -> Iterator[Piece]:
        if row not in asked.choices:
            return  # another choice has ended the request with an error
        row.next = token.id
        try:
            if row.guide is not None:
                row.guide.take(token.id)
        except GuideError as fault:
            self._release(asked)
            yield asked.refused(error("bad_schema", f"{fault}.", FORMAT))
            return
        yield from asked.take(row, token, self._desk)
        if row not in asked.choices:
            self._model.release(row.cache)
