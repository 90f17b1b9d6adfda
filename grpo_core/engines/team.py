"""The exchange between the ranks of a run: each computes a share, and then all ranks have all results.

Owns the process group, the distribution of rows, the exchange of results, which is a sum, and the gathering of weights
that are shared out. TRL's loop does not know about it: every rank runs the whole loop on the same batch. Invariant:
after an exchange all ranks hold the same bits, so that they decide and learn the same; a step depends on the number of
ranks only by the order of its additions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from enum import IntEnum
from itertools import accumulate, chain
from typing import Any, Final

import torch
import torch.distributed as dist

from grpo_core.engines.completions import Drawn, Request, Sampler
from grpo_core.errors import fault
from grpo_core.ranks import Rank, lost
from grpo_core.reasons import FailureCode

MEETING_SECONDS: Final = 7200
"""Longest time in seconds to wait for other ranks, at the start and in an exchange. The launcher and the worker's stall
detector, which decide how long a rank may hang, are quicker."""
BUCKET: Final = 2**26
"""Number of values that are exchanged together."""
_all_gather: Final[Any] = vars(dist).get("all_gather_single") or vars(dist)["all_gather_into_tensor"]
"""Under its name from torch 2.13 on, or before."""


class Order(IntEnum):
    """What rank 0 has the other ranks do, when it alone works with weights that all share out."""

    PART = 0
    SCORE = 1
    DRAW_BASE = 2
    DRAW_ADAPTER = 3


class Team:
    """The ranks of a run. A single rank exchanges nothing."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self.size, self.number = rank.count, rank.number
        self.in_step = False
        """Whether a rank without rows goes through the passes of the others."""
        self.directed = False
        """Whether rank 0 works alone, and the others do what it orders."""
        self.worked: list[float] = []
        """How long each rank computed between the last two agreements, in seconds."""
        self._worked = 0.0
        self._apart = 0.0
        """Time so far in which this rank waited for others, or did what the others do not, in seconds."""
        self._works = False
        if self.size == 1:
            return
        # Never by the host's name, which may not resolve, or to an address that other hosts cannot reach.
        if rank.interface is not None:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, rank.interface)
        on_gpu = device.type == "cuda"
        # Or each CUDA graph, of which there is one for each number of rows, would register the weights' buffers anew.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        with self._waiting():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                init_method=rank.address,
                rank=rank.number,
                world_size=rank.count,
                timeout=timedelta(seconds=MEETING_SECONDS),
                device_id=device if on_gpu else None,
            )

    @property
    def is_lead(self) -> bool:
        return self._rank.is_lead

    def sum(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size == 1:
            return
        with self._waiting():
            for tensor in tensors:
                dist.all_reduce(tensor)
            if any(tensor.is_cuda for tensor in tensors):
                torch.cuda.synchronize()  # here, where this rank is marked as waiting for the others

    def sum_joined(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum many small tensors of one type over the ranks, in place and in few exchanges."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for at, tensor in enumerate(tensors):
            bucket.append(tensor)
            if at == len(tensors) - 1 or sum(one.numel() for one in bucket) >= BUCKET:
                joined = torch.cat([one.flatten() for one in bucket])
                self.sum(joined)
                for one, part in zip(bucket, joined.split([one.numel() for one in bucket]), strict=True):
                    one.copy_(part.view_as(one))
                bucket = []

    def exchange(self, *values: int) -> list[list[int]]:
        """Return the values of every rank, in order."""
        told = torch.zeros(self.size, len(values), dtype=torch.int64)
        told[self.number] = torch.tensor(values)
        self.sum(told)
        return told.tolist()

    def direct(self, order: Order) -> None:
        """Tell the other ranks what to do, if they wait for it."""
        if self.directed and self.is_lead:
            self.exchange(order)

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Any:
        """Begin to put all ranks' parts into `whole`, in order; NCCL does it beside what is queued afterwards."""
        with self._waiting():
            return _all_gather(whole, part, async_op=True)

    def finish(self, coming: Any) -> None:
        """Wait for a gathering; on a GPU only what is queued from now on waits."""
        with self._waiting():
            coming.wait()

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the indices of this rank's pieces of work, in order, given the sizes of all pieces."""
        return deal(sizes, self.size)[self.number]

    def agree(self, flag: bool, leaves: Sequence[torch.Tensor]) -> bool:
        """Return whether `flag` is true on any rank. Fails the job unless all ranks' adapters have the same bits."""
        if self.size == 1:
            return flag
        bits = sum((leaf.detach().view(torch.int32).sum(dtype=torch.int64) for leaf in leaves), torch.zeros(()).long())
        told = self.exchange(int(flag), int(bits), round(self._worked * 1e6))
        self.worked, self._worked = [microseconds / 1e6 for *_, microseconds in told], 0.0
        if any(theirs != told[0][1] for _, theirs, _ in told):
            raise fault(FailureCode.RANKS_DIFFER, "The ranks have learnt different adapters from the same completions.")
        return any(asked for asked, *_ in told)

    def draw(
        self, sampler: Sampler, requests: Sequence[Request], *, tokens: int, logprobs: bool = True, **options: Any
    ) -> list[Drawn]:
        """Do as `Sampler.generate`, with a share of the requests on each rank; rows of one prompt stay together.

        `logprobs`: whether the ranks need each other's log-probabilities; if not, there may be none.
        """
        if self.size == 1 or self.directed:
            return sampler.generate(requests, tokens=tokens, **options)
        groups = runs_of([tuple(request.prompt) for request in requests], self.size)
        sizes = [len(requests[group.start].prompt) + len(group) * tokens for group in groups]
        own = list(chain.from_iterable(groups[at] for at in self.share(sizes)))
        mine = [requests[row] for row in own]
        with self.working():
            drawn = sampler.generate(mine, tokens=tokens, **options) if own or self.in_step else []
        lengths = torch.zeros(len(requests), dtype=torch.int64)
        for row, one in zip(own, drawn, strict=True):
            lengths[row] = len(one.tokens)
        self.sum(lengths)
        width = int(lengths.max())
        said = self._rows_of_all(own, [one.tokens for one in drawn], len(requests), width, torch.int64)
        told = [[0.0]] * len(requests)
        if logprobs:
            told = self._rows_of_all(own, [one.logprobs for one in drawn], len(requests), width, torch.float64)
        cut = zip(said, told, lengths.tolist(), strict=True)
        return [Drawn(tokens[:count], values[:count] if logprobs else []) for tokens, values, count in cut]

    def texts(self, rows: Sequence[Sequence[int]], decode: Callable[[Sequence[Sequence[int]]], list[str]]) -> list[str]:
        """Return the text of each row of tokens, of which every rank decodes a share."""
        if self.size == 1:
            return decode(rows)
        own = range(self.number, len(rows), self.size)
        # Surrogates, which have no UTF-8, must get to the others as they are.
        mine = [text.encode("utf-8", "surrogatepass") for text in (decode([rows[row] for row in own]) if own else [])]
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        lengths[own.start :: self.size] = torch.tensor([len(raw) for raw in mine], dtype=torch.int64)
        self.sum(lengths)
        ends = list(accumulate(lengths.tolist()))
        whole = bytearray(ends[-1])
        for row, raw in zip(own, mine, strict=True):
            whole[ends[row] - len(raw) : ends[row]] = raw
        if whole:
            self.sum(torch.frombuffer(whole, dtype=torch.uint8))
        return [whole[begin:end].decode("utf-8", "surrogatepass") for begin, end in zip([0, *ends], ends, strict=False)]

    def _rows_of_all(
        self, own: Sequence[int], rows: Sequence[Sequence[Any]], count: int, width: int, dtype: torch.dtype
    ) -> list[list[Any]]:
        """Return every rank's rows, padded to `width`, in order; `own` are the numbers of this rank's `rows`."""
        told = torch.zeros(count, width, dtype=dtype)
        for number, row in zip(own, rows, strict=True):
            told[number, : len(row)] = torch.tensor(row, dtype=dtype)
        self.sum(told)
        return told.tolist()

    @contextmanager
    def working(self) -> Generator[None]:
        """Count the time in this block as this rank's own work, without what it waits for others."""
        if self.size == 1 or self._works:  # the outer block counts it
            yield
            return
        began, apart, self._works = time.perf_counter(), self._apart, True
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize()
        finally:
            self._works = False
            self._worked += time.perf_counter() - began - (self._apart - apart)

    @contextmanager
    def apart(self) -> Generator[None]:
        """Do not count the time in this block as work: the other ranks wait in it, or do nothing like it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._apart += time.perf_counter() - began

    def leave(self) -> None:
        """Leave the group; rank 0 continues alone. All ranks must call it."""
        if self.size == 1:
            return
        dist.destroy_process_group()
        self.size = 1
        if self._rank.pulse is not None:
            self._rank.pulse.done()

    @contextmanager
    def _waiting(self) -> Generator[None]:
        """Report every error while waiting for the others as the loss of a rank."""
        try:
            with self.apart(), nullcontext() if self._rank.pulse is None else self._rank.pulse.waiting():
                yield
        except (RuntimeError, OSError) as error:
            first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise lost(f"Rank {self.number} of {self._rank.count} lost another: {first}") from error


def deal(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Pieces of work dealt so that the shares' sums are about equal: the largest first, each to who has least."""
    dealt: list[list[int]] = [[] for _ in range(shares)]
    sums = [0] * shares
    for piece in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        least = min(range(shares), key=lambda at: (sums[at], at))
        dealt[least].append(piece)
        sums[least] += sizes[piece]
    return [sorted(share) for share in dealt]


def runs_of(keys: Sequence[Any], shares: int) -> list[range]:
    """Runs of rows with equal keys; single rows where there are fewer runs than shares."""
    begins = [at for at in range(len(keys)) if at == 0 or keys[at] != keys[at - 1]]
    runs = [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(keys)], strict=True)]
    return runs if len(runs) >= shares else [range(row, row + 1) for row in range(len(keys))]
