"""How training scales over the GPUs of one host, and whether a base that no one GPU holds is trained and resumed.

    python scripts/bench_cards.py [--gpus 8] [--seconds 560] [--out DIR]
    python scripts/bench_cards.py --cpu --gpus 4          # tiny shapes on CPU ranks, one of them slow, to its end
    python scripts/bench_cards.py --plan                  # the plan of memory for 32B and 70B, without a GPU

Owns the order of runs, what is compared, the summary, and that table. Each run is `random_run.py train`: the product's
launcher, trainer, rewards, records and checkpoints, on random weights that the GPUs make. Each finding is a line of
cards.jsonl in DIR (default $OUT or .), written at once; cards.md, a table and what was found, is written anew after
each part:

- scale: Qwen2.5-7B's shape, 32 N x 8 completions of 200 tokens on N = 1, 2, 4, 8 GPUs. The most GPUs first and alone.
  Then the others side by side, on different GPUs. The one GPU goes on when they have ended, and the others are
  compared with its steps from then on: beside others it might be slower, which would flatter them.
- large: Llama-70B's shape over all GPUs, with a checkpoint of each step. A rank is killed in the middle of step 4. A
  run resumes from the checkpoint of step 2, so that its step 3 must equal the first one's; all its processes are killed
  in step 4. A third resumes from that checkpoint. On a CPU the rank is killed in step 6, so that the third must equal
  the first one's steps 4 and 5.
- host: what no GPU does in a step of 32 N x 8 completions, with N ranks that draw and train in no time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RUNNER: Final = Path(__file__).with_name("random_run.py")
BEGAN: Final = time.time()
WARM: Final = 3
"""First steps that are not measured: they compile and capture."""
GOAL: Final = 0.9
LIMITS: Final = {"scale": 170.0, "large": 330.0, "host": 60.0}
"""Seconds of a round of runs of `scale`, of all of `large`, and of a run of `host`."""
COMPLETION: Final = 200
"""Tokens."""
TIMES: Final = ("seconds", "completions_per_s", "gpu_memory_gb", "epoch")
"""What may differ between two runs of the same steps."""
QUESTION: Final = (
    "A farmer has {a} hens and buys {b} more on the market. How many hens has the farmer then? Think about it first, "
    "and then give the number alone as your answer."
)


@dataclass(slots=True)
class Sitting:
    """The options, the folders, and what was found."""

    options: argparse.Namespace
    work: Path
    """Bases and runs; removed at the end."""
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def left(self) -> float:
        return float(self.options.seconds) - (time.time() - BEGAN)

    def note(self, **values: Any) -> None:
        line = {"at_s": round(time.time() - BEGAN, 1), **values}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        with (self.options.out / "cards.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def spec(self, base: str, prompts: int, generations: int, tokens: int, **changes: Any) -> dict[str, Any]:
        gpus = 0 if self.options.cpu else changes["ranks"]
        return {
            "engine": "native",
            "model": {"name": base, "precision": self.options.precision if gpus else "auto"},
            "lora": {"rank": changes.get("rank", 32), "alpha": 32},
            "optimizer": {"name": "adamw_torch", "learning_rate": 1e-4, "schedule": "constant", "warmup_ratio": 0},
            "training": {"steps": 1000, "log_every": 1, "save_steps": 1000, "checkpoint_every": 1000}
            | changes.get("training", {}),
            "sampling": {
                "prompts_per_step": prompts,
                "generations": generations,
                "gradient_accumulation": 1,
                "max_prompt_tokens": 400,
                "max_completion_tokens": tokens,
                "temperature": 1.0,
            },
            "loss": {"beta": 0.0},
            # It differs between completions of random tokens, so that there is something to learn.
            "rewards": {
                "graders": {"long": {"type": "length", "minimum": 2000, "falloff": 2000}},
                "weights": {"long": 1.0},
            },
            "data": {"source": "file", "dataset": str(self.work / "rows.jsonl"), "system_prompt": ""},
            "evaluation": {"questions": 0},
            "resources": {"gpus": gpus},
            "guards": {"no_signal_steps": 0, "max_logprob_diff": 0},
        }


class Run:
    """A run on some GPUs, by the command that a worker starts."""

    def __init__(
        self,
        sitting: Sitting,
        name: str,
        spec: dict[str, Any],
        ranks: int,
        *,
        first: int = 0,
        slow: str = "",
        shared: bool = False,
        instant: bool = False,
    ) -> None:
        """`first`: the first GPU of `ranks`; `slow`: RANK:FACTOR; `shared`: whether the base is, on a CPU too;
        `instant`: whether it has no model."""
        self.name, self.ranks, self.root = name, ranks, sitting.work / name
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        seen = {} if sitting.options.cpu else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + ranks)))}
        threads = len(os.sched_getaffinity(0)) * ranks // max(ranks, sitting.options.gpus)
        self.began = time.time()
        with (self.root / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, RUNNER, "train", self.root / "spec.json", "--out", self.root, "--ranks", str(ranks)],
                stdout=log,
                stderr=log,
                # NCCL's variables stay as the host sets them.
                env={
                    **os.environ,
                    "GRPO_MODEL_DIR": str(sitting.work / "models"),
                    "OMP_NUM_THREADS": str(max(1, threads)),
                    "TOKENIZERS_PARALLELISM": "false",
                    "BENCH_SLOW": slow,
                    "BENCH_SHARED": "1" if shared and sitting.options.cpu else "",
                    "BENCH_INSTANT": str(COMPLETION) if instant else "",
                    **seen,
                },
                start_new_session=True,
            )

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return what a rank wrote so far: `loaded`, then its steps."""
        return _json_lines(self.root / f"times-{rank}.jsonl")

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        return [line for line in self.lines(rank) if "step" in line]

    def done(self, step: int) -> bool:
        """Whether every rank has finished a step."""
        return all(any(line["step"] >= step for line in self.steps(rank)) for rank in range(self.ranks))

    def checkpoint(self, step: int) -> Path:
        return self.root / "checkpoints" / f"step-{step:06d}"

    def events(self, type_: str) -> list[dict[str, Any]]:
        return [event["data"] for event in _json_lines(self.root / "events.jsonl") if event["type"] == type_]

    def pids(self) -> list[int]:
        """Return the processes of the ranks; of one rank, that of the run."""
        if self.ranks == 1:
            return [self.process.pid]
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def kill(self) -> float:
        """Kill all its processes; return the seconds until the last one is gone."""
        began, pids = time.time(), [self.process.pid]
        with suppress(OSError):
            pids += self.pids()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _wait(lambda: not any(_runs(pid) for pid in pids), 30)
        return round(time.time() - began, 2)

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait for something; raise an error if the run ends before, or it takes too long."""
        if not _wait(lambda: until() or self.process.poll() is not None, seconds):
            raise TimeoutError(f"{self.name}: not within {seconds:.0f} s; its log ends:\n{self.tail()}")
        if not until():
            raise ChildProcessError(f"{self.name} ended with {self.process.poll()}; its log ends:\n{self.tail()}")

    def tail(self) -> str:
        told = "".join(f"\n{error['code']}: {error['message']}" for error in self.events("error"))
        return (self.root / "log").read_text("utf-8", "replace")[-1500:] + told


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that may be growing."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    end = time.time() + seconds
    while not until():
        if time.time() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Scaling


def scale(sitting: Sitting) -> None:
    options = sitting.options
    model, generations, tokens = ("tiny", 4, 8) if options.cpu else ("qwen7b", 8, COMPLETION)
    each, count = (4, 12) if options.cpu else (32, 6)
    sizes = [n for n in (8, 4, 2, 1) if n <= options.gpus]
    rounds = [sizes[:1], sizes[1:]] if len(sizes) > 1 else [sizes]
    for number, together in enumerate(rounds):
        first, runs = 0, list[Run]()
        slow = options.slow if number == 0 else ""
        for n in together:
            spec = sitting.spec(model, each * n + (options.cpu and n > 1), generations, tokens, ranks=n)
            runs.append(Run(sitting, f"scale-{n}", spec, n, first=first, slow=slow))
            first += n
        until = time.time() + min(sitting.left, 10 * LIMITS["scale"] if options.cpu else LIMITS["scale"])
        try:
            for run in runs:
                run.wait(lambda run=run: run.done(WARM + count), until - time.time())
                alone, beside = 0, WARM
                if run.ranks == 1 and len(runs) > 1:  # the last one, and now alone
                    alone = beside = len(run.steps()) + 1
                    run.wait(lambda run=run, alone=alone: run.done(alone + count), until - time.time())
                run.kill()
                _note_scale(sitting, run, beside, len(runs) > 1 and not alone, slow)
        finally:
            for run in runs:
                run.kill()
        _write_summary(sitting)


def _note_scale(sitting: Sitting, run: Run, skipped: int, beside: bool, slow: str) -> None:
    """Note a run's median step, its parts, and what each rank worked; its first `skipped` steps do not count."""
    metrics = _json_lines(run.root / "metrics.jsonl")[skipped:]
    by_rank = [run.steps(rank)[skipped : skipped + len(metrics)] for rank in range(run.ranks)]
    seconds = [line["seconds"]["total"] for line in metrics]
    worked = [
        round(statistics.median(line["worked"][rank] for line in by_rank[0]), 3)
        for rank in range(run.ranks if run.ranks > 1 else 0)
    ]
    last = [run.lines(rank)[-1] for rank in range(run.ranks)]
    loaded = run.lines()[0]
    sampling = json.loads((run.root / "spec.json").read_text())["sampling"]
    completions = sampling["prompts_per_step"] * sampling["generations"]
    median = statistics.median(seconds)
    sitting.note(
        part="scale",
        gpus=run.ranks,
        shape=f"{sampling['prompts_per_step']}x{sampling['generations']}",
        steps=len(seconds),
        step_s=round(median, 3),
        fastest_s=round(min(seconds), 3),
        completions_per_s=round(completions / median, 1),
        seconds={
            name: round(statistics.median(line["seconds"][name] for line in metrics), 3)
            for name in ("generation", "reward", "update")
        },
        parts=_medians(by_rank[0], "parts"),
        cpu=_medians(by_rank[0], "cpu"),
        logprob_diff_mean=max((line["logprob_diff_mean"] or 0.0 for line in metrics), default=0.0),
        worked_s=worked,
        slowest_rank=worked.index(max(worked)) if worked else None,
        peak_gb=[line.get("peak_gb") for line in last],
        reserved_gb=[line.get("reserved_gb") for line in last],
        planned_gb=loaded.get("planned_gb"),
        host_gb=round(sum(line["host_gb"] for line in last), 1),
        loaded_s=loaded["at"],
        first_step_at_s=run.steps()[0]["at"],
        beside_others=beside,
        **(
            {"slow": slow, "warned": [w["message"] for w in run.events("warning") if w["code"] == "slow_rank"]}
            if slow
            else {}
        ),
    )


