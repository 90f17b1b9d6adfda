"""Packs groups of completions into one stream of tokens, in which each prompt occurs once.

Owns the order of the stream and its index tables, which depend on lengths alone. Invariant: the keys of a completion
are those of its prompt followed by its own, so that causal attention aligned to the end needs no other mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Group:
    """The length of a prompt, at least 1, and of each of its completions."""

    prompt: int
    completions: Sequence[int]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Rows of the stream in another order, some of them copied, and how to sum the copies in the backward pass."""

    rows: torch.Tensor
    once: torch.Tensor
    """Positions of rows that occur once."""
    shared: torch.Tensor
    """Rows that occur more than once."""
    places: torch.Tensor
    """Positions of each such row's copies, filled up with -1: rows × copies."""

    def to(self, device: torch.device) -> Copies:
        """The same with its tables on a device."""
        return Copies(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Positions in the stream, in which each group is its prompt followed by its completions."""

    positions: torch.Tensor
    """Position of each token of the stream in its text."""
    predictors: Copies
    """For each token of the completions, in order, the row that predicts it; for a first token, the prompt's last
    row."""
    keys: Copies
    """Rows of the gathered keys: a prompt's rows for itself and again for each of its completions."""
    query_ends: torch.Tensor
    """Cumulative lengths of the segments' queries, starting with 0."""
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int

    @property
    def tokens(self) -> int:
        return self.positions.shape[0]

    def to(self, device: torch.device) -> Layout:
        """The same with its tables on a device."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {
            name: value if isinstance(value, int) else value.to(device) for name, value in values.items()
        }
        return Layout(**moved)


class _Table:
    """Builds a `Copies`."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._once: list[torch.Tensor] = []
        self._shared: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self.size = 0

    def once(self, rows: torch.Tensor) -> None:
        self._rows.append(rows)
        self._once.append(torch.arange(self.size, self.size + len(rows)))
        self.size += len(rows)

    def copy(self, rows: torch.Tensor) -> int:
        """Add a copy of rows. Returns its position."""
        self._rows.append(rows)
        self.size += len(rows)
        return self.size - len(rows)

    def share(self, rows: torch.Tensor, begins: Sequence[int], most: int) -> None:
        """Record the positions of rows' copies."""
        self._shared.append(rows)
        at = torch.arange(len(rows))[:, None] + torch.tensor(begins, dtype=torch.long)[None]
        self._places.append(torch.nn.functional.pad(at, (0, most - len(begins)), value=-1))

    def done(self) -> Copies:
        none = torch.empty(0, dtype=torch.long)
        return Copies(
            rows=torch.cat([none, *self._rows]),
            once=torch.cat([none, *self._once]),
            shared=torch.cat([none, *self._shared]),
            places=torch.cat(self._places),
        )


def lay_out(groups: Sequence[Group]) -> Layout:
    """Return the layout of groups, on the CPU."""
    positions: list[torch.Tensor] = []
    queries: list[int] = []
    seen: list[int] = []
    keys, predictors = _Table(), _Table()
    row, most = 0, max(len(group.completions) for group in groups) + 1
    for group in groups:
        prompt = torch.arange(row, row + group.prompt)
        positions.append(torch.arange(group.prompt))
        queries.append(group.prompt)
        seen.append(group.prompt)
        copies, firsts = [keys.copy(prompt)], list[int]()
        row += group.prompt
        for length in filter(None, group.completions):
            own = torch.arange(row, row + length)
            positions.append(torch.arange(group.prompt, group.prompt + length))
            queries.append(length)
            seen.append(group.prompt + length)
            firsts.append(predictors.copy(prompt[-1:]))
            predictors.once(own[:-1])
            copies.append(keys.copy(prompt))
            keys.once(own)
            row += length
        keys.share(prompt, copies, most)
        predictors.share(prompt[-1:], firsts, most)
    return Layout(
        positions=torch.cat(positions),
        predictors=predictors.done(),
        keys=keys.done(),
        query_ends=_ends(queries),
        key_ends=_ends(seen),
        longest_query=max(queries),
        longest_key=max(seen),
    )


def parts_within(groups: Sequence[Group], budget: int) -> list[range]:
    """Return ranges of groups with at most `budget` tokens each. A larger group is a separate range."""
    parts: list[range] = []
    start, tokens = 0, 0
    for at, group in enumerate(groups):
        if at > start and tokens + group.tokens > budget:
            parts.append(range(start, at))
            start, tokens = at, 0
        tokens += group.tokens
    return [*parts, range(start, len(groups))]


def rows_within(groups: Sequence[Group], budget: int) -> list[range]:
    """Return ranges of completions, counted over all groups, with at most `budget` tokens each, including prompts.

    Groups stay whole unless they are larger than the budget; a completion is never split.
    """
    runs: list[range] = []
    start = row = tokens = 0
    for group in groups:
        sizes = list(group.completions)
        pieces = [(group.tokens, len(sizes))]
        if group.tokens > budget:
            pieces = [(group.prompt + size, 1) for size in sizes]
        for piece, (size, completions) in enumerate(pieces):
            more = size - group.prompt if piece and row > start else size
            if row > start and tokens + more > budget:
                runs.append(range(start, row))
                start, tokens, more = row, 0, size
            tokens += more
            row += completions
    return [*runs, range(start, row)]


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
