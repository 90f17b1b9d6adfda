"""`make demo`: a job through the whole service on this machine, and the proof that the adapter learnt.

Starts a separate local stack, uploads a lesson's problems, submits its `job.json`, shows it train, downloads the
adapter, loads it with plain PEFT and asks base and adapter the same unseen questions with the same seeds; the base
answers while the job trains. The tiny model must answer clearly more of them, and a real chat model keep to the format,
or this exits 1, loudly. Everything that was started is stopped again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.local import ports, stack
from grpo_client import GrpoClient, JobDetail, StepMetrics
from grpo_client.cli.progress import show_progress
from grpo_core import strict_json
from grpo_core.evaluation.paired_stats import ends_of

EXAMPLES = Path(__file__).resolve().parent
console = Console(width=None if sys.stdout.isatty() else 110)


DATA = Path(".grpo-demo")
"""Beside the folder of `grpo up`, not in it: that takes none that holds something else."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is taught to whom, and how it is examined."""

    folder: Path
    """Holds `job.json`, `train.jsonl` and `heldout.jsonl`."""
    models: Path
    """The worker's model directory."""
    questions: int
    samples: int
    must_change: Mapping[str, float]
    """By figure of the sampled answers' summary, how much the adapter must add at least."""
    note: str = ""
    """What to know before the training."""

    @property
    def spec(self) -> dict[str, Any]:
        """The job, with a placeholder for the uploaded data set."""
        return strict_json.loads((self.folder / "job.json").read_bytes())

    @property
    def model(self) -> Path:
        """The base model's folder."""
        return self.models / self.spec["model"]["name"]


LESSONS = {
    "english": Lesson(
        folder=EXAMPLES / "english",
        models=EXAMPLES / "models",
        questions=200,
        samples=4,
        must_change={"strict_accuracy": 0.30, "lenient_accuracy": -0.05},
    ),
    "chinese": Lesson(
        folder=EXAMPLES / "tiny",
        models=EXAMPLES / "models",
        questions=200,
        samples=4,
        must_change={"strict_accuracy": 0.30, "lenient_accuracy": -0.05},
        note="This model knows the format from its own making, so no prompt asks for it. The service cannot know that, "
        "and will warn that no prompt mentions the tags (format_not_asked): nothing is to be done.",
    ),
    # So small a model learns the form in minutes, and arithmetic never.
    "smollm2": Lesson(
        folder=EXAMPLES / "smollm2",
        models=Path(".grpo-models"),
        questions=24,
        samples=2,
        must_change={"strict_format_share": 0.50},
    ),
}


@dataclass(frozen=True)
class Answers:
    """What one model answered: sampled at temperature 1, and greedily."""

    sampled: Any
    greedy: Any


@dataclass(frozen=True)
class Base:
    """The base model, and what it answered."""

    lesson: Lesson
    model: Any
    tokenizer: Any
    answers: Answers

    def ask_with(self, adapter: Path) -> Answers:
        """Ask the same model with the adapter, by stock PEFT."""
        from peft import PeftModel

        return ask(self.lesson, PeftModel.from_pretrained(self.model, adapter), self.tokenizer)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a model through the service and show what it learnt.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the demo's stack, made anew")
    parser.add_argument("--lesson", choices=LESSONS, default="english")
    arguments = parser.parse_args()
    lesson = LESSONS[arguments.lesson]
    began = time.monotonic()
    require_model(lesson)
    # Another thread asks the models, while the job trains and while the stack stops.
    with ThreadPoolExecutor(1) as beside:
        with demo_stack(arguments.data, lesson) as environment:
            base = beside.submit(ask_base, lesson)
            client = GrpoClient(environment["GRPO_URL"], environment["GRPO_API_KEY"])
            job = train(client, lesson)
            if job.status != "succeeded":
                console.print(f"[bold red]The job {job.status}:[/] {job.error and job.error.message}")
                return 1
            metrics = client.metrics(job.id)
            adapter = download(client, job.id, arguments.data / "artifacts")
            say(f"Asking the adapter the {lesson.questions} unseen problems that the base has answered meanwhile")
            adapted = beside.submit(lambda: base.result().ask_with(adapter))
        before, after = base.result().answers, adapted.result()
    console.print(comparison(lesson, before, after, metrics))
    show_problems(before, after)
    status = verdict(lesson, before, after, time.monotonic() - began)
    say(f"The report, one file for a browser: {arguments.data / 'artifacts' / 'report.html'}")
    say("Talk to it in the service's page, beside the model that it was:")
    models = "" if lesson.models == EXAMPLES / "models" else f" --model-dir {lesson.models}"
    command = f".venv/bin/grpo up --data {arguments.data}{models} --talk {job.id} --open"
    console.print(command, soft_wrap=True, highlight=False)
    return status


