"""TRL's GRPO trainer with the engine's two modes: TRL's loop, losses and optimizers, this engine's rollouts and
gradients.

Owns how a step's completions are generated, how they are split to fit into memory, and how a padded batch becomes
packed groups; `shared_trainer` has what ranks share. Invariant: a step's loss and gradient depend neither on the split
nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch

from grpo_core.compat.trl import OwnModel
from grpo_core.engines.native.adapter import Adapter
from grpo_core.engines.native.decode import Decoder
from grpo_core.engines.native.layout import Group, lay_out, rows_within
from grpo_core.engines.native.packed import Packed
from grpo_core.engines.shared_trainer import SharedTrainer, pick_rows
from grpo_core.engines.team import Order, Team, runs_of


@dataclass(frozen=True, slots=True)
class Modes:
    """The two modes of the model, for the trainer."""

    packed: Packed
    decoder: Decoder
    adapter: Adapter
    team: Team
    budget: int
    """Number of tokens of a forward pass with kept activations."""
    sparing: bool = False
    """Whether activations are computed again in the backward pass of every part; if not, only of parts that are too
    large."""


class DecodingMode:
    """The decoding mode as a sampler of the adapter in training."""

    is_apart = True

    def __init__(self, modes: Modes) -> None:
        self._decoder, self._adapter, self._team = modes.decoder, modes.adapter, modes.team
        self.generate = modes.decoder.generate

    @contextmanager
    def serving(self, *, adapter: bool) -> Generator[None]:
        """Generate with the adapter's present values in this block, or with the base model."""
        self._team.direct(Order.DRAW_ADAPTER if adapter else Order.DRAW_BASE)
        self._decoder.set_adapter(self._adapter if adapter else None)
        yield


