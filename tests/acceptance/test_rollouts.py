"""Rollouts of a job that a real worker runs: read while it goes on, over a lost worker, and after the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from jobs.read.rollout_query import RolloutQuery
from jobs.read.rollouts import Rollout
from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for
from tests.clock import patience

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]


def read(service: JobService, job: JobRecord, **filters: object) -> list[Rollout]:
    """All pages of a query."""
    query, cursor, found = RolloutQuery(**filters), None, []  # type: ignore[arg-type]
    while True:
        page = service.rollouts(job.id, OWNER, query, limit=7, cursor=cursor)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


def test_rollouts_of_a_job_whose_first_worker_dies(service: JobService, start_worker: Start, submit: Submit) -> None:
    first = start_worker()
    job = submit(steps=40, checkpoint_every=10, step_seconds="0.4")
    deadline = time.monotonic() + patience(90)
    seen: list[tuple[int, int]] = []
    while service.get(job.id, OWNER).step < 24:
        now = [(rollout.step, rollout.sample) for rollout in read(service, job)]
        assert now == [(step, sample) for step in range(1, len(now) // 2 + 1) for sample in (0, 1)], "a gap or a repeat"
        assert len(now) >= len(seen), "what was there is there"
        seen = now
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(seen) >= 2 * 15, "a running job shows its steps some seconds later"
    first.process.kill()
    wait_for(service, job.id, JobStatus.QUEUED, seconds=60)
    start_worker()
    done = wait_for(service, job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.epoch >= 2  # on a busy machine, the second worker may lose its lease too
    rollouts = read(service, job)
    assert [(r.step, r.sample) for r in rollouts] == [(step, sample) for step in range(1, 41) for sample in (0, 1)]
    assert rollouts[0].epoch == 1 < rollouts[-1].epoch
    assert [rollout.epoch for rollout in rollouts] == sorted(rollout.epoch for rollout in rollouts)
    by_reward = read(service, job, order="-reward", reward_gt=0.5)
    assert sorted((-r.reward_total, r.step, r.sample) for r in rollouts if (r.reward_total or 0) > 0.5) == [
        (-(r.reward_total or 0), r.step, r.sample) for r in by_reward
    ]
    assert [step.step for step in service.rollout_steps(job.id, OWNER)] == list(range(1, 41))
