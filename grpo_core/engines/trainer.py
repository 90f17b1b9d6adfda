"""The GRPO trainer of a run: TRL's, which records every completion and can save and restore its state.

Owns what happens between TRL and `step_recorder`: stateless seeds, the rewards before rounding, the completions of a
step before TRL shuffles them, and the end of a step. Owns the state on which the next step depends beside the adapter;
`compat.trl` accesses TRL's private attributes. Invariant: the algorithm is TRL's, unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_core.checkpoints.manifest import unreadable
from grpo_core.compat.trl import SAMPLER_LOGPROBS, HookedTrainer, optimized, split
from grpo_core.errors import JobFailure
from grpo_core.grading import TOTAL, Graded, Grading, Payment
from grpo_core.monitoring.step_recorder import StepRecorder, Update
from grpo_core.reasons import FailureCode, FinishReason
from grpo_core.run_dir.records import Completion


def rollout_seed(run_seed: int, step: int) -> int:
    """Return the seed of a step's sampling, from run and step alone, so that a resumed run samples the same."""
    digest = hashlib.sha256(f"rollout/{run_seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: what a Parquet int64 holds


def completion_seed(run_seed: int, step: int, index: int) -> int:
    """Return the seed of one completion of a step, for samplers with a seed for each."""
    digest = hashlib.sha256(f"rollout/{run_seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


DIFFERENCE_EVERY = 5
"""Steps between two comparisons of sampler and trainer; each takes the forward pass of a few completions."""
DIFFERENCE_ROWS = 4


@dataclass(frozen=True)
class Rollout:
    """The arguments of TRL's reward function: a step's completions, their tokens, and the columns of the data set."""

    completions: Sequence[Any] = ()
    completion_ids: Sequence[list[int]] = ()
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])


class PaymentTap:
    """TRL's only reward function, which returns the total reward of each completion.

    It keeps its arguments, the rewards, which TRL rounds to 32 bits, and the time they took.
    """

    __name__ = TOTAL  # TRL names its metrics after it

    def __init__(self, grading: Grading, generations: int) -> None:
        self._grading, self._generations = grading, generations
        self.rollout = Rollout()
        self.paid: list[Payment] = []
        self.seconds = 0.0
        self.step = 0
        """The step of the next completions."""

    def __call__(
        self, completions: Sequence[Any], *, completion_ids: Sequence[list[int]], **columns: Any
    ) -> list[float | None]:
        self.rollout = Rollout(completions, completion_ids, columns)
        began = time.perf_counter()
        graded = [
            Graded(
                text=completion[0]["content"],
                answer=answer,
                item=json.loads(item),
                prompt_id=prompt_id,
                number=index % self._generations,
            )
            for index, (completion, answer, prompt_id, item) in enumerate(
                zip(completions, columns["answer"], columns["prompt_id"], columns["item"], strict=True)
            )
        ]
        try:
            self.paid = self._grading.pay(graded, step=self.step)
        except JobFailure:
            raise
        except Exception as error:
            raise JobFailure(
                FailureCode.REWARD_FAILED,
                f"The rewards raised {type(error).__name__}: {error}",
                hint="Check rewards and data.answer_column.",
            ) from error
        self.seconds = time.perf_counter() - began
        if not all(math.isfinite(payment.total) for payment in self.paid):
            raise JobFailure(
                FailureCode.REWARD_NOT_FINITE,
                "The reward of a completion is not a finite number.",
                hint="Rewards must be finite; check the graders and the formula.",
            )
        return [payment.total for payment in self.paid]