def _medians(steps: Sequence[dict[str, Any]], column: str) -> dict[str, float]:
    names = {name: None for line in steps for name in line[column]}
    found = {name: statistics.median(line[column].get(name, 0.0) for line in steps) for name in names}
    return {name: round(value, 4) for name, value in sorted(found.items(), key=lambda one: -one[1]) if value >= 0.001}


def host(sitting: Sitting) -> None:
    """Measure steps in which drawing and training take no time, on the most ranks and on one."""
    for n in dict.fromkeys((sitting.options.gpus, 1)):
        spec = sitting.spec("instant", 32 * n, 8, COMPLETION, ranks=0)
        limit = min(sitting.left, 10 * LIMITS["host"] if sitting.options.cpu else LIMITS["host"])
        run = Run(sitting, f"host-{n}", spec, n, instant=True)
        try:
            run.wait(lambda run=run: run.done(WARM + 3), limit)
        finally:
            run.kill()
        steps = run.steps()[WARM:]
        total = statistics.median(sum(line["parts"].values()) for line in steps)
        spent = statistics.median(sum(line["cpu"].values()) for line in steps)
        sitting.note(
            part="host",
            ranks=n,
            shape=f"{32 * n}x8",
            step_s=round(total, 3),
            cpu_s=round(spent, 3),
            parts=_medians(steps, "parts"),
            cpu=_medians(steps, "cpu"),
        )


