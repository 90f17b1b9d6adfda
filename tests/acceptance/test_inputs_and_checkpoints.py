"""What goes into a run and what it saves on its way, through a real worker process."""

from __future__ import annotations

import hashlib
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for
from tests.clock import patience

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]

ROWS = b'{"question": "1+1", "answer": "2"}\n'


def test_an_object_of_the_bucket_reaches_the_training_process(
    service: JobService, start_worker: Start, submit: Submit, prefix: str
) -> None:
    url = f"s3://{service.store.bucket}/data/{prefix}.jsonl"
    service.store.put(f"data/{prefix}.jsonl", ROWS)
    start_worker()
    job = submit(data={"source": "s3", "dataset": url})
    assert wait_for(service, job.id).status is JobStatus.SUCCEEDED


def test_an_object_that_is_bad_or_gone_fails_the_job_with_its_reason(
    service: JobService, start_worker: Start, submit: Submit, prefix: str
) -> None:
    for name, rows in ((f"data/{prefix}-bad", b"[1]\n"), (f"data/{prefix}-gone", ROWS)):
        service.store.put(name, rows)
    bad, gone = (
        submit(data={"source": "s3", "dataset": f"s3://{service.store.bucket}/data/{prefix}-{how}"})
        for how in ("bad", "gone")
    )
    service.store.delete(f"data/{prefix}-gone")
    start_worker()
    for job, code in ((bad, "not_an_object"), (gone, "no_such_dataset")):
        done = wait_for(service, job.id)
        assert done.status is JobStatus.FAILED
        assert done.error is not None
        assert (done.error["class"], done.error["code"]) == ("dataset", code)


def test_a_worker_logs_no_prompt_and_no_secret(
    service: JobService, start_worker: Start, submit: Submit, prefix: str
) -> None:
    canary = "CANARY-5f1c"
    worker = start_worker()
    for name, rows in (("good", canary), ("bad", f"{canary}\n")):
        service.store.put(f"data/{prefix}-{name}", f'{{"question": "{rows}", "answer": "{canary}"}}\n'.encode())
    place = f"s3://{service.store.bucket}/data/{prefix}"
    data = {"source": "s3", "dataset": f"{place}-good", "system_prompt": canary}
    jobs = [
        submit(data=data, name=canary),
        submit(data=data, fail="16", note=canary),
        submit(data={**data, "dataset": f"{place}-bad"}),
        submit(data=data, fail="kill", note=canary),
    ]
    ends = [wait_for(service, job.id, seconds=60).status.value for job in jobs]
    assert ends == ["succeeded", "failed", "failed", "failed"]
    worker.stop()
    text = worker.log.read_text()
    assert all(job.id in text for job in jobs)
    secrets = [
        canary,
        "Signature",
        service.store._settings.secret_key.get_secret_value(),
        service.job_store._url.split("@")[0].split(":")[-1],
    ]
    assert [line[:300] for line in text.splitlines() if any(secret in line for secret in secrets)] == []


def test_checkpoints_can_be_read_while_the_job_runs(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(steps=10_000, checkpoint_every=2, step_seconds="1")
    assert service.checkpoints(job.id, OWNER) == []
    deadline = time.monotonic() + patience(30)
    while len(found := service.checkpoints(job.id, OWNER)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    steps = [checkpoint.step for checkpoint in found]
    assert steps == sorted(set(steps))
    assert all(step % 2 == 0 for step in steps)
    newest = found[-1]  # the others may be pruned at any moment
    assert newest.epoch == 1
    assert datetime.now(UTC) - newest.created_at < timedelta(minutes=2)
    for file in newest.files:
        with urllib.request.urlopen(file.url) as answer:
            body = answer.read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (file.size, file.sha256)
    # Half of one, as while it is sent: no manifest, no checkpoint.
    service.store.put(f"jobs/{job.id}/e1/checkpoints/step-999999/adapter_config.json", b"{}")
    assert 999_999 not in [checkpoint.step for checkpoint in service.checkpoints(job.id, OWNER)]
    service.cancel(job.id, OWNER)
    wait_for(service, job.id)
