"""Classifies an exception: failure class, code, message and hint.

Owns the interpretation of errors that libraries raise; the classes and their exit codes are in `errors`. Imports no
torch, so it matches names and messages. Invariant: every exception has a failure, and an unknown one is `unexpected`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from grpo_core import egress
from grpo_core.datasets import DatasetError, DatasetUnreachableError
from grpo_core.errors import JobFailure
from grpo_core.hardware import micro_batch
from grpo_core.monitoring.stop_rules import diverged
from grpo_core.reasons import FailureClass, FailureCode, Phase
from grpo_core.spec import JobSpec


def failure_of(error: Exception, spec: JobSpec | None = None, *, phase: Phase | None = None) -> JobFailure:
    """The failure report of a run of `spec` that raised `error` in `phase`."""
    if isinstance(error, JobFailure):
        return error
    if isinstance(error, DatasetError):
        return JobFailure(
            error.code,
            "; ".join(f"{p.pointer or '/data'} {p.detail}" for p in error.problems) + "; and more" * error.more,
            hint=" ".join(dict.fromkeys(p.remedy for p in error.problems)),
            # A hub that does not answer is nobody's mistake: another try may find it.
            failure_class=FailureClass.INFRA if isinstance(error, DatasetUnreachableError) else FailureClass.DATASET,
        )
    if egress.refusal(error):
        return JobFailure(
            FailureCode.EGRESS_REFUSED,
            "The run needed a host that the training process may not connect to.",
            hint=f"If it should be reached, the operator can list it in {egress.HOSTS_VARIABLE}; stderr.log names it.",
        )
    if any(_is_out_of_memory(cause) for cause in _causes(error)):
        return JobFailure(
            FailureCode.OUT_OF_MEMORY,
            f"The run needed more memory than there is: {_first_line(error)}",
            hint=_how_to_need_less(spec, phase),
        )
    if any(_is_disk_full(cause) for cause in _causes(error)):
        return JobFailure(
            FailureCode.DISK_FULL,
            f"The disk is full: {_first_line(error)}",
            hint="Free room on the disk that holds the run folder, or give the worker a larger one: it needs room for "
            "three checkpoints, the adapter and the rollouts. The run can resume from its last checkpoint.",
        )
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return diverged("The model's probabilities are no longer numbers: nothing can be sampled from it.")
    return JobFailure(
        FailureCode.UNEXPECTED,
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
    # safetensors, which is not Python, raises its own error, with the system's message in it.
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


def _how_to_need_less(spec: JobSpec | None, phase: Phase | None) -> str:
    if phase in (Phase.PREPARING, Phase.LOADING):
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