# A base that is shared out


def large(sitting: Sitting) -> None:
    options, n = sitting.options, sitting.options.gpus
    if n == 1:
        sitting.note(part="large", skipped="one GPU shares nothing")
        return
    until = time.time() + min(sitting.left, 10 * LIMITS["large"] if options.cpu else LIMITS["large"])
    model, generations, tokens = ("tiny", 4, 8) if options.cpu else (options.large, 8, 24)
    undisturbed = 5 if options.cpu else 3
    spec = sitting.spec(
        model,
        n + 1 if options.cpu else 2 * n,  # uneven: some rank has two groups
        generations,
        tokens,
        ranks=n,
        rank=16,
        training={"save_steps": 1, "checkpoint_every": 1},
    )
    runs: list[Run] = []

    def start(name: str, resumed: Path | None = None) -> Run:
        if resumed is not None:
            shutil.copytree(resumed, sitting.work / name / "inputs" / "resume")
        run = Run(sitting, name, spec, n, slow=options.slow if name == "large-first" else "", shared=True)
        runs.append(run)
        run.wait(lambda: bool(run.lines()), until - time.time())
        _note_loaded(sitting, run)
        return run

    def reach(run: Run, step: int) -> None:
        """Let a run finish a step, and begin the next."""
        run.wait(lambda: run.done(step) and (run.checkpoint(step) / "manifest.json").exists(), until - time.time())
        _note_steps(sitting, run)
        time.sleep(
            0.4 * statistics.median(line["seconds"]["total"] for line in _json_lines(run.root / "metrics.jsonl"))
        )

    try:
        first = start("large-first")
        reach(first, undisturbed)
        _note_checkpoint(sitting, first, 3)
        _kill_one(sitting, first)
        _write_summary(sitting)
        second = start("large-second", first.checkpoint(2))
        reach(second, 3)
        _note_same(sitting, first, second, 3)
        sitting.note(part="large", killed="all processes", run=second.name, gone_after_s=second.kill())
        _write_summary(sitting)
        third = start("large-third", second.checkpoint(3))
        reach(third, max(4, undisturbed))
        third.kill()
        for step in range(4, undisturbed + 1):
            _note_same(sitting, first, third, step)
    finally:
        for run in runs:
            run.kill()
        _write_summary(sitting)


