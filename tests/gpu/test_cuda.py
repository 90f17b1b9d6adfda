"""Runs on one CUDA GPU, through the command a worker starts: both engines, both precisions, every check on.

Skipped without a GPU. `GRPO_TEST_MODEL` names the folder of a small chat model (SmolLM2-135M-Instruct, say); without
it only plain TRL is tried, on the tiny model, whose heads are too small for vLLM's kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.hardware.gpus import find_gpus
from grpo_core.run_dir.records import read_rollouts

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "models" / "tiny-arithmetic"
MODEL = os.environ.get("GRPO_TEST_MODEL")
UPLOADED = "ds-00000000000000000000000000"
"""What a worker has put into the run's folder; nobody looks it up."""

ON_BASE = {"16bit": 0.05, "4bit": 0.1}
"""What two programs may differ by on the base model alone: rounding. A small model makes more of it in 4-bit."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(find_gpus()) == 0, reason="no CUDA GPU"),
]
needs_unsloth = pytest.mark.skipif(
    MODEL is None or any(importlib.util.find_spec(name) is None for name in ("unsloth", "vllm")),
    reason="needs GRPO_TEST_MODEL, unsloth and vllm",
)


def spec_of(folder: Path, engine: str, precision: str, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "engine": engine,
        "model": {"name": folder.name, "precision": precision, "max_sequence": 512, "gpu_memory_share": 0.3},
        "training": {"steps": 3, "checkpoint_every": 2},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0},
        "sampling": {
            "prompts_per_step": 2,
            "generations": 4,
            "max_prompt_tokens": 384,
            "max_completion_tokens": 32,
            "temperature": 1.0,
        },
        "rewards": {"mode": "published"},
        "guards": {"no_signal_steps": 0},
        "evaluation": {"questions": 8, "max_completion_tokens": 32},
        "data": {
            "source": "upload",
            "dataset": UPLOADED,
            "question_column": "question",
            "answer_column": "answer",
        },
    }
    return {**spec, **changes}


def start(run: Path, spec: dict[str, Any], folder: Path, *more: str) -> subprocess.Popen[bytes]:
    (run / "inputs").mkdir(parents=True, exist_ok=True)
    (run / "inputs" / "dataset.jsonl").write_bytes((ROOT / "examples" / "tiny" / "train.jsonl").read_bytes())
    (run / "spec.json").write_text(json.dumps(spec))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "GRPO_MODEL_DIR": str(folder.parent)}
    with (run / "stderr.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "grpo_core", "train", "spec.json", "--out", ".", *more],
            cwd=run,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(run: Path, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    code = start(run, spec, folder).wait(timeout=540)
    assert code == 0, (run / "stderr.log").read_text("utf-8", "replace")[-4000:]
    return json.loads((run / "report.json").read_text())


Ran = Callable[[str, str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A finished run of an engine and a precision, with its report; one of each, as a start takes a minute or two."""
    done: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def of(engine: str, precision: str) -> tuple[Path, dict[str, Any]]:
        if (engine, precision) not in done:
            folder, run = Path(MODEL) if MODEL else TINY, tmp_path_factory.mktemp(f"{engine}-{precision}")
            done[engine, precision] = run, finish(run, spec_of(folder, engine, precision), folder)
        return done[engine, precision]

    return of


@pytest.mark.parametrize("precision", ["16bit", "4bit"])
def test_plain_trl(ran: Ran, precision: str) -> None:
    _, report = ran("trl", precision)
    assert report["engine"] == "trl"
    assert report["precision"]["weights"] == precision
    assert report["selftest"]["peft"]["mean"] <= 0.02
    assert (report["selftest"]["served"] is None) == ("rollout_server" not in report)


@needs_unsloth
@pytest.mark.parametrize("precision", ["16bit", "4bit"])
def test_unsloth_with_vllm(ran: Ran, precision: str) -> None:
    run, report = ran("unsloth", precision)
    assert report["engine"] == "unsloth"
    assert report["precision"]["weights"] == precision
    assert report["rollout_server"]["sequences_at_once"] == 8
    for check in ("peft", "served"):
        agreement = report["selftest"][check]
        assert agreement["mean"] <= agreement["bound"], check
        assert agreement["on_base"] <= ON_BASE[precision], check
    assert {"import", "model", "trainer", "first_step"} <= report["start_up_seconds"].keys()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["logprob_diff_mean"] < 0.1
    assert first["gpu_memory_gb"] > 0


@pytest.mark.parametrize("engine", ["trl", pytest.param("unsloth", marks=needs_unsloth)])
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, ran: Ran, engine: str) -> None:
    """With the paged 8-bit optimizer. Kernels need not repeat themselves to the bit, so numbers are compared."""
    folder = Path(MODEL) if MODEL else TINY
    (whole, _), run = ran(engine, "16bit"), tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step-000002", run / "inputs" / "resume")
    report = finish(run, spec_of(folder, engine, "16bit"), folder)
    assert report["resumed"] == {"epoch": 1, "step": 2}
    assert not {"base_differs", "data_changed"} & warnings_of(run)
    straight, resumed = (lines_of(folder / "metrics.jsonl") for folder in (whole, run))
    assert resumed[:2] == straight[:2]
    assert resumed[2]["learning_rate"] == straight[2]["learning_rate"]
    assert resumed[2]["grad_norm"] == pytest.approx(straight[2]["grad_norm"], rel=0.5)
    one, other = (read_rollouts(folder / "rollouts" / "step-000003.parquet") for folder in (whole, run))
    assert [(row["prompt_id"], row["seed"]) for row in one] == [(row["prompt_id"], row["seed"]) for row in other]
    same = sum(a["completion"] == b["completion"] for a, b in zip(one, other, strict=True))
    assert same >= len(one) // 2, f"{same} of {len(one)} completions are the same"


@needs_unsloth
def test_the_recipes_loss_has_a_kl_term(ran: Ran) -> None:
    run, _ = ran("unsloth", "16bit")
    assert json.loads((run / "spec.json").read_text()).get("loss") is None, "the recipe's"
    kl = [json.loads(line)["kl"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kl[0] == pytest.approx(0, abs=1e-3), "the reference is the base, which the adapter starts as"
    assert kl[-1] > 0


@needs_unsloth
def test_a_killed_run_leaves_the_cards_memory_free(tmp_path: Path) -> None:
    assert MODEL is not None
    run, before = tmp_path / "run", memory_used()
    spec = spec_of(Path(MODEL), "unsloth", "16bit", training={"steps": 500})
    process = start(run, spec, Path(MODEL))
    until = time.monotonic() + 300
    metrics = run / "metrics.jsonl"
    while time.monotonic() < until and (not metrics.exists() or not metrics.read_text().count("\n")):
        assert process.poll() is None, (run / "stderr.log").read_text("utf-8", "replace")[-4000:]
        time.sleep(0.5)
    assert memory_used() > before + 1000
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 15
    while memory_used() > before + 64 and time.monotonic() < until:
        time.sleep(0.2)
    assert memory_used() <= before + 64


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def warnings_of(run: Path) -> set[str]:
    return {event["data"]["code"] for event in lines_of(run / "events.jsonl") if event["type"] == "warning"}


def memory_used() -> int:
    argv = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[0])
