"""The engine `trl` on two CUDA GPUs with vLLM, through the command a worker starts; skipped with fewer.

`GRPO_TEST_MODEL` names the folder of a small chat model whose heads vLLM's kernels know (Qwen2.5-Coder-1.5B, say).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.hardware.gpus import find_gpus
from grpo_core.run_dir.records import read_jsonl, read_rollouts
from tests.gpu.test_cuda import MODEL, spec_of, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(find_gpus()) < 2, reason="no two CUDA GPUs"),
    pytest.mark.skipif(
        MODEL is None or importlib.util.find_spec("vllm") is None, reason="needs GRPO_TEST_MODEL and vllm"
    ),
]
STEPS, PROMPTS, GENERATIONS = 6, 8, 4
SPEC: dict[str, Any] = {
    "training": {"steps": STEPS, "checkpoint_every": 1, "save_steps": 1},
    "optimizer": {"name": "adamw_torch", "learning_rate": 1e-4, "schedule": "constant", "warmup_ratio": 0},
    "sampling": {
        "prompts_per_step": PROMPTS,
        "generations": GENERATIONS,
        "gradient_accumulation": 2,
        "max_prompt_tokens": 384,
        "max_completion_tokens": 64,
        "temperature": 1.0,
    },
    "resources": {"gpus": 2},
}


def spec(**changes: Any) -> tuple[dict[str, Any], Path]:
    folder = Path(str(MODEL))
    return spec_of(folder, "trl", "16bit", **SPEC | changes), folder


def log_of(run: Path) -> str:
    return (run / "stderr.log").read_text("utf-8", "replace")[-6000:]


def events(run: Path, type_: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(run / "events.jsonl") if event["type"] == type_]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The metrics so far; none before the run has begun to write them."""
    file = run / "metrics.jsonl"
    return list(read_jsonl(file)) if file.exists() else []


def wait(condition: Callable[[], bool], process: Any, run: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log_of(run)
        assert time.monotonic() < until, log_of(run)
        time.sleep(0.2)


def left_in_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("grpo-adapter-*")}


def test_two_cards_train_one_adapter_that_vllm_serves(tmp_path: Path) -> None:
    before, run = left_in_memory(), tmp_path / "run"
    asked, folder = spec()
    code = start(run, asked, folder).wait(timeout=540)
    assert code == 0, log_of(run)
    report = json.loads((run / "report.json").read_text())
    assert (report["engine"], report["ranks"]) == ("trl", 2)
    assert report["rollout_server"]["logprobs"] == "processed_logprobs"
    assert report["selftest"]["peft"]["mean"] <= report["selftest"]["peft"]["bound"]
    served = report["selftest"]["served"]
    assert served["mean"] <= served["bound"]
    assert served["adapter_effect"] > 0
    rows = read_rollouts(run / "rollouts")
    assert len(rows) == STEPS * PROMPTS * GENERATIONS
    groups = [rows[at : at + GENERATIONS] for at in range(0, len(rows), GENERATIONS)]
    assert all(len({row["prompt_id"] for row in group}) == 1 for group in groups)
    assert all([row["sample"] for row in group] == list(range(GENERATIONS)) for group in groups)
    assert len({row["seed"] for row in rows}) == len(rows)
    compared = [m["logprob_diff_mean"] for m in steps_of(run) if m["logprob_diff_mean"] is not None]
    assert len(compared) == 2
    assert max(compared) < 0.05
    assert left_in_memory() == before
    print({"start_up": report["start_up_seconds"], "diff": compared, "selftest": report["selftest"]})


def test_a_killed_rank_ends_the_run_and_it_resumes_on_one_card(tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle; then one card goes on from the last checkpoint of two."""
    torn, again = tmp_path / "torn", tmp_path / "again"
    asked, folder = spec(evaluation={"questions": 0}, training={**SPEC["training"], "steps": 40})
    process = start(torn, asked, folder)
    wait(lambda: (torn / "checkpoints" / "step-000003" / "manifest.json").exists(), process, torn, 300)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert process.wait(timeout=60) == 17, log_of(torn)
    assert time.monotonic() - began < 20
    error = events(torn, "error")[-1]["data"]
    assert (error["code"], error["retryable"]) == ("rank_lost", True)
    step = max(int(path.parent.name[5:]) for path in (torn / "checkpoints").glob("step-*/manifest.json"))
    shutil.copytree(torn / "checkpoints" / f"step-{step:06d}", again / "inputs" / "resume")
    process = start(again, asked, folder, "--ranks", "1")
    wait(lambda: len(steps_of(again)) >= step + 2, process, again, 300)
    process.terminate()
    assert process.wait(timeout=120) == 75, log_of(again)
    seeds = [[(r["step"], r["prompt_id"], r["seed"]) for r in read_rollouts(run / "rollouts")] for run in (torn, again)]
    after = [row for row in seeds[0] if row[0] == step + 1]
    assert not after or [row for row in seeds[1] if row[0] == step + 1] == after


def test_a_pause_of_two_cards_ends_with_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked, folder = spec(evaluation={"questions": 0}, training={"steps": 200, "checkpoint_every": 100})
    process = start(run, asked, folder)
    wait(lambda: len(steps_of(run)) >= 3, process, run, 300)
    process.terminate()
    assert process.wait(timeout=120) == 75, log_of(run)
    steps = len(steps_of(run))
    assert (run / "checkpoints" / f"step-{steps:06d}" / "manifest.json").exists()
    assert not events(run, "error")
