"""The tags that mark reasoning and answer in a completion, and the rewards for them.

Owns the constants that both modes share: the tags, the marks of `xml_count`, the amounts, and `Tags`, which replaces
the tags by others. Grades no completion. Invariant: each function passes over the text once and never raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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


BOXED: Final = "boxed"
"""Value of `Tags.answer` for an answer in `\\boxed{}` instead of a tag."""
_BOX_OPEN: Final = "\\boxed{"


@dataclass(frozen=True)
class Tags:
    """The required format of completions; None stands for no tag."""

    reasoning: str | None = "reasoning"
    answer: str | None = "answer"

    @cached_property
    def reasoning_pair(self) -> tuple[str, str] | None:
        """The opening and the closing tag around the reasoning; None if it has no tag."""
        return None if self.reasoning is None else (f"<{self.reasoning}>", f"</{self.reasoning}>")

    @cached_property
    def answer_pair(self) -> tuple[str, str] | None:
        """The opening and the closing tag around the answer; None if it is in a box or has no tag."""
        return None if self.answer in (None, BOXED) else (f"<{self.answer}>", f"</{self.answer}>")

    @property
    def any(self) -> bool:
        """Whether any format is required."""
        return self.reasoning is not None or self.answer is not None

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The marks that `xml_count` counts. The first has no newline before it, because it may start the text."""
        found: list[str] = []
        for pair in (self.reasoning_pair, self.answer_pair):
            if pair is not None:
                found += [f"\n{pair[0]}\n", f"\n{pair[1]}\n"]
        if self.answer == BOXED:
            found.append(_BOX_OPEN)
        if found:
            found[0] = found[0].removeprefix("\n")
        if self.answer_pair is not None:
            found[-1] = found[-1].removesuffix("\n")  # the last mark may end the text
        return tuple(found)

    @property
    def shown(self) -> str:
        """An example of the format for a prompt."""
        lines: list[str] = []
        for pair in (self.reasoning_pair, self.answer_pair):
            if pair is not None:
                lines += [pair[0], "...", pair[1]]
        if self.answer == BOXED:
            lines.append("\\boxed{...}")
        return "".join(f"{line}\n" for line in lines)

    @property
    def prompt(self) -> str:
        """An English system prompt that asks for the format; empty if no format is required."""
        return f"Answer in this format:\n{self.shown}" if self.any else ""

    def missing_from(self, text: str) -> list[str]:
        """The parts of the format that a prompt does not mention."""
        named = [pair[0] for pair in (self.reasoning_pair, self.answer_pair) if pair is not None]
        return [one for one in [*named, *(["\\boxed"] if self.answer == BOXED else [])] if one not in text]


DEFAULT: Final = Tags()


def last_box(text: str) -> tuple[str, int] | None:
    """The content of the last closed `\\boxed{}`, and the index of the text after it; None if there is no box."""
    start = text.rfind(_BOX_OPEN)
    if start < 0:
        return None
    depth, at = 1, start + len(_BOX_OPEN)
    for place in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[at:place], place + 1
    return None


def pay_for_marks(text: str, tags: Tags = DEFAULT) -> float:
    """The reward for marks that occur exactly once, from 0.0 to 0.5.

    Marks are counted with `str.count`, as in the recipe: two equal marks that share one newline count once.
    """
    each = MARK_PAYS * len(MARKS) / max(1, len(tags.marks))
    return each * sum(text.count(mark) == 1 for mark in tags.marks)
