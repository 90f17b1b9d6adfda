"""Whether two answers are the same, as far as that can be said without computer algebra.

Owns which forms of an answer are compared here, exactly: values, equations, tuples, intervals and sets of values.
`closed_forms` reads the values. Invariant: an answer is decided only if both texts were read as a whole; for all others
the result is None, and math-verify decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from grpo_core.rewards.graders.closed_forms import Terms, as_float, difference, is_linear, read

MAX_PARTS: Final = 16
ROUNDED: Final = 1e-5
"""Values that differ by less may be the same to math-verify, which rounds if one of the texts has a decimal point."""
_EQUALS: Final = re.compile(r"(?<![<>!\\:])=(?!=)")
_GROUPED: Final = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
"""What may be one number or two."""
_LIST: Final = re.compile(r"(?:\\left)?\s*(\\\{|[(\[])(.*?)(?:\\right)?\s*(\\\}|[)\]])", re.DOTALL)
_OPEN: Final = "([{"
_CLOSED: Final = ")]}"


def same_answer(left: str, right: str) -> bool | None:
    """Whether an answer (left) is the reference (right); None if that is not known here."""
    one, other = _list(left), _list(right)
    if one is not None and other is not None:
        return _same_lists(one, other)
    if one is not None or other is not None:
        # Brackets may also surround a value.
        return _same_values(left, right)
    first, second = _EQUALS.split(left), _EQUALS.split(right)
    if len(first) > 2 or len(second) > 2:
        return None
    if len(first) == len(second) == 2:
        return _same_equations(first, second)
    if len(second) == 2 and not _is_letter(second[0]):
        return None
    return _same_values(first[-1], second[-1])


def _same_values(left: str, right: str) -> bool | None:
    first, second = read(left), read(right)
    if first is None or second is None:
        return None
    if first == second:
        return True
    if "." not in left + right:
        return False
    apart = difference(first, second)
    distance = None if apart is None else as_float(apart)
    return None if distance is None or abs(distance) < ROUNDED else False


def _same_equations(left: Sequence[str], right: Sequence[str]) -> bool | None:
    """Linear equations have the same solutions exactly if one is a multiple of the other."""
    if "." in "".join((*left, *right)):
        return None
    if left[0].strip() == right[0].strip() and _is_letter(left[0]):
        return _same_values(left[1], right[1])
    first, second = _as_zero(left), _as_zero(right)
    if not first or not second:
        return None
    if set(first) == set(second):
        key = next(iter(first))
        if all(first[other] * second[key] == second[other] * first[key] for other in first):
            return True
    return False if is_linear(first) and is_linear(second) else None


def _as_zero(sides: Sequence[str]) -> Terms | None:
    """The left side of an equation minus its right side."""
    left, right = read(sides[0]), read(sides[1])
    return None if left is None or right is None else difference(left, right)


def _is_letter(text: str) -> bool:
    return re.fullmatch(r"\s*[A-Za-z]\s*", text) is not None


def _list(text: str) -> tuple[str, list[str]] | None:
    """The brackets and parts of a tuple, an interval or a set; None for another text."""
    match = _LIST.fullmatch(text.strip())
    if match is None:
        return None
    parts = _parts(match[2])
    return None if parts is None or len(parts) < 2 else (match[1] + match[3], parts)


def _parts(text: str) -> list[str] | None:
    """The text between commas outside of brackets; None if brackets do not match."""
    depth, begin = 0, 0
    found: list[str] = []
    for at, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSED)
        if depth < 0:
            return None
        if letter == "," and depth == 0 and text[at - 1 : at] != "\\":
            found.append(text[begin:at])
            begin = at + 1
    return None if depth else [*found, text[begin:]]


def _same_lists(left: tuple[str, list[str]], right: tuple[str, list[str]]) -> bool | None:
    (brackets, parts), (others, other_parts) = left, right
    whole = ",".join((*parts, *other_parts))
    if brackets != others or len(parts) > MAX_PARTS or _GROUPED.search(whole) or "." in whole:
        return None
    first, second = [read(part) for part in parts], [read(part) for part in other_parts]
    if None in first or None in second:
        return None
    if brackets == "\\{\\}":
        return {frozenset(value.items()) for value in first if value is not None} == {
            frozenset(value.items()) for value in second if value is not None
        }
    return first == second
