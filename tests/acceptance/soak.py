"""A night in ten minutes: many jobs, while everything that serves them is killed, frozen and cut off at random.

`make soak`, or `python -m tests.acceptance.soak`. Owns what is submitted and what is done to the service; what must be
true of every job afterwards is the oracle's of the fault suite. Invariant: the seed decides what is done and when, up
to how fast the machine is.

    GRPO_SOAK_SECONDS    how long faults go on (600)      GRPO_SOAK_JOBS   jobs for the fake trainer (200)
    GRPO_SOAK_REAL_JOBS  jobs on the CPU engine (10)      GRPO_SOAK_SEED   (1)
    GRPO_SOAK_WORKERS    (3)                              GRPO_FAULT_TABLE update the page of the fault table
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_client import ClientError, GrpoClient, ProblemError
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from tests.acceptance.faults import table
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import ROOT, Follower, Stage, Worker, job_spec, processes_below

LEASE_SECONDS = 4.0
FOLLOWED = 8
"""So many jobs have a reader who follows their events."""
REAL_QUIET_SECONDS = 90.0
"""A run of the real engine loads for 20 s and more: lost three times before its first step, it would rightly fail."""
FAKE_QUIET_SECONDS = 8.0
KINDS = {
    "plain": 66,
    "killed once": 6,
    "hangs once": 4,
    "out of memory": 6,
    "diverges": 4,
    "cancelled": 7,
    "paused and resumed": 7,
}
"""Percent of the jobs of each kind."""
HOW: dict[str, dict[str, str]] = {
    "killed once": {"fail": "kill", "fail_step": "7", "fail_epochs": "1"},
    "hangs once": {"fail": "hang", "fail_step": "12", "fail_epochs": "1"},
    "out of memory": {"oom_until": "2"},
    "diverges": {"fail": "15", "fail_step": "12"},
}
FAULTS = {
    "worker killed": 26,
    "worker asked to stop": 8,
    "worker frozen": 10,
    "worker cut off from Valkey": 7,
    "worker cut off from storage": 7,
    "connections reset": 8,
    "API killed": 12,
    "Valkey killed": 11,
    "SeaweedFS killed": 11,
}
"""How often each is done, of a hundred."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how much."""

    seconds: float = 600
    jobs: int = 200
    real_jobs: int = 10
    workers: int = 3
    seed: int = 1

    @classmethod
    def from_environment(cls) -> Settings:
        """As the variables above say."""
        given = {name: os.environ.get(f"GRPO_SOAK_{name.upper()}") for name in cls.__dataclass_fields__}
        return cls(**{name: type(getattr(cls, name))(float(value)) for name, value in given.items() if value})


@dataclass
class Asked:
    """A job of the soak."""

    kind: str
    spec: dict[str, Any]
    at: float
    """Seconds after the start."""
    id: str = ""
    follower: Follower | None = None
    key: str = field(default_factory=lambda: str(uuid.uuid4()))


