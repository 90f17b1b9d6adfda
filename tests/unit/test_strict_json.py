"""Strict JSON: one meaning for every text, and nothing that a store, a log or a stack could choke on."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import strict_json
from grpo_core.strict_json import MAX_DEPTH, MAX_DIGITS, StrictJsonError
from tests.clock import patience

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (" {} \n", {}),
        (b'{"a": [1, -0.5, 1e3, true, null, ""]}', {"a": [1, -0.5, 1000.0, True, None, ""]}),
        ("12", 12),
        ('"\\ud83d\\ude00"', "😀"),
        ("1e-999", 0.0),
        ("9" * MAX_DIGITS, int("9" * MAX_DIGITS)),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
        ('{"a": {"a": 1}, "b": {"a": 1}}', {"a": {"a": 1}, "b": {"a": 1}}),
        (json.dumps(["[{" * 1000, '\\"[[[']), ["[{" * 1000, '\\"[[[']),
        ("[" + "{}," * 100 + "{}]", [{}] * 101),
    ],
)
def test_accepted(source: str | bytes, value: Any) -> None:
    assert strict_json.loads(source) == value


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "not JSON"),
        (b"", "not JSON"),
        ("nul", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1} {}', "not JSON"),
        ('"a\nb"', "not JSON"),
        ("01", "not JSON"),
        ("NaN", "NaN is not a JSON number"),
        ('{"a": [Infinity]}', "Infinity is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ('{"a": 1.5e400}', "too large"),
        ("9" * (MAX_DIGITS + 1), "digits"),
        ("-" + "9" * 100_000, "digits"),
        ('{"a": 1, "a": 1}', "'a' occurs twice"),
        ('[{"b": {"a": 1, "\\u0061": 2}}]', "'a' occurs twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested"),
        ('["\\"", ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "]", "nested"),
        ('["\\\\", ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "]", "nested"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('["\ud800"]', "surrogate"),
        ('"\\u0000"', "NUL"),
        ('{"a\\u0000b": 1}', "NUL"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8 \\(byte 7\\)"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ("\ufeff{}", "not JSON"),
        ("\ufeff{}".encode(), "not JSON"),
    ],
)
def test_refused(source: str | bytes, says: str) -> None:
    with pytest.raises(StrictJsonError, match=says):
        strict_json.loads(source)


@pytest.mark.parametrize(
    ("source", "pointer", "message"),
    [
        ("NaN", "", "NaN is not a JSON number. Give a finite number."),
        ('{"a": [1, {"b/c": Infinity}]}', "/a/1/b~1c", "Infinity is not a JSON number. Give a finite number."),
        ("[0, -1e999]", "/1", "The number -1e999 is too large. Give a finite number."),
        ('{"a": ' + "9" * 401 + "}", "/a", "A number has 401 digits. Give one with at most 400."),
        ('{"a": {"b": 1, "b": NaN}}', "/a/b", "The key 'b' occurs twice in one object. Keep one of them."),
        ('{"a": NaN, "a": 1}', "/a", "The key 'a' occurs twice in one object. Keep one of them."),
        ('{"a": {"\\udfff": NaN}}', "/a", "A string holds NUL or half of a surrogate pair. Send valid Unicode text."),
    ],
)
def test_what_is_refused_is_told_with_its_place(source: str, pointer: str, message: str) -> None:
    with pytest.raises(StrictJsonError) as caught:
        strict_json.loads(source)
    assert caught.value.pointer == pointer
    assert str(caught.value) == (f"{pointer}: {message}" if pointer else message)


@pytest.mark.parametrize("source", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "[[]," * 100_000])
def test_deep_nesting_is_refused_fast(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(StrictJsonError):
        strict_json.loads(source)
    assert time.perf_counter() - started < patience(0.5)


@given(values)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert strict_json.loads(strict_json.dumps(value)) == value
    assert strict_json.loads(strict_json.canonical(value).encode()) == value


@given(st.text() | st.binary())
def test_anything_else_is_one_kind_of_error(source: str | bytes) -> None:
    try:
        value = strict_json.loads(source)
    except StrictJsonError:
        return
    assert value == json.loads(source)


def test_canonical_text_has_one_form() -> None:
    assert strict_json.canonical({"b": [1, 2.5], "a": "好"}) == '{"a":"\\u597d","b":[1,2.5]}'
    assert strict_json.canonical({"a": "好", "b": [1, 2.5]}) == strict_json.canonical({"b": [1, 2.5], "a": "好"})


@pytest.mark.parametrize("write", [strict_json.dumps, strict_json.canonical])
def test_non_finite_numbers_are_not_written(write: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write({"a": [float("nan")]})


def test_lines_stay_lines() -> None:
    assert strict_json.dumps({"a": "x\ny", "好": "\u2028"}) == '{"a":"x\\ny","好":"\u2028"}'
