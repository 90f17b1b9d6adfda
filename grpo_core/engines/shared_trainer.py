"""A trainer whose steps are shared by several ranks: each does a share of the work, and then all have all results.

Owns how completions, rewards and gradients get to all ranks, and how the loss of some rows becomes that of a step.
Every rank runs TRL's loop completely and on the same batch; which rows a rank computes is for subclasses to say.
Invariant: a step's loss and gradient depend neither on the split into parts nor on the number of ranks, except for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from grpo_core.compat.trl import OwnSampler
from grpo_core.engines.completions import Request, ServingSampler
from grpo_core.engines.team import Team
from grpo_core.engines.trainer import RecordingTrainer, Rollout
from grpo_core.grading import Payment

RECORDED: Final = ("kl", "entropy")
"""Metrics that TRL averages over tokens and that a step's record has."""


class SharedTrainer(OwnSampler, RecordingTrainer):
    """A `RecordingTrainer` of one of several ranks, whose completions come from a separate sampler."""

    team: Team
    sampler: ServingSampler

    def share(self, team: Team, sampler: ServingSampler) -> None:
        """Set what the steps need."""
        self.team, self.sampler = team, sampler
        self.give_seeds = lambda _: None  # one for each completion, which `sample` reads from `_seeds`

    def forget(self) -> None:
        del self.sampler

    def sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        sampler, tokens = self.sampler, self.max_completion_length
        assert tokens is not None
        requests = [Request(ids, seed) for ids, seed in zip(prompts, self._seeds, strict=True)]
        with sampler.serving(adapter=True):
            drawn = self.team.draw(
                sampler,
                requests,
                tokens=tokens,
                logprobs=(compares := sampler.is_apart and self.compares()),
                temperature=self.temperature,
                penalty=self.repetition_penalty,
            )
        return [one.tokens for one in drawn], [one.logprobs for one in drawn] if compares else None

    def texts(self, rows: Sequence[Sequence[int]], decode: Callable[[Sequence[Sequence[int]]], list[str]]) -> list[str]:
        return self.team.texts(rows, decode)

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients that the ranks sum; equal shapes in an equal order on every rank."""
        model: Any = self.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # on a rank that had no rows
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in trained]

    def compute_rewards(
        self, inputs: Any, completions: Any, completion_ids: Any, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        team = self.team
        if team.size == 1:
            return compute()
        # Only rank 0 calls graders, because they may cost money, or answer differently a second time.
        totals = torch.zeros(len(completions), dtype=torch.float64)
        if team.is_lead:
            with team.apart():
                compute()
            totals = torch.tensor([payment.total for payment in self._tap.paid], dtype=torch.float64)
        team.sum(totals)
        if not team.is_lead:
            columns = {name: [row[name] for row in inputs] for name in inputs[0]}
            self._tap.rollout = Rollout(completions, completion_ids, columns)
            self._tap.paid = [Payment(rewards={}, total=total) for total in totals.tolist()]
        return totals[:, None].to(self.accelerator.device, torch.float32)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with self.team.working():
            loss = super().training_step(*arguments, **options)
        if self.team.size > 1:
            if self.accelerator.sync_gradients:
                self.team.sum_joined(self.gradients())
            self.team.sum(loss)
        return loss

    def loss_of_runs(
        self,
        model: Any,
        parts: Sequence[tuple[dict[str, Any], float, int]],
        nothing: torch.Tensor,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a rank's rows, from `parts` of them: each its inputs, the weight of its loss, its tokens.

        Gradients are computed part by part; the caller computes those of the last part. A rank without rows returns
        `nothing`, a zero that can be differentiated.
        """
        marks = {name: len(self.train_metrics[name]) for name in RECORDED}
        loss: Any = nothing if not parts else 0.0
        for at, (inputs, weight, _) in enumerate(parts):
            one = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) * weight
            if at < len(parts) - 1:
                self.accelerator.backward(one)
                one = one.detach()
            loss = loss + one
        self._join_metrics(marks, [tokens for _, _, tokens in parts])
        return loss

    def weight(self, completions: Sequence[int], of: Sequence[int]) -> float:
        """Return the weight of the loss of completions in that `of` all of a part, because TRL averages over the rows
        it gets; both are lengths."""
        if self.loss_type == "dapo":
            return 1.0  # TRL divides by the tokens of the whole step
        if self.loss_type == "bnpo":
            return sum(completions) / max(1, sum(of))
        return len(completions) / len(of)

    def _join_metrics(self, marks: Mapping[str, int], tokens: Sequence[int]) -> None:
        """Replace the means over parts, which start at `marks`, by one over all tokens of all ranks."""
        team, metrics = self.team, self.train_metrics
        if team.size == 1 and len(tokens) == 1:
            return
        recorded = [name for name in RECORDED if name != "kl" or self.beta]
        sums = [sum(v * n for v, n in zip(metrics[name][marks[name] :], tokens, strict=True)) for name in recorded]
        totals = torch.tensor([*sums, sum(tokens)], dtype=torch.float64)
        team.sum(totals)
        for name, total in zip(recorded, (totals[:-1] / totals[-1].clamp_min(1)).tolist(), strict=True):
            metrics[name][marks[name] :] = [total]


def pick_rows(value: Any, picked: Sequence[int] | range, rows: int) -> Any:
    """Return some rows of a column of `rows` rows; other values are returned unchanged."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
        return value[torch.tensor(picked, dtype=torch.long, device=value.device)]
    return value
