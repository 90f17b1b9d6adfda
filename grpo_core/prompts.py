"""From rows of a data set to the chat prompts a model is asked.

Owns the order of the turns (system prompt, worked examples, question) and the dropping of prompts that are too
long by templated token count. Knows nothing of where rows come from. Invariant: a row that is dropped is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from grpo_core.datasets import DatasetError
from grpo_core.spec import DataSection, JobSpec, Problem

if TYPE_CHECKING:
    from grpo_core.datasets import Row

Message = dict[str, str]

_BATCH = 512


class ChatTokenizer(Protocol):
    """The one thing asked of a tokenizer here; transformers' own has it."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as it will be asked."""

    prompt_id: str
    row: int
    question: str
    answer: str
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that fit, and what became of the others."""

    prompts: list[Prompt]
    dropped: int
    longest_kept: int
    """Tokens of the longest prompt that fits."""
    longest_dropped: int
    """Tokens of the longest prompt that does not; 0 where none was dropped."""


def messages_for(question: str, data: DataSection) -> list[Message]:
    """The chat turns that ask `question`: system prompt unless empty, worked examples, the question."""
    system = [_turn("system", data.system_prompt)] if data.system_prompt else []
    examples = [turn for e in data.examples for turn in (_turn("user", e.question), _turn("assistant", e.answer))]
    return [*system, *examples, _turn("user", question)]


def build_prompts(rows: Sequence[Row], spec: JobSpec, tokenizer: ChatTokenizer) -> PromptSet:
    """Template every row and keep those within `max_prompt_tokens`; `DatasetError` if too few are left for a step."""
    limit = spec.sampling.max_prompt_tokens
    prompts = [
        Prompt(str(row.row), row.row, row.question, row.answer, messages_for(row.question, spec.data)) for row in rows
    ]
    lengths = _token_counts(prompts, tokenizer)
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    result = PromptSet(
        prompts=kept,
        dropped=len(prompts) - len(kept),
        longest_kept=max((length for length in lengths if length <= limit), default=0),
        longest_dropped=max((length for length in lengths if length > limit), default=0),
    )
    _require_enough(result, min(lengths, default=0), spec)
    return result


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _token_counts(prompts: Sequence[Prompt], tokenizer: ChatTokenizer) -> list[int]:
    counts: list[int] = []
    for start in range(0, len(prompts), _BATCH):
        batch = [prompt.messages for prompt in prompts[start : start + _BATCH]]
        encoded = tokenizer.apply_chat_template(batch, add_generation_prompt=True, tokenize=True, return_dict=True)
        counts += [len(ids) for ids in encoded["input_ids"]]
    return counts


def _require_enough(found: PromptSet, shortest: int, spec: JobSpec) -> None:
    limit, needed = spec.sampling.max_prompt_tokens, spec.sampling.prompts_per_step
    if not found.prompts:
        problem = Problem(
            pointer="/sampling/max_prompt_tokens",
            code="all_prompts_too_long",
            detail=f"all {found.dropped} prompts are longer than {limit} tokens; the shortest has {shortest}",
            remedy=f"Set sampling.max_prompt_tokens to {shortest} or more, or shorten the system prompt or examples.",
        )
        raise DatasetError([problem])
    if len(found.prompts) < needed:
        problem = Problem(
            pointer="/sampling/prompts_per_step",
            code="too_few_prompts",
            detail=f"a step asks {needed} different prompts and only {len(found.prompts)} are left "
            f"({found.dropped} were longer than {limit} tokens)",
            remedy=f"Set sampling.prompts_per_step to {len(found.prompts)} or less, or add questions.",
        )
        raise DatasetError([problem])
