"""Answers that must match a schema, by the tiny model: they do, and no schema takes more than its share."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from typing import Any

import pytest

from grpo_core.serving import schemas
from grpo_core.serving.wire import ChatRequest
from tests.clock import patience
from tests.lazy import lazy
from tests.unit.native import test_serving as ours

torch = lazy("torch")
Guides = lazy("grpo_core.serving.guide", "Guides")
constrain = lazy("grpo_core.serving.guide", "constrain")
jsonschema_rs = lazy("jsonschema_rs")

ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "answer": {"type": "integer", "minimum": -99, "maximum": 99},
        "unit": {"enum": ["个", "kg", None]},
    },
    "required": ["steps", "answer", "unit"],
    "additionalProperties": False,
}
CHOICE: dict[str, Any] = {"enum": ["yes", "no"]}
TREE: dict[str, Any] = {
    "$defs": {"tree": {"type": "object", "properties": {"k": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}},
    "$ref": "#/$defs/tree",
}


def guided_batch(tmp_path: Any) -> Any:
    model = ours.make_native(ours.adapters_in(tmp_path))
    desk = ours.desk_of(model)
    return ours.Batch(model, replace(desk, guides=Guides(model.tokenizer, model.stops)))


def ask(number: int, schema: dict[str, Any] | None = None, **options: Any) -> ChatRequest:
    return ours.ask(number, **{"max_tokens": 200, "temperature": 1.0, "seed": number, "schema": schema, **options})


def texts(pieces: list[Any]) -> list[tuple[str, str]]:
    """The text and the end of each choice."""
    own: dict[int, list[Any]] = {}
    for piece in pieces:
        if "index" in piece:
            own.setdefault(piece["index"], []).append(piece)
    return [(ours.text_of(own[index]), own[index][-1]["finish"]) for index in sorted(own)]


def test_every_answer_is_json_of_its_schema_among_rows_with_others_and_none(tmp_path: Any) -> None:
    batch = guided_batch(tmp_path)
    wanted = [ANSWER, None, CHOICE, TREE, ANSWER, {"type": "object", "maxProperties": 0}]
    for number, schema in enumerate(wanted):
        request = ask(number, schema, n=1 + number % 3, adapter=ours.NAMES[number % 3])
        assert batch.add(request) == []
    found = ours.answers(batch)
    whole = [0] * len(wanted)
    for number, schema in enumerate(wanted):
        for text, finish in texts(found[f"r{number}"]):
            if schema is not None and finish == "stop":
                jsonschema_rs.validate(schema, json.loads(text))
                whole[number] += 1
    assert min(whole[:1] + whole[2:]) > 0, whole


def test_rows_without_a_schema_get_what_they_get_alone(tmp_path: Any) -> None:
    batch, alone = guided_batch(tmp_path), guided_batch(tmp_path / "alone")
    for number in range(4):
        batch.add(ask(number, logprobs=2))
        alone.add(ask(number, logprobs=2))
        batch.add(ask(number + 10, ANSWER))
    found, expected = ours.answers(batch), ours.answers(alone)
    assert all(texts(found[name]) == texts(expected[name]) for name in expected)


def test_the_pieces_of_a_stream_joined_are_the_whole(tmp_path: Any) -> None:
    batch = guided_batch(tmp_path)
    batch.add(ask(1, ANSWER, logprobs=1))
    pieces = ours.answers(batch)["r1"]
    assert [piece["k"] for piece in pieces] == list(range(1, len(pieces) + 1))
    assert len(pieces) > 5
    ((text, finish),) = texts(pieces)
    assert finish == "stop"
    jsonschema_rs.validate(ANSWER, json.loads(text))
    told = [one for piece in pieces for one in piece.get("logprobs", ())]
    assert min(one["logprob"] for one in told) > -9999, "they are the model's own, whatever was forbidden"


def test_an_answer_that_is_cut_off_begins_like_one_of_its_schema(tmp_path: Any) -> None:
    batch = guided_batch(tmp_path)
    batch.add(ask(1, ANSWER, max_tokens=4))
    ((text, finish),) = texts(ours.answers(batch)["r1"])
    assert finish == "length"
    assert text.startswith("{")


def test_a_schema_that_becomes_too_complex_ends_its_request_alone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    batch = guided_batch(tmp_path)
    monkeypatch.setattr(schemas, "LIMITS", LLParserLimits(step_lexer_fuel=300))
    batch.add(ask(1, {"type": "string", "pattern": "(x+x+)+y|.*a.{1,500}b.{1,500}"}, n=3))
    batch.add(ask(2))
    found = ours.answers(batch)
    assert found["r1"][-1]["error"]["param"] == "response_format"
    assert sum("error" in piece for piece in found["r1"]) == 1
    assert "done" in found["r2"][-1]


def test_a_bad_schema_and_a_session_without_guides_refuse_by_the_parameter(tmp_path: Any) -> None:
    batch = guided_batch(tmp_path)
    (piece,) = batch.add(ask(1, {"type": "word"}))
    assert (piece["error"]["code"], piece["error"]["param"]) == ("bad_schema", "response_format")
    assert batch.is_idle
    (piece,) = ours.batch_of(ours.make_native(ours.adapters_in(tmp_path / "b"))).add(ask(1, ANSWER))
    assert piece["error"]["param"] == "response_format"


def test_logits_beyond_the_tokenizers_tokens_are_forbidden() -> None:
    tokenizer, stops = ours.tokenizer_and_stops()
    guide = Guides(tokenizer, stops).make(ANSWER)
    logits = torch.zeros(2, len(tokenizer) + 70)
    allowed = constrain(logits, [None, guide]) == 0
    assert allowed[0].all()
    assert [tokenizer.decode([token]) for token in allowed[1].nonzero().flatten().tolist()] == ["{"]
    assert (logits == 0).all(), "what the model computed stays"


@pytest.mark.parametrize("schema", [ANSWER, CHOICE, TREE, {}, {"type": "object", "x-guidance": {"lenient": True}}])
def test_a_schema_that_can_guide_has_no_fault(schema: dict[str, Any]) -> None:
    assert schemas.fault_of(schema) == ""


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "word"}, "Invalid type"),
        ({"not": {}}, "Unimplemented keys"),
        ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
        ({"enum": ["a" * schemas.MAX_BYTES]}, "bytes"),
        ({"type": "array", "minItems": 10**9}, "too complex"),
        ({"type": "array", "items": {"type": "array", "maxItems": 10**9}, "maxItems": 10**9}, "too complex"),
        ({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83, 79)]}, "too complex"),
        ({"type": "integer", "multipleOf": 1234567}, "too complex"),
        ({"$ref": "#"}, "cannot guide"),
        ({"$ref": "https://example.com/a.json"}, "cannot guide"),
    ],
)
def test_no_schema_takes_more_than_its_share(schema: dict[str, Any], fault: str) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    assert fault in schemas.fault_of(schema)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < patience(0.5)
    assert time.monotonic() - began < schemas.WAIT_SECONDS + patience(1)
