"""What a worker makes of the death of a training process."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_CODES, EXIT_DONE
from grpo_core.spec import parse_spec
from jobs.lifecycle.outcomes import STOPPED
from jobs.store.commits import CommitRef, ResumeBase
from jobs.worker.event_forwarder import EventTail
from jobs.worker.exit_status import ExitClassifier, RunResult
from jobs.worker.oom_kills import OomKills
from jobs.worker.shutdown import GracefulShutdown

OUT_OF_MEMORY = {"class": "oom", "code": "out_of_memory", "message": "CUDA out of memory.", "hint": "Lower it."}


class Run(NamedTuple):
    """What was known of a run when its child died."""

    said: dict[str, Any] | None = None
    """The child's last words."""
    phase: str = "training"
    spec: dict[str, Any] = {}  # noqa: RUF012 - never written to
    killed_for_memory: bool = False
    stopping: bool = False
    asked: bool = False
    parts: int | None = None
    resumed: CommitRef | None = None


def judge(folder: Path, code: int, run: Run) -> RunResult:
    tail = cast("EventTail", SimpleNamespace(last_error=run.said, phase=run.phase))
    kills = cast("OomKills", SimpleNamespace(rose=run.killed_for_memory))
    stop = GracefulShutdown(30)
    if run.stopping:
        stop.give()
    base = ResumeBase(job="job-1", epoch=2, resumed=run.resumed, objects=[], gradient_accumulation=run.parts)
    classify = ExitClassifier(folder, parse_spec(run.spec), base, tail=tail, oom_kills=kills, stop=stop)
    return classify(code, asked=run.asked)


def test_a_child_that_is_done_has_succeeded(tmp_path: Path) -> None:
    assert judge(tmp_path, EXIT_DONE, Run()).status == "succeeded"


def test_a_child_that_saved_because_the_worker_stops_goes_back(tmp_path: Path) -> None:
    result = judge(tmp_path, EXIT_CHECKPOINTED, Run(stopping=True, asked=True))
    assert (result.status, result.handback) == (None, STOPPED)


@pytest.mark.parametrize("code", [EXIT_CHECKPOINTED, -15])
def test_a_child_that_was_paused_costs_no_attempt(tmp_path: Path, code: int) -> None:
    result = judge(tmp_path, code, Run(asked=True))
    assert result.status is None
    assert not result.handback.counts
    assert result.handback.report is None


def test_a_child_that_somebody_else_stopped_does_not_come_back_for_ever(tmp_path: Path) -> None:
    result = judge(tmp_path, EXIT_CHECKPOINTED, Run())
    assert result.handback.counts
    assert result.handback.report is not None
    assert result.handback.report.code == "stopped_from_outside"


def test_last_words_of_a_mistake_fail_the_job(tmp_path: Path) -> None:
    said = {"class": "user_config", "code": "bad_model", "message": "No such model.", "hint": "Name another."}
    result = judge(tmp_path, EXIT_CODES["user_config"], Run(said=said))
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.code, result.error.hint) == ("bad_model", "Name another.")


def test_a_death_by_signal_is_tried_again(tmp_path: Path) -> None:
    result = judge(tmp_path, -11, Run())
    assert (result.status, result.handback.counts) == (None, True)
    assert result.handback.report is not None
    assert result.handback.report.code == "child_died"
    assert "signal 11" in result.handback.report.message


def test_last_words_before_a_signal_are_not_its_reason(tmp_path: Path) -> None:
    result = judge(tmp_path, -11, Run(said=OUT_OF_MEMORY))
    assert result.handback.report is not None
    assert result.handback.report.code == "child_died"


def test_out_of_memory_splits_the_step_further(tmp_path: Path) -> None:
    code = EXIT_CODES["oom"]
    first = judge(tmp_path, code, Run(said=OUT_OF_MEMORY))
    assert first.status is None
    assert not first.handback.counts
    lowered = first.handback.fields["accumulation"]
    assert lowered > parse_spec({}).sampling.gradient_accumulation
    assert first.handback.events[0].data["after"] == lowered
    second = judge(tmp_path, code, Run(said=OUT_OF_MEMORY, parts=lowered))
    assert second.handback.fields["accumulation"] > lowered


def test_out_of_memory_with_nothing_left_to_split_fails_with_the_hint(tmp_path: Path) -> None:
    parts = parse_spec({}).completions_per_step
    result = judge(tmp_path, EXIT_CODES["oom"], Run(said=OUT_OF_MEMORY, parts=parts))
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.hint == "Lower it."


def test_the_kernels_kill_of_a_gpu_job_is_not_cured_by_smaller_parts(tmp_path: Path) -> None:
    result = judge(tmp_path, -9, Run(killed_for_memory=True))
    assert (result.status, result.handback.counts, dict(result.handback.fields)) == (None, True, {})
    assert result.handback.report is not None
    assert result.handback.report.code == "killed_for_memory"


def test_the_kernels_kill_of_a_cpu_job_splits_its_step(tmp_path: Path) -> None:
    spec = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
    result = judge(tmp_path, -9, Run(killed_for_memory=True, spec=spec))
    assert result.handback.fields["accumulation"] > 1


def test_a_full_disk_is_the_reason_whatever_the_child_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    said = {"class": "internal", "code": "internal", "message": "OSError"}
    result = judge(tmp_path, EXIT_CODES["internal"], Run(said=said))
    assert result.status is None
    assert result.handback.report is not None
    assert result.handback.report.code == "disk_full"


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    said = {"class": "internal", "code": "checkpoint_unreadable", "message": "The checkpoint is damaged."}
    result = judge(tmp_path, EXIT_CODES["internal"], Run(said=said, resumed=CommitRef(step=5, epoch=1)))
    assert result.unreadable
    assert not result.handback.counts
    assert result.handback.events[0].type == "warning"
