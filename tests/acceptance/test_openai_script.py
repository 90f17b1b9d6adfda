"""The example of a user of OpenAI's package, as it is, against a service with a worker that trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import openai
import pytest

from jobs.service import JobService
from jobs.store.job import JobStatus
from jobs.store.workers import WorkerInfo
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess
from tests.acceptance.test_graders import start_real_worker
from tests.integration.running import RunningApi, wait_until


def a_worker_is_connected(service: JobService) -> list[WorkerInfo]:
    return service.workers.all()


@pytest.mark.timeout(900)
def test_the_example_trains_and_its_model_is_named(
    service: JobService, start_worker: Callable[..., WorkerProcess]
) -> None:
    start_real_worker(start_worker)
    api = RunningApi(service)
    with api.run():
        wait_until(lambda: a_worker_is_connected(service), seconds=60)
        key = service.keys.create(OWNER)[0]
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples/openai/finetune.py")],
            env={**os.environ, "OPENAI_BASE_URL": f"{api.url}/v1", "OPENAI_API_KEY": key, "POLL_SECONDS": "1"},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = done.stdout.splitlines()
        last = re.fullmatch(r"succeeded: (job-[0-9A-Z]{26})", lines[-1])
        assert last, lines[-5:]
        record = service.get(last[1], OWNER)
        assert record.status is JobStatus.SUCCEEDED
        assert (record.spec["resources"]["gpus"], record.total_steps) == (0, 50)
        assert any(re.match(r"  info  Step 50/50: train_reward_mean=", line) for line in lines)
        assert any(re.match(r"  info  Step 25/50: valid_reward_mean=", line) for line in lines)
        assert any(line.startswith(f"  info  Checkpoint at step 50: {record.id}:step-50") for line in lines)
        (checkpoint,) = (line for line in lines if line.startswith(f"{record.id}:step-50: "))
        assert "'valid_reward_mean'" in checkpoint
        assert any("50 steps, columns step,epoch,train_reward_mean" in line for line in lines)

        with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key) as client:
            job = client.fine_tuning.jobs.retrieve(record.id)
            assert job.fine_tuned_model == record.id
            again = client.fine_tuning.jobs.create(
                model=f"{record.id}:step-25",
                training_file=job.training_file,
                method=json.loads(json.dumps(job.method.to_dict())) if job.method else {},  # type: ignore[arg-type]
                extra_body={"grpo": job.to_dict()["grpo"]},
            )
            assert service.get(again.id, OWNER).spec["from_checkpoint"] == {"job": record.id, "step": 25}
            client.fine_tuning.jobs.cancel(again.id)
