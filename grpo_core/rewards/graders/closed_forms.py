"""The exact value of a short expression: sums, products, fractions, square roots and powers of numbers, π and letters.

Owns the part of LaTeX that is read here. A value is a sum of terms, each a rational number times the square root of an
integer without square factors, times powers of π and of letters. Such terms are linearly independent over the rational
numbers, so two values are equal exactly if their terms are. All else is not read, and math-verify decides. Invariant:
reading never raises and takes at most `MAX_WORK` multiplications, whatever the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Final

MAX_TEXT: Final = 160
"""Characters of an expression that is read here."""
MAX_WORK: Final = 300
"""Multiplications of two terms in one expression."""
MAX_BITS: Final = 192
"""Of a numerator or denominator."""
MAX_POWER: Final = 32
MAX_RADICAND: Final = 10**6
MAX_DEPTH: Final = 12

PI: Final = "pi"
Monomial = tuple[tuple[str, int], ...]
Terms = Mapping[tuple[int, Monomial], Fraction]
"""Factors by the integer under the root and the powers of letters; none is 0."""

_TOKEN: Final = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)|\\(?P<command>[A-Za-z]+)|(?P<sign>[-+*/^(){}√π])|(?P<letter>[A-Za-z](?![A-Za-z]{2}))"
)
"""Three letters in a row are a word."""
_SPACES: Final = re.compile(r"\\[ ,;:!]|[\s$~]|\\(?:left|right|displaystyle|quad)(?![A-Za-z])")
_NAMES: Final = {"cdot": "*", "times": "*", "div": "/", "frac": "frac", "dfrac": "frac", "tfrac": "frac"}
_NAMES_OF_ATOMS: Final = {"pi": "π", "sqrt": "√"}
_NO_LETTERS: Final = frozenset("eijdfghEI")
"""Letters that mean a number, a differential or a function."""
_NO_FUNCTIONS: Final = frozenset("abckmnrstxyz")
"""Letters that are a factor before a bracket."""
_STARTS: Final = frozenset({"number", "letter", "(", "frac", "√", "π"})
"""Tokens that multiply what stands before them, without a sign."""


class _NotRead(Exception):
    """The text is no expression of this kind, or would take too long."""


@lru_cache(maxsize=4096)
def read(text: str) -> Terms | None:
    """The value of an expression; None if it is not read here."""
    if len(text) > MAX_TEXT:
        return None
    try:
        return _Reader(_tokens(text)).value()
    except (_NotRead, ZeroDivisionError):
        return None


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind and text of each token, spaces left out."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if space := _SPACES.match(text, at):
            at = space.end()
            continue
        match = _TOKEN.match(text, at)
        if match is None:
            raise _NotRead
        at = match.end()
        kind, value = match.lastgroup or "", match.group()
        if kind == "command":
            name = _NAMES.get(value[1:]) or _NAMES_OF_ATOMS.get(value[1:])
            if name is None:
                raise _NotRead
            kind = value = name
        elif kind == "sign":
            kind = value
        found.append((kind, value))
    if len(found) > 1 and all(kind == "letter" for kind, _ in found):
        raise _NotRead  # a short word
    return found


class _Reader:
    """Reads one expression by recursive descent, and counts its work."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = [*tokens, ("end", "")]
        self._at = self._depth = self._work = 0

    def value(self) -> Terms:
        value = self._sum()
        if self._kind != "end":
            raise _NotRead
        return value

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _take(self, kind: str | None = None) -> str:
        found, text = self._tokens[self._at]
        if kind is not None and found != kind:
            raise _NotRead
        self._at += 1
        return text

    def _sum(self) -> Terms:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NotRead
        value: Terms = {}
        is_first = True
        while is_first or self._kind in ("+", "-"):
            sign = 1
            while self._kind in ("+", "-"):
                sign = -sign if self._take() == "-" else sign
            value = _plus(value, self._product(), sign)
            is_first = False
        self._depth -= 1
        return value

    def _product(self) -> Terms:
        value = self._power()
        was_divided = False
        while True:
            kind, before = self._kind, self._tokens[self._at - 1]
            if kind in ("*", "/"):
                self._take()
                was_divided = kind == "/"
                factor = self._power()
                value = self._times(value, self._inverse(factor) if was_divided else factor)
            elif kind not in _STARTS:
                return value
            elif was_divided or not _multiplies(before, kind):
                raise _NotRead
            else:
                value = self._times(value, self._power())

    def _power(self) -> Terms:
        value = self._atom()
        if self._kind != "^":
            return value
        self._take()
        exponent = _integer(self._argument())
        if self._kind == "^" or abs(exponent) > MAX_POWER:
            raise _NotRead
        if exponent < 0:
            value, exponent = self._inverse(value), -exponent
        result: Terms = {(1, ()): Fraction(1)}
        for _ in range(exponent):
            result = self._times(result, value)
        return result

    def _atom(self) -> Terms:
        kind, text = self._tokens[self._at]
        self._take()
        if kind == "number":
            return _number(Fraction(text))
        if kind == "letter" and text not in _NO_LETTERS:
            return {(1, ((text, 1),)): Fraction(1)}
        if kind == "π":
            return {(1, ((PI, 1),)): Fraction(1)}
        if kind == "√":
            return _root(self._argument())
        if kind == "frac":
            top = self._argument()
            return self._times(top, self._inverse(self._argument()))
        if kind in ("(", "{"):
            value = self._sum()
            self._take(")" if kind == "(" else "}")
            return value
        raise _NotRead

    def _argument(self) -> Terms:
        """What a command or `^` is applied to: a group in braces, or a single digit or letter."""
        if self._kind == "{":
            return self._atom()
        kind, text = self._tokens[self._at]
        if kind == "letter" or (kind == "number" and len(text) == 1):
            return self._atom()
        if kind == "number" and text.isdigit():  # \frac12 and 2^10 take one digit
            self._tokens[self._at] = ("number", text[1:])
            return _number(Fraction(text[0]))
        if kind == "(" and self._tokens[self._at - 1][0] == "√":
            return self._atom()
        raise _NotRead

    def _times(self, left: Terms, right: Terms) -> Terms:
        self._work += len(left) * len(right)
        if self._work > MAX_WORK:
            raise _NotRead
        product: dict[tuple[int, Monomial], Fraction] = {}
        for (root, letters), factor in left.items():
            for (other, more), by in right.items():
                common = math.gcd(root, other)
                key = ((root // common) * (other // common), _joined(letters, more))
                product[key] = product.get(key, Fraction(0)) + factor * by * common
        return _checked(product)

    def _inverse(self, value: Terms) -> Terms:
        """1 divided by a value of one term, or of two with roots alone."""
        if not value:
            raise ZeroDivisionError
        if len(value) == 2 and not any(letters for _, letters in value):
            (first, one), (second, two) = value.items()
            conjugate = {first: one, second: -two}
            norm = one**2 * first[0] - two**2 * second[0]
            return _checked({key: factor / norm for key, factor in conjugate.items()})
        if len(value) > 1:
            raise _NotRead
        ((root, letters), factor) = next(iter(value.items()))
        return {(root, tuple((name, -power) for name, power in letters)): 1 / (factor * root)}


def difference(left: Terms, right: Terms) -> Terms | None:
    """One value minus another; None if its numbers are too long."""
    try:
        return _plus(left, right, -1)
    except _NotRead:
        return None


def as_float(value: Terms) -> float | None:
    """A constant's value, about; None if it has letters."""
    total = 0.0
    for (root, letters), factor in value.items():
        if any(name != PI for name, _ in letters):
            return None
        total += float(factor) * math.sqrt(root) * math.prod(math.pi**power for _, power in letters)
    return total


def is_linear(value: Terms) -> bool:
    """Whether each term is rational, with at most one letter, to the first power."""
    return all(root == 1 and (not letters or (len(letters) == 1 and letters[0][1] == 1)) for root, letters in value)


def _multiplies(before: tuple[str, str], kind: str) -> bool:
    """Whether a token that follows without a sign is a factor: not in `2 3`, `2\\frac{1}{2}`, `f(x)` and words."""
    if before[0] == "letter" and kind == "(":
        return before[1] in _NO_FUNCTIONS
    return kind != "number" and (before[0], kind) != ("number", "frac")


def _number(value: Fraction) -> Terms:
    return _checked({(1, ()): value})


def _plus(left: Terms, right: Terms, sign: int) -> Terms:
    total = dict(left)
    for key, factor in right.items():
        total[key] = total.get(key, Fraction(0)) + sign * factor
    return _checked(total)


def _checked(terms: Mapping[tuple[int, Monomial], Fraction]) -> Terms:
    if any(max(abs(factor.numerator), factor.denominator).bit_length() > MAX_BITS for factor in terms.values()):
        raise _NotRead
    return {key: factor for key, factor in terms.items() if factor}


def _joined(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _root(value: Terms) -> Terms:
    """The square root of a rational number."""
    number = _rational(value)
    radicand = number.numerator * number.denominator
    if not 0 <= radicand <= MAX_RADICAND:
        raise _NotRead
    outside, inside, factor = 1, radicand, 2
    while factor * factor <= inside:
        while inside % (factor * factor) == 0:
            inside //= factor * factor
            outside *= factor
        factor += 1
    return _checked({(inside or 1, ()): Fraction(outside if inside else 0, number.denominator)})


def _rational(value: Terms) -> Fraction:
    if not value:
        return Fraction(0)
    if set(value) != {(1, ())}:
        raise _NotRead
    return value[1, ()]


def _integer(value: Terms) -> int:
    number = _rational(value)
    if number.denominator != 1:
        raise _NotRead
    return int(number)
