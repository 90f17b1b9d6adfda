"""The page of a job whose worker was killed: it tells of the whole job, as if nothing had happened and that it had."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from jobs import lineage
from jobs.record import JobRecord
from jobs.service import JobService
from tests.acceptance.conftest import WorkerProcess, wait_for
from tests.acceptance.test_worker import artifact, assert_whole, resumed_at, wait_until


def test_the_page_of_a_job_whose_worker_was_killed_is_that_of_the_whole_job(
    service: JobService, start_worker: Callable[..., WorkerProcess], submit: Callable[..., JobRecord]
) -> None:
    first = start_worker()
    job = submit(steps=48, checkpoint_every=4, step_seconds="0.2")
    # The last fifth of the steps, of which completions are shown, is the first run's in part.
    wait_until(lambda: service.get(job.id, "ann").checkpoint_step >= 40)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    start_worker()
    done = wait_for(service, job.id)
    assert done.epoch == 2
    assert resumed_at(service, job) in ([40], [44])
    page = artifact(service, done, "report.html").decode()
    assert '<h2 id="runs">' in page
    assert "run_lost: " in page

    straight = wait_for(service, submit(steps=48, checkpoint_every=4).id)
    whole = artifact(service, straight, "report.html").decode()
    assert '<h2 id="runs">' not in whole
    assert completions(page) == completions(whole)
    assert any(f"step <b>{step}</b>" in completions(page) for step in range(40, 45)), "drawn by the run that was killed"

    listed = lineage.listed_rollouts(service.archive.manifest(done.manifest or "").objects)  # type: ignore[union-attr]
    steps = [step for file in listed for step in range(file.first, file.last + 1)]
    assert steps == list(range(1, 49)), "what was fetched for the page is not shipped again"
    assert_whole(service, done)


def completions(page: str) -> str:
    """The best and the worst completions, as they are shown."""
    return page[page.index('id="best"') : page.index('id="settings"')]
