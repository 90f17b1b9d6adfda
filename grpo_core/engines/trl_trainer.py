"""The trainer of the `trl` engine: TRL's model calls and losses, rollouts by a sampler, rows shared by the ranks.

Owns which rows a rank scores and trains, and how many at a time. With one rank, TRL splits a step itself. Invariant: a
step has the same completions and, except for rounding, the same gradient for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from grpo_core.compat.trl import Scores
from grpo_core.engines.shared_trainer import SharedTrainer, pick_rows


class TrlTrainer(SharedTrainer):
    """A `SharedTrainer` with transformers' model."""

    at_once: int
    """Completions of a forward pass, if ranks share a step."""

    def scoring(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        keep: int,
        compute: Callable[[torch.Tensor, torch.Tensor], Scores],
    ) -> Scores:
        if self.team.size == 1 or torch.is_grad_enabled():
            return compute(ids, mask)
        values = torch.zeros(len(ids), keep, device=ids.device)
        for rows in self._own_rows(mask.sum(1).tolist()):
            values[rows] = compute(ids[rows], mask[rows])[0].float()
        self.team.sum(values)
        return values, None, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this rank's share of a part's loss. Gradients are computed a few rows at a time; the caller computes
        that of the last rows."""
        if self.team.size == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        prompts = inputs["prompt_mask"].sum(1).tolist()
        completions = inputs["completion_mask"].sum(1).tolist()
        parts: list[tuple[dict[str, Any], float, int]] = []
        for rows in self._own_rows([sum(pair) for pair in zip(prompts, completions, strict=True)]):
            own = [completions[row] for row in rows]
            picked = {name: pick_rows(value, rows, len(prompts)) for name, value in inputs.items()}
            parts.append((picked, self.weight(own, completions), sum(own)))
        nothing = sum(0.0 * p.sum() for p in model.parameters() if p.requires_grad)
        assert isinstance(nothing, torch.Tensor)
        return self.loss_of_runs(model, parts, nothing, num_items_in_batch)

    def _own_rows(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Return this rank's rows, as many at a time as fit."""
        own = self.team.share(lengths)
        return (own[start : start + self.at_once] for start in range(0, len(own), self.at_once))
