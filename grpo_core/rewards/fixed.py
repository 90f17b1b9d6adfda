"""The recipe's five rewards with their faults corrected, for one completion at a time.

Defines mode `fixed`: an answer counts only inside its tags, numbers compare by value, and the format that the prompt
asks for, which spans several lines, is rewarded. Invariant: a reward is finite, never raises, and takes time that is
linear in the text.
"""

from __future__ import annotations

from grpo_core.rewards.number_parser import read_number, same_answer
from grpo_core.rewards.tags import (
    BOXED,
    CHARGE_PER_CHARACTER,
    CORRECTNESS_PAYS,
    DEFAULT,
    FORMAT_PAYS,
    INTEGER_PAYS,
    Tags,
    last_box,
    pay_for_marks,
)


def extract(text: str, tags: Tags = DEFAULT) -> str | None:
    """Return the answer with the white space around it; None if the text has no answer.

    The answer is the text between the last opening tag and the next closing tag. With a box, it is what the last box
    holds; without tags, it is the text after the reasoning.
    """
    if tags.answer == BOXED:
        box = last_box(text)
        return None if box is None else box[0]
    if tags.answer_pair is not None:
        _, opened, after = text.rpartition(tags.answer_pair[0])
        inside, closed, _ = after.partition(tags.answer_pair[1])
        return inside if opened and closed else None
    if tags.reasoning_pair is None:
        return text
    _, closed, after = text.rpartition(tags.reasoning_pair[1])
    return after if closed else None


def correctness(text: str, gold: str | None, tags: Tags = DEFAULT) -> float:
    """2.0 if the answer equals the gold one, by value where both are numbers, else as text."""
    answer = extract(text, tags)
    right = answer is not None and gold is not None and same_answer(answer, gold)
    return CORRECTNESS_PAYS if right else 0.0


def integer(text: str, tags: Tags = DEFAULT) -> float:
    """0.5 if the answer is a number whose value is whole: `-5`, `12.0`, `1,200` and `4/2` are."""
    answer = extract(text, tags)
    number = None if answer is None else read_number(answer)
    return INTEGER_PAYS if number is not None and number.denominator == 1 else 0.0


def strict_format(text: str, tags: Tags = DEFAULT) -> float:
    """0.5 if the stripped text is one reasoning block, a newline, one answer block, each tag once on its own line.

    A part without a tag may be any text. If the answer is a box, the text must contain exactly one `\\boxed{}`.
    """
    return FORMAT_PAYS if tags.any and _is_strict(text.strip(), tags) else 0.0


def soft_format(text: str, tags: Tags = DEFAULT) -> float:
    """0.5 if the text begins, after white space, with a closed reasoning block and then a closed answer block.

    A block ends at its first closing tag; between the two there may be white space or nothing.
    """
    return FORMAT_PAYS if tags.any and _is_soft(text.lstrip(), tags) else 0.0


def xml_count(text: str, tags: Tags = DEFAULT) -> float:
    """Up to 0.5 for marks that occur once, less 0.001 a character of stripped text after the last closing answer tag.

    There is no lower bound. Nothing is subtracted if the text has no such tag.
    """
    charged = 0
    if tags.answer_pair is not None:
        _, closed, tail = text.rpartition(tags.answer_pair[1])
        charged = len(tail.strip()) if closed else 0
    return pay_for_marks(text, tags) - charged * CHARGE_PER_CHARACTER


def _is_strict(text: str, tags: Tags) -> bool:
    """Whether the text is the reasoning block followed by the answer block, and nothing else."""
    rest = text
    if tags.reasoning_pair is not None:
        opening, closing = tags.reasoning_pair
        _, closed, rest = text.partition(f"\n{closing}\n")
        if not (text.startswith(f"{opening}\n") and closed and text.count(opening) == 1 and text.count(closing) == 1):
            return False
    if tags.answer == BOXED:
        return text.count("\\boxed{") == 1 and last_box(rest) is not None
    if tags.answer_pair is None:
        return bool(rest.strip())
    opening, closing = tags.answer_pair
    begins = rest.startswith(f"{opening}\n") if tags.reasoning_pair is not None else f"\n{opening}\n" in f"\n{rest}"
    return begins and rest.endswith(f"\n{closing}") and text.count(opening) == 1 and text.count(closing) == 1


def _is_soft(text: str, tags: Tags) -> bool:
    rest = text
    if tags.reasoning_pair is not None:
        opening, closing = tags.reasoning_pair
        _, closed, after = text.partition(closing)
        rest = after.lstrip()
        if not (text.startswith(opening) and closed):
            return False
    if tags.answer == BOXED:
        return last_box(rest) is not None
    if tags.answer_pair is None:
        return bool(rest.strip())
    opening, closing = tags.answer_pair
    if tags.reasoning_pair is None:  # reasoning without tags may stand before it
        _, opened, inside = rest.partition(opening)
        return bool(opened) and closing in inside
    return rest.startswith(opening) and closing in rest
