"""The private parts of TRL's GRPOTrainer, and of the transformers Trainer below it, as hooks with public names.

Owns the hooks around a step's rollout, resuming from a step without reading a checkpoint folder, and the replacement of
TRL's generation by a sampler of ours and of its scoring by the native engine's model. Does not know records, graders or
models. Invariant: no other module uses a private name of either trainer, and each name is checked before a trainer is
built.

Shapes: B completions of a batch, P and C the widths of padded prompts (left) and completions (right).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import trl.trainer.utils
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from grpo_core.compat import LibraryChanged, Use, require
from grpo_core.compat.transformers import READ_IN as TRANSFORMERS_READ_IN

READ_IN: Final = "1.15.0"
_TRAINER: Final = "trl.trainer.grpo_trainer:GRPOTrainer"
_BASE: Final = "transformers.trainer:Trainer"
_LOG_PROBS: Final = "_ChunkedLogProbFunction"

USES: Final = (
    Use(name=f"{_TRAINER}._generate", positional=2),
    Use(name=f"{_TRAINER}._generate_single_turn", positional=5),
    Use(name=f"{_TRAINER}._tokenize_prompts", positional=2),
    Use(name=f"{_TRAINER}._generate_and_score_completions", positional=2),
    Use(name=f"{_TRAINER}._calculate_rewards", positional=5),
    Use(name=f"{_TRAINER}._prepare_inputs", positional=2),
    Use(name=f"{_TRAINER}._get_per_token_logps_and_entropies", positional=5, named=("batch_size",)),
    Use(name=f"{_TRAINER}._get_train_sampler", positional=2),
    Use(name="trl.trainer.utils:split_tensor_dict", positional=2),
    Use(name=f"trl.trainer.utils:{_LOG_PROBS}"),
)
TRANSFORMERS_USES: Final = (
    Use(name=f"{_BASE}._load_from_checkpoint", positional=3),
    Use(name=f"{_BASE}._load_optimizer_and_scheduler", positional=2),
    Use(name=f"{_BASE}._load_scaler", positional=2),
    Use(name=f"{_BASE}._load_rng_state", positional=2),
    Use(name="transformers.trainer:TRAINER_STATE_NAME"),
)
HELD: Final = ("_step", "_buffered_inputs", "_metrics", "eos_token_ids")
"""Attributes of a built trainer."""
SAMPLER_LOGPROBS: Final = "sampling_per_token_logps"
"""A batch's column with the sampler's log-probabilities, where it is another program than the trainer; [B, C]."""

Batch = dict[str, Any]
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities and entropies, each [B, C], and an auxiliary loss."""


def check() -> None:
    """Raise `LibraryChanged` if TRL or transformers differs from what this module relies on."""
    require("trl", READ_IN, USES)
    require("transformers", TRANSFORMERS_READ_IN, TRANSFORMERS_USES)