def _note_loaded(sitting: Sitting, run: Run) -> None:
    loaded = run.lines()[0]
    facts = ("weights_s", "held_gb", "sharded", "budget_tokens", "sparing", "planned_gb", "peak_gb", "reserved_gb")
    told = [event["message"] for event in run.events("log") if event.get("code") in ("sharding", "resumed")]
    changed = [event["message"] for event in run.events("warning") if event["code"] == "base_differs"]
    found = {name: loaded[name] for name in facts if name in loaded}
    sitting.note(part="large", run=run.name, loaded_s=loaded["at"], **found, told=told, base_differs=changed)


def _note_steps(sitting: Sitting, run: Run) -> None:
    for metrics, line in zip(_json_lines(run.root / "metrics.jsonl")[-len(run.steps()) :], run.steps(), strict=False):
        last = [run.steps(rank)[-1] for rank in range(run.ranks)]
        seconds = {name: round(value, 3) for name, value in metrics["seconds"].items()}
        sitting.note(
            part="large",
            run=run.name,
            step=metrics["step"],
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            seconds=seconds,
            checkpoint_s=line["parts"].get("checkpoint"),
            worked_s=line["worked"],
            peak_gb=[one.get("peak_gb") for one in last],
            reserved_gb=[one.get("reserved_gb") for one in last],
        )


def _note_checkpoint(sitting: Sitting, run: Run, step: int) -> None:
    """Note what a checkpoint holds: of the base it may hold nothing, and besides the adapter its two moments."""
    sizes = {file.name: file.stat().st_size for file in sorted(run.checkpoint(step).iterdir())}
    adapter = sizes["adapter_model.safetensors"]
    beside = sum(sizes.values()) - 3 * adapter
    sitting.note(part="large", run=run.name, checkpoint=sizes, beside_adapter_and_moments_mb=round(beside / 1e6, 2))


def _kill_one(sitting: Sitting, run: Run) -> None:
    """Kill the last rank, and wait until its launcher has ended the others."""
    pids, began = run.pids(), time.time()
    os.kill(pids[-1], signal.SIGKILL)
    _wait(lambda: run.process.poll() is not None and not any(map(_runs, pids)), 60)
    seconds = round(time.time() - began, 2)
    steps = len(_json_lines(run.root / "metrics.jsonl"))
    said = [error["code"] for error in run.events("error")]
    killed, code = f"rank {run.ranks - 1}", run.process.poll()
    sitting.note(
        part="large", killed=killed, run=run.name, after_steps=steps, exit=code, error=said, gone_after_s=seconds
    )


