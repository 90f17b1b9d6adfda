"""Many watchers of one job: does any miss an event, and does the API's memory stay flat?

    grpo up --no-worker && source .grpo/env && python scripts/bench_watchers.py --watchers 50 --seconds 120

Emits events of a job at a steady rate, as a worker would: a metric a time, and a completion of some kilobytes with
every fourth. Every watcher reads the whole stream as server-sent events; one in five hangs up now and then and comes
back with Last-Event-ID. Prints one JSON line: what was missed or came twice, how late events were, and
the API's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.job import JobStatus
from jobs.store.job_store import JobEvent

SPEC = {"name": "bench_watchers", "resources": {"gpus": 1, "min_gpu_memory_gb": 1024}}
"""For a queue that no worker of a small machine serves."""
HANG_UP_EVERY = 5
"""One in this number of watchers disconnects now and then."""


@dataclass
class Watcher:
    """One reader of the stream: the numbers it read in order, and how many seconds late each was."""

    restless: bool
    seqs: list[int] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    connections: int = 0
    ended: bool = False

    async def follow(self, client: httpx.AsyncClient, job_id: str) -> None:
        """Read until the job has ended, coming back as often as it takes."""
        while not self.ended:
            self.connections += 1
            headers = {"Last-Event-ID": str(self.seqs[-1])} if self.seqs else {}
            stay = random.uniform(1, 8) if self.restless else float("inf")  # noqa: S311 - no secret
            try:
                async with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
                    if answer.status_code == 204:
                        return
                    answer.raise_for_status()
                    await self._read(answer, time.monotonic() + stay)
            except httpx.TransportError:
                await asyncio.sleep(0.2)

    async def _read(self, answer: httpx.Response, until: float) -> None:
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            self.seqs.append(event["seq"])
            if "sent" in event["data"]:
                self.late.append(time.time() - event["data"]["sent"])
            self.ended = event["type"] == "status" and event["data"].get("status") == "succeeded"
            if self.ended or time.monotonic() > until:
                return


def emit(service: JobService, job_id: str, *, seconds: float, rate: float) -> None:
    """A job's events at a steady rate, then its end."""
    completion = "So 12 + 30 = 42. " * 250
    began = time.monotonic()
    for step in range(1, max(2, round(seconds * rate)) + 1):
        time.sleep(max(0.0, began + step / rate - time.monotonic()))
        events = [JobEvent(type="metric", step=step, data={"reward": step, "sent": time.time()})]
        if step % 4 == 0:
            events.append(JobEvent(type="sample", step=step, data={"completion": completion, "sent": time.time()}))
        assert service.job_store.change(job_id, epoch=1, events=events).done
    end = JobEvent(type="status", data={"status": "succeeded"})
    assert service.job_store.change(job_id, epoch=1, to=JobStatus.SUCCEEDED, events=[end]).done


async def watch(service: JobService, url: str, key: str, owner: str, **how: Any) -> dict[str, Any]:
    """Run it all; returns what is to be said of it. `how`: watchers, seconds, rate, and `rss`, a function or None."""
    job_id = service.submit(parse_spec(SPEC), owner).id
    assert service.job_store.claim(job_id, epoch=1, worker="bench", lease_seconds=3600)
    watchers = [Watcher(restless=number % HANG_UP_EVERY == 0) for number in range(how["watchers"])]
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    memory: list[float] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30) as client:
        readers = [asyncio.create_task(watcher.follow(client, job_id)) for watcher in watchers]
        emitter = threading.Thread(
            target=emit, args=(service, job_id), kwargs={"seconds": how["seconds"], "rate": how["rate"]}
        )
        emitter.start()
        while not all(reader.done() for reader in readers):
            if how["rss"]:
                memory.append(await asyncio.to_thread(how["rss"]))
            await asyncio.wait(readers, timeout=5)
        emitter.join()
        await asyncio.gather(*readers)
    return summary(service, job_id, owner, watchers, memory)


def summary(
    service: JobService, job_id: str, owner: str, watchers: list[Watcher], memory: list[float]
) -> dict[str, Any]:
    """What was missed, what came twice, how late, and the memory at the start, at most and at the end."""
    expected = [event["seq"] for event in service.events(job_id, owner, limit=1_000_000)]
    late = sorted(seconds * 1000 for watcher in watchers for seconds in watcher.late)
    hundredths = quantiles(late, n=100)
    return {
        "watchers": len(watchers),
        "events": len(expected),
        "read": sum(len(watcher.seqs) for watcher in watchers),
        "missed": sum(len(set(expected) - set(watcher.seqs)) for watcher in watchers),
        "twice": sum(len(watcher.seqs) - len(set(watcher.seqs)) for watcher in watchers),
        "out_of_order": sum(watcher.seqs != sorted(watcher.seqs) for watcher in watchers),
        "connections": sum(watcher.connections for watcher in watchers),
        "late_ms": {"p50": round(hundredths[49]), "p99": round(hundredths[98]), "most": round(late[-1])},
        "api_rss_mb": [round(value) for value in (memory[0], max(memory), memory[-1])] if memory else None,
    }


def rss_of(url: str, key: str) -> float:
    """The API's resident memory in megabytes, as it tells Prometheus."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=10).raise_for_status().text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.M)
    assert found is not None
    return float(found[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--watchers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rate", type=float, default=5, help="metrics a second")
    arguments = parser.parse_args()
    service = JobService.from_settings()
    key, record = service.keys.create("bench", ["jobs:read", "metrics:read"])
    try:
        how = {"watchers": arguments.watchers, "seconds": arguments.seconds, "rate": arguments.rate}
        result = asyncio.run(watch(service, arguments.url, key, "bench", rss=lambda: rss_of(arguments.url, key), **how))
    finally:
        service.keys.revoke(record.id)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
