"""One answer in the making: its tokens, the text that is certain so far, and when it ends.

Owns the way from tokens to text. Invariant: the pieces of an answer joined are exactly the decoded tokens, or what
stands before its stop text; no piece ends within a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from grpo_core.serving.model import Token

_HALF: Final = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a part of a character."""


class Text:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._held = max(map(len, self._stops), default=1) - 1
        """Characters at the end that may be the beginning of a stop text."""
        self._tokens: list[int] = []
        self._begin = self._read = 0
        """Tokens from `_begin` on are decoded again with each new one; the text up to `_read` is in `_text`."""
        self._text = ""
        self._given = 0
        self.stopped = False
        """Whether a stop text was found; the text ends before it."""

    def add(self, token: int) -> str:
        """Add a token. Returns the text that is certain now and was not before."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._begin : self._read])
        now = self._decode(self._tokens[self._begin :])
        if len(now) > len(before) and not now.endswith(_HALF):
            self._text += now[len(before) :]
            self._begin, self._read = self._read, len(self._tokens)
        return self._certain(self._held)

    def end(self) -> str:
        """Return the rest, when there are no more tokens."""
        if not self.stopped:
            whole = self._decode(self._tokens)
            self._text = whole if whole.startswith(self._text) else self._text
        return self._certain(0)

    def _certain(self, held: int) -> str:
        if not self.stopped:
            places = [at for stop in self._stops if (at := self._text.find(stop, max(0, self._given - held))) >= 0]
            if places:
                self._text, self.stopped = self._text[: min(places)], True
        end = len(self._text) if self.stopped else max(self._given, len(self._text) - held)
        piece, self._given = self._text[self._given : end], max(self._given, end)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def logprobs_of(tokenizer: Any, token: Token) -> dict[str, Any]:
    """A token's log-probabilities in OpenAI's form."""
    return {
        **_entry(tokenizer, token.id, token.logprob),
        "top_logprobs": [_entry(tokenizer, one, logprob) for one, logprob in token.top],
    }


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text: str = tokenizer.decode([token])
    # Of a token that is a part of a character, the bytes are not known.
    return {
        "token": text,
        "logprob": max(logprob, -9999.0),
        "bytes": None if _HALF in text else list(text.encode()),
    }
