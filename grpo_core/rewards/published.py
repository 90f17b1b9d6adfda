"""The recipe's five rewards as published, faults included, for one completion at a time.

Defines mode `published`. The recipe's two regular expressions are written as linear scans with the same result for
every text (a test compares them), because a completion can make a backtracking match take forever. One thing differs
from the recipe: the gold answer is compared as text.
"""

from __future__ import annotations

from grpo_core.rewards.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CHARGE_PER_CHARACTER,
    CORRECTNESS_PAYS,
    FORMAT_PAYS,
    INTEGER_PAYS,
    REASONING_CLOSE,
    REASONING_OPEN,
    pay_for_marks,
)

_END_OF_ANSWER = "\n</answer>\n"


def extract(text: str) -> str:
    """What follows the last `<answer>`, up to `</answer>`, stripped; without tags, the whole text."""
    return text.rpartition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)[0].strip()


def correctness(text: str, gold: str | None) -> float:
    """2.0 if the extracted text is exactly the gold answer, which None never is."""
    return CORRECTNESS_PAYS if extract(text) == gold else 0.0


def integer(text: str) -> float:
    """0.5 if the extracted text is all digits: no sign, no point, but superscripts and other scripts count."""
    return INTEGER_PAYS if extract(text).isdigit() else 0.0


def strict_format(text: str) -> float:
    r"""0.5 for `^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$`, where no dot crosses a line."""
    return FORMAT_PAYS if _matches_strict(text) else 0.0


def soft_format(text: str) -> float:
    r"""0.5 for `<reasoning>.*?</reasoning>\s*<answer>.*?</answer>` from the start, where no dot crosses a line."""
    return FORMAT_PAYS if _matches_soft(text) else 0.0


def xml_count(text: str) -> float:
    """Up to 0.5 for marks that occur once, less 0.001 for each character after the end mark; there is no lower bound.

    Without the end mark every character of the text is subtracted for, even if no other mark occurs.
    """
    # Not rpartition: two end marks can share a newline, and `split` then takes the first of them.
    charged = text.split(_END_OF_ANSWER)[-1]
    return pay_for_marks(text) - len(charged) * CHARGE_PER_CHARACTER


def _matches_strict(text: str) -> bool:
    lines = text.split("\n", 8)
    # `$` also matches before a final newline, so one more empty line is accepted.
    if len(lines) not in (7, 8) or any(lines[6:]):
        return False
    return [lines[0], *lines[2:4], lines[5]] == [REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN, ANSWER_CLOSE]


def _matches_soft(text: str) -> bool:
    line, _, rest = text.partition("\n")
    if not line.startswith(REASONING_OPEN):
        return False
    # The expression can end the reasoning at any closing tag of the first line, so each of them is tried.
    _, *after_close = line.split(REASONING_CLOSE)
    if _answer_on_line(after_close):
        return True
    # Only white space may cross the line, and only after the last closing tag.
    return bool(after_close) and not after_close[-1].strip() and _starts_with_answer(rest.lstrip())


def _answer_on_line(after_close: list[str]) -> bool:
    for index, piece in enumerate(after_close):
        if piece.lstrip().startswith(ANSWER_OPEN):
            # Every closing tag after a later opening tag is also after the first one.
            return ANSWER_CLOSE in REASONING_CLOSE.join(after_close[index:])
    return False


def _starts_with_answer(text: str) -> bool:
    return text.startswith(ANSWER_OPEN) and ANSWER_CLOSE in text.partition("\n")[0]
