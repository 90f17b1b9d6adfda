"""How fast rollouts are read, and what that costs the API: against a running stack that holds one made-up job.

    grpo up --no-worker && source .grpo/env && python scripts/bench_rollouts.py

Puts a job of STEPS x COMPLETIONS into the bucket as a worker would, merged into parts but for a tail of single steps,
asks the API a hundred and more mixed questions, and prints one JSON line for each kind, milliseconds as the client
waited: the first answer, then median and slowest. `index` is cold where the API has not read that job before.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_client import GrpoClient
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.commits import ResumeBase, put_base
from tests.integration.rollout_objects import RunOfRollouts, completions

SPEC = {"name": "bench_rollouts", "resources": {"gpus": 1, "min_gpu_memory_gb": 1024}}
"""For a queue that no worker of a small machine serves."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--words", type=int, default=150, help="words a completion; 150 are about 200 tokens")
    parser.add_argument("--part", type=int, default=25, help="steps a part")
    parser.add_argument("--tail", type=int, default=60, help="single steps in the second job")
    parser.add_argument("--rounds", type=int, default=12, help="times to run each query")
    arguments = parser.parse_args()
    service = JobService.from_settings()
    key, record = service.keys.create("bench", ["metrics:read"])
    with GrpoClient() as client, GrpoClient(key=key) as watcher:
        owner = client.submit(SPEC)["owner"]
        say({"api_rss_mb": rss(watcher), "when": "before"})
        merged = make(service, owner, arguments, steps=arguments.steps, part=arguments.part)
        report(client, merged, "parts", arguments)
        tail = make(service, owner, arguments, steps=arguments.tail, part=None)
        report(client, tail, "single steps", arguments)
        say({"api_rss_mb": rss(watcher), "when": "after"})
        for job in (merged, tail):
            client.cancel(job)
    service.keys.revoke(record.id)


def make(service: JobService, owner: str, arguments: argparse.Namespace, *, steps: int, part: int | None) -> str:
    """A running job whose objects are in the bucket."""
    job = service.submit(parse_spec(SPEC), owner).id
    service.job_store.claim(job, epoch=1, worker="bench", lease_seconds=3600)
    put_base(service.store, ResumeBase(job=job, epoch=1, resumed=None))
    with TemporaryDirectory() as folder:
        run = RunOfRollouts(service.store, job, 1, Path(folder))
        for step in range(1, steps + 1):
            drawn = completions(step, prompts=arguments.prompts, group=arguments.group, words=arguments.words)
            run.step(step, drawn)
            if part and step % part == 0:
                run.merge()
        size = sum(entry.size for entry in run.sent.values())
        say({"job": job, "objects": len(run.sent), "megabytes": round(size / 1e6, 1)})
    return job


def report(client: GrpoClient, job: str, what: str, arguments: argparse.Namespace) -> None:
    """Ask every question some times over."""
    draw = random.Random(1)  # noqa: S311 - made-up work
    last = arguments.steps if what == "parts" else arguments.tail
    prompts = [rollout["prompt_id"] for rollout in client.rollouts(job, limit=500)["data"]]

    def step() -> int:
        return draw.randrange(1, last + 1)

    questions: dict[str, Callable[[], Any]] = {
        "one step": lambda: client.rollouts(job, step=step(), limit=min(500, arguments.prompts * arguments.group)),
        "a group": lambda: client.rollouts(job, step=1, prompt=draw.choice(prompts[: arguments.group])),
        "a prompt across steps": lambda: client.rollouts(job, prompt=draw.choice(prompts), order="step"),
        "worst 50": lambda: client.rollouts(job, order="reward"),
        "best 50 cut ones": lambda: client.rollouts(job, order="-reward", finish="length"),
        "reward below 0.5": lambda: client.rollouts(job, reward_lt=0.5, step_from=step()),
        "longest 200": lambda: client.rollouts(job, order="-length", limit=200),
        "newest 50": lambda: client.rollouts(job, order="-step"),
        "the second page of the worst": lambda: client.rollouts(
            job, order="reward", cursor=client.rollouts(job, order="reward", limit=1)["next_cursor"]
        ),
        "the steps": lambda: client.rollout_steps(job),
    }
    taken: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(arguments.rounds):
        for name, ask in questions.items():
            began = time.perf_counter()
            ask()
            taken[name].append((time.perf_counter() - began) * 1000)
    for name, times in taken.items():
        middle = sorted(times)[len(times) // 2]
        say({"of": what, "ask": name, "first": round(times[0]), "p50": round(middle), "max": round(max(times))})


def rss(watcher: GrpoClient) -> int:
    """The API process's resident memory in 10^6 bytes, by its own account."""
    found = re.search(r"^process_resident_memory_bytes (\S+)$", watcher.service_metrics(), re.MULTILINE)
    assert found is not None, "the API's host tells no memory"
    return round(float(found[1]) / 1e6)


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
