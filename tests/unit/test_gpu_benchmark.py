"""The benchmark for GPU hosts: its jobs are valid, both sides do the same work, and the table says what failed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import parse_spec
from tests.gpu import test_cuda

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="gpu")
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu  # pyright: ignore[reportMissingImports]

    return gpu


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"model": "Qwen/Qwen2.5-7B-Instruct", "steps": 10, "completion": 200, "cpu": False} | changes
    )


@pytest.mark.parametrize("cpu", [False, True])
def test_every_job_is_valid(gpu: Any, tmp_path: Path, cpu: bool) -> None:
    chosen = options(cpu=cpu, model=str(gpu.TINY) if cpu else "Qwen/Qwen2.5-7B-Instruct")
    ours = [one for one in gpu.BENCHMARKS if one.engine and not (cpu and one.engine == "unsloth")]
    assert len(ours) >= 3
    for benchmark in ours:
        command = benchmark.command(chosen, tmp_path / benchmark.name)
        spec = parse_spec(json.loads(Path(command[command.index("train") + 1]).read_text()))
        assert (spec.engine, spec.completions_per_step) == (
            benchmark.engine,
            benchmark.shape.prompts * benchmark.shape.generations,
        )


def test_a_baseline_does_the_same_work(gpu: Any, tmp_path: Path) -> None:
    """The script's arguments are the shape of the step that ours takes."""
    for benchmark in (one for one in gpu.BENCHMARKS if one.baseline):
        assert any(one.engine and one.shape == benchmark.shape for one in gpu.BENCHMARKS), benchmark.name
        command = benchmark.command(options(), tmp_path)
        given = {name: command[command.index(f"--{name}") + 1] for name in ("prompts", "generations", "parts", "bits")}
        assert given == {name: str(getattr(benchmark.shape, name)) for name in given}


def test_figures_of_a_run_leave_out_its_first_steps(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    steps = [
        {"seconds": {"total": total, "generation": 1.0, "update": total - 1}, "completion_tokens_mean": 100.0}
        for total in (60.0, 30.0, 9.0, 2.0, 4.0, 3.0)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    benchmark = next(one for one in gpu.BENCHMARKS if one.name == "recipe-native")
    (tmp_path / "job.json").write_text(json.dumps(benchmark.spec(options())))
    found = gpu.figures(benchmark, tmp_path, "")
    assert found["estimated_s"] is None, "there is no GPU here"
    assert gpu.steps_in(tmp_path) == 6
    assert (found["step_s"], found["completions_per_s"], found["tokens"]) == (3.0, 2.0, 100.0)


def test_the_table_names_what_failed(gpu: Any) -> None:
    lines = [
        {"about": "a", "shape": "1 × 6", "failed": 13, "step_s": 1.5},
        {"about": "b", "shape": "1 × 6", "step_s": 2.5},
    ]
    failed, done = gpu.table(lines).splitlines()[2:]
    assert "| 1.5 failed (13), see log.txt |" in failed
    assert "| 2.5 |" in done


@pytest.mark.parametrize("engine", ["trl", "unsloth"])
@pytest.mark.parametrize("precision", ["16bit", "4bit"])
def test_the_gpu_tests_specs(tmp_path: Path, engine: str, precision: str) -> None:
    spec = parse_spec(test_cuda.spec_of(tmp_path, engine, precision, loss={"beta": 0.04}))
    assert (spec.engine, spec.model.precision, spec.loss.beta) == (engine, precision, 0.04)
