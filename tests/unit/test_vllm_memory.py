"""Room for the rollout engine: who is turned away before anything is loaded, and what is said to help."""

from __future__ import annotations

import pytest

from grpo_core.engines.vllm_memory import no_room, require_room
from grpo_core.errors import JobFailure
from grpo_core.estimates import Precision

QWEN_7B = 7_615_600_000


@pytest.mark.parametrize(
    ("share", "free", "weights"),
    [(0.6, 14.3e9, "4bit"), (0.3, 15.6e9, "4bit"), (0.6, 85e9, "16bit"), (0.65, 24e9, "16bit")],
)
def test_what_may_fit_is_tried(share: float, free: float, weights: Precision) -> None:
    require_room(share, int(free), QWEN_7B, weights)


@pytest.mark.parametrize(
    ("share", "free", "weights", "remedy"),
    [
        (0.11, 14.3e9, "4bit", "Raise model.gpu_memory_share to about 0.49."),
        (0.3, 24e9, "16bit", "Raise model.gpu_memory_share to about 0.69."),
        (0.6, 15.6e9, "16bit", "Set model.precision to 4bit, or use a GPU with more free memory."),
        (0.6, 6e9, "4bit", "Use a GPU with more free memory, or a smaller model."),
    ],
)
def test_weights_that_cannot_fit_are_turned_away_with_what_helps(
    share: float, free: float, weights: Precision, remedy: str
) -> None:
    with pytest.raises(JobFailure) as failed:
        require_room(share, int(free), QWEN_7B, weights)
    report = failed.value.report
    assert (report.failure_class, report.code, report.hint) == ("oom", "no_room_for_rollouts", remedy)
    assert f"at least {3.8 if weights == '4bit' else 15.2} GB" in report.message
    assert f"model.gpu_memory_share {share:g} of the {free / 1e9:.1f} GB" in report.message


@pytest.mark.parametrize(("weights", "remedy"), [("4bit", False), ("16bit", True)])
def test_the_remedy_of_a_failed_start_is_not_what_the_job_has_already(weights: Precision, remedy: bool) -> None:
    report = no_room(ValueError("No available memory for the cache blocks.\nSee the manual."), weights).report
    assert report.message.endswith("its sequences: No available memory for the cache blocks.")
    assert ("precision to 4bit" in report.hint) is remedy