@dataclass(frozen=True, slots=True)
class Batch:
    """TRL's padded rows (B × T), with prompts aligned to the right and completions to the left."""

    ids: torch.Tensor
    prompt_width: int
    prompts: list[int]
    completions: list[int]
    """Lengths."""
    begins: list[bool]
    """Whether a row's prompt differs from that of the previous row."""

    @staticmethod
    def of(ids: torch.Tensor, mask: torch.Tensor, keep: int) -> Batch:
        """Make a batch from `ids` and `mask` (B × T), whose last `keep` columns are completions.

        Waits for the device once.
        """
        width = ids.shape[1] - keep
        left, shown = ids[:, :width], mask[:, :width]
        other = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        other[1:] = ((left[1:] != left[:-1]) | (shown[1:] != shown[:-1])).any(1)
        prompts, completions, begins = torch.stack([shown.sum(1), mask[:, width:].sum(1), other.long()]).tolist()
        return Batch(ids, width, prompts, completions, [bool(value) for value in begins])

    def groups(self, rows: range) -> list[tuple[int, Group]]:
        """Return the groups among these rows, each with its first row."""
        found: list[tuple[int, list[int]]] = []
        for row in rows:
            if self.begins[row] or not found:
                found.append((row, []))
            found[-1][1].append(self.completions[row])
        return [(row, Group(self.prompts[row], sizes)) for row, sizes in found]

    def runs_within(self, budget: int) -> list[range]:
        """Return ranges of rows with at most `budget` tokens each, as `rows_within` does."""
        every = range(len(self.prompts))
        return rows_within([group for _, group in self.groups(every)], budget) if every else []

    def cells(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of the stream's tokens in the flattened rows, and those of the completions' tokens."""
        width, stream, targets = self.ids.shape[1], list[torch.Tensor](), list[torch.Tensor]()
        for row in rows:
            end = row * width + self.prompt_width
            if self.begins[row] or row == rows.start:
                stream.append(torch.arange(end - self.prompts[row], end))
            own = torch.arange(end, end + self.completions[row])
            stream.append(own)
            targets.append(own)
        return torch.cat(stream), torch.cat(targets)


class NativeTrainer(OwnModel, SharedTrainer):
    """A `SharedTrainer` that generates with the decoder and trains with the packed mode."""

    modes: Modes
    """Set before the first step."""

    def use(self, modes: Modes) -> None:
        """Set the modes."""
        self.modes = modes
        self.share(modes.team, DecodingMode(modes))

    def forget(self) -> None:
        super().forget()
        del self.modes

    def gradients(self) -> list[torch.Tensor]:
        return self.modes.adapter.gradients()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002 - TRL has none
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this rank's share of a part's loss. Gradients are computed a few groups at a time; the caller computes
        that of the last groups."""
        self.modes.adapter.begin()
        whole = batch = Batch.of(*_rows(inputs))
        if self.modes.team.size > 1:
            own = self._own_rows(whole)
            inputs = {name: pick_rows(value, own, len(whole.prompts)) for name, value in inputs.items()}
            batch = Batch.of(*_rows(inputs)) if own else Batch(whole.ids[:0], whole.prompt_width, [], [], [])
        runs = batch.runs_within(self.modes.budget)
        self.modes.packed.weights.keep_step(max(1, len(runs)), back=True)
        parts = [
            (
                {name: _cut(value, run, len(batch.prompts)) for name, value in inputs.items()},
                self.weight(batch.completions[run.start : run.stop], whole.completions),
                sum(batch.completions[run.start : run.stop]),
            )
            for run in runs
        ]
        nothing = 0.0 * self.modes.adapter.leaves[0].sum() if runs else self._without_rows()
        return self.loss_of_runs(model, parts, nothing, num_items_in_batch)

    def _without_rows(self) -> torch.Tensor:
        """Return the loss of a rank that has no rows: it can be differentiated, and gives other ranks their layers."""
        loss, shards = 0.0 * self.modes.adapter.leaves[0].sum(), self.modes.packed.weights.shards
        if shards is None:
            return loss

        def give(_: torch.Tensor) -> None:
            shards.accompany_back()

        shards.accompany(1)
        loss.register_hook(give)
        return loss

    def _own_rows(self, batch: Batch) -> list[int]:
        """Return this rank's rows: whole groups, if there are enough."""
        team = self.modes.team
        runs = runs_of(list(accumulate(batch.begins)), team.size)
        sizes = [batch.prompts[run.start] + sum(batch.completions[run.start : run.stop]) for run in runs]
        return list(chain.from_iterable(runs[at] for at in team.share(sizes)))

    def score(self, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        modes, batch = self.modes, Batch.of(ids, mask, keep)
        if torch.is_grad_enabled():
            return self._score(batch, range(len(batch.prompts)), keep)
        rows = list(range(len(batch.prompts)))
        if modes.team.size > 1 and (rows := self._own_rows(batch)):
            batch = Batch.of(ids[rows], mask[rows], keep)
        runs = batch.runs_within(modes.budget) if rows else []
        modes.packed.weights.keep_step(len(runs))
        dtype = torch.promote_types(modes.packed.weights.dtype, torch.float32)
        values = torch.zeros(2, len(ids), keep, dtype=dtype, device=ids.device)
        for run in runs:
            values[:, rows[run.start : run.stop]] = torch.stack(self._score(batch, run, keep)).to(dtype)
        modes.team.sum(values)
        return values[0], values[1]

    def _score(self, batch: Batch, run: range, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities and entropies of a range of rows (rows × `keep`), padded with 0."""
        modes, device = self.modes, batch.ids.device
        stream, targets = batch.cells(run)
        layout = lay_out([group for _, group in batch.groups(run)])
        ids = batch.ids.flatten()
        values = modes.packed.logprobs(
            layout.to(device),
            ids[stream.to(device)],
            ids[targets.to(device)],
            modes.adapter if modes.adapter.enabled else None,
            self.temperature,
            sparing=modes.sparing or layout.tokens > modes.budget,
        )
        width = batch.ids.shape[1]
        # From cells of whole rows to cells of completions.
        row = targets // width
        places = ((row - run.start) * keep + targets - row * width - batch.prompt_width).to(device)
        padded = [v.new_zeros(len(run) * keep).index_copy(0, places, v).view(len(run), keep) for v in values]
        return padded[0], padded[1]


def _rows(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Join prompts and completions of a batch as TRL does."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return ids, mask, inputs["completion_ids"].shape[1]


def _cut(value: Any, run: range, rows: int) -> Any:
    """Return a range of a column; other values are returned unchanged."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
        return value[run.start : run.stop]
    return value
