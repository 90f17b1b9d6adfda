"""The recipe's five rewards, by name and mode, in the shape TRL calls them.

Owns the public surface: names, descriptions, reward functions over batches, and the score of one completion.
`published` and `fixed` define each reward; the spec's weights are not applied here.
No completion makes a reward raise or return anything but a finite float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from grpo_core.rewards import fixed, published
from grpo_core.rewards.tags import CORRECTNESS_PAYS, DEFAULT, FORMAT_PAYS, INTEGER_PAYS, MARK_PAYS, MARKS, Tags

__all__ = [
    "REWARD_NAMES",
    "Completion",
    "RewardFunction",
    "RewardInfo",
    "RewardMode",
    "Scorer",
    "Tags",
    "describe",
    "get_rewards",
    "score",
    "scorers",
]

RewardMode = Literal["published", "fixed"]
Completion = str | Sequence[Mapping[str, object]]
"""Plain text, or a chat list whose first message is the assistant's."""

REWARD_NAMES: Final = ("correctness", "integer", "strict_format", "soft_format", "xml_count")

_ANSWER: Final = "answer"


class RewardFunction(Protocol):
    """What TRL calls with a batch: one float per completion; data set columns come as keyword arguments."""

    __name__: str

    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]:
        """Return one reward per completion. Raises ValueError if a required column is missing or has another length."""
        ...


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """One reward for people. `most` and `least` are before weights; `least` is None if there is no lower bound."""

    name: str
    mode: RewardMode
    most: float
    least: float | None
    description: str
    columns: tuple[str, ...]


Scorer = Callable[[str, str | None], float]
"""A reward of one completion's text and its gold answer."""


def _text_only(reward: Callable[[str], float]) -> Scorer:
    return lambda text, _gold: reward(text)


_SCORERS: Final[Mapping[str, Mapping[str, Scorer]]] = {
    "published": {
        "correctness": published.correctness,
        "integer": _text_only(published.integer),
        "strict_format": _text_only(published.strict_format),
        "soft_format": _text_only(published.soft_format),
        "xml_count": _text_only(published.xml_count),
    },
    "fixed": {
        "correctness": fixed.correctness,
        "integer": _text_only(fixed.integer),
        "strict_format": _text_only(fixed.strict_format),
        "soft_format": _text_only(fixed.soft_format),
        "xml_count": _text_only(fixed.xml_count),
    },
}

_MOST: Final = {
    "correctness": CORRECTNESS_PAYS,
    "integer": INTEGER_PAYS,
    "strict_format": FORMAT_PAYS,
    "soft_format": FORMAT_PAYS,
    "xml_count": MARK_PAYS * len(MARKS),
}

_DESCRIPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "published": {
        "correctness": "The text after the last <answer>, or the whole text without one, is exactly the gold answer.",
        "integer": "That text is all digits, with no sign, point or comma.",
        "strict_format": "Six lines and a final newline: the four tags, one line of reasoning, one line of answer.",
        "soft_format": "Starts with <reasoning>...</reasoning><answer>...</answer>, neither block crossing a line.",
        "xml_count": "0.125 per mark found once, less 0.001 per character after an </answer> line, or of all text.",
    },
    "fixed": {
        "correctness": "The last <answer>, if closed, equals the gold answer, by value where both are numbers.",
        "integer": "The last <answer>, if closed, is a number whose value is whole, whatever its sign or unit.",
        "strict_format": "One reasoning block, a newline, one answer block, each tag once on its own line.",
        "soft_format": "Starts with a closed reasoning block, then a closed answer block.",
        "xml_count": "0.125 per mark found once, less 0.001 per character of stripped text after the last </answer>.",
    },
}


def get_rewards(mode: RewardMode, tags: Tags = DEFAULT) -> dict[str, RewardFunction]:
    """Return the five reward functions of `mode` by name, in the order of REWARD_NAMES.

    Raises ValueError for an unknown mode.
    """
    by_name = scorers(mode, tags)
    return {name: _batched(name, by_name[name]) for name in REWARD_NAMES}


def describe(mode: RewardMode) -> list[RewardInfo]:
    """Describe each reward of `mode`, in the order of REWARD_NAMES. Raises ValueError for an unknown mode."""
    _ = scorers(mode)
    return [_info(name, mode) for name in REWARD_NAMES]


def score(completion: Completion, answer: object, mode: RewardMode, tags: Tags = DEFAULT) -> dict[str, float]:
    """Return the five rewards of one completion before weights, and their sum as `total`.

    Raises ValueError for an unknown mode.
    """
    text, gold = _text(completion), _gold(answer)
    rewards = {name: scorer(text, gold) for name, scorer in scorers(mode, tags).items()}
    return {**rewards, "total": sum(rewards.values())}


def scorers(mode: str, tags: Tags = DEFAULT) -> Mapping[str, Scorer]:
    """Return the five scorers of `mode` by name. `tags` is the format that mode `fixed` looks for."""
    if mode not in _SCORERS:
        raise ValueError(f"unknown reward mode {mode!r}: use one of {', '.join(_SCORERS)}")
    if mode == "published" or tags == DEFAULT:
        return _SCORERS[mode]
    return {
        "correctness": lambda text, gold: fixed.correctness(text, gold, tags),
        "integer": lambda text, _gold: fixed.integer(text, tags),
        "strict_format": lambda text, _gold: fixed.strict_format(text, tags),
        "soft_format": lambda text, _gold: fixed.soft_format(text, tags),
        "xml_count": lambda text, _gold: fixed.xml_count(text, tags),
    }


def _info(name: str, mode: RewardMode) -> RewardInfo:
    return RewardInfo(
        name=name,
        mode=mode,
        most=_MOST[name],
        least=None if name == "xml_count" else 0.0,
        description=_DESCRIPTIONS[mode][name],
        columns=_columns(name),
    )


def _columns(name: str) -> tuple[str, ...]:
    return (_ANSWER,) if name == "correctness" else ()


def _batched(name: str, scorer: Scorer) -> RewardFunction:
    needs_answer = _ANSWER in _columns(name)

    def reward(completions: Sequence[Completion], **columns: object) -> list[float]:
        golds = _golds(name, columns, len(completions)) if needs_answer else [None] * len(completions)
        return [scorer(_text(completion), gold) for completion, gold in zip(completions, golds, strict=True)]

    # TRL names its metrics after the function.
    reward.__name__ = reward.__qualname__ = name
    return reward


def _golds(name: str, columns: Mapping[str, object], expected: int) -> list[str | None]:
    answers = columns.get(_ANSWER)
    if not isinstance(answers, Sequence) or isinstance(answers, str):
        raise ValueError(f"reward {name} needs the column {_ANSWER!r}, a list")
    if len(answers) != expected:
        raise ValueError(f"column {_ANSWER!r} has {len(answers)} values for {expected} completions")
    return [_gold(answer) for answer in answers]


def _gold(answer: object) -> str | None:
    """The gold answer as text; None if there is none. No answer equals None."""
    if answer is None:
        return None
    try:
        return str(answer)
    except ValueError:  # an int of more digits than Python will print
        return None


def _text(completion: Completion) -> str:
    """The completion's text; empty for a chat without text, such as a tool call alone."""
    if isinstance(completion, str):
        return completion
    content = completion[0].get("content") if completion else None
    return content if isinstance(content, str) else ""
