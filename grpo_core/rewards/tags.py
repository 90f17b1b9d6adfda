"""The tags a completion is asked to write, and what each reward pays for them.

Owns the literals that both modes share: tags, the four marks of `xml_count`, amounts and the charge.
Judges nothing itself; every helper is one linear pass over the text and never raises.
"""

from __future__ import annotations

from typing import Final

REASONING_OPEN: Final = "<reasoning>"
REASONING_CLOSE: Final = "</reasoning>"
ANSWER_OPEN: Final = "<answer>"
ANSWER_CLOSE: Final = "</answer>"
TAGS: Final = (REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# The first has no newline before it, because it may start the text.
MARKS: Final = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")

CORRECTNESS_PAYS: Final = 2.0
INTEGER_PAYS: Final = 0.5
FORMAT_PAYS: Final = 0.5
MARK_PAYS: Final = 0.125
CHARGE_PER_CHARACTER: Final = 0.001


def pay_for_marks(text: str) -> float:
    """What the marks that occur exactly once earn, 0.0 to 0.5.

    Occurrences are counted as the recipe counts them, with `str.count`: two equal marks that share one
    newline count once.
    """
    return MARK_PAYS * sum(text.count(mark) == 1 for mark in MARKS)