class HookedTrainer(GRPOTrainer):
    """GRPOTrainer with hooks for subclasses. If none is overridden, it trains exactly as TRL's does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in HELD:
            if not hasattr(self, name):
                raise LibraryChanged("trl", READ_IN, f"has no GRPOTrainer.{name}")

    # Hooks

    def generating(self, count: int) -> AbstractContextManager[None]:  # noqa: ARG002 - for subclasses
        """The context in which `count` completions are drawn."""
        return nullcontext()

    def compute_rewards(
        self,
        inputs: list[dict[str, Any]],  # noqa: ARG002 - for subclasses
        completions: list[Any],  # noqa: ARG002
        completion_ids: list[list[int]],  # noqa: ARG002
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The reward of each completion by each reward function, [B, functions]. `compute` makes TRL call them."""
        return compute()

    def on_scored(self, batch: Batch) -> None:
        """Called with each batch when its advantages are known, before it is shuffled."""

    def restore_optimizer(self) -> None:
        """Called while training resumes from a step, when optimizer and scheduler have been made."""

    def restore_scaler(self) -> None:
        """Called next."""

    def restore_random(self) -> None:
        """Called last, when transformers has found its place in the data set."""

    # State

    @property
    def stop_tokens(self) -> Sequence[Any]:
        """The tokens that end a completion."""
        return self.eos_token_ids

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """The values of each metric since the last log, which averages them."""
        return self._metrics["train"]

    def unfinished_batch(self) -> list[Batch] | None:
        """The parts of a batch that more passes will train on. None if the next step draws a new batch."""
        return self._buffered_inputs if self.state.global_step % self.num_iterations else None

    def token_logprobs(self, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """The model's log-probabilities, [B, C], of the last `keep` = C tokens of each row of `ids`, [B, P + C]."""
        scored = self._get_per_token_logps_and_entropies(self.model, ids, mask, keep, batch_size=len(ids))
        return scored[0]

    def train_after(self, step: int, tokens_seen: float, batch: list[Batch] | None) -> None:
        """Resume training after `step`. The model must have the adapter; the `restore_...` hooks restore the rest.

        transformers computes its place in the data set from the number of the step.
        """
        self._step = step * self.args.gradient_accumulation_steps
        self._buffered_inputs = batch
        state = TrainerState(
            global_step=step, num_input_tokens_seen=int(tokens_seen), train_batch_size=self.args.train_batch_size
        )
        state.compute_steps(self.args, self.args.max_steps)  # when to log, which it takes from here and not from `args`
        # transformers reads this one file of what it takes for a checkpoint folder. Below are the others.
        with tempfile.TemporaryDirectory(prefix=".trainer-", dir=self.args.output_dir) as folder:
            state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            self.train(resume_from_checkpoint=folder)

    # Overridden methods of TRL

    def _generate(self, prompts: list[Any]) -> Any:
        with self.generating(len(prompts)):
            return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        batch = super()._generate_and_score_completions(inputs)
        self.on_scored(batch)
        return batch

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        def compute() -> torch.Tensor:
            return super(HookedTrainer, self)._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        return self.compute_rewards(inputs, completions, completion_ids_list, compute)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(dataset)
        args: Any = self.args
        steps_an_epoch = len(sampler) // (args.generation_batch_size * args.steps_per_generation)
        # Each epoch's order is the next draw of one generator, and transformers begins at the epoch it is in.
        for _ in range(self._step // args.gradient_accumulation_steps // max(1, steps_an_epoch)):
            next(iter(sampler))
        return sampler

    # Overridden methods of transformers that would read a checkpoint folder. From memory, so that nothing is unpickled.

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """The adapter is in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore_optimizer()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore_scaler()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore_random()


class _Decoding:
    """A tokenizer whose `batch_decode` is replaced."""

    def __init__(self, tokenizer: Any, texts: Callable[[Any, Callable[[Any], list[str]]], list[str]]) -> None:
        self._tokenizer, self._texts = tokenizer, texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return self._texts(rows, partial(self._tokenizer.batch_decode, **options))


class OwnSampler(HookedTrainer):
    """A trainer whose completions are generated by our own sampler."""

    def sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate a completion for each tokenized prompt: its tokens, and the log-probability of each, if the sampler
        is another program than the trainer and this step compares them."""
        raise NotImplementedError

    def texts(self, rows: Sequence[Sequence[int]], decode: Callable[[Sequence[Sequence[int]]], list[str]]) -> list[str]:
        """The text of each completion. `decode` has the tokenizer decode some."""
        return decode(rows)

    def scoring(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        keep: int,  # noqa: ARG002 - for subclasses
        compute: Callable[[torch.Tensor, torch.Tensor], Scores],
    ) -> Scores:
        """The scores of the last `keep` = C tokens of rows [B, P + C]. `compute` makes TRL compute those of some."""
        return compute(ids, mask)

    def _generate(self, prompts: list[Any]) -> Any:
        trainer: Any = self
        tokenizer = trainer.processing_class
        trainer.processing_class = _Decoding(tokenizer, self.texts)
        try:
            return super()._generate(prompts)
        finally:
            trainer.processing_class = tokenizer

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # A prompt stands there once for each of its completions.
        begins = [at == 0 or prompts[at] != prompts[at - 1] for at in range(len(prompts))]
        ids, images, fields = super()._tokenize_prompts(list(compress(prompts, begins)))
        rows = [np.array(row, dtype=np.int64) for row in ids]
        return [rows[at - 1] for at in accumulate(begins)], images, fields  # only the first is used

    def _generate_single_turn(self, prompt_ids: list[Any], *_: Any, **__: Any) -> Any:
        # TRL makes a tensor of each row of prompts and completions, which takes seven times as long from a list.
        tokens, logprobs = self.sample([row.tolist() for row in prompt_ids])
        return [np.array(row, dtype=np.int64) for row in tokens], logprobs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *arguments: Any, **options: Any
    ) -> Scores:
        def compute(ids: torch.Tensor, mask: torch.Tensor) -> Scores:
            return super(OwnSampler, self)._get_per_token_logps_and_entropies(
                model, ids, mask, logits_to_keep, *arguments, **options
            )

        return self.scoring(input_ids, attention_mask, logits_to_keep, compute)


class OwnModel(OwnSampler):
    """A trainer whose model is our own: it generates and scores, and the completions of a prompt stay together."""

    def score(self, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, each [B, C], of the last `keep` = C tokens of rows [B, P + C]."""
        raise NotImplementedError

    def _get_per_token_logps_and_entropies(
        self, _model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *self.score(input_ids, attention_mask, logits_to_keep), None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # Like TRL's, without its shuffle, which would separate the completions of a group.
        args: Any = self.args
        parts, buffered = args.steps_per_generation, self._buffered_inputs
        if self._step % (parts * self.num_iterations) == 0 or not buffered:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = buffered = split(batch, parts)
        return buffered[self._step % parts]


def split(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch by rows into equal parts."""
    return split_tensor_dict(batch, parts)


def use_log_probs(apply: Callable[..., Any]) -> None:
    """Make TRL in this process compute token log-probabilities with `apply`; its signature is that of TRL's kernel."""
    # TRL looks the name up at each call and calls only `apply`. Without Triton the name is None.
    trl.trainer.utils.__dict__[_LOG_PROBS] = type(_LOG_PROBS, (), {"apply": staticmethod(apply)})


def optimized(trainer: Any) -> list[str]:
    """The names of the parameters in the optimizer's order, in which its state is numbered."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]
