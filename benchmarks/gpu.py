"""How fast this service trains on your GPU, beside what you would run instead: one command, one table.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py [NAME ...] [--model MODEL] [--steps 10] [--gpus 1] [--out runs/benchmark]

Needs a CUDA GPU with the `cuda` extra installed, and a model: a hub name, or a folder. `--cpu` rehearses the same with
the repository's tiny model. A benchmark is a name and a command; ours are `python -m grpo_core train`, the others are
benchmarks/baseline.py. They run one after another on each GPU, each in a separate process, and one that fails does not
stop the rest. The table is printed and written to OUT/results.md, the figures to OUT/results.jsonl.
Invariant: ours and its baseline have the same model, problems, completions in a step and limit of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from baseline import PROBLEMS, SYSTEM, WARM_UP

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TINY = ROOT / "examples" / "models" / "tiny-arithmetic"


@dataclass(frozen=True)
class Shape:
    """What a step is: how many prompts, completions of each, parts, and the KL term."""

    prompts: int
    generations: int
    parts: int
    beta: float
    bits: int = 16
    memory: float = 0.5

    @property
    def title(self) -> str:
        return f"{self.prompts} × {self.generations}, {self.bits}-bit, {'KL' if self.beta else 'no KL'}"


RECIPE = Shape(1, 6, 1, 0.04)
RECIPE_4BIT = Shape(1, 6, 1, 0.04, bits=4)
THROUGHPUT = Shape(32, 8, 16, 0.0, memory=0.3)
THROUGHPUT_8BIT = Shape(32, 8, 16, 0.0, bits=8, memory=0.3)


SIMILARITY = {
    "type": "text_similarity",
    "name": "similar",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}} is the answer, as the reasoning shows.",
    "evaluation_metric": "fuzzy_match",
}


@dataclass(frozen=True)
class Benchmark:
    """A name, what it measures, and how to run it: an engine of ours, or arguments of baseline.py."""

    name: str
    about: str
    shape: Shape
    engine: str = ""
    baseline: tuple[str, ...] = ()

    def command(self, options: argparse.Namespace, folder: Path) -> list[str]:
        """What to run; ours gets its spec written to `folder`."""
        if self.engine:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.json").write_text(json.dumps(self.spec(options), ensure_ascii=False, indent=2))
            return [sys.executable, "-m", "grpo_core", "train", str(folder / "job.json"), "--out", str(folder / "run")]
        shape, (library, *more) = self.shape, self.baseline
        sizes = {"prompts": shape.prompts, "generations": shape.generations, "parts": shape.parts, "beta": shape.beta}
        sizes |= {"bits": shape.bits, "memory": shape.memory, "steps": options.steps, "completion": options.completion}
        given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(Path(__file__).with_name("baseline.py")), library, options.model, *given, *more]

    def spec(self, options: argparse.Namespace) -> dict[str, Any]:
        """The job spec of a benchmark of ours."""
        shape, folder = self.shape, Path(options.model)
        return {
            "name": self.name,
            "engine": self.engine,
            "model": {
                "name": folder.name if folder.is_dir() else options.model,
                "precision": "auto" if options.cpu else f"{shape.bits}bit",
                "gpu_memory_share": shape.memory,
            },
            "optimizer": {"name": "adamw_torch" if options.cpu else "paged_adamw_8bit"},
            "training": {"steps": options.steps, "save_steps": options.steps, "checkpoint_every": options.steps},
            "sampling": {
                "prompts_per_step": shape.prompts,
                "generations": shape.generations,
                # `native` splits a step by the memory that there is.
                "gradient_accumulation": 1 if self.engine == "native" else shape.parts,
                "max_prompt_tokens": 400,
                "max_completion_tokens": options.completion,
            },
            "loss": {"beta": shape.beta},
            # Noise of random weights is rewarded too, so that each step has something to learn from.
            "rewards": {"graders": {"similar": SIMILARITY}},
            "data": {"source": "file", "dataset": str(PROBLEMS), "system_prompt": SYSTEM},
            "resources": {"gpus": 0 if options.cpu else 1},
            # In 10 steps a model may learn nothing, which is not what is measured.
            "guards": {"no_signal_steps": 0, "max_logprob_diff": 0},
        }


BENCHMARKS = [
    Benchmark("recipe-unsloth", "the recipe, `unsloth` engine", RECIPE, engine="unsloth"),
    Benchmark("recipe-native", "the recipe, `native` engine", RECIPE, engine="native"),
    Benchmark("recipe-trl", "the recipe, `trl` engine", RECIPE, engine="trl"),
    Benchmark("baseline-unsloth", "the recipe as a script with Unsloth", RECIPE, baseline=("unsloth",)),
    Benchmark("baseline-trl", "the recipe as a script with TRL", RECIPE, baseline=("trl",)),
    Benchmark("recipe4-unsloth", "the recipe in 4 bits, `unsloth` engine", RECIPE_4BIT, engine="unsloth"),
    Benchmark("baseline4-unsloth", "the same as a script with Unsloth", RECIPE_4BIT, baseline=("unsloth",)),
    Benchmark("throughput-unsloth", "many completions, `unsloth` engine", THROUGHPUT, engine="unsloth"),
    Benchmark("throughput-native", "many completions, `native` engine", THROUGHPUT, engine="native"),
    Benchmark("throughput8-native", "many completions in FP8, `native` engine", THROUGHPUT_8BIT, engine="native"),
    Benchmark("baseline-trl-vllm", "the same as a script with TRL and vLLM", THROUGHPUT, baseline=("trl", "--vllm")),
]
"""To add one, add a line: everything below treats them alike."""


def run_all(chosen: list[Benchmark], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the benchmarks, each on the next free GPU; results are written as they come, in the order of the table."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.gpus)))
    free: SimpleQueue[str] = SimpleQueue()
    for card in shown.split(",")[: options.gpus]:
        free.put(card)
    lines: dict[str, dict[str, Any]] = {}
    writing = threading.Lock()

    def run_next(benchmark: Benchmark) -> None:
        card = free.get()
        print(f"{benchmark.name} ...", flush=True)
        line = run(benchmark, options, card)
        free.put(card)
        with writing:
            lines[benchmark.name] = line
            print(json.dumps(line, ensure_ascii=False), flush=True)
            done = [lines[one.name] for one in chosen if one.name in lines]
            (options.out / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in done))
            (options.out / "results.md").write_text(table(done) + "\n")

    with ThreadPoolExecutor(free.qsize()) as pool:
        list(pool.map(run_next, chosen))
    return [lines[one.name] for one in chosen]


def run(benchmark: Benchmark, options: argparse.Namespace, card: str) -> dict[str, Any]:
    """Run one benchmark on a GPU and return its line of the results."""
    folder = options.out / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(options.model)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": card}
    if model.is_dir():
        environment["GRPO_MODEL_DIR"] = str(model.resolve().parent)
    line: dict[str, Any] = {"name": benchmark.name, "about": benchmark.about, "shape": benchmark.shape.title}
    began = time.monotonic()
    with (folder / "log.txt").open("w+", encoding="utf-8") as log, Memory(card).sampled() as memory:
        argv = benchmark.command(options, folder)
        try:
            done = subprocess.run(
                argv, stdout=log, stderr=log, cwd=ROOT, env=environment, timeout=options.limit, check=False
            )
            log.seek(0)
            if done.returncode == 0:
                line |= figures(benchmark, folder, log.read())
            else:
                line["failed"] = done.returncode
                if steps_in(folder) == options.steps:  # it was measured, and something after training failed
                    line |= figures(benchmark, folder, "")
        except (subprocess.TimeoutExpired, ValueError) as error:
            line["failed"] = f"{type(error).__name__}: {error}"[:200]
    return {**line, "peak_gib": memory.peak_gib, "seconds": round(time.monotonic() - began, 1)}


def figures(benchmark: Benchmark, folder: Path, log: str) -> dict[str, Any]:
    """Median step, completions per second and mean tokens, from the run folder or the script's last line."""
    if not benchmark.engine:
        found = re.search(r"^RESULT (\{.*\})$", log, re.MULTILINE)
        if found is None:
            raise ValueError("the script printed no RESULT line")
        return json.loads(found[1])
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    settled = metrics[WARM_UP:] or metrics

    def median(name: str) -> float:
        return statistics.median(step["seconds"][name] for step in settled)

    size = benchmark.shape.prompts * benchmark.shape.generations
    return {
        "step_s": round(median("total"), 3),
        "estimated_s": estimated(folder),
        "generation_s": round(median("generation"), 3),
        "update_s": round(median("update"), 3),
        "completions_per_s": round(size / median("total"), 2),
        "tokens": round(statistics.mean(step["completion_tokens_mean"] for step in settled), 1),
    }


