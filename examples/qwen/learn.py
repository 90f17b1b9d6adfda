"""`make learn`: Qwen2.5 learns to reason, through the whole service, and what that is worth on problems it never saw.

    python examples/qwen/learn.py [--model NAME] [--seeds 3407 1 2] [--steps 100] [--out runs/qwen]

Starts a local stack, uploads the problems, submits one job for each seed and waits for them; each job answers the
held-out problems before and after. Writes what each job left below OUT, then `results.json`, `results.md` and
`curve.svg` about all of them. Owns no training and no statistics. Needs a GPU (`--cpu` tries the script with a tiny
model), and for a hub name a hub; `--models` is a folder of models that is searched first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.local import ports, stack
from grpo_client import GrpoClient
from grpo_client.cli.progress import show_progress
from grpo_client.cli.spec_file import set_field
from grpo_core.evaluation.paired_stats import Comparison, compare
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EVALUATION_NAME, read_rollouts

HERE: Final = Path(__file__).resolve().parent
TINY: Final = HERE.parent / "models" / "tiny-arithmetic"
LANGUAGES: Final = {"mgsm-zh": "MGSM in Chinese", "gsm8k-test": "GSM8K test in English"}
READINGS: Final = {
    "lenient": "right by the last number",
    "strict": "right in the format",
    "strict_format": "in the format",
}
"""Columns of the evaluation, and what each says of an answer."""
SHOWN: Final = 5
"""Problems of each set that `results.md` shows, spread evenly over the set."""


@dataclass(frozen=True)
class Run:
    """One seed's job, and the files it left."""

    seed: int
    job: str
    folder: RunFolder
    answers: list[dict[str, Any]]
    """One row for each held-out problem, with both answers, and `set` of the data."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]

    @property
    def model(self) -> str:
        return json.loads(self.folder.spec.read_bytes())["model"]["name"]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.folder.report.read_bytes())

    def compared(self, name: str, reading: str) -> Comparison:
        """Before and after on one set, problem by problem."""
        asked = [row for row in self.answers if row["set"] == name]
        before, after = ([bool(row[f"{reading}_{stage}"]) for row in asked] for stage in ("before", "after"))
        return compare(f"{LANGUAGES[name]}, {READINGS[reading]}", before, after)


def main() -> int:
    options = parse()
    with service(options) as client:
        uploads = upload(client, options)
        jobs = [(seed, submit(client, options, seed, uploads)) for seed in options.seeds]
        runs = []
        for seed, job in jobs:
            with show_progress(client.get(job), sys.stdout) as on_event:
                ended = client.wait(job, on_event, timeout=24 * 3600)
            if ended.status != "succeeded":
                print(f"The job of seed {seed} {ended.status}: {ended.error and ended.error.message}")
                return 1
            client.download(job, options.out / f"seed-{seed}")
            runs.append(read(seed, job, options.out / f"seed-{seed}", options.heldout))
    write(runs, options.out)
    print((options.out / "results.md").read_text(encoding="utf-8"))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a hub name, or a folder in --models; job.json's if not given")
    parser.add_argument("--models", type=Path, help="a folder of models that is searched before the hub")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407])
    parser.add_argument("--steps", type=int, help="job.json's if not given")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=JSON", help="change another field of the job"
    )
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/qwen"))
    parser.add_argument("--data", type=Path, default=Path(".grpo-learn"), help="the stack's folder")
    parser.add_argument("--cpu", action="store_true", help="try the script: a tiny model, two steps, a few problems")
    options = parser.parse_args()
    if options.cpu:
        options.model, options.models, options.steps = TINY.name, TINY.parent, options.steps or 2
    return options


@contextmanager
def service(options: argparse.Namespace) -> Iterator[GrpoClient]:
    """The service that `GRPO_URL` names, or a stack for as long as this lasts."""
    if "GRPO_URL" in os.environ:
        yield GrpoClient()
        return
    models = options.models and options.models.resolve()
    state = {"api_port": ports.pick_port(), "valkey_port": ports.pick_port(), "s3_port": ports.pick_s3_port()}
    stack.up(options.data, **state, model_dir=models)
    try:
        environment = stack.client_env(options.data)
        yield GrpoClient(environment["GRPO_URL"], environment["GRPO_API_KEY"])
    finally:
        stack.down(options.data)


def upload(client: GrpoClient, options: argparse.Namespace) -> tuple[str, str]:
    """Upload both files of problems; returns the ids of those to train on and of those held out."""
    train = client.upload_dataset(HERE / "train.jsonl", name="qwen-train")
    return train.id, client.upload_dataset(options.heldout, name="qwen-heldout").id


def submit(client: GrpoClient, options: argparse.Namespace, seed: int, uploads: tuple[str, str]) -> str:
    """Post the job of one seed; returns its id."""
    spec = job(options, seed)
    spec["data"]["dataset"], spec["evaluation"]["dataset"] = uploads
    posted = client.submit(spec)
    print(f"POST /jobs: {posted.id}, seed {seed}, {spec['model']['name']}, {spec['training']['steps']} steps")
    return posted.id


def job(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """job.json with what the options change."""
    spec = json.loads((HERE / "job.json").read_bytes())
    spec["lora"] = {"seed": seed}
    spec["training"]["seed"] = seed
    spec["model"]["name"] = options.model or spec["model"]["name"]
    if options.steps:
        spec["training"] |= {"steps": options.steps, "save_steps": options.steps}
    if options.cpu:
        spec["model"]["precision"] = "auto"
        spec["sampling"] |= {"prompts_per_step": 8, "gradient_accumulation": 1, "max_completion_tokens": 64}
        questions = sum(1 for _ in options.heldout.open())
        spec["evaluation"] |= {"questions": questions, "max_completion_tokens": 64, "every": 1, "sample": 1}
        spec["resources"] = {"gpus": 0}
    for change in options.set:
        set_field(spec, change)
    return spec


def read(seed: int, job: str, folder: Path, heldout: Path) -> Run:
    """A job's files, with the set of each held-out problem."""
    with heldout.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers = [{**row, "set": rows[row["row"]]["set"]} for row in read_rollouts(folder / EVALUATION_NAME)]
    return Run(seed, job, RunFolder(folder), answers)


