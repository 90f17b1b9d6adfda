"""What an exception means for a job: its failure class, a code, one sentence, and what to do about it.

Owns the reading of errors that libraries raise; the classes and their exit codes are in `errors`. Imports no torch, so
it goes by names and texts. Invariant: every exception has a failure, and one that nothing foresaw is `unexpected`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from grpo_core import micro_batch
from grpo_core.datasets import DatasetError, DatasetUnreachableError
from grpo_core.errors import JobFailure
from grpo_core.guards import diverged
from grpo_core.records import Phase
from grpo_core.spec import JobSpec


def failure_of(error: Exception, spec: JobSpec | None = None, *, phase: Phase | None = None) -> JobFailure:
    """What a run of `spec` that raised `error` in `phase` tells its owner."""
    if isinstance(error, JobFailure):
        return error
    if isinstance(error, DatasetError):
        return JobFailure(
            # A hub that does not answer is nobody's mistake: another try may find it.
            "infra" if isinstance(error, DatasetUnreachableError) else "dataset",
            error.code,
            "; ".join(f"{p.pointer or '/data'} {p.detail}" for p in error.problems) + "; and more" * error.more,
            hint=" ".join(dict.fromkeys(p.remedy for p in error.problems)),
        )
    if any(_is_out_of_memory(cause) for cause in _causes(error)):
        return JobFailure(
            "oom",
            "out_of_memory",
            f"The run needed more memory than there is: {_first_line(error)}",
            hint=_how_to_need_less(spec, phase),
        )
    if any(_is_disk_full(cause) for cause in _causes(error)):
        return JobFailure(
            "infra",
            "disk_full",
            f"The disk is full: {_first_line(error)}",
            hint="Free room on the disk that holds the run folder, or give the worker a larger one: it needs room for "
            "three checkpoints, the adapter and the rollouts. The run can go on from its last checkpoint.",
        )
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return diverged("The model's probabilities are no longer numbers: nothing can be sampled from it.")
    return JobFailure(
        "internal",
        "unexpected",
        f"{type(error).__name__}: {_first_line(error)}",
        hint="The traceback is in the run's stderr.log; please report it.",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it: libraries wrap what they catch."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "STATUS_ALLOC_FAILED",
)


def _is_out_of_memory(error: BaseException) -> bool:
    # By name and text: torch is not imported here, and a CPU's allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY))
    )


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Not all that writes is Python: safetensors has an error of its own, with the system's words in it.
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


def _how_to_need_less(spec: JobSpec | None, phase: Phase | None) -> str:
    if phase in ("preparing", "loading"):
        return "Use a smaller model or a worker with more memory; on a GPU, set model.precision to 4bit."
    lower = "lower sampling.max_completion_tokens, sampling.generations or sampling.prompts_per_step"
    parts = spec.sampling.gradient_accumulation if spec else 1
    following = micro_batch.smaller(spec, parts) if spec else None
    if spec and following is None:
        return f"{lower[0].upper()}{lower[1:]}, or use a worker with more memory."
    to = f" to {following}" if following else ""
    return f"Raise sampling.gradient_accumulation{to} (smaller parts of the same step), or {lower}."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:500]
