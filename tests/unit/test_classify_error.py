"""What a job's owner is told of an exception: class, code and what to do about it."""

from __future__ import annotations

import errno
import os

import pytest

from grpo_core.reasons import Phase
from grpo_core.spec import parse_spec
from grpo_core.training.classify_error import failure_of


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (MemoryError("x"), 13, "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 13, "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 13, "out_of_memory"),
        (RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), 15, "not_finite"),
        (RuntimeError("CUDA error: out of memory"), 13, "out_of_memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 13, "out_of_memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), 13, "out_of_memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 16, "disk_full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 16, "disk_full"),
        (ValueError("I/O error: No space left on device (os error 28)"), 16, "disk_full"),
        (KeyError("anything"), 16, "unexpected"),
    ],
)
def test_failures_are_told_apart(error: Exception, exit_code: int, code: str) -> None:
    failure = failure_of(error)
    assert (failure.exit_code, failure.report.code) == (exit_code, code)
    assert failure.report.hint
    assert (failure.report.failure_class == "infra") == (code == "disk_full")


def test_a_wrapped_out_of_memory_is_one() -> None:
    wrapped = ValueError("the trainer failed")
    wrapped.__cause__ = MemoryError("x")
    assert failure_of(wrapped).exit_code == 13


@pytest.mark.parametrize(
    ("accumulation", "phase", "hint"),
    [
        (1, "training", "Raise sampling.gradient_accumulation to 2 (smaller parts of the same step)"),
        (2, "training", "Raise sampling.gradient_accumulation to 4"),
        (4, "training", "Lower sampling.max_completion_tokens"),
        (1, "loading", "Use a smaller model"),
    ],
)
def test_out_of_memory_names_the_setting_that_helps(accumulation: int, phase: Phase, hint: str) -> None:
    sampling = {"prompts_per_step": 1, "generations": 4, "gradient_accumulation": accumulation}
    failure = failure_of(MemoryError(), parse_spec({"sampling": sampling}), phase=phase)
    assert failure.report.hint.startswith(hint)
