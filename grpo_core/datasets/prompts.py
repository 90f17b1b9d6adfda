"""Makes chat prompts from rows of a data set.

Owns the order of the turns (system prompt, worked examples, question) and drops prompts that have too many tokens after
the chat template. Invariant: every dropped row is counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_core.datasets.rows import DatasetError, Message, Question
from grpo_core.datasets.templates import ChatTokenizer, encode
from grpo_core.reasons import FailureCode
from grpo_core.spec import DataSection, JobSpec, Problem

if TYPE_CHECKING:
    from grpo_core.datasets import Row


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model receives it."""

    prompt_id: str
    row: int
    question: str
    answer: str
    messages: list[Message]
    item: str = "{}"
    """The row's columns as a JSON object, if graders read them."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that fit, and the number and length of the others."""

    prompts: list[Prompt]
    dropped: int
    longest_kept: int
    """Tokens of the longest prompt that fits."""
    longest_dropped: int
    """Tokens of the longest prompt that does not; 0 where none was dropped."""


def messages_for(question: Question, data: DataSection) -> list[Message]:
    """Return the chat turns for `question`: the system prompt unless it is empty, worked examples, the question.

    A chat that begins with its own system turns keeps them in place of the system prompt.
    """
    turns = (("user", question),) if isinstance(question, str) else question.turns or (("user", question.question),)
    own = [_turn(role, text) for role, text in itertools.takewhile(lambda turn: turn[0] == "system", turns)]
    system = own or ([_turn("system", data.system_prompt)] if data.system_prompt else [])
    return [*system, *_worked(data), *(_turn(role, text) for role, text in turns[len(own) :])]


def conversation_for(given: Sequence[Mapping[str, str]], data: DataSection) -> list[Message]:
    """Return a conversation as a served model reads it: after the job's system prompt and worked examples, unless one
    of its turns is a system message."""
    turns = [dict(message) for message in given]
    if any(message["role"] == "system" for message in turns):
        return turns
    system = [_turn("system", data.system_prompt)] if data.system_prompt else []
    return [*system, *_worked(data), *turns]


def build_prompts(rows: Sequence[Row], spec: JobSpec, tokenizer: ChatTokenizer) -> PromptSet:
    """Apply the chat template to every row and keep prompts of at most `max_prompt_tokens`.

    Raises `DatasetError` if too few are left for a step.
    """
    limit = spec.sampling.max_prompt_tokens
    prompts = [
        Prompt(str(row.row), row.row, row.question, row.answer, messages_for(row, spec.data), row.item) for row in rows
    ]
    lengths = [len(ids) for ids in encode(tokenizer, [prompt.messages for prompt in prompts])]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    result = PromptSet(
        prompts=kept,
        dropped=len(prompts) - len(kept),
        longest_kept=max((length for length in lengths if length <= limit), default=0),
        longest_dropped=max((length for length in lengths if length > limit), default=0),
    )
    _require_enough(result, min(lengths, default=0), spec)
    return result


def _worked(data: DataSection) -> list[Message]:
    """The worked examples as turns."""
    return [turn for e in data.examples for turn in (_turn("user", e.question), _turn("assistant", e.answer))]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _require_enough(found: PromptSet, shortest: int, spec: JobSpec) -> None:
    limit, needed = spec.sampling.max_prompt_tokens, spec.sampling.prompts_per_step
    if not found.prompts:
        problem = Problem(
            pointer="/sampling/max_prompt_tokens",
            code=FailureCode.ALL_PROMPTS_TOO_LONG,
            detail=f"all {found.dropped} prompts are longer than {limit} tokens; the shortest has {shortest}",
            remedy=f"Set sampling.max_prompt_tokens to {shortest} or more, or shorten the system prompt or examples.",
        )
        raise DatasetError([problem])
    if len(found.prompts) < needed:
        problem = Problem(
            pointer="/sampling/prompts_per_step",
            code=FailureCode.TOO_FEW_PROMPTS,
            detail=f"a step needs {needed} different prompts and only {len(found.prompts)} are left "
            f"({found.dropped} were longer than {limit} tokens)",
            remedy=f"Set sampling.prompts_per_step to {len(found.prompts)} or less, or add questions.",
        )
        raise DatasetError([problem])
