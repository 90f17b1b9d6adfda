"""TRL's GRPO trainer with the one hook that records need.

Owns what happens between TRL and `step_recorder`: stateless seeds, the rewards as they were paid, the completions
of a step before TRL shuffles them, and the moment a step is done. It changes nothing of the algorithm.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_core.errors import JobFailure
from grpo_core.records import Completion
from grpo_core.rewards import RewardFunction
from grpo_core.step_recorder import StepRecorder, Update


def rollout_seed(run_seed: int, step: int) -> int:
    """The seed of a step's sampling: a function of run and step alone, so that a resumed run draws the same."""
    digest = hashlib.sha256(f"rollout/{run_seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: what a Parquet int64 holds


def completion_seed(run_seed: int, step: int, index: int) -> int:
    """The seed of one completion of a step, for samplers that take one for each."""
    digest = hashlib.sha256(f"rollout/{run_seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


DIFFERENCE_EVERY = 5
"""Steps between two comparisons of rollout and trainer: each costs the forward pass of a few completions."""
DIFFERENCE_ROWS = 4


class RewardTap:
    """A reward function that keeps what it paid in full precision (TRL rounds to 32 bits) and how long it took."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.__name__ = name  # TRL names its metrics after it
        self._function = function
        self.paid: list[float] = []
        self.seconds = 0.0

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        began = time.perf_counter()
        try:
            self.paid = self._function(completions, **columns)
        except Exception as error:
            raise JobFailure(
                "reward",
                "reward_failed",
                f"The reward {self.__name__} raised {type(error).__name__}: {error}",
                hint="Check rewards.mode and data.answer_column.",
            ) from error
        self.seconds = time.perf_counter() - began
        if not all(math.isfinite(value) for value in self.paid):
            raise JobFailure(
                "reward",
                "reward_not_finite",
                f"The reward {self.__name__} paid a value that is no finite number.",
                hint="Rewards must be finite; check the function.",
            )
        return [*self.paid]


@dataclass
class _Drawn:
    """What a call of the sampler returned."""

    seeds: Sequence[int] = ()
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    logprobs: list[list[float | None]] | None = None
    """Of each token by the sampler's own account, where it is another program than the trainer."""
    seconds: float = 0.0


class RecordingTrainer(GRPOTrainer):
    """GRPOTrainer whose every completion reaches the recorder, keyed before the batch is shuffled."""

    give_seeds: Callable[[Sequence[int]], None] | None = None
    """Set by an engine whose sampler takes a seed for each completion."""
    logprob_difference: tuple[float, float] | None = None
    """Mean and largest absolute difference between the sampler's log-probabilities and the trainer's in this step."""

    def __init__(
        self,
        *,
        recorder: StepRecorder,
        rewards: Mapping[str, RewardFunction],
        weights: Mapping[str, float],
        **options: Any,
    ) -> None:
        self._recorder = recorder
        self._taps = [RewardTap(name, function) for name, function in rewards.items()]
        self._weights = weights
        self._drawn = _Drawn()
        super().__init__(reward_funcs=[*self._taps], **options)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        # One seed a call: transformers' sampler takes none for each row.
        run_seed, step = self.args.seed, self.state.global_step + 1
        seeds = [rollout_seed(run_seed, step)] * len(prompts)
        torch.manual_seed(seeds[0])
        if self.give_seeds is not None:
            seeds = [completion_seed(run_seed, step, index) for index in range(len(prompts))]
            self.give_seeds(seeds)
        began = time.perf_counter()
        output = super()._generate(prompts)
        self._drawn = _Drawn(seeds, output[0], output[1], output[3], output[4], time.perf_counter() - began)
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._recorder.record_rollout(
            self.state.global_step + 1,
            self._completions(inputs, batch["advantages"].tolist()),
            generation_seconds=self._drawn.seconds,
            reward_seconds=sum(tap.seconds for tap in self._taps),
        )
        self.logprob_difference = self._compare(batch)
        return batch

    def _compare(self, batch: Mapping[str, Any]) -> tuple[float, float] | None:
        """How far the sampler's log-probabilities are from the trainer's, on some completions of one prompt."""
        told, step, group = self._drawn.logprobs, self.state.global_step + 1, self.num_generations or 1
        if told is None or (step > 1 and step % DIFFERENCE_EVERY):
            return None
        first = step % (len(told) // group) * group
        rows = slice(first, first + min(group, DIFFERENCE_ROWS))
        prompt_mask, completion_mask = batch["prompt_mask"][rows], batch["completion_mask"][rows]
        # One prompt has one length: without its padding every way of laying out the rows is the same.
        prompt = slice(prompt_mask.shape[1] - int(prompt_mask[0].sum()), None)
        with torch.no_grad():
            scored = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"][rows, prompt], batch["completion_ids"][rows]], dim=1),
                torch.cat([prompt_mask[:, prompt], completion_mask], dim=1),
                completion_mask.shape[1],
                batch_size=completion_mask.shape[0],
            )[0]
        expected = torch.full_like(scored, math.nan, dtype=torch.float32)
        for row, values in zip(expected, told[rows], strict=True):
            # vLLM tells None where it has no number.
            row[: len(values)] = torch.tensor([math.nan if value is None else value for value in values])
        difference = (scored.float() - expected).abs()[completion_mask.bool() & ~expected.isnan()]
        return (difference.mean().item(), difference.max().item()) if difference.numel() else None

    def _completions(self, inputs: list[dict[str, Any]], advantages: list[float]) -> list[Completion]:
        drawn, version, group_size = self._drawn, self.state.global_step, self.num_generations
        assert group_size is not None
        records: list[Completion] = []
        for index, row in enumerate(inputs):
            rewards = {tap.__name__: tap.paid[index] for tap in self._taps}
            ids = drawn.completion_ids[index]
            records.append(
                Completion(
                    prompt_id=row["prompt_id"],
                    row=row["row"],
                    sample=index % group_size,
                    seed=drawn.seeds[index],
                    prompt=row["question"],
                    answer=row["answer"],
                    completion=drawn.completions[index][0]["content"],
                    rewards=rewards,
                    reward_total=sum(self._weights[name] * value for name, value in rewards.items()),
                    advantage=advantages[index],
                    prompt_tokens=len(drawn.prompt_ids[index]),
                    completion_tokens=len(ids),
                    finish_reason="stop" if ids and ids[-1] in self.eos_token_ids else "length",
                    adapter_version=version,
                )
            )
        return records


class StepCallback(TrainerCallback):
    """Times each step, reports it when its metrics are known, and then lets the engine act on it."""

    def __init__(self, recorder: StepRecorder, trainer: RecordingTrainer, after_step: Callable[[int], bool]) -> None:
        self._recorder = recorder
        self._trainer = trainer
        self._after_step = after_step
        """Told of a finished step; answers whether to stop."""
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "grad_norm" not in logs:
            return  # the summary at the end of training
        state.log_history.clear()  # it would grow with every step, and nobody reads it
        mean, most = self._trainer.logprob_difference or (None, None)
        self._recorder.record_update(
            Update(
                step=state.global_step,
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                # Unsloth gives 0 where there is no such term.
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