def require_model(lesson: Lesson) -> None:
    """Make the base model's folder where it is not part of the repository."""
    if not lesson.model.exists():
        say(f"Writing {lesson.model.name}")
        subprocess.run([sys.executable, lesson.folder / "make_model.py", lesson.model], check=True)


@contextmanager
def demo_stack(data: Path, lesson: Lesson) -> Iterator[dict[str, str]]:
    """A fresh stack on free ports, ended whatever happens."""
    shutil.rmtree(data, ignore_errors=True)
    say("Starting Valkey, SeaweedFS, the API and a worker")
    stack.up(
        data,
        api_port=ports.pick_port(),
        valkey_port=ports.pick_port(),
        s3_port=ports.pick_s3_port(),
        model_dir=lesson.models.resolve(),
    )
    try:
        yield stack.client_env(data)
    finally:
        stack.down(data)


def train(client: GrpoClient, lesson: Lesson) -> JobDetail:
    """Upload the problems, submit the job, show it train; returns the job as it ended."""
    dataset = client.upload_dataset(lesson.folder / "train.jsonl", name=lesson.folder.name)
    spec = lesson.spec
    spec["data"]["dataset"] = dataset.id
    job = client.submit(spec)
    prompts, generations = spec["sampling"]["prompts_per_step"], spec["sampling"]["generations"]
    if lesson.note:
        say(lesson.note)
    say(f"POST /jobs: {job.id}, {spec['training']['steps']} steps of {prompts} × {generations} completions")
    with show_progress(job, sys.stdout) as on_event:
        return client.wait(job.id, on_event, timeout=3 * 3600)


def download(client: GrpoClient, job_id: str, folder: Path) -> Path:
    """Fetch what the job left, each file checked against its SHA-256; returns the adapter's folder."""
    files = client.download(job_id, folder)
    size = sum(file.size for file in files)
    say(f"Downloaded {len(files)} files ({size / 1e6:.1f} MB) from object storage; every SHA-256 is right")
    return folder / "adapter"


def ask_base(lesson: Lesson) -> Base:
    """Load the base model by stock transformers and ask it."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    tokenizer = AutoTokenizer.from_pretrained(lesson.model)
    model = AutoModelForCausalLM.from_pretrained(lesson.model, dtype=torch.float32)
    return Base(lesson, model, tokenizer, ask(lesson, model, tokenizer))


def ask(lesson: Lesson, model: Any, tokenizer: Any) -> Answers:
    """Both ways of answering the held-out problems, asked as the job asked."""
    from grpo_core.datasets import load_rows
    from grpo_core.evaluation.generate import Sampling, evaluate
    from grpo_core.spec import parse_spec

    spec = lesson.spec
    spec["data"] |= {"source": "file", "dataset": str(lesson.folder / "heldout.jsonl"), "max_rows": lesson.questions}
    data, tokens = parse_spec(spec).data, spec["sampling"]["max_completion_tokens"]
    rows = load_rows(data, lesson.folder)
    ways = (
        Sampling(samples=lesson.samples, temperature=1.0, max_new_tokens=tokens, batch_size=200),
        Sampling(max_new_tokens=tokens),
    )
    sampled, greedy = (evaluate(model, tokenizer, rows, data, way) for way in ways)
    return Answers(sampled, greedy)


def comparison(lesson: Lesson, before: Answers, after: Answers, metrics: list[StepMetrics]) -> Table:
    """The table that says what training changed."""
    title = f"{lesson.questions} unseen problems × {lesson.samples} samples at temperature 1, and greedy"
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    first, last = map(statistics.fmean, ends_of([step.reward for step in metrics]))
    table.add_row("mean reward, start and end", f"{first:.2f}", f"{last:.2f}", f"{last - first:+.2f}")
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


def verdict(lesson: Lesson, before: Answers, after: Answers, seconds: float) -> int:
    """0 when the adapter is as much better as it must be; else say loudly what fell short."""
    old, new = before.sampled.summary, after.sampled.summary
    changes = {name: getattr(new, name) - getattr(old, name) for name in lesson.must_change}
    said = ", ".join(f"{name.replace('_', ' ')} {change * 100:+.1f} points" for name, change in changes.items())
    if any(changes[name] < least for name, least in lesson.must_change.items()):
        expected = ", ".join(f"{least * 100:+.0f}" for least in lesson.must_change.values())
        console.print(f"[bold red]FAILED:[/] {said}; at least {expected} expected.")
        return 1
    console.print(f"[bold green]It learnt:[/] {said}, in {seconds:.0f} s all told.")
    return 0


def say(text: str) -> None:
    """One line of what happens now."""
    console.print(f"[bold]▸[/] {text}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
