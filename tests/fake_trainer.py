"""A training process without torch that honours docs/run-folder.md: same arguments, files, signals and exit codes.

For tests of what surrounds training. It learns nothing: its numbers are made up. How it behaves is read from the
job's metadata, so that a test can ask for a failure through the front door: `fail` is an exit code or `kill`,
`step_seconds` the length of a step.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

FAILURES = {10: "user_config", 11: "dataset", 12: "reward", 13: "oom", 14: "no_signal", 15: "diverged", 16: "internal"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epoch", type=int, default=1)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    return Trainer(json.loads(arguments.spec.read_text()), arguments.out, arguments.epoch).run()


class Trainer:
    def __init__(self, spec: dict, out: Path, epoch: int) -> None:
        self.spec, self.out, self.epoch = spec, out, epoch
        self.seq = 0
        self.stop = False
        signal.signal(signal.SIGTERM, self.ask_to_stop)

    def ask_to_stop(self, *_: object) -> None:
        self.stop = True

    def run(self) -> int:
        how = self.spec["metadata"]
        self.event("status", {"phase": "loading"})
        if self.spec["data"]["source"] == "upload":
            assert (self.out / "inputs" / "dataset.jsonl").stat().st_size > 0
        self.event("status", {"phase": "training"})
        steps = self.spec["training"]["steps"]
        for step in range(1, steps + 1):
            time.sleep(float(how.get("step_seconds", "0.01")))
            self.train_step(step, steps)
            if self.stop:
                return 75
            if how.get("fail") and step == int(how.get("fail_step", "1")):
                return self.fail(how["fail"])
        self.write_json("adapter/adapter_config.json", {"r": self.spec["lora"]["rank"]})
        (self.out / "adapter" / "adapter_model.safetensors").write_bytes(hashlib.sha256(b"weights").digest() * 1000)
        self.write_json("report.json", {"steps": steps})
        print("done", file=sys.stderr)
        return 0

    def train_step(self, step: int, steps: int) -> None:
        reward = 4.0 * step / steps
        self.write_rollouts(step)
        metrics = {"step": step, "reward": reward, "rewards": {"correctness": reward / 2}}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.event("metric", metrics, step)
        if step % self.spec["training"]["checkpoint_every"] == 0:
            self.checkpoint(step)

    def write_rollouts(self, step: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (self.out / "rollouts").mkdir(exist_ok=True)
        table = pa.table(
            {"step": [step] * 2, "sample": [0, 1], "completion": ["一", "two"], "reward_total": [1.0, 2.0]}
        )
        partial = self.out / "rollouts" / "partial"
        pq.write_table(table, partial)
        partial.replace(self.out / "rollouts" / f"step-{step:06d}.parquet")

    def checkpoint(self, step: int) -> None:
        folder = f"checkpoints/step-{step:06d}"
        self.write_json(f"{folder}/adapter_config.json", {})
        body = (self.out / folder / "adapter_config.json").read_bytes()
        files = [{"path": "adapter_config.json", "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}]
        self.write_json(f"{folder}/manifest.json", {"v": 1, "step": step, "files": files})
        self.event("checkpoint", {"path": folder, "step": step}, step)

    def fail(self, how: str) -> int:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        code = int(how)
        self.event(
            "error",
            {"code": "made_up", "class": FAILURES[code], "message": "As asked.", "hint": "", "retryable": False},
        )
        return code

    def write_json(self, name: str, value: object) -> None:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def event(self, kind: str, data: dict, step: int = 0) -> None:
        self.seq += 1
        body = {"v": 1, "seq": self.seq, "epoch": self.epoch, "type": kind, "step": step, "data": data}
        line = json.dumps({**body, "time": datetime.now(UTC).isoformat()})
        with (self.out / "events.jsonl").open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
