"""A training process without torch: the arguments, files, signals and exit codes of docs/reference/run-folder.md.

For tests of what surrounds training. It learns nothing: its numbers are made up, and are a function of the seed and the
step alone, so a run that was interrupted and goes on leaves what a straight one does. The bytes of its adapter depend
on every step before, through the state in its checkpoints. How it behaves is read from the job's metadata, so that a
test can ask for a failure through the front door:

    step_seconds, load_seconds, save_seconds   how long each takes
    fail        an exit code, `kill` (SIGKILL to itself), `hang` (sleeps, deaf to TERM) or `stop` (SIGSTOP to itself)
    fail_step   at the end of which step; 0 while loading
    fail_epochs only in the first so many runs of the job
    oom_until   exits 13 at its first step until a step is split into so many parts
    fill        writes until the disk is full, at fail_step
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_core.processes import die_with_parent

FAILURES = {10: "user_config", 11: "dataset", 12: "reward", 13: "oom", 14: "no_signal", 15: "diverged", 16: "internal"}
KEPT = 2
SAMPLES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epoch", type=int, default=1)
    parser.add_argument("--gradient-accumulation", type=int)
    options = parser.parse_args(arguments)
    die_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    spec = json.loads(options.spec.read_text())
    parts = options.gradient_accumulation or spec["sampling"]["gradient_accumulation"]
    return Trainer(spec, options.out, options.epoch, parts).run()


class Unreadable(Exception):
    """The checkpoint to go on from is not whole."""


class Trainer:
    def __init__(self, spec: dict[str, Any], out: Path, epoch: int, parts: int) -> None:
        self.spec, self.out, self.epoch, self.parts = spec, out, epoch, parts
        self.how: dict[str, str] = spec["metadata"]
        self.steps: int = spec["training"]["steps"]
        self.seed: int = spec["training"]["seed"]
        self.state = hashlib.sha256(f"start {self.seed}".encode()).hexdigest()
        self.seq = 0
        self.stop = False
        signal.signal(signal.SIGTERM, self.ask_to_stop)

    def ask_to_stop(self, *_: object) -> None:
        self.stop = True

    def run(self) -> int:
        self.event("status", {"phase": "loading"})
        if self.spec["data"]["source"] == "upload":
            assert (self.out / "inputs" / "dataset.jsonl").stat().st_size > 0
        self.sleep("load_seconds", "0")
        if self.fails_at(0):
            return self.fail(self.how["fail"])
        try:
            done = self.resume(self.out / "inputs" / "resume")
        except Unreadable as error:
            return self.leave(16, "checkpoint_unreadable", str(error))
        if self.stop:
            return 75
        self.event("status", {"phase": "training"})
        return self.train(done) or self.write_result()

    def train(self, done: int) -> int:
        if self.parts < int(self.how.get("oom_until", "0")):
            return self.leave(13, "cuda_out_of_memory", f"CUDA out of memory with {self.parts} parts.")
        for step in range(done + 1, self.steps + 1):
            self.sleep("step_seconds", "0.01")
            self.train_step(step)
            if self.stop:
                self.checkpoint(step)
                return 75
            if self.fails_at(step):
                return self.fail(self.how["fail"])
            if "fill" in self.how and step == int(self.how.get("fail_step", "1")):
                self.fill_disk()
        return 0

    def resume(self, folder: Path) -> int:
        """Take up a checkpoint, if there is one; returns its step."""
        if not folder.is_dir():
            return 0
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for file in manifest["files"]:
                if hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest() != file["sha256"]:
                    raise Unreadable(f"{file['path']} has another hash.")
            self.state = json.loads((folder / "state.json").read_text())["state"]
        except (OSError, ValueError, KeyError) as error:
            raise Unreadable(f"{type(error).__name__}.") from error
        shutil.copyfile(folder / "metrics.jsonl", self.out / "metrics.jsonl")
        step: int = manifest["step"]
        self.event("log", {"code": "resumed", "message": f"Goes on after step {step}.", "step": step}, step)
        return step

    def train_step(self, step: int) -> None:
        reward = 4.0 * step / self.steps
        self.write_rollouts(step)
        self.state = hashlib.sha256(f"{self.state} {step}".encode()).hexdigest()
        metrics = {"step": step, "reward": reward, "rewards": {"correctness": reward / 2}}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.event("metric", metrics, step)
        training = self.spec["training"]
        if step % training["checkpoint_every"] == 0 or step % training["save_steps"] == 0:
            self.checkpoint(step)

    def write_rollouts(self, step: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (self.out / "rollouts").mkdir(exist_ok=True)
        rows = [self.rollout(step, sample) for sample in range(SAMPLES)]
        partial = self.out / "rollouts" / ".partial"
        pq.write_table(pa.Table.from_pylist(rows), partial)
        partial.replace(self.out / "rollouts" / f"step-{step:06d}.parquet")

    def rollout(self, step: int, sample: int) -> dict[str, Any]:
        """One completion: a function of the job's seed, the step and its place, as in a real run."""
        drawn = hashlib.sha256(f"{self.seed} {step} {sample}".encode())
        return {
            "step": step,
            "epoch": self.epoch,
            "prompt_id": f"p{step % 7}",
            "row": step % 7,
            "sample": sample,
            "seed": int.from_bytes(drawn.digest()[:4], "big"),
            "prompt": f"{step}+{step}",
            "answer": str(step + step),
            "completion": f"一 {drawn.hexdigest()[:16]}",
            "reward_correctness": float(drawn.digest()[4] % 3),
            "reward_total": float(drawn.digest()[4] % 3),
            "advantage": float(sample),
            "prompt_tokens": 3,
            "completion_tokens": 17,
            "finish_reason": "stop",
            "adapter_version": step - 1,
        }

    def checkpoint(self, step: int) -> None:
        """Written under another name and renamed, manifest last; then the old ones go."""
        name = f"checkpoints/step-{step:06d}"
        if (self.out / name).exists():
            return
        self.sleep("save_seconds", "0")
        part = self.out / "checkpoints" / f".step-{step:06d}.part"
        part.mkdir(parents=True)
        (part / "adapter_config.json").write_text("{}")
        (part / "adapter_model.safetensors").write_bytes(self.weights())
        (part / "state.json").write_text(json.dumps({"step": step, "state": self.state}))
        shutil.copyfile(self.out / "metrics.jsonl", part / "metrics.jsonl")
        files = [
            {
                "path": file.name,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "size": file.stat().st_size,
            }
            for file in sorted(part.iterdir())
        ]
        manifest = {"v": 1, "step": step, "epoch": self.epoch, "files": files}
        (part / "manifest.json").write_text(json.dumps(manifest))
        part.rename(self.out / name)
        self.prune()
        self.event("checkpoint", {"path": name, "step": step}, step)

    def prune(self) -> None:
        for old in sorted((self.out / "checkpoints").glob("step-*"))[:-KEPT]:
            if int(old.name.removeprefix("step-")) % self.spec["training"]["save_steps"]:
                (old / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)

    def weights(self) -> bytes:
        return self.state.encode() * 100

    def write_result(self) -> int:
        self.write_json("adapter/adapter_config.json", {"r": self.spec["lora"]["rank"]})
        (self.out / "adapter" / "adapter_model.safetensors").write_bytes(self.weights())
        self.write_json("report.json", {"steps": self.steps, "gradient_accumulation": self.parts})
        print("done", file=sys.stderr)
        return 0

    def fails_at(self, step: int) -> bool:
        wanted = step == int(self.how.get("fail_step", "1")) and self.epoch <= int(self.how.get("fail_epochs", "1000"))
        return "fail" in self.how and wanted

    def fail(self, how: str) -> int:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        return self.leave(int(how), "made_up", "As asked.") if how.isdecimal() else 0

    def leave(self, code: int, reason: str, message: str) -> int:
        data = {"code": reason, "class": FAILURES[code], "message": message, "hint": "", "retryable": False}
        self.event("error", data)
        return code

    def fill_disk(self) -> None:
        with (self.out / "filler").open("wb") as file:
            while True:
                file.write(b"x" * 65536)

    def sleep(self, name: str, default: str) -> None:
        """As asked for, but not past a request to stop by much."""
        until = time.monotonic() + float(self.how.get(name, default))
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def write_json(self, name: str, value: object) -> None:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def event(self, kind: str, data: dict[str, Any], step: int = 0) -> None:
        self.seq += 1
        body = {"v": 1, "seq": self.seq, "epoch": self.epoch, "type": kind, "step": step, "data": data}
        line = json.dumps({**body, "time": datetime.now(UTC).isoformat()})
        with (self.out / "events.jsonl").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