def steps_in(folder: Path) -> int:
    """How many steps a job of ours has recorded."""
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0


def estimated(folder: Path) -> float | None:
    """Seconds of a step that a dry run of the same job estimates for this GPU."""
    from grpo_core.estimates import estimate
    from grpo_core.hardware.gpus import find_gpus
    from grpo_core.spec import parse_spec

    spec = parse_spec(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    found = estimate(spec, devices=[gpu.name for gpu in find_gpus()]).gpus
    return next((gpu.step_seconds for gpu in found if gpu.has_worker), None)


@dataclass
class Memory:
    """The most GPU memory in use, sampled twice a second, less what was in use before."""

    card: str
    peak_gib: float | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def sampled(self) -> Iterator[Memory]:
        """Sample while the block runs."""
        idle = used_gib(self.card)
        thread = threading.Thread(target=self._watch, args=(idle,), daemon=True)
        if idle is not None:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()

    def _watch(self, idle: float) -> None:
        while not self._stop.wait(0.5):
            self.peak_gib = max(self.peak_gib or 0.0, round((used_gib(self.card) or idle) - idle, 1))


def used_gib(card: str) -> float | None:
    """A GPU's memory in use, or None without nvidia-smi."""
    argv = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        return float(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout) / 1024
    return None


COLUMNS = {
    "step_s": "s per step",
    "estimated_s": "estimate",
    "completions_per_s": "completions/s",
    "tokens": "tokens",
    "peak_gib": "peak GiB",
}


def table(lines: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = [f"| benchmark | step | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (2 + len(COLUMNS))}"]
    for line in lines:
        cells = [str(line.get(name) or "-") for name in COLUMNS]
        if "failed" in line:
            cells[0] = f"{line.get('step_s', '')} failed ({line['failed']}), see log.txt".strip()
        rows.append(f"| {line['about']} | {line['shape']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Run the chosen benchmarks; returns how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if none is given")
    parser.add_argument("--list", action="store_true", help="show the benchmarks")
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="hub name or folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--completion", type=int, default=200, help="most tokens of a completion")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each benchmark")
    parser.add_argument("--gpus", type=int, default=1, help="on how many GPUs benchmarks run side by side, one on each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / time.strftime("benchmark-%Y%m%d-%H%M%S"))
    parser.add_argument("--cpu", action="store_true", help="rehearse with the tiny model, without a GPU")
    options = parser.parse_args()
    chosen = [one for one in BENCHMARKS if not options.names or one.name in options.names]
    if unknown := set(options.names) - {one.name for one in BENCHMARKS}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; see --list")
    if options.list:
        print("\n".join(f"{one.name:20} {one.shape.title:24} {one.about}" for one in BENCHMARKS))
        return 0
    if options.cpu:
        options.model = str(TINY)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = run_all(chosen, options)
    print(table(lines))
    return sum("failed" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