def _note_same(sitting: Sitting, one: Run, other: Run, step: int) -> None:
    """Note whether two runs did the same in a step: rollouts, metrics, and the bytes of adapter and optimizer."""
    from grpo_core.run_dir.records import read_rollouts

    rows = [[row for row in read_rollouts(run.root / "rollouts") if row["step"] == step] for run in (one, other)]
    for row in (*rows[0], *rows[1]):
        row.pop("epoch", None)
    metrics = [
        {name: value for name, value in line.items() if name not in TIMES}
        for run in (one, other)
        for line in _json_lines(run.root / "metrics.jsonl")
        if line["step"] == step
    ]
    files = ("adapter_model.safetensors", "state.safetensors")
    equal = {name: _same_file(one.checkpoint(step) / name, other.checkpoint(step) / name) for name in files}
    bases = [json.loads((run.checkpoint(step) / "progress.json").read_text())["base"] for run in (one, other)]
    sitting.note(
        part="large",
        step=step,
        compared=[one.name, other.name],
        same_rollouts=rows[0] == rows[1] and bool(rows[0]),
        same_metrics=metrics[0] == metrics[1],
        same_base=bases[0] == bases[1],
        **{f"same_{name}": same for name, same in equal.items()},
        apart={k: [metrics[0][k], metrics[1][k]] for k in metrics[0] if metrics[0][k] != metrics[1].get(k)},
    )


def _same_file(one: Path, other: Path) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        while block := left.read(2**24):
            if block != right.read(2**24):
                return False
        return not right.read(1)


# The summary


