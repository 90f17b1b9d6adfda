"""`make reproduce`: the published recipe on a GPU host, and whether it did anything, as a folder of figures.

Runs `python -m grpo_core train` with a spec (the recipe as published: Qwen2.5-7B-Instruct, Chinese GSM8K, the 1,319
test questions before and after), then writes `report.md` and `curve.png` beside the run's own files. Owns no
training and no statistics; needs a GPU and a model hub unless the spec says otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo_core import strict_json
from grpo_core.run_dir.layout import RunFolder
from grpo_core.spec import parse_spec

RECIPE = Path(__file__).resolve().parent / "specs" / "recipe.json"


def main() -> int:
    """Train, then write the figures; returns the run's exit status."""
    parser = argparse.ArgumentParser(description="Run the recipe and write figures of what it did.")
    parser.add_argument("--spec", type=Path, default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="a new folder")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "grpo_core", "train", str(arguments.spec), "--out", str(arguments.out)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        write_figures(RunFolder(arguments.out))
        print(f"Figures: {arguments.out / 'report.md'}")
    return code


def write_figures(folder: RunFolder) -> None:
    """`curve.png` and `report.md`, from what the run wrote down."""
    metrics = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    report = json.loads(folder.report.read_bytes())  # completions in it may hold what strict JSON refuses, as NUL
    draw_curve(metrics, folder.root / "curve.png")
    (folder.root / "report.md").write_text(describe(report, metrics, folder), encoding="utf-8")


def draw_curve(metrics: list[dict[str, Any]], path: Path) -> None:
    """Total reward with the groups' spread, and each reward function below it."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    steps = [step["step"] for step in metrics]
    total, spread = [step["reward"] for step in metrics], [step["reward_std"] for step in metrics]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
    above.plot(steps, total, color="tab:blue", label="total, mean of the step")
    low, high = zip(*((mean - std, mean + std) for mean, std in zip(total, spread, strict=True)), strict=True)
    above.fill_between(steps, low, high, alpha=0.15, color="tab:blue", label="± mean spread within a group")
    for name in metrics[0]["rewards"]:
        below.plot(steps, [step["rewards"][name] for step in metrics], label=name)
    for axes in (above, below):
        axes.legend(loc="best", fontsize="small")
        axes.set_ylabel("reward")
        axes.grid(alpha=0.3)
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe(report: dict[str, Any], metrics: list[dict[str, Any]], folder: RunFolder) -> str:
    """The page: what ran, how fast, and what changed."""
    spec = parse_spec(strict_json.loads(folder.spec.read_bytes()))
    seconds = sorted(step["seconds"]["total"] for step in metrics)
    lines = [
        f"# {spec.name or spec.model.name}",
        "",
        (
            f"{spec.model.name}, LoRA rank {spec.lora.rank}, {spec.data.dataset}, {report['steps']} steps of "
            f"{spec.sampling.prompts_per_step} × {spec.sampling.generations} completions, on {report['device']} in "
            f"{report['precision']['weights']} with the `{report['engine']}` engine."
        ),
        "",
        (
            f"- Reward: {report['reward']['start']:.3f} at the start, {report['reward']['end']:.3f} at the end "
            f"(means of {report['reward']['steps_averaged']} steps)."
        ),
        f"- A step took {seconds[len(seconds) // 2]:.2f} s (median), all of it {report['seconds']:.0f} s.",
        f"- Spec SHA-256: `{report['spec_digest']}`. Versions: "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
        "![reward by step](curve.png)",
        "",
    ]
    return "\n".join([*lines, *evaluation_lines(report.get("evaluation"))]) + "\n"


def evaluation_lines(evaluation: dict[str, Any] | None) -> list[str]:
    """Before and after, with the verdicts, where the spec asked for an evaluation."""
    if evaluation is None:
        return ["No evaluation was asked for (`evaluation.questions` is 0)."]
    paired = evaluation["paired"]
    rows = [
        f"| {name} | {pair['before']:.1%} | {pair['after']:.1%} | {pair['difference'] * 100:+.1f} "
        f"| {pair['interval'][0] * 100:+.1f} to {pair['interval'][1] * 100:+.1f} | {pair['p_value']:.3g} |"
        for name, pair in paired.items()
    ]
    verdicts = [f"- {pair['verdict']}" for pair in paired.values()]
    head = ["| share | before | after | points | 95 % interval | exact McNemar p |", "|---|---|---|---|---|---|"]
    return ["## The same held-out questions, before and after", "", *head, *rows, "", *verdicts]


if __name__ == "__main__":
    sys.exit(main())