def write(runs: Sequence[Run], out: Path) -> None:
    """`results.json`, `results.md` and `curve.svg`."""
    results = [result(run) for run in runs]
    (out / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = [f"# {runs[0].model}", *tables(results), *answers(runs[0])]
    (out / "results.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    draw(results, out / "curve.svg")


def result(run: Run) -> dict[str, Any]:
    """One seed's figures."""
    metrics, report = run.metrics, run.report
    sets = [name for name in LANGUAGES if any(row["set"] == name for row in run.answers)]
    return {
        "seed": run.seed,
        "job": run.job,
        "device": report["device"],
        "engine": report["engine"],
        "versions": report["versions"],
        "steps": len(metrics),
        "step_s": round(statistics.median(step["seconds"]["total"] for step in metrics), 3),
        "training_s": round(sum(step["seconds"]["total"] for step in metrics), 1),
        "rewards": [round(step["reward"], 3) for step in metrics],
        "completion_tokens": [round(step["completion_tokens_mean"], 1) for step in metrics],
        "curve": (report.get("evaluation") or {}).get("curve") or [],
        "sets": {name: {reading: run.compared(name, reading).as_dict() for reading in READINGS} for name in sets},
    }


def tables(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What each job was, and before and after for each set, reading and seed."""
    first = results[0]
    yield f"\n{first['steps']} steps for each seed, on one {first['device']} with the `{first['engine']}` engine.\n"
    yield "| seed | median step | training | reward, first and last step | tokens of a completion |"
    yield "|---|---|---|---|---|"
    for one in results:
        reward, tokens = one["rewards"], one["completion_tokens"]
        yield (
            f"| {one['seed']} | {one['step_s']:.2f} s | {one['training_s']:.0f} s "
            f"| {reward[0]:.2f} to {reward[-1]:.2f} | {tokens[0]:.0f} to {tokens[-1]:.0f} |"
        )
    for name in first["sets"]:
        asked = sum(first["sets"][name]["lenient"]["counts"].values())
        yield f"\n## {LANGUAGES[name]}: {asked:,} problems, answered greedily\n"
        yield "| | seed | before | after | points | 95 % interval | p (exact McNemar) |"
        yield "|---|---|---|---|---|---|---|"
        for reading, label in READINGS.items():
            for one in results:
                pair = one["sets"][name][reading]
                low, high = (f"{end * 100:+.1f}" for end in pair["interval"])
                yield (
                    f"| {label} | {one['seed']} | {pair['before']:.1%} | {pair['after']:.1%} "
                    f"| {pair['difference'] * 100:+.1f} | {low} to {high} | {pair['p_value']:.2g} |"
                )


def answers(run: Run) -> Iterator[str]:
    """Problems spread evenly over each set, with the first seed's answers before and after."""
    for name in dict.fromkeys(row["set"] for row in run.answers):
        asked = [row for row in run.answers if row["set"] == name]
        shown = min(SHOWN, len(asked))
        for row in (asked[at * len(asked) // shown] for at in range(shown)):
            yield f"\n### {name}, row {row['row'] + 1}: {row['question']}\n\nRight answer: {row['answer']}\n"
            for stage in ("before", "after"):
                yield f"{stage.capitalize()} ({'right' if row[f'lenient_{stage}'] else 'wrong'}):\n"
                yield f"````text\n{row[f'completion_{stage}'].strip()}\n````\n"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy on a sample of the held-out problems, reward and length by step; a line for each seed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qwen"  # the same results are the same file
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, (accuracy, reward, tokens) = plt.subplots(3, 1, sharex=True, figsize=(8, 8), layout="constrained")
    for at, one in enumerate(results):
        color, label = f"C{at}", f"seed {one['seed']}"
        points = [(point["step"], point["lenient_accuracy"], *point["lenient_interval"]) for point in one["curve"]]
        if points:
            steps, means, lows, highs = zip(*points, strict=True)
            accuracy.plot(steps, means, color=color, marker="o", markersize=3, label=label)
            accuracy.fill_between(steps, lows, highs, color=color, alpha=0.1, linewidth=0)
        for axes, values in ((reward, one["rewards"]), (tokens, one["completion_tokens"])):
            axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1, label=label)
    accuracy.set_ylabel("held-out problems answered right\nwith 95 % interval")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    reward.set_ylabel("mean reward")
    tokens.set_ylabel("tokens of a completion")
    tokens.set_xlabel("step")
    for axes in (accuracy, reward, tokens):
        axes.grid(alpha=0.3)
    reward.legend(loc="best", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(status)
