"""Reads the one number that a short answer holds, exactly.

Owns the number grammar of the `fixed` rewards and the mapping of full-width characters to ASCII. Tags and the amounts
of rewards are separate modules. Invariant: parsing never raises and never rounds, and a regular expression sees at most
40 characters, so that no text can make it slow.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Final

MAX_NUMBER_TEXT: Final = 40
"""Longest answer, in characters after stripping, that is read as a number."""

_FULL_WIDTH_TO_ASCII: Final = {full: full - 0xFF01 + 0x21 for full in range(0xFF01, 0xFF5F)}
# Other forms of the same signs. Without this map, a minus would be read as a unit, and the number would lose its sign.
_LOOKALIKES: Final = {
    0x3000: " ",  # ideographic space
    0x2212: "-",  # minus sign
    0x2013: "-",  # en dash
    0xFE63: "-",  # small hyphen-minus
    0x2044: "/",  # fraction slash
    0x2215: "/",  # division slash
}
_TO_ASCII: Final = {**_FULL_WIDTH_TO_ASCII, **_LOOKALIKES}

# [0-9] together with \D is intended: a digit of another script is neither part of a number nor a unit.
_NUMBER: Final = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
# The text before is lazy, so that a sign belongs to the number.
_QUANTITY: Final = re.compile(
    rf"(?P<before>\D{{0,12}}?)(?P<top>{_NUMBER})(?:\s*/\s*(?P<bottom>{_NUMBER}))?(?P<after>\D{{0,12}})"
)


def to_ascii(text: str) -> str:
    """Map full-width forms (U+FF01 to U+FF5E, U+3000) and other minus and slash signs to one ASCII character each."""
    return text if text.isascii() else text.translate(_TO_ASCII)


def read_number(text: str) -> Fraction | None:
    """Return the exact value of the one number in `text`; None if the text must be compared as text.

    A number is `[+-]?(\\d{1,3}(,\\d{3})+|\\d+)(\\.\\d+)?`, or two of them as `a/b`, with at most 12
    non-digits on either side, in at most 40 characters once stripped. Never raises.
    """
    stripped = text.strip()
    if len(stripped) > MAX_NUMBER_TEXT:
        return None
    match = _QUANTITY.fullmatch(to_ascii(stripped))
    if match is None or _value_differs(match["before"], match["after"]):
        return None
    return _divide(match["top"], match["bottom"])


def same_answer(left: str, right: str) -> bool:
    """Whether two answers are equal: by value if both are numbers, else as text, stripped and mapped to ASCII."""
    left_number, right_number = read_number(left), read_number(right)
    if left_number is not None and right_number is not None:
        return left_number == right_number
    return _same_text(left.strip(), right.strip())


def _same_text(left: str, right: str) -> bool:
    # Mapping keeps the length, so a long hostile answer is refused before it is mapped.
    return len(left) == len(right) and to_ascii(left) == to_ascii(right)


def _value_differs(before: str, after: str) -> bool:
    """Whether a character next to the digits changes their value, as in `.5`, `-$5`, `5²` and `5½`."""
    return _bare_point(before) or _sign_before_currency(before) or unicodedata.category(after[:1] or " ") == "No"


def _bare_point(before: str) -> bool:
    # `.5` is not 5; but in `Rs.500` and `No.5` the point ends a word.
    return before.endswith(".") and not before[-2:-1].isalpha()


def _sign_before_currency(before: str) -> bool:
    return before[-2:-1] == "-" and unicodedata.category(before[-1]) == "Sc"


def _divide(top: str, bottom: str | None) -> Fraction | None:
    numerator = Fraction(top.replace(",", ""))
    if bottom is None:
        return numerator
    denominator = Fraction(bottom.replace(",", ""))
    return numerator / denominator if denominator else None
