"""Why a job waits: by the workers that are connected."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_core.spec import SPEC_FORMAT, parse_spec
from jobs.read.queue_position import WaitReason, workers_for
from jobs.store.workers import WorkerInfo

CODE = {"type": "python", "source": "def grade(sample, item): return 1.0"}
TEXT = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "1", "operation": "eq"}
CPU = ["grpo.cpu", f"grpo.cpu.f{SPEC_FORMAT}"]


class Registry:
    """Stands in for the workers in Valkey."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self._workers = list(workers)

    def all(self) -> list[WorkerInfo]:
        return self._workers


def worker(isolation: str = "none", spec_format: int = SPEC_FORMAT, queues: list[str] = CPU) -> WorkerInfo:
    return WorkerInfo(name="w", queues=queues, device="cpu", grader_isolation=isolation, spec_format=spec_format)


@pytest.mark.parametrize(
    ("grader", "workers", "able", "reason"),
    [
        (CODE, [], 0, WaitReason.NO_WORKER),
        (CODE, [worker(queues=["grpo.gpu1"])], 0, WaitReason.NO_WORKER),
        (CODE, [worker("landlock+seccomp", 1, ["grpo.cpu"])], 0, WaitReason.NEWER_WORKER),
        (CODE, [worker()], 0, WaitReason.NO_CONFINEMENT),
        (CODE, [worker(), worker("landlock+seccomp")], 1, WaitReason.TURN),
        (CODE, [worker("unconfined")], 1, WaitReason.TURN),
        (TEXT, [worker()], 1, WaitReason.TURN),
    ],
)
def test_a_job_that_runs_code_needs_a_worker_that_confines_it(
    grader: dict[str, Any], workers: list[WorkerInfo], able: int, reason: WaitReason
) -> None:
    spec = parse_spec(
        {"rewards": {"graders": {"mine": grader}}, "resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
    )
    queue, found = workers_for(spec, "grpo", Registry(*workers))  # type: ignore[arg-type]
    assert queue == CPU[-1]
    assert (found.able, found.reason) == (able, reason)