class Client:
    """The jobs' owner: submits, follows, cancels, pauses and resumes, through whatever happens to the API."""

    def __init__(self, stage: Stage, jobs: list[Asked], rng: random.Random) -> None:
        self._stage = stage
        self._jobs = jobs
        self._rng = rng
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [self._spawn(self._submit_all)]

    def finish(self) -> None:
        """Returns when every job was accepted and every order given."""
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), "the owner is not done"
        if self._errors:
            raise self._errors[0]

    def _spawn(self, target: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                target()
            except BaseException as error:  # noqa: BLE001 - raised again by `finish`
                self._errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _submit_all(self) -> None:
        for asked in self._jobs:
            time.sleep(max(0.0, asked.at - (time.monotonic() - self._began)))
            with GrpoClient(self._stage.url, self._stage.key) as client:
                spec, key = asked.spec, asked.key
                asked.id = self._insist(lambda s=spec, k=key, c=client: c.submit(s, idempotency_key=k))["id"]
            if sum(job.follower is not None for job in self._jobs) < FOLLOWED:
                asked.follower = Follower(self._stage, asked.id)
            if asked.kind in ("cancelled", "paused and resumed"):
                delay = self._rng.uniform(0, 12)
                self._threads.append(self._spawn(lambda a=asked, d=delay: self._order(a, d)))

    def _order(self, asked: Asked, delay: float) -> None:
        time.sleep(delay)
        with GrpoClient(self._stage.url, self._stage.key) as client, contextlib.suppress(_Ended):
            if asked.kind == "cancelled":
                self._insist(lambda: client.cancel(asked.id))
                return
            self._insist(lambda: client.pause(asked.id))
            time.sleep(delay / 3)
            self._insist(lambda: client.resume(asked.id))

    def _insist(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask until it is done. A job that is pausing cannot be resumed yet; one that has ended raises."""
        until = time.monotonic() + 240
        while True:
            try:
                return ask()
            except ProblemError as problem:
                if problem.status == 409 and "has ended" in str(problem):
                    raise _Ended from problem
                if problem.status < 500 and problem.status != 409:
                    raise
                error: ClientError = problem
            except ClientError as away:
                error = away
            if time.monotonic() > until:
                raise error
            time.sleep(0.5)


class _Ended(Exception):
    """An order came after the job's end."""


class Monkey:
    """Does the faults. Everything here runs in the main thread, which the processes are bound to."""

    def __init__(self, stage: Stage, rng: random.Random, real: Callable[[str], bool]) -> None:
        self._stage = stage
        self._rng = rng
        self._is_real = real
        self._lost: dict[str, float] = {}
        self._repairs: list[tuple[float, Callable[[], None]]] = []
        self._broken: set[str] = set()
        self.done: Counter[str] = Counter()

    def play(self, seconds: float) -> None:
        """Go on for so long, then mend everything."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pause = time.monotonic() + self._rng.uniform(0.5, 4)
            self._hurt()
            while time.monotonic() < pause:
                self._mend()
                time.sleep(0.05)
        for _, repair in self._repairs:
            repair()
        self._stage.start()

    def _hurt(self) -> None:
        fault = self._rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        worker = self._rng.choice(self._stage.workers)
        length = self._rng.uniform(0.2, 6)
        target = {"API": self._stage.api, "Valkey": self._stage.valkey, "SeaweedFS": self._stage.seaweedfs}
        name = fault.split(" ")[0]
        process = target.get(name, worker)
        if process.name in self._broken or (process is worker and not self._may_lose(worker)):
            return
        self.done[fault] += 1
        if fault.endswith("killed"):
            process.kill()
            self._later(process.name, length, lambda: process.start(wait=False))
        elif fault == "worker asked to stop":
            process.signal(signal.SIGTERM)
            self._later(process.name, 6.0, lambda: (process.kill(), process.start(wait=False)))
        elif fault == "worker frozen":
            process.signal(signal.SIGSTOP)
            self._later(process.name, length, lambda: process.signal(signal.SIGCONT))
        elif fault == "connections reset":
            worker.valkey.cut()
            worker.storage.cut()
        else:
            line = worker.valkey if fault.endswith("Valkey") else worker.storage
            mode = self._rng.choice(["hole", "refused"])
            self._stage.network.run(line._set(mode, 0.0))  # type: ignore[arg-type]
            self._later(process.name, length, line.open)

    def _may_lose(self, worker: Worker) -> bool:
        """Whether what this worker runs can bear to be lost now; if so, it counts as lost."""
        try:
            running = [r for r in self._running() if r.worker == worker.name]
        except Exception:  # noqa: BLE001 - Valkey is down: nobody knows
            return False
        now = time.monotonic()
        for record in running:
            quiet = REAL_QUIET_SECONDS if self._is_real(record.id) else FAKE_QUIET_SECONDS
            if now - self._lost.get(record.id, -1e9) < quiet:
                return False
        self._lost |= {record.id: now for record in running}
        return True

    def _running(self) -> list[JobRecord]:
        job_store = self._stage.job_store
        ids = [str(job) for job in job_store.client.zrange(f"{job_store.prefix}:leases", 0, -1)]
        return job_store.get_many(ids)

    def _later(self, name: str, seconds: float, repair: Callable[[], Any]) -> None:
        self._broken.add(name)

        def mend() -> None:
            repair()
            self._broken.discard(name)

        self._repairs.append((time.monotonic() + seconds, mend))

    def _mend(self) -> None:
        now = time.monotonic()
        due = [repair for moment, repair in self._repairs if moment <= now]
        self._repairs = [(moment, repair) for moment, repair in self._repairs if moment > now]
        for repair in due:
            repair()
        for process in (self._stage.api, *self._stage.workers):
            if process.name not in self._broken and not process.alive:
                process.start(wait=False)  # it gave up, as a worker does: its supervisor starts it again


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the soak found; `wrong` is empty, or it failed."""

    settings: Settings
    took: float
    settled: float
    faults: dict[str, int]
    statuses: dict[str, int]
    runs: dict[int, int]
    """How many jobs took so many runs."""
    wrong: dict[str, str]

    def __str__(self) -> str:
        s = self.settings
        faults = ", ".join(f"{name} {count} times" for name, count in sorted(self.faults.items()))
        runs = ", ".join(f"{jobs} in {number}" for number, jobs in sorted(self.runs.items()))
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{s.jobs} jobs with the fake trainer and {s.real_jobs} on the CPU engine, {s.workers} workers, "
            f"{s.seconds:.0f} s of faults, seed {s.seed}.\n\n"
            f"- Faults: {faults}; {sum(self.faults.values())} in all.\n"
            f"- Jobs: {statuses}. Runs a job took: {runs}.\n"
            f"- After the last fault it took {self.settled:.0f} s until every job had ended; {self.took:.0f} s in all, "
            "checks included.\n"
            f"- Jobs for which the oracle found something wrong: {len(self.wrong)}."
        )


def make_jobs(settings: Settings, rng: random.Random, dataset: str | None) -> list[Asked]:
    """What is submitted, in order of time: over the first three quarters of the faults."""
    span = settings.seconds * 0.75
    jobs: list[Asked] = []
    for _ in range(settings.jobs):
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        spec = job_spec(rng.choice([20, 30, 40]), 5, **HOW.get(kind, {}))
        jobs.append(Asked(kind, spec, rng.uniform(0, span)))
    for number in range(settings.real_jobs):
        assert dataset is not None
        jobs.append(Asked("real", real_spec(dataset), span * number / settings.real_jobs))
    return sorted(jobs, key=lambda asked: asked.at)


def real_spec(dataset: str) -> dict[str, Any]:
    """A few steps of the tiny model on the CPU engine."""
    return {
        "metadata": {"trainer": "real"},
        "model": {"name": "tiny-arithmetic", "max_sequence": 128},
        "lora": {"rank": 4, "alpha": 4, "gradient_checkpointing": "off"},
        "optimizer": {"name": "adamw_torch", "learning_rate": 2e-3},
        "training": {"steps": 6, "checkpoint_every": 1},
        "sampling": {
            "prompts_per_step": 2,
            "generations": 4,
            "max_prompt_tokens": 64,
            "max_completion_tokens": 24,
            "temperature": 1.0,
        },
        "data": {"source": "upload", "dataset": dataset, "system_prompt": "", "max_rows": 100},
        "resources": {"gpus": 0},
    }


@contextlib.contextmanager
def open_stage(folder: Path, settings: Settings) -> Generator[Stage]:
    """The service of the soak: workers that serve both trainers."""
    launcher = f"{sys.executable} {ROOT / 'tests' / 'acceptance' / 'either_trainer.py'}"
    more = {"GRPO_LAUNCHER": launcher, "GRPO_STALL_FLOOR_SECONDS": "8", "GRPO_STALL_QUIET_SECONDS": "240"}
    stage = Stage(folder, settings.workers, lease_seconds=LEASE_SECONDS, worker_settings=more)
    try:
        stage.start()
        yield stage
    finally:
        stage.close()


def soak(settings: Settings, folder: Path) -> Result:
    """Run it; what is wrong with a job is told in the result."""
    began = time.monotonic()
    with open_stage(folder, settings) as stage:
        rng = random.Random(settings.seed)
        oracle = Oracle(stage)
        dataset = None
        if settings.real_jobs:
            dataset = stage.client.upload_dataset(ROOT / "examples" / "tiny" / "train.jsonl")["id"]
            first = stage.client.submit(real_spec(dataset))["id"]
            record = stage.until_ended(first, seconds=240)
            assert record.status is JobStatus.SUCCEEDED, record.error
            oracle.know(record)
        jobs = make_jobs(settings, rng, dataset)
        by_id = lambda job_id: next((asked for asked in jobs if asked.id == job_id), None)  # noqa: E731
        owner = Client(stage, jobs, random.Random(settings.seed + 1))
        monkey = Monkey(stage, rng, lambda job_id: (asked := by_id(job_id)) is not None and asked.kind == "real")
        monkey.play(settings.seconds)
        mended = time.monotonic()
        print(f"faults are over after {mended - began:.0f} s: {dict(monkey.done)}", flush=True)
        owner.finish()
        wait_for_all(stage, jobs, 600)
        settled = time.monotonic() - mended
        print(f"every job has ended {settled:.0f} s later", flush=True)
        wrong = {asked.id: problem for asked in jobs if (problem := examine(oracle, asked)) is not None}
        wrong |= what_is_left(stage)
        records = [stage.record(asked.id) for asked in jobs]
        return Result(
            settings=settings,
            took=time.monotonic() - began,
            settled=settled,
            faults=dict(monkey.done),
            statuses=dict(Counter(record.status.value for record in records)),
            runs=dict(Counter(record.epoch for record in records)),
            wrong=wrong,
        )


def wait_for_all(stage: Stage, jobs: list[Asked], seconds: float) -> None:
    """Until every job has ended; one that is stuck is found by the oracle."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        records = stage.job_store.get_many([asked.id for asked in jobs])
        if len(records) == len(jobs) and all(record.status in TERMINAL for record in records):
            return
        for worker in stage.workers:
            worker.start(wait=False)
        time.sleep(0.5)


def examine(oracle: Oracle, asked: Asked) -> str | None:
    """Ask the oracle; what it found wrong, or None."""
    expected = {"diverges": ("failed",), "cancelled": ("cancelled", "succeeded")}.get(asked.kind, ("succeeded",))
    try:
        status = oracle.stage.record(asked.id).status.value
        assert status in expected, f"a job that is {asked.kind}: {status}, {oracle.stage.record(asked.id).error}"
        oracle.check(asked.id, status, follower=asked.follower, untold=True, manifest=status != "cancelled")
    except Exception as error:  # noqa: BLE001 - all are told at the end
        return f"{asked.kind}: {type(error).__name__}: {error}"[:500]
    return None


def what_is_left(stage: Stage) -> dict[str, str]:
    """Records that are stuck, processes and scratch: nothing of it belongs to a job any more."""
    client, prefix = stage.job_store.client, stage.job_store.prefix
    left: dict[str, str] = {}
    for index in ("leases", "queued", "submitting", "ordering"):
        if members := client.zrange(f"{prefix}:{index}", 0, -1):
            left[index] = f"still holds {members}"
    counts = {name: int(count) for name, count in client.hgetall(f"{prefix}:statuses").items() if int(count)}
    if unended := {name: count for name, count in counts.items() if JobStatus(name) not in TERMINAL}:
        left["statuses"] = f"counts {unended}"
    if processes := [pid for worker in stage.workers for pid in processes_below(worker.work_dir)]:
        left["processes"] = f"alive: {processes}"
    if scratch := [str(path) for worker in stage.workers for path in worker.scratch()]:
        left["scratch"] = f"not removed: {scratch}"
    return left


def main() -> int:
    settings = Settings.from_environment()
    with tempfile.TemporaryDirectory(prefix="grpo-soak-") as folder:
        result = soak(settings, Path(folder))
        print(result)
        print(json.dumps(result.wrong, indent=1, ensure_ascii=False))
        if result.wrong and (keep := os.environ.get("GRPO_SOAK_LOGS")):
            for log in Path(folder).glob("*.log"):
                (Path(keep) / log.name).write_bytes(log.read_bytes())
    if os.environ.get("GRPO_FAULT_TABLE") and not result.wrong:
        page = table.replace_between(table.PAGE.read_text("utf-8"), "soak", str(result))
        table.PAGE.write_text(page, encoding="utf-8")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
