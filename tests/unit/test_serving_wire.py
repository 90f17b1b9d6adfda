"""The messages between a worker and its serving process: what a model may write, and what ends the session."""

from __future__ import annotations

import io

import pytest

from grpo_core.serving.wire import CPU_ROWS, MAX_LINE_BYTES, WAITING_PER_ROW, ChatRequest, messages


def read(line: bytes) -> list[object]:
    return list(messages(io.BytesIO(line)))


def test_nul_is_a_character_like_any_other() -> None:
    assert read(b'{"a":"\\u0000"}\n{"b":1}\n') == [{"a": "\0"}, {"b": 1}]


def test_a_message_that_its_writer_did_not_finish_is_none() -> None:
    assert read(b'{"a":1}\n{"b"') == [{"a": 1}]


@pytest.mark.parametrize("line", [b"no\n", b"NaN\n", b"1e999\n", b'"\\ud800"\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_what_is_no_message_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        read(line)


def test_a_message_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="too long"):
        read(b'"' + b"a" * MAX_LINE_BYTES + b'"\n')


def test_200_streams_at_once_have_room_on_a_cpu() -> None:
    assert CPU_ROWS * (1 + WAITING_PER_ROW) >= 200


def test_a_session_of_the_previous_release_reads_a_request_without_a_schema() -> None:
    request = ChatRequest(id="r", adapter="base", messages=(), max_tokens=5)
    known = {"id", "adapter", "messages", "n", "seed", "temperature", "top_p", "max_tokens", "stop", "logprobs"}
    assert request.as_dict().keys() <= known
    assert ChatRequest.read(request.as_dict()) == request
    guided = ChatRequest(id="r", adapter="base", messages=(), schema={"b": 1, "a": 2})
    assert ChatRequest.read(guided.as_dict()) == guided