def _write_summary(sitting: Sitting) -> None:
    lines = [*_table(sitting), *_of_parts(sitting), *_of_others(sitting)]
    (sitting.options.out / "cards.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scaled(sitting: Sitting) -> list[dict[str, Any]]:
    found = (line for line in sitting.lines if line.get("part") == "scale" and "gpus" in line)
    return sorted(found, key=lambda one: one["gpus"])


def _table(sitting: Sitting) -> list[str]:
    found = _scaled(sitting)
    base = next((line["completions_per_s"] for line in found if line["gpus"] == 1), None)
    lines = [
        "| GPUs | shape | step | generation, rewards, update | completions/s | of N × one GPU | own work | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in found:
        share = "" if base is None else f"{line['completions_per_s'] / base / line['gpus']:.2f}"
        parts = ", ".join(f"{line['seconds'][name]:.2f} s" for name in ("generation", "reward", "update"))
        worked = line["worked_s"]
        slowest = f"{min(worked):.2f} to {max(worked):.2f} s, rank {line['slowest_rank']}" if worked else ""
        peak = max((gb for gb in line["peak_gb"] if gb), default=0.0)
        cells = [line["gpus"], line["shape"].replace("x", " × "), f"{line['step_s']:.2f} s", parts]
        cells += [line["completions_per_s"], share, slowest, f"{peak:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _of_parts(sitting: Sitting) -> list[str]:
    found = _scaled(sitting)
    names = list(dict.fromkeys(name for line in reversed(found) for name in line["parts"]))
    head = " | ".join(f"{line['gpus']}" for line in found)
    lines = ["", f"| seconds of a step, rank 0 | {head} |", "|---" * (1 + len(found)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{line['parts'].get(name, 0.0):.3f}" for line in found) + " |" for name in names
    ]
    return lines if found else []


def _of_others(sitting: Sitting) -> list[str]:
    found = [line for line in sitting.lines if line.get("part") in ("large", "host") or "error" in line]
    return ["", *(f"- {json.dumps(line, ensure_ascii=False)}" for line in found)] if found else []


# The plan


def plan() -> list[str]:
    """Say what the plan of memory has for large bases on several GPUs, for 32 x 8 completions of 200 tokens."""
    import torch

    from grpo_core.cost import GIB
    from grpo_core.engines.native.memory import plan_memory, require_room
    from grpo_core.engines.native.weights import matrix_bytes
    from grpo_core.errors import JobFailure
    from grpo_core.spec import parse_spec
    from scripts.random_run import shape_of

    sampling = {"prompts_per_step": 32, "generations": 8, "max_prompt_tokens": 160}
    spec = parse_spec({"engine": "native", "sampling": sampling})
    lines = ["| model | GPUs | weights on each | room beside them | completions at a time |", "|---" * 5 + "|"]
    for name, gigabytes, ranks in itertools.product(("qwen32b", "llama70b"), (80, 141), (1, 2, 4, 8)):
        model, memory = shape_of(name), gigabytes * GIB
        held = matrix_bytes(model, ranks=ranks, dtype=torch.bfloat16, spare_rank=32)
        try:
            require_room(spec, model, memory=memory, held=held, ranks=ranks)
            cache, _ = plan_memory(spec, model, memory=memory, held=held, size=2, sparing=ranks > 1)
            room = [f"{(0.88 * memory - held) / 1e9:.0f} GB", str(min(256, ranks * (cache // 361)))]
        except JobFailure:
            room = ["none", "refused"]
        lines.append("| " + " | ".join([name, f"{ranks} × {gigabytes} GB", f"{held / 1e9:.1f} GB", *room]) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=0, help="default: all of this host; with --cpu, 4 ranks")
    parser.add_argument("--seconds", type=float, default=560, help="no part goes on after that; 3600 with --cpu")
    parser.add_argument("--parts", default="scale,large,host")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--precision", default="16bit", choices=("16bit", "8bit"), help="of the base, on GPUs")
    parser.add_argument("--large", default="llama70b", choices=("llama70b", "qwen32b"), help="the base of that part")
    parser.add_argument("--plan", action="store_true", help="print the plan of memory for large bases, and end")
    parser.add_argument("--slow", default=None, help="RANK:FACTOR, a rank that is made slow; 1:3 with --cpu")
    options = parser.parse_args()
    if options.plan:
        print("\n".join(plan()))
        return 0
    if options.cpu:
        options.gpus, options.slow = options.gpus or 4, "1:3" if options.slow is None else options.slow
        options.seconds = 3600 if options.seconds == parser.get_default("seconds") else options.seconds
    else:
        from grpo_core.hardware.gpus import find_gpus

        options.gpus, options.slow = options.gpus or len(find_gpus()), options.slow or ""
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="grpo-cards-") as work:
        return _sit(Sitting(options, Path(work)))


def _sit(sitting: Sitting) -> int:
    options, failed = sitting.options, 0
    numbers = random.Random(0)  # noqa: S311 - questions of a measurement
    with (sitting.work / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(2048):
            a, b = numbers.randint(10, 999), numbers.randint(10, 999)
            file.write(json.dumps({"question": QUESTION.format(a=a, b=b), "answer": str(a + b)}) + "\n")
    bases = ("instant", "tiny") if options.cpu else ("qwen7b", options.large, "instant")
    subprocess.run([sys.executable, RUNNER, "--models", sitting.work / "models", *bases], check=True)
    sitting.note(gpus=options.gpus, cpu=options.cpu, bases_s=round(time.time() - BEGAN, 1))
    for part in options.parts.split(","):
        if sitting.left < 60:
            sitting.note(part=part, skipped=f"{sitting.left:.0f} s are left")
            continue
        try:
            {"scale": scale, "large": large, "host": host}[part](sitting)
        except Exception as error:  # noqa: BLE001 - the next part is to be measured all the same
            sitting.note(part=part, error=f"{type(error).__name__}: {error}"[:2500])
            failed += 1
        _write_summary(sitting)
    print((options.out / "cards.md").read_text("utf-8"))
    return failed + _missed(sitting)


def _missed(sitting: Sitting) -> int:
    """Count what was measured and is not as it must be."""
    found = {line["gpus"]: line["completions_per_s"] for line in _scaled(sitting)}
    if not sitting.options.cpu:
        slow = [n for n in found if 1 in found and found[n] < GOAL * n * found[1]]
        for n in slow:
            sitting.note(
                missed=f"{n} GPUs give {found[n] / found[1]:.2f} times what one does; {GOAL * n:.1f} is the goal"
            )
    differs = [line for line in sitting.lines if any(k.startswith("same_") and not v for k, v in line.items())]
    return len(differs)


if __name__ == "__main__":
    sys.exit(main())
