"""In how many parts a step's completions are trained, and what to try if one part does not fit into memory.

Owns which splits are equivalent: neither the completions of a step nor the objective depend on the split, only the
memory in use. Imports no torch, so that the worker can use it too.
"""

from __future__ import annotations

from typing import Final

from grpo_core.reasons import FailureCode, Phase
from grpo_core.spec import JobSpec

_DRAWING: Final = frozenset({FailureCode.OUT_OF_MEMORY_IN_ROLLOUT, FailureCode.NO_ROOM_FOR_ROLLOUTS})
"""Codes of failures for want of memory outside the training of a step."""


def splits(spec: JobSpec) -> list[int]:
    """The numbers of equal parts that a step of this job can be trained on in, from one part up."""
    total = spec.completions_per_step
    return [parts for parts in range(1, total + 1) if total % parts == 0]


def keeps_objective(spec: JobSpec) -> bool:
    """Whether another split than the spec's computes the same loss; `bnpo` averages over the tokens of each part."""
    return spec.loss.type != "bnpo"


def can_cure(code: str, phase: Phase | None) -> bool:
    """Whether smaller parts help after this failure: the model is loaded, and the completions drawn, in one piece."""
    return code not in _DRAWING and phase not in (Phase.PREPARING, Phase.LOADING)


def smaller(spec: JobSpec, accumulation: int) -> int | None:
    """The next split after `accumulation` parts needed too much memory; None if nothing is left to lower."""
    if not keeps_objective(spec):
        return None
    return next((parts for parts in splits(spec) if parts > accumulation), None)