class RecordingTrainer(HookedTrainer):
    """A GRPOTrainer that passes every completion to the recorder, before the batch is shuffled."""

    give_seeds: Callable[[Sequence[int]], None] | None = None
    """Set by an engine whose sampler has a seed for each completion."""
    logprob_difference: tuple[float, float] | None = None
    """Mean and largest absolute difference between the sampler's log-probabilities and the trainer's in this step."""

    def __init__(
        self,
        *,
        recorder: StepRecorder,
        grading: Grading,
        **options: Any,
    ) -> None:
        self._recorder = recorder
        self._tap = PaymentTap(grading, options["args"].num_generations)
        self._seeds: Sequence[int] = ()
        self._generation_seconds = 0.0
        self._remembered: Mapping[str, Any] = {}
        self._set_random: Callable[[], None] = lambda: None
        super().__init__(reward_funcs=[self._tap], **options)

    def forget(self) -> None:
        """Release what the engine gave."""

    def remember(self) -> dict[str, Any]:
        """Return the state on which the next step depends, beside adapter and random generators, as a tree of
        tensors."""
        trainer: Any = self  # the libraries' annotations also allow objects without this state
        scaler = trainer.accelerator.scaler
        return {
            "optimizer": trainer.optimizer.state_dict(),
            "parameters": optimized(trainer),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "tokens_seen": self.state.num_input_tokens_seen,
            "batch": self.unfinished_batch(),
            "logprob_difference": self.logprob_difference,
        }

    def train_on(self, step: int, remembered: Mapping[str, Any], set_random: Callable[[], None]) -> None:
        """Continue after `step` with the state of an earlier trainer. The model must have the adapter of that step.

        `set_random` is called once transformers has found its position in the data set. Raises `JobFailure` with the
        code `checkpoint_unreadable` if the optimizers differ.
        """
        self._remembered, self._set_random = remembered, set_random
        self.logprob_difference = remembered["logprob_difference"]
        self.train_after(step, remembered["tokens_seen"], self._split_again(remembered["batch"]))

    def _split_again(self, parts: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return a batch on this trainer's device and in its number of parts, which may have changed."""
        if parts is None:
            return None
        args: Any = self.args
        device, wanted = self.accelerator.device, args.steps_per_generation
        moved = [{name: _to(value, device) for name, value in part.items()} for part in parts]
        if len(moved) == wanted:
            return moved
        return split({name: _joined([part[name] for part in moved]) for name in moved[0]}, wanted)

    def restore_optimizer(self) -> None:
        trainer: Any = self
        if self._remembered["parameters"] != optimized(trainer):
            raise unreadable("The optimizer's state in the checkpoint has other parameters, or another order.")
        try:
            trainer.optimizer.load_state_dict(self._remembered["optimizer"])
            trainer.lr_scheduler.load_state_dict(self._remembered["scheduler"])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(f"The optimizer's state in the checkpoint does not fit: {error}") from error

    def restore_scaler(self) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.load_state_dict(self._remembered["scaler"] or {})
        self._remembered = {}  # no longer needed, and as large as the optimizer

    def restore_random(self) -> None:
        self._set_random()

    @contextmanager
    def generating(self, count: int) -> Generator[None]:
        """Seed a step's sampling and time it."""
        # One seed per call, for samplers that have no seed for each row.
        run_seed, step = self.args.seed, self.state.global_step + 1
        self._tap.step = step
        self._seeds = [rollout_seed(run_seed, step)] * count
        torch.manual_seed(self._seeds[0])
        if self.give_seeds is not None:
            self._seeds = [completion_seed(run_seed, step, index) for index in range(count)]
            self.give_seeds(self._seeds)
        began = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise _no_room_to_draw(error) from error
        self._generation_seconds = time.perf_counter() - began

    def on_scored(self, batch: Mapping[str, Any]) -> None:
        self._recorder.record_rollout(
            self.state.global_step + 1,
            self._completions(batch),
            generation_seconds=self._generation_seconds,
            reward_seconds=self._tap.seconds,
        )
        self.logprob_difference = self._compare(batch)

    def compares(self) -> bool:
        """Whether this step compares the sampler's log-probabilities with the trainer's."""
        step = self.state.global_step + 1
        return step == 1 or step % DIFFERENCE_EVERY == 0

    def _compare(self, batch: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return mean and largest difference of the sampler's and the trainer's log-probabilities, for some
        completions.

        The tensors in `batch` are completions × tokens.
        """
        told, step, group = batch.get(SAMPLER_LOGPROBS), self.state.global_step + 1, self.num_generations or 1
        if told is None or not self.compares():
            return None
        first = step % (len(told) // group) * group
        rows = slice(first, first + min(group, DIFFERENCE_ROWS))
        prompt_mask, completion_mask = batch["prompt_mask"][rows], batch["completion_mask"][rows]
        # All are of one prompt, so its padding can be cut off, and the rows have the same layout in both.
        prompt = slice(prompt_mask.shape[1] - int(prompt_mask[0].sum()), None)
        with torch.no_grad():
            scored = self.token_logprobs(
                torch.cat([batch["prompt_ids"][rows, prompt], batch["completion_ids"][rows]], dim=1),
                torch.cat([prompt_mask[:, prompt], completion_mask], dim=1),
                completion_mask.shape[1],
            )
        expected = told[rows].float()
        # vLLM returns no value for some tokens, for which TRL sets NaN.
        difference = (scored.float() - expected).abs()[completion_mask.bool() & ~expected.isnan()]
        return (difference.mean().item(), difference.max().item()) if difference.numel() else None

    def _completions(self, batch: Mapping[str, Any]) -> list[Completion]:
        drawn, group_size = self._tap.rollout, self.num_generations
        assert group_size is not None
        prompt_tokens, advantages = batch["prompt_mask"].sum(1).tolist(), batch["advantages"].tolist()
        return [
            Completion(
                prompt_id=drawn.columns["prompt_id"][index],
                row=drawn.columns["row"][index],
                sample=index % group_size,
                seed=self._seeds[index],
                prompt=drawn.columns["question"][index],
                answer=drawn.columns["answer"][index],
                completion=drawn.completions[index][0]["content"],
                rewards=paid.rewards,
                reward_total=paid.total,
                advantage=advantages[index],
                prompt_tokens=prompt_tokens[index],
                completion_tokens=len(ids),
                finish_reason=FinishReason.of(len(ids) > 0 and ids[-1] in self.stop_tokens),
                adapter_version=self.state.global_step,
                skipped=paid.skipped,
                grader_errors={name: error.as_dict() for name, error in paid.errors.items()},
                grader_details=paid.details,
            )
            for index, (ids, paid) in enumerate(zip(drawn.completion_ids, self._tap.paid, strict=True))
        ]


def _no_room_to_draw(error: Exception) -> JobFailure:
    """Return the failure of a step whose completions, which are all generated together, need too much memory."""
    return JobFailure(
        FailureCode.OUT_OF_MEMORY_IN_ROLLOUT,
        f"Generating the completions of a step needed more memory than there is: {str(error).splitlines()[0][:500]}",
        hint="Lower sampling.prompts_per_step, sampling.generations or sampling.max_completion_tokens. Smaller parts "
        "of the step (sampling.gradient_accumulation) do not help here.",
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _joined(values: list[Any]) -> Any:
    """Join the parts of a batch's column. Values that are not columns are equal in all parts."""
    first = values[0]
    return torch.cat(values) if isinstance(first, torch.Tensor) and first.ndim else first


class StepCallback(TrainerCallback):
    """Times each step, records it once its metrics are known, and then calls `after_step`."""

    def __init__(self, recorder: StepRecorder, trainer: RecordingTrainer, after_step: Callable[[int], bool]) -> None:
        self._recorder = recorder
        self._trainer = trainer
        self._after_step = after_step
        """Called after each step. Returns True to stop training."""
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "grad_norm" not in logs:
            return  # the summary at the end of training
        state.log_history.clear()  # it would grow with every step and is not used
        mean, most = self._trainer.logprob_difference or (None, None)
        self._recorder.record_update(
            Update(
                step=state.global_step,
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                # Unsloth logs 0 without such a term.
                kl=logs.get("kl") if args.beta else None,
                entropy=logs.get("entropy"),
                seconds=time.perf_counter() - self._began,
                gpu_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if args.device.type == "cuda" else None,
                logprob_diff_mean=mean,
                logprob_diff_max=most,
            )
        )
        if self._after_step(state.global_step):
            control.should_training_stop = True
