"""The recipe's five rewards with their faults mended, for one completion at a time.

Owns the exact meaning of mode `fixed`: an answer counts only inside its tags, numbers compare by value, and the
multi-line format that the prompt asks for is paid. Linear string scans only; never raises, always finite.
"""

from __future__ import annotations

from grpo_core.rewards.quantity import read_number, same_answer
from grpo_core.rewards.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CHARGE_PER_CHARACTER,
    CORRECTNESS_PAYS,
    FORMAT_PAYS,
    INTEGER_PAYS,
    REASONING_CLOSE,
    REASONING_OPEN,
    TAGS,
    pay_for_marks,
)

_FIRST_LINE = f"{REASONING_OPEN}\n"
_BETWEEN_BLOCKS = f"\n{REASONING_CLOSE}\n{ANSWER_OPEN}\n"
_LAST_LINE = f"\n{ANSWER_CLOSE}"


def extract(text: str) -> str | None:
    """What stands between the last `<answer>` and the next `</answer>`, unstripped; None without both."""
    _, opened, after = text.rpartition(ANSWER_OPEN)
    inside, closed, _ = after.partition(ANSWER_CLOSE)
    return inside if opened and closed else None


def correctness(text: str, gold: str | None) -> float:
    """2.0 if the answer equals the gold one, by value where both are numbers, else as text."""
    answer = extract(text)
    right = answer is not None and gold is not None and same_answer(answer, gold)
    return CORRECTNESS_PAYS if right else 0.0


def integer(text: str) -> float:
    """0.5 if the answer is a number whose value is whole: `-5`, `12.0`, `1,200` and `4/2` are."""
    answer = extract(text)
    number = None if answer is None else read_number(answer)
    return INTEGER_PAYS if number is not None and number.denominator == 1 else 0.0


def strict_format(text: str) -> float:
    """0.5 if the stripped text is one reasoning block, a newline, one answer block, each tag once on its own line."""
    return FORMAT_PAYS if _is_strict(text.strip()) else 0.0


def soft_format(text: str) -> float:
    """0.5 if the text begins, after white space, with a closed reasoning block and then a closed answer block.

    A block ends at its first closing tag; between the two there may be white space or nothing.
    """
    return FORMAT_PAYS if _is_soft(text.lstrip()) else 0.0


def xml_count(text: str) -> float:
    """Up to 0.5 for marks that occur once, less 0.001 a character of stripped text after the last `</answer>`.

    Unbounded below, but nothing is charged where there is no `</answer>`.
    """
    _, closed, tail = text.rpartition(ANSWER_CLOSE)
    charged = len(tail.strip()) if closed else 0
    return pay_for_marks(text) - charged * CHARGE_PER_CHARACTER


def _is_strict(text: str) -> bool:
    framed = text.startswith(_FIRST_LINE) and _BETWEEN_BLOCKS in text and text.endswith(_LAST_LINE)
    return framed and all(text.count(tag) == 1 for tag in TAGS)


def _is_soft(text: str) -> bool:
    after = text.partition(REASONING_CLOSE)[2]
    answer = after.lstrip()
    return text.startswith(REASONING_OPEN) and answer.startswith(ANSWER_OPEN) and ANSWER_CLOSE in answer
