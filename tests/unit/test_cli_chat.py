"""`grpo chat`: what a conversation prints, and which answers of the service end it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from grpo_client.cli import chat
from grpo_client.errors import ProblemError


class Model:
    """Answers as the service does, or refuses."""

    def __init__(self, *told: str | ProblemError) -> None:
        self.told = list(told)

    def stream_chat(self, *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        told = self.told.pop(0)
        if isinstance(told, ProblemError):
            raise told
        yield {"choices": [{"delta": {"content": told}}]}


def converse(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    chat._converse(model, "m", [], {})  # pyright: ignore[reportPrivateUsage]


def test_a_model_commands_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    converse(monkeypatch, Model("a\x1b[2J\x00\u202e\n\t算\u3000c", "d"))
    assert capsys.readouterr().out == "a\\x1b[2J\\x00\\u202e\n\t算\u3000c\nd\n"


@pytest.mark.parametrize(
    ("status", "code"), [(401, "invalid_api_key"), (404, "model_not_found"), (409, "not_serving"), (403, "forbidden")]
)
def test_what_the_next_question_would_get_too_ends_a_conversation(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    with pytest.raises(ProblemError):
        converse(monkeypatch, Model(ProblemError(status, {"code": code})))


def test_a_conversation_survives_a_refused_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, Model(ProblemError(400, {"detail": "too long"}), "d"))
    read = capsys.readouterr()
    assert (read.out, "too long" in read.err) == ("d\n", True)
