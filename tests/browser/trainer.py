"""The launcher of the page's tests: the real training process, or a made-up run where a job's metadata asks for it.

`made_up` is `good` (a run that learns, with held-out questions), `hostile` (completions and questions that try to be
HTML), `failing` (it diverges in the middle), `long` (only metrics, many of them) or `alike` (reward functions that lie
on each other, a metric that is measured at every tenth step, and evaluations at every twelfth). Honours the contract of
docs/reference/run-folder.md without torch; `step_seconds` is the length of a step. Its numbers are invented.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_core.processes import die_with_parent

HOSTILE = (
    '<script>window.hacked = "completion"</script><img src=x onerror="window.hacked = \'image\'">'
    "</div></body>&amp;<svg onload=window.hacked=1>\u202e<answer>\n1\n</answer>"
)
REWARDS = ("correctness", "integer", "strict_format", "soft_format", "xml_count")
PROMPTS, GENERATIONS = 2, 6


def main() -> int:
    spec_path = Path(sys.argv[1])
    spec = json.loads(spec_path.read_text())
    if "made_up" not in spec["metadata"]:
        os.execv(sys.executable, [sys.executable, "-m", "grpo_core", "train", *sys.argv[1:]])
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epoch", type=int, default=1)
    arguments, _ = parser.parse_known_args()
    die_with_parent()
    return MadeUpRun(spec, arguments.out, arguments.epoch).run()


class MadeUpRun:
    """A run folder, step by step."""

    def __init__(self, spec: dict[str, Any], out: Path, epoch: int) -> None:
        self.spec, self.out, self.epoch = spec, out, epoch
        self.how: dict[str, str] = spec["metadata"]
        self.steps: int = spec["training"]["steps"]
        self.seconds = float(self.how.get("step_seconds", "0.02"))
        self.chance = random.Random(7)
        self.stop = False
        self.seq = 0
        signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, *_: object) -> None:
        self.stop = True

    def run(self) -> int:
        self.event("status", {"phase": "loading"})
        first = self._resumed() + 1
        self.event("status", {"phase": "evaluating"})
        self.event("evaluation", {"stage": "before", **self._side(0.31, 0.52, 0.43), **self._curve(0)})
        self.event("status", {"phase": "training"})
        for step in range(first, self.steps + 1):
            time.sleep(self.seconds)
            self._step(step)
            if self.how["made_up"] == "failing" and step == self.steps // 2:
                return self._diverge(step)
            if self.stop:
                self._checkpoint(step)
                return 75
        self._finish()
        return 0

    def _resumed(self) -> int:
        manifest = self.out / "inputs" / "resume" / "manifest.json"
        if not manifest.exists():
            return 0
        step: int = json.loads(manifest.read_text())["step"]
        saved = self.out / "inputs" / "resume" / "metrics.jsonl"
        if saved.exists():
            (self.out / "metrics.jsonl").write_text(saved.read_text())
        self.event("log", {"code": "resumed", "message": f"Goes on after step {step}", "step": step}, step)
        return step

    def _step(self, step: int) -> None:
        metrics = self._metrics(step)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.event("metric", metrics, step)
        if self.how["made_up"] != "long":
            self._rollouts(step)
            if step == self.steps // 2:
                self._warn(step)
        if step % self.spec["training"]["checkpoint_every"] == 0:
            self._checkpoint(step)
        if step % 12 == 0 and (curve := self._curve(step)):
            self.event("evaluation", {"stage": "during", **self._side(0.4, 0.5, 0.5), **curve, "best_step": 48}, step)

    def _diverge(self, step: int) -> int:
        error = {
            "code": "loss_not_finite",
            "class": "diverged",
            "message": f"The loss of step {step} is nan, so the adapter is of no more use.",
            "hint": "Lower optimizer.learning_rate, for example to 1e-6, or optimizer.max_grad_norm.",
            "retryable": False,
        }
        self.event("error", error, step)
        return 15

    def _warn(self, step: int) -> None:
        message = (
            f"41 % of the completions of steps {step - 4} to {step} were cut off at the limit; below 25 % is usual."
        )
        data = {
            "code": "audit",
            "message": message,
            "audit": "truncation",
            "steps": [max(1, step - 4), step],
            "values": {"truncated_share": 0.41},
            "rollouts": {"step": step, "finish": "length"},
        }
        self.event("warning", data, step)

    def _metrics(self, step: int) -> dict[str, Any]:
        done = step / self.steps
        learnt = 1 / (1 + math.exp(-9 * (done - 0.38)))
        noise = lambda size: self.chance.gauss(0, size)  # noqa: E731
        dip = 1.1 * math.exp(-(((done - 0.62) / 0.03) ** 2))
        rewards = {
            "correctness": max(0.0, 0.25 + 1.5 * learnt - dip + noise(0.12)),
            "integer": min(0.5, max(0.0, 0.15 + 0.33 * learnt - dip / 5 + noise(0.03))),
            "strict_format": min(0.5, max(0.0, 0.45 * learnt + noise(0.03))),
            "soft_format": min(0.5, max(0.0, 0.1 + 0.4 * min(1, learnt * 1.6) + noise(0.02))),
            "xml_count": min(0.5, 0.05 + 0.43 * min(1, learnt * 1.4) + noise(0.02)),
        }
        if self.how["made_up"] == "alike":
            rewards |= {"soft_format": rewards["strict_format"], "xml_count": 0.5 if done > 0.5 else 0.1}
            rewards["integer"] = 0.5 if done > 0.5 else 0.3
        length = 150 - 60 * learnt + noise(6)
        total = self.seconds or 0.02
        return {
            "v": 1,
            "epoch": self.epoch,
            "step": step,
            "reward": sum(rewards.values()),
            "reward_std": max(0.05, 0.8 - 0.5 * learnt + noise(0.08)),
            "rewards": rewards,
            "zero_variance_share": min(1.0, max(0.0, 0.1 + 0.3 * done + noise(0.08))),
            "completion_tokens_mean": length,
            "completion_tokens_min": max(3.0, length - 60 + noise(8)),
            "completion_tokens_max": min(200.0, length + 50 + noise(8)),
            "truncated_share": min(1.0, max(0.0, 0.22 - 0.2 * learnt + dip * 0.3 + noise(0.02))),
            "kl": 0.002 + 0.05 * learnt + abs(noise(0.003)),
            "entropy": 0.9 - 0.5 * learnt + noise(0.03),
            "loss": noise(0.01),
            "grad_norm": 0.4 + abs(noise(0.1)),
            "learning_rate": 5e-6 * min(1, done / 0.1) * (0.5 + 0.5 * math.cos(math.pi * done)),
            "seconds": {"generation": total * 0.6, "reward": total * 0.02, "update": total * 0.38, "total": total},
            "completions_per_s": PROMPTS * GENERATIONS / total,
            "gpu_memory_gb": None if self.spec["resources"]["gpus"] == 0 else 41.2 + noise(0.2),
            "logprob_diff_mean": 0.01 + step / 1e4 if self.how["made_up"] == "alike" and step % 10 == 0 else None,
            "logprob_diff_max": None,
        }

    def _rollouts(self, step: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [self._rollout(step, prompt, sample) for prompt in range(PROMPTS) for sample in range(GENERATIONS)]
        (self.out / "rollouts").mkdir(exist_ok=True)
        partial = self.out / "rollouts" / ".part"
        pq.write_table(pa.Table.from_pylist(rows), partial)
        partial.replace(self.out / "rollouts" / f"step-{step:06d}.parquet")

    def _rollout(self, step: int, prompt: int, sample: int) -> dict[str, Any]:
        row = (step * PROMPTS + prompt) % 12
        apples, eaten = 12 + row, 3 + row % 4
        is_right = self.chance.random() < 0.2 + 0.7 * step / self.steps
        answer = apples - eaten if is_right else apples + eaten
        verb = self.chance.choice(["eats", "gives away", "loses", "sells"])
        text = (
            f"<reasoning>\nThere are {apples} apples. Mia {verb} {eaten} of them. "
            f"So {apples} {'-' if is_right else '+'} {eaten} = {answer}.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
        )
        is_cut = sample == 5 and step % 3 == 0
        if is_cut:
            text = text[: len(text) // 2]
        if self.how["made_up"] == "hostile":
            text = HOSTILE
        paid = [2.0 * (is_right and not is_cut), 0.5 * (not is_cut), 0.5 * (not is_cut), 0.0 if is_cut else 0.5, 0.5]
        return {
            "step": step,
            "epoch": self.epoch,
            "prompt_id": f"row-{row}",
            "row": row,
            "sample": sample,
            "seed": 3407 + step,
            "prompt": HOSTILE
            if self.how["made_up"] == "hostile"
            else f"Mia has {apples} apples and {verb} {eaten}. How many are left?",
            "answer": str(apples - eaten),
            "completion": text,
            **{f"reward_{name}": float(value) for name, value in zip(REWARDS, paid, strict=True)},
            "reward_total": float(sum(paid)),
            "advantage": round(sum(paid) / 2 - 1.4, 3),
            "prompt_tokens": 31,
            "completion_tokens": len(text) // 4,
            "finish_reason": "length" if is_cut else "stop",
            "adapter_version": step - 1,
        }

    def _curve(self, step: int) -> dict[str, Any]:
        """A point of the curve of evaluations, which workers of the last release do not send."""
        if self.how["made_up"] != "alike":
            return {}
        strict, lenient = 0.2 + step / 150 - 0.1 * (step > 48), 0.4 + step / 200
        interval = (strict - 0.1, strict + 0.1)
        accuracy = {"strict_accuracy": strict, "strict_interval": interval, "lenient_accuracy": lenient}
        shown = {"step": step, "questions": 100, "metric": "strict_accuracy", "value": strict, "interval": interval}
        return {"curve": {**shown, **accuracy, "lenient_interval": (lenient - 0.1, lenient + 0.1)}}

    def _checkpoint(self, step: int) -> None:
        folder = f"checkpoints/step-{step:06d}"
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": hashlib.sha256(b"w").digest() * 4000}
        metrics = self.out / "metrics.jsonl"
        files["metrics.jsonl"] = metrics.read_bytes()
        for name, body in files.items():
            self._write(f"{folder}/{name}", body)
        listed = [{"path": n, "sha256": hashlib.sha256(b).hexdigest(), "size": len(b)} for n, b in files.items()]
        manifest = {"v": 1, "step": step, "epoch": self.epoch, "files": listed}
        self._write(f"{folder}/manifest.json", json.dumps(manifest).encode())
        self.event("checkpoint", {"path": folder, "step": step}, step)

    def _finish(self) -> None:
        self.event("status", {"phase": "evaluating"})
        evaluation = self._evaluation()
        self.event("evaluation", {"stage": "after", **evaluation["after"], "paired": evaluation["paired"]})
        self._write("adapter/adapter_config.json", json.dumps({"r": self.spec["lora"]["rank"]}).encode())
        self._write("adapter/adapter_model.safetensors", hashlib.sha256(b"weights").digest() * 100_000)
        self._write("report.json", json.dumps({"steps": self.steps, "evaluation": evaluation}).encode())

    def _evaluation(self) -> dict[str, Any]:
        from grpo_core.evaluation.paired_stats import compare

        before, after = [i % 100 < 31 for i in range(200)], [i % 100 < 31 or i % 4 == 0 for i in range(200)]
        lenient = [i % 100 < 52 for i in range(200)], [i % 100 < 54 for i in range(200)]
        form = [i % 100 < 43 for i in range(200)], [i % 100 < 68 for i in range(200)]
        return {
            "questions": 200,
            "dropped": 0,
            "held_out": "last rows",
            "max_completion_tokens": 512,
            "before": self._side(sum(before) / 200, sum(lenient[0]) / 200, sum(form[0]) / 200),
            "after": self._side(sum(after) / 200, sum(lenient[1]) / 200, sum(form[1]) / 200),
            "paired": {
                "strict": compare("strict accuracy", before, after).as_dict(),
                "lenient": compare("lenient accuracy", *lenient).as_dict(),
                "format": compare("the share of answers in the required format", *form).as_dict(),
            },
            "samples": [self._sample(row) for row in range(10)],
        }

    def _sample(self, row: int) -> dict[str, Any]:
        hostile = self.how["made_up"] == "hostile"
        before = f"The answer is {row + 9}, because {row + 12} minus 3 is {row + 9}."
        after = f"<reasoning>\n{row + 12} minus 3 is {row + 9}.\n</reasoning>\n<answer>\n{row + 9}\n</answer>\n"
        return {
            "row": row,
            "question": HOSTILE if hostile else f"Mia has {row + 12} apples and eats 3. How many are left?",
            "answer": str(row + 9),
            "before": HOSTILE if hostile else before,
            "after": HOSTILE if hostile else after,
        }

    @staticmethod
    def _side(strict: float, lenient: float, form: float) -> dict[str, Any]:
        from grpo_core.evaluation.paired_stats import wilson_interval

        return {
            "strict_accuracy": strict,
            "lenient_accuracy": lenient,
            "strict_format_share": form,
            "truncated_share": 0.04,
            "reward": 4 * strict,
            "completion_tokens": 96.4,
            "strict_interval": wilson_interval(round(strict * 200), 200),
            "lenient_interval": wilson_interval(round(lenient * 200), 200),
            "seconds": 12.4,
        }

    def _write(self, name: str, body: bytes) -> None:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)

    def event(self, kind: str, data: dict[str, Any], step: int = 0) -> None:
        """Append one event."""
        self.seq += 1
        body = {"v": 1, "seq": self.seq, "epoch": self.epoch, "type": kind, "step": step, "data": data}
        with (self.out / "events.jsonl").open("a") as file:
            file.write(json.dumps({**body, "time": datetime.now(UTC).isoformat()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
