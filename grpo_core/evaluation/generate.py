"""Generates answers in batches and reads them strictly and leniently, item by item.

Owns the protocol (left padding, explicit sampling, seeds that do not depend on the model) and the two readings of an
answer. Works with any causal language model, with or without an adapter. Invariant: two models with the same rows and
`Sampling` get the same seeds, so that their answers can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from grpo_core.datasets import Question, Row
from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.templates import encode
from grpo_core.grading import TOTAL
from grpo_core.reasons import FinishReason
from grpo_core.rewards import score
from grpo_core.rewards.fixed import extract
from grpo_core.rewards.number_parser import read_number, same_answer, to_ascii
from grpo_core.rewards.tags import DEFAULT, Tags
from grpo_core.spec import DataSection

if TYPE_CHECKING:
    import torch

_MAX_DIGITS = 40
# A minus after a digit or a bracket subtracts; anywhere else it is a sign.
_LAST_NUMBER = re.compile(r"(?:(?<![\d.)])[+-])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings for the answers."""

    samples: int = 1
    """Answers to each question."""
    temperature: float = 0.0
    """0 is greedy; otherwise drawn from the whole distribution."""
    max_new_tokens: int = 512
    seed: int = 0
    batch_size: int = 64
    """Sequences at once; a different one draws different samples."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question, and how it ended."""

    text: str
    tokens: int
    """With the end mark."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem:
    """One answer and how it was read."""

    row: int
    sample: int
    seed: int
    question: str
    answer: str
    completion: str
    completion_tokens: int
    finish_reason: FinishReason
    reward: float
    """Plain sum of the five rewards in `fixed` mode."""
    strict: bool
    """Correct, and in the required format."""
    lenient: bool
    """Right, if the last number anywhere in the text is taken as the answer."""
    strict_format: bool
    rewards: Mapping[str, float | None] | None = None
    """Raw rewards by name, in a job with graders; None for a reward that its grader failed to compute."""
    total: float | None = None
    """Total reward, in a job with graders."""

    def as_dict(self) -> dict[str, Any]:
        """The record's form."""
        found = asdict(self)
        return found if self.rewards is not None else {k: v for k, v in found.items() if k not in ("rewards", "total")}

    def value_of(self, metric: str) -> float | None:
        """A reward by its name, or the total."""
        return self.total if metric == TOTAL else (self.rewards or {}).get(metric)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """Means over all items."""

    questions: int
    samples: int
    temperature: float
    strict_accuracy: float
    lenient_accuracy: float
    strict_format_share: float
    truncated_share: float
    reward: float
    completion_tokens: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` returns."""

    items: list[EvaluationItem]
    summary: EvaluationSummary


def evaluate(model: Any, tokenizer: Any, rows: Sequence[Row], data: DataSection, sampling: Sampling) -> Evaluation:
    """Ask the model every row as a job with this `data` section would, and read its answers."""
    asked = [(row, sample) for row in rows for sample in range(sampling.samples)]
    said = ask(model, tokenizer, [row for row, _ in asked], data, sampling)
    items = [
        read(row, answer, sample=sample, seed=seed) for (row, sample), (answer, seed) in zip(asked, said, strict=True)
    ]
    return Evaluation(items, summarise(items, sampling))


def ask(
    model: Any, tokenizer: Any, questions: Sequence[Question], data: DataSection, sampling: Sampling
) -> Generator[tuple[Answer, int]]:
    """One answer to each question, in their order, with the seed it was drawn with; batch by batch, as they come."""
    with _asking(model, tokenizer):
        for start in range(0, len(questions), sampling.batch_size):
            seed = _seed(sampling.seed, start)
            batch = questions[start : start + sampling.batch_size]
            for answer in _sample(model, tokenizer, batch, data, sampling, seed):
                yield answer, seed


def read(row: Row, answer: Answer, *, sample: int = 0, seed: int = 0, tags: Tags = DEFAULT) -> EvaluationItem:
    """Read an answer both ways; `tags` is the format that was asked for."""
    rewards = score(answer.text, row.answer, "fixed", tags)
    return EvaluationItem(
        row=row.row,
        sample=sample,
        seed=seed,
        question=row.question,
        answer=row.answer,
        completion=answer.text,
        completion_tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        reward=rewards["total"],
        strict=rewards["strict_format"] > 0 and rewards["correctness"] > 0,
        lenient=is_right_leniently(answer.text, row.answer, tags),
        strict_format=rewards["strict_format"] > 0,
    )


def summarise(items: Sequence[EvaluationItem], sampling: Sampling) -> EvaluationSummary:
    """The means; there must be an item."""
    return EvaluationSummary(
        questions=len(items) // sampling.samples,
        samples=sampling.samples,
        temperature=sampling.temperature,
        strict_accuracy=statistics.fmean(item.strict for item in items),
        lenient_accuracy=statistics.fmean(item.lenient for item in items),
        strict_format_share=statistics.fmean(item.strict_format for item in items),
        truncated_share=statistics.fmean(item.finish_reason == FinishReason.LENGTH for item in items),
        reward=statistics.fmean(item.reward for item in items),
        completion_tokens=statistics.fmean(item.completion_tokens for item in items),
    )


def last_number(text: str) -> Fraction | None:
    """The last number in a text, whatever stands around it."""
    found = _LAST_NUMBER.findall(to_ascii(text))
    return read_number(found[-1]) if found and len(found[-1]) <= _MAX_DIGITS else None


def is_right_leniently(text: str, answer: str, tags: Tags = DEFAULT) -> bool:
    """Whether the last number in the text is the answer; answers that are no numbers count inside their tags."""
    gold = read_number(answer)
    if gold is None:
        inside = extract(text, tags)
        return inside is not None and same_answer(inside, answer)
    return last_number(text) == gold


def _sample(
    model: Any, tokenizer: Any, questions: Sequence[Question], data: DataSection, sampling: Sampling, seed: int
) -> list[Answer]:
    import torch
    from transformers import GenerationConfig

    ids, mask = _left_padded(tokenizer, questions, data)
    defaults = model.generation_config  # set by `_asking`
    greedy = sampling.temperature == 0
    chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=defaults.eos_token_id,
        pad_token_id=defaults.pad_token_id,
        # Gradient checkpointing turns it off in the model's own settings.
        use_cache=True,
        **chosen,
    )
    torch.manual_seed(seed)
    # Not inference mode: a model that is trained later must not have kept a tensor of it.
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    ends = set(defaults.eos_token_id)
    completions = [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        Answer(text, len(completion), FinishReason.of(completion[-1] in ends))
        for text, completion in zip(texts, completions, strict=True)
    ]


def _left_padded(tokenizer: Any, questions: Sequence[Question], data: DataSection) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    conversations = [messages_for(question, data) for question in questions]
    prompts = encode(tokenizer, conversations)
    width = max(map(len, prompts))
    ids = torch.tensor([[_pad_id(tokenizer)] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and with the first end mark; all of them where there is none."""
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@contextmanager
def _asking(model: Any, tokenizer: Any) -> Generator[None]:
    """Turn off dropout and the model's own sampling defaults, which would replace missing settings."""
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=ends if isinstance(ends, list) else [ends], pad_token_id=_pad_id(tokenizer)
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _seed(run_seed: int, start: int) -> int:
    digest = hashlib.sha256(f"evaluation/{run_seed}/{start}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
