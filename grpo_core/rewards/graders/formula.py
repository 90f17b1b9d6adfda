"""Formulas of scores: the language of OpenAI's `calculate_output`.

    + - * / ^ ( )    min max abs floor ceil exp sqrt log    numbers    names of graders

Owns the parser and the evaluator; Python never evaluates a formula. `^` binds tightest and to the right. Invariant: a
text is either a formula in which every name is known, or raises `FormulaError`; a value is a finite number, or raises
`FormulaError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Final

MAX_CHARACTERS: Final = 2000
MAX_DEPTH: Final = 50

_NUMBER: Final = r"[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
_TOKEN: Final = re.compile(rf"\s*(?:({_NUMBER})|([A-Za-z_][A-Za-z0-9_]*)|([-+*/^(),]))")
_OF_ONE: Final[Mapping[str, Callable[[float], float]]] = {
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_OF_MANY: Final[Mapping[str, Callable[[list[float]], float]]] = {"min": min, "max": max}

_Value = Callable[[Mapping[str, float]], float]


class FormulaError(ValueError):
    """The text is not a formula, or the formula has no value for these scores."""


class Formula:
    """A formula over `names`. `used` holds the names that occur in it."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        if len(text) > MAX_CHARACTERS:
            raise FormulaError(f"it is longer than {MAX_CHARACTERS} characters")
        self.text = text
        parser = _Parser(_tokens(text.strip()), names)
        self._value = parser.whole()
        self.used = frozenset(parser.used)

    def __call__(self, scores: Mapping[str, float]) -> float:
        """Return the value. Raises `FormulaError` if it has none, as for a division by zero."""
        try:
            value = self._value(scores)
        except (ArithmeticError, ValueError) as error:
            raise FormulaError(f"no value for {_shown(scores)}: {error}") from error
        if isinstance(value, complex) or not math.isfinite(value):
            raise FormulaError(f"no finite value for {_shown(scores)}")
        return float(value)


def _shown(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in scores.items())


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise FormulaError(f"{text[at : at + 10]!r} at character {at + 1} is not allowed in a formula")
        tokens.append(found[found.lastindex or 0])
        at = found.end()
    return tokens


class _Parser:
    def __init__(self, tokens: list[str], names: Collection[str]) -> None:
        self._tokens, self._names = tokens, names
        self._at = 0
        self.used: set[str] = set()

    def whole(self) -> _Value:
        value = self._sum(0)
        if self._next is not None:
            raise FormulaError(f"{self._next!r} is not allowed in this place")
        return value

    @property
    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self, wanted: str | None = None) -> str:
        token = self._next
        if token is None or (wanted is not None and token != wanted):
            raise FormulaError(f"{repr(wanted) if wanted else 'something'} is missing {_before(token)}")
        self._at += 1
        return token

    def _sum(self, depth: int) -> _Value:
        _require_shallow(depth)
        value = self._product(depth)
        while self._next in ("+", "-"):
            join = _add if self._take() == "+" else _subtract
            value = join(value, self._product(depth))
        return value

    def _product(self, depth: int) -> _Value:
        value = self._signed(depth)
        while self._next in ("*", "/"):
            join = _multiply if self._take() == "*" else _divide
            value = join(value, self._signed(depth))
        return value

    def _signed(self, depth: int) -> _Value:
        _require_shallow(depth)
        if self._next == "-":
            self._take()
            return _negate(self._signed(depth + 1))
        if self._next == "+":
            self._take()
            return self._signed(depth + 1)
        return self._power(depth)

    def _power(self, depth: int) -> _Value:
        base = self._atom(depth)
        if self._next == "^":
            self._take()
            return _raise(base, self._signed(depth + 1))
        return base

    def _atom(self, depth: int) -> _Value:
        word = self._take()
        if word == "(":
            value = self._sum(depth + 1)
            self._take(")")
            return value
        if word[0].isdigit() or word[0] == ".":
            return _constant(float(word))
        if (word in _OF_ONE or word in _OF_MANY) and self._next == "(":
            return self._call(word, depth)
        if word in self._names:
            self.used.add(word)
            return _named(word)
        known = ", ".join(sorted(self._names)) or "none"
        raise FormulaError(f"{word!r} is neither a grader nor a function; the names are: {known}")

    def _call(self, name: str, depth: int) -> _Value:
        self._take("(")
        values = [self._sum(depth + 1)]
        while self._next == ",":
            self._take()
            values.append(self._sum(depth + 1))
        self._take(")")
        if name in _OF_MANY:
            return _apply(_OF_MANY[name], values)
        if len(values) != 1:
            raise FormulaError(f"{name} takes one value, not {len(values)}")
        return lambda scores: float(_OF_ONE[name](values[0](scores)))


def _before(token: str | None) -> str:
    return "at its end" if token is None else f"before {token!r}"


def _require_shallow(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormulaError(f"it is nested more than {MAX_DEPTH} levels deep")


def _constant(value: float) -> _Value:
    return lambda _: value


def _named(name: str) -> _Value:
    return lambda scores: scores[name]


def _negate(value: _Value) -> _Value:
    return lambda scores: -value(scores)


def _add(left: _Value, right: _Value) -> _Value:
    return lambda scores: left(scores) + right(scores)


def _subtract(left: _Value, right: _Value) -> _Value:
    return lambda scores: left(scores) - right(scores)


def _multiply(left: _Value, right: _Value) -> _Value:
    return lambda scores: left(scores) * right(scores)


def _divide(left: _Value, right: _Value) -> _Value:
    return lambda scores: left(scores) / right(scores)


def _raise(base: _Value, exponent: _Value) -> _Value:
    return lambda scores: float(base(scores)) ** float(exponent(scores))


def _apply(function: Callable[[list[float]], float], values: list[_Value]) -> _Value:
    return lambda scores: function([value(scores) for value in values])
