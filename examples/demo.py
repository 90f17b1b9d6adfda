"""`make demo`: a job through the whole service on this machine, and the proof that the adapter learnt.

Starts a local stack of its own, uploads the tiny problems, submits `tiny/job.json`, shows it train, downloads the
adapter, loads it with plain PEFT and asks base and adapter the same unseen questions with the same seeds. Exits 1,
loudly, when the adapter is not clearly better. Everything it started is stopped again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from api.cli.progress import show_progress
from api.client import GrpoClient
from deploy.local import ports, stack
from grpo_core import strict_json

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES / "models" / "tiny-arithmetic"
SAMPLES = 4
MIN_STRICT_GAIN = 0.30
MAX_LENIENT_LOSS = 0.05

console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True)
class Answers:
    """What one model answered: sampled at temperature 1, and greedily."""

    sampled: Any
    greedy: Any


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the tiny model through the service and show what it learnt.")
    parser.add_argument("--data", type=Path, default=Path(".grpo/demo"), help="folder of the demo's stack, made anew")
    arguments = parser.parse_args()
    began = time.monotonic()
    with demo_stack(arguments.data) as environment:
        client = GrpoClient(environment["GRPO_URL"], environment["GRPO_API_KEY"])
        job = train(client)
        if job["status"] != "succeeded":
            console.print(f"[bold red]The job {job['status']}:[/] {job['error']}")
            return 1
        metrics = client.metrics(job["id"])
        adapter = download(client, job["id"], arguments.data / "artifacts")
    before, after = evaluate_both(adapter)
    console.print(comparison(before, after, metrics))
    show_problems(before, after)
    return verdict(before, after, time.monotonic() - began)


@contextmanager
def demo_stack(data: Path) -> Iterator[dict[str, str]]:
    """A fresh stack on free ports, ended whatever happens."""
    shutil.rmtree(data, ignore_errors=True)
    say("Starting Valkey, SeaweedFS, the API and a worker")
    stack.up(
        data,
        api_port=ports.pick_port(),
        valkey_port=ports.pick_port(),
        s3_port=ports.pick_s3_port(),
        model_dir=EXAMPLES / "models",
    )
    try:
        yield stack.client_env(data)
    finally:
        stack.down(data)


def train(client: GrpoClient) -> dict[str, Any]:
    """Upload the problems, submit the job, show it train; returns the job as it ended."""
    dataset = client.upload_dataset(EXAMPLES / "tiny" / "train.jsonl", name="tiny arithmetic")
    spec = strict_json.loads((EXAMPLES / "tiny" / "job.json").read_bytes())
    spec["data"]["dataset"] = dataset["id"]
    job = client.submit(spec)
    say(f"POST /jobs: {job['id']}, {spec['training']['steps']} steps of 8 problems × 8 completions")
    with show_progress(job, sys.stdout) as on_event:
        return client.wait(job["id"], on_event, poll=0.5)


def download(client: GrpoClient, job_id: str, folder: Path) -> Path:
    """Fetch what the job left, each file checked against its SHA-256; returns the adapter's folder."""
    files = client.download(job_id, folder)
    size = sum(file["size"] for file in files)
    say(f"Downloaded {len(files)} files ({size / 1e6:.1f} MB) from object storage; every SHA-256 is right")
    return folder / "adapter"


def evaluate_both(adapter: Path) -> tuple[Answers, Answers]:
    """Ask the base model, then the same model with the adapter, by stock transformers and PEFT."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    say("Asking base and adapter 200 unseen problems, with the same seeds")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = ask(model, tokenizer)
    return before, ask(PeftModel.from_pretrained(model, adapter), tokenizer)


def ask(model: Any, tokenizer: Any) -> Answers:
    """Both ways of answering the held-out problems."""
    from grpo_core.datasets import load_rows
    from grpo_core.evaluation import Sampling, evaluate
    from grpo_core.spec import DataSection

    data = DataSection(source="file", dataset=str(EXAMPLES / "tiny" / "heldout.jsonl"), system_prompt="")
    rows = load_rows(data, EXAMPLES)
    ways = (Sampling(samples=SAMPLES, temperature=1.0, max_new_tokens=48, batch_size=200), Sampling(max_new_tokens=48))
    sampled, greedy = (evaluate(model, tokenizer, rows, data, way) for way in ways)
    return Answers(sampled, greedy)


def comparison(before: Answers, after: Answers, metrics: list[dict[str, Any]]) -> Table:
    """The table that says what training changed."""
    table = Table(title=f"200 unseen problems × {SAMPLES} samples at temperature 1, and greedy", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    first, last = mean_reward(metrics[:5]), mean_reward(metrics[-5:])
    table.add_row("mean reward, first and last 5 steps", f"{first:.2f}", f"{last:.2f}", f"{last - first:+.2f}")
    rows = {
        "right and in the format": "strict_accuracy",
        "right, last number in the text": "lenient_accuracy",
        "in the format": "strict_format_share",
    }
    for label, field in rows.items():
        for how in ("sampled", "greedy"):
            old, new = (getattr(getattr(answers, how).summary, field) for answers in (before, after))
            table.add_row(f"{label}, {how}", f"{old:.1%}", f"{new:.1%}", f"{(new - old) * 100:+.1f}")
    return table


def mean_reward(metrics: list[dict[str, Any]]) -> float:
    """The mean total reward of some steps."""
    return sum(step["reward"] for step in metrics) / len(metrics)


def show_problems(before: Answers, after: Answers) -> None:
    """Three problems with what each model sampled first."""
    table = Table(show_lines=True, title="Three of them", title_justify="left")
    for column in ("problem", "answer", "before", "after"):
        table.add_column(column)
    pairs = list(zip(before.sampled.items, after.sampled.items, strict=True))
    changed = [(old, new) for old, new in pairs if old.sample == 0 and new.strict and not old.strict] or pairs
    for old, new in changed[:: max(1, len(changed) // 3)][:3]:
        table.add_row(old.question, old.answer, old.completion, new.completion)
    console.print(table)


def verdict(before: Answers, after: Answers, seconds: float) -> int:
    """0 when the adapter is clearly better; else say loudly what fell short."""
    old, new = before.sampled.summary, after.sampled.summary
    gain, lenient = new.strict_accuracy - old.strict_accuracy, new.lenient_accuracy - old.lenient_accuracy
    if gain < MIN_STRICT_GAIN or lenient < -MAX_LENIENT_LOSS:
        console.print(
            f"[bold red]FAILED:[/] strict accuracy {gain * 100:+.1f} points (at least +30 expected), "
            f"lenient accuracy {lenient * 100:+.1f} points (at least -5 expected)."
        )
        return 1
    console.print(f"[bold green]It learnt:[/] strict accuracy {gain * 100:+.1f} points, in {seconds:.0f} s all told.")
    return 0


def say(text: str) -> None:
    """One line of what happens now."""
    console.print(f"[bold]▸[/] {text}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
