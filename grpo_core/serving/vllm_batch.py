"""The requests that vLLM is answering: each choice is a request of the engine, which decides whose turn it is.

Owns the way from the engine's outputs to pieces: seeds, stop texts and log-probabilities as those of the other engines.
Invariant: an answer whose client has gone, or whose stop text was found, is ended in the engine too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_core.serving.asked import Asked, Choice, Desk
from grpo_core.serving.completion import Text
from grpo_core.serving.model import Token
from grpo_core.serving.vllm_engine import Output, VllmEngine
from grpo_core.serving.wire import ChatRequest, Piece, error


class VllmBatch:
    """All requests of one session. Used from one thread."""

    def __init__(self, engine: VllmEngine, desk: Desk) -> None:
        self.engine, self.context, self.accepts = engine.name, desk.context, ()
        self._engine, self._desk = engine, desk
        self._open: dict[str, Asked[Choice]] = {}
        """The requests that have not ended, by their ids."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._open

    def add(self, request: ChatRequest) -> list[Piece]:
        """Accept a request, or return the piece that refuses it."""
        asked = Asked[Choice](request=request)
        rows = sum(len(one.choices) for one in self._open.values())
        if fault := self._desk.read(asked, max(0, rows - self._engine.rows)):
            return [asked.refused(fault)]
        self._open[request.id] = asked
        for index in range(request.n):
            text = Text(self._desk.tokenizer, request.stop)
            asked.choices.append(Choice(index=index, seed=asked.seed(index), text=text))
            self._engine.add(
                _name(request.id, index),
                request.adapter,
                asked.prompt,
                tokens=asked.tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=asked.seed(index),
                stops=sorted(self._desk.stops),
                logprobs=request.logprobs,
            )
        return []

    def cancel(self, request_id: str) -> None:
        """Forget a request whose client has gone."""
        asked = self._open.pop(request_id, None)
        if asked is not None:
            self._stop(asked)

    def fail(self, fault: dict[str, Any]) -> list[Piece]:
        """End every request with an error."""
        ended, self._open = list(self._open.values()), {}
        for asked in ended:
            self._stop(asked)
        return [asked.refused(fault) for asked in ended]

    def step(self) -> list[Piece]:
        """Give the answers that have a place their next tokens."""
        return [piece for output in self._engine.step() for piece in self._take(output)]

    def _stop(self, asked: Asked[Choice]) -> None:
        self._engine.stop([_name(asked.request.id, choice.index) for choice in asked.choices])

    def _take(self, output: Output) -> Iterator[Piece]:
        request_id, _, index = output.id.rpartition("/")
        asked = self._open.get(request_id)
        choice = next((one for one in asked.choices if one.index == int(index)), None) if asked else None
        if asked is None or choice is None:
            return
        for at, token in enumerate(output.tokens):
            logprobs = output.logprobs[at] if output.logprobs else {}
            yield from asked.take(choice, _token(token, logprobs, asked.request.logprobs), self._desk)
            if choice not in asked.choices:
                break
        if choice not in asked.choices and not output.has_ended:
            self._engine.stop([output.id])
        if choice in asked.choices and output.has_ended:
            self.cancel(request_id)
            yield asked.refused(error("session_ended", "vLLM gave this answer up. Send the request again."))
        if not asked.choices:
            self._open.pop(request_id, None)


def _name(request_id: str, index: int) -> str:
    return f"{request_id}/{index}"


def _token(token: int, logprobs: Mapping[int, float], top: int | None) -> Token:
    if top is None:
        return Token(token, 0.0)
    best = sorted(logprobs.items(), key=lambda item: -item[1])[:top]
    return Token(token, logprobs[token], tuple(best))
