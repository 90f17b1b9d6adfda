"""TRL's GRPO trainer with the one hook that records need, and with a memory that a later process can go on from.

Owns what happens between TRL and `step_recorder`: stateless seeds, the rewards as they were paid, the completions
of a step before TRL shuffles them, and the moment a step is done. Owns what the next step depends on besides the
adapter, and how it is put back. It changes nothing of the algorithm.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from grpo_core.errors import JobFailure
from grpo_core.micro_batch import NO_ROOM_TO_DRAW
from grpo_core.records import Completion
from grpo_core.rewards import RewardFunction
from grpo_core.saved_run import unreadable
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
        self._remembered: Mapping[str, Any] | None = None
        self._set_random: Callable[[], None] | None = None
        super().__init__(reward_funcs=[*self._taps], **options)

    def remember(self) -> dict[str, Any]:
        """All that the next step depends on besides the adapter and the random generators, as a tree of tensors."""
        trainer: Any = self  # the libraries' annotations allow for stand-ins without any state
        scaler = trainer.accelerator.scaler
        return {
            "optimizer": trainer.optimizer.state_dict(),
            "parameters": _optimized(trainer),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "tokens_seen": self.state.num_input_tokens_seen,
            # Further passes over the same completions are still to come, or there is nothing left to learn from them.
            "batch": self._buffered_inputs if self.state.global_step % self.num_iterations else None,
            "logprob_difference": self.logprob_difference,
        }

    def train_on(self, step: int, remembered: Mapping[str, Any], set_random: Callable[[], None]) -> None:
        """Train on after `step`, where a trainer with this adapter remembered that; the model must have the adapter.

        Where it is in the data set, transformers works out itself from the number of the step; `set_random` is called
        when it has. Raises `JobFailure` with the code `checkpoint_unreadable` if the optimizers differ.
        """
        self._remembered, self._set_random = remembered, set_random
        self._step = step * self.args.gradient_accumulation_steps
        self._buffered_inputs = self._split_again(remembered["batch"])
        self.logprob_difference = remembered["logprob_difference"]
        state = TrainerState(
            global_step=step,
            num_input_tokens_seen=remembered["tokens_seen"],
            train_batch_size=self.args.train_batch_size,
        )
        state.compute_steps(self.args, self.args.max_steps)  # when to log, which it takes from here and not from `args`
        # transformers reads this one file of what it takes for a checkpoint folder; the rest is asked for below.
        with tempfile.TemporaryDirectory(prefix=".trainer-", dir=self.args.output_dir) as folder:
            state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            self.train(resume_from_checkpoint=folder)

    def _split_again(self, parts: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """A batch on this trainer's device and in its number of parts, which may not be that it was kept in."""
        if parts is None:
            return None
        args: Any = self.args
        device, wanted = self.accelerator.device, args.steps_per_generation
        moved = [{name: _to(value, device) for name, value in part.items()} for part in parts]
        if len(moved) == wanted:
            return moved
        return split_tensor_dict({name: _joined([part[name] for part in moved]) for name in moved[0]}, wanted)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(dataset)
        args: Any = self.args
        steps_an_epoch = len(sampler) // (args.generation_batch_size * args.steps_per_generation)
        # Each epoch's order is the next draw of one generator, and transformers begins at the epoch it is in.
        for _ in range(self._step // args.gradient_accumulation_steps // max(1, steps_an_epoch)):
            next(iter(sampler))
        return sampler

    # What transformers does with a checkpoint folder, four times, from memory: nothing is ever unpickled.

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """The adapter is in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._remembered is None:
            return
        trainer: Any = self
        if self._remembered["parameters"] != _optimized(trainer):
            raise unreadable("The optimizer's state in the checkpoint is of other parameters, or in another order.")
        try:
            trainer.optimizer.load_state_dict(self._remembered["optimizer"])
            trainer.lr_scheduler.load_state_dict(self._remembered["scheduler"])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(f"The optimizer's state in the checkpoint does not fit: {error}") from error

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and self._remembered is not None and scaler is not None:
            scaler.load_state_dict(self._remembered["scaler"] or {})
        self._remembered = None  # it is of no use any more, and as large as the optimizer

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._set_random is not None:
            self._set_random()

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        # One seed a call: transformers' sampler takes none for each row.
        run_seed, step = self.args.seed, self.state.global_step + 1
        seeds = [rollout_seed(run_seed, step)] * len(prompts)
        torch.manual_seed(seeds[0])
        if self.give_seeds is not None:
            seeds = [completion_seed(run_seed, step, index) for index in range(len(prompts))]
            self.give_seeds(seeds)
        began = time.perf_counter()
        try:
            output = super()._generate(prompts)
        except torch.OutOfMemoryError as error:
            raise _no_room_to_draw(error) from error
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


def _no_room_to_draw(error: Exception) -> JobFailure:
    """All completions of a step are drawn together, in however many parts they are trained on."""
    return JobFailure(
        "oom",
        NO_ROOM_TO_DRAW,
        f"Drawing the completions of a step needed more memory than there is: {str(error).splitlines()[0][:500]}",
        hint="Lower sampling.prompts_per_step, sampling.generations or sampling.max_completion_tokens. Smaller parts "
        "of the step (sampling.gradient_accumulation) do not help here.",
    )


def _optimized(trainer: Any) -> list[str]:
    """The names of the parameters in the optimizer's order, in which its state is numbered."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _joined(values: list[Any]) -> Any:
    """A batch's column from its parts; what is no column is the same in all of them."""
    first = values[0]
    return torch.cat(values) if isinstance(first, torch.Tensor) and first.ndim else first


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
