"""What one worker costs Valkey: processor time and bytes of the append-only file for each exchange.

    PYTHONPATH=. python scripts/bench_capacity.py --workers 2000

Starts a separate Valkey, gives each simulated worker a job, and lets all of them do each exchange once, one after the
other. Prints one JSON line an exchange, with what 10,000 workers need. It measures the server's processor time, not how
long an answer takes. On a busy machine that is several times longer too, so the figures are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.local.ports import pick_port
from deploy.local.process import Child
from deploy.local.valkey import Valkey
from grpo_core.spec import parse_spec
from jobs.settings import QueueSettings
from jobs.store.job import JobStatus, new_job_id, record_of
from jobs.store.job_store import JobEvent, JobStore

LEASE_SECONDS = 60.0
FLEET = 10_000
STEP = {"reward": 1.25, "seconds": {"total": 4.0}, "rewards": {f"reward_{n}": 0.5 for n in range(5)}, "loss": 0.01} | {
    f"metric_{n}": n / 7 for n in range(40)
}
"""About as large as the metrics of a step."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Valkey(
            data=Path(folder) / "data", port=pick_port(), password=secrets.token_hex(16), log=Path(folder) / "log"
        )
        child = Child(server.service())
        try:
            child.wait_ready(60)
            measure(JobStore(QueueSettings.model_validate({"redis_url": server.url})), arguments.workers)
        finally:
            child.stop()


def measure(job_store: JobStore, workers: int) -> None:
    """Print the cost of each exchange, in the order of a job's life."""
    spec = parse_spec({"metadata": {"team": "capacity"}})
    now, queue = datetime.now(UTC).isoformat(), "grpo.gpu1"
    asked = {"owner": "ann", "created_at": now, "queue": queue, "spec": spec.as_dict(), "spec_sha256": spec.digest()}
    records = [record_of({**asked, "id": new_job_id()}) for _ in range(workers)]
    ids = [record.id for record in records]
    told = dict.fromkeys(ids, 0)

    def step(job_id: str) -> None:
        told[job_id] += 2
        events = [JobEvent(type="metric", step=told[job_id] // 2, data=STEP), JobEvent(type="log", data={"code": "x"})]
        job_store.change(
            job_id, epoch=1, fields={"step": 1, "reward": 1.0}, events=events, first_ordinal=told[job_id] - 1
        )

    exchanges: list[tuple[str, float, Callable[[int], Any]]] = [
        ("submission", 0, lambda n: job_store.create(records[n])),
        ("claim", 0, lambda n: job_store.claim(ids[n], epoch=1, worker=f"worker-{n}", lease_seconds=LEASE_SECONDS)),
        ("look, each second", 1, lambda n: job_store.beat(ids[n], epoch=1, lease_seconds=None)),
        ("heartbeat, every 10 s", 0.1, lambda n: job_store.beat(ids[n], epoch=1, lease_seconds=LEASE_SECONDS)),
        ("a step's events, every 4 s", 0.25, lambda n: step(ids[n])),
        ("hand back", 0, lambda n: job_store.change(ids[n], epoch=1, to=JobStatus.QUEUED)),
    ]
    for name, each_second, exchange in exchanges:
        before = standing(job_store)
        for number in range(workers):
            exchange(number)
        after = standing(job_store)
        cpu, written = ((now - was) / workers for now, was in zip(after, before, strict=True))
        line: dict[str, Any] = {"exchange": name, "cpu_us": round(cpu * 1e6, 1), "written_bytes": round(written)}
        if each_second:
            line["core_share_of_fleet"] = round(cpu * each_second * FLEET, 3)
            line["written_gb_a_day_of_fleet"] = round(written * each_second * FLEET * 86400 / 1e9, 1)
        print(json.dumps(line))
    print(json.dumps({"memory_bytes_a_job": job_store.client.info("memory")["used_memory"] // workers}))


def standing(job_store: JobStore) -> tuple[float, int]:
    """The server's processor seconds so far, and the size of its append-only file."""
    time.sleep(0.3)  # so that it has written what it took
    cpu, persistence = job_store.client.info("cpu"), job_store.client.info("persistence")
    return cpu["used_cpu_sys"] + cpu["used_cpu_user"], persistence["aof_current_size"]


if __name__ == "__main__":
    main()
