"""Runs of `grpo_core` in processes of their own, with the demo's tiny model, and what they leave.

Importing TRL takes 18 seconds of processor time: a run can also be forked from a process that has done so, and is the
same `main` (fixtures `forks` and `finish`).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import read_jsonl
from tests.clock import patience

MODELS = Path("examples/models").resolve()
ROWS = Path("examples/tiny/train.jsonl").resolve()
WEIGHTS = {"correctness": 1.0, "integer": 0.5, "strict_format": 1.0, "soft_format": -0.25, "xml_count": 0.0}
PROMPTS, GENERATIONS, STEPS = 3, 4, 4
EVALUATION = {"questions": 20, "max_completion_tokens": 40}

SPEC: dict[str, Any] = {
    "name": "a test",
    "model": {"name": "tiny-arithmetic", "max_sequence": 256},
    "lora": {"rank": 8, "alpha": 8, "gradient_checkpointing": "off"},
    "optimizer": {"name": "adamw_torch", "learning_rate": 2e-3, "max_grad_norm": 1.0},
    "training": {"steps": STEPS, "checkpoint_every": 1, "save_steps": 2, "log_every": 2},
    "sampling": {
        "prompts_per_step": PROMPTS,
        "generations": GENERATIONS,
        "gradient_accumulation": 2,
        "max_prompt_tokens": 64,
        "max_completion_tokens": 40,
        "temperature": 1.0,
    },
    "rewards": {"weights": WEIGHTS},
    "data": {"source": "file", "dataset": str(ROWS), "system_prompt": "", "max_rows": 200},
    "resources": {"gpus": 0},
}

ENGINES = ("auto", "trl")
"""What a job may ask for on a CPU: `auto` is `native` for this model."""


def spec_with(**sections: dict[str, Any]) -> dict[str, Any]:
    return SPEC | {name: SPEC.get(name, {}) | fields for name, fields in sections.items()}


class Run:
    """A run's folder after it ended."""

    def __init__(self, root: Path, exit_code: int) -> None:
        self.folder = RunFolder(root)
        self.exit_code = exit_code

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder.events))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder.metrics))

    @property
    def error(self) -> dict[str, Any]:
        last = self.events[-1]
        assert last["type"] == "error", (self.folder.root / "stderr.log").read_text("utf-8")
        return last["data"]

    def of_type(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type_]


def prepare(root: Path, spec: dict[str, Any], *more: str, epoch: int = 2) -> list[str]:
    """The arguments of a run whose spec is already in its folder, as a worker leaves it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return ["train", str(root / "spec.json"), "--out", str(root), "--epoch", str(epoch), *more]


def spawn(root: Path, spec: dict[str, Any], *, epoch: int = 2, **environment: str) -> subprocess.Popen[bytes]:
    with (root.with_name(root.name + ".log")).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "grpo_core", *prepare(root, spec, epoch=epoch)],
            stdout=log,
            stderr=log,
            env={**os.environ, "GRPO_MODEL_DIR": str(MODELS), "OMP_NUM_THREADS": "1", **environment},
        )


def run_main(arguments: list[str], log: str, environment: dict[str, str], fault: Callable[[], None] | None) -> None:
    """In a forked process: the command line, after breaking something if asked to."""
    os.environ.update(environment)
    if fault is not None:
        fault()
    with open(log, "w", encoding="utf-8", buffering=1) as file:  # noqa: PTH123
        sys.stdout = sys.stderr = file
        from grpo_core.__main__ import main

        sys.exit(main(arguments))


def assert_whole(checkpoint: Path) -> dict[str, Any]:
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    assert {entry["path"] for entry in manifest["files"]} | {"manifest.json"} == {p.name for p in checkpoint.iterdir()}
    for entry in manifest["files"]:
        content = (checkpoint / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
    return manifest


def wait_for(condition: Callable[[], bool], process: Any = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        ended = process is not None and (process.poll() if hasattr(process, "poll") else process.exitcode) is not None
        assert not ended, "the process ended"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie, which nobody has waited for in a container without init, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
