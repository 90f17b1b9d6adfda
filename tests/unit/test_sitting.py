"""What is tried on a GPU host asks for jobs that the service accepts: a typo there costs minutes of a dear machine."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import parse_spec
from tests.gpu import sitting, test_cuda

WITHOUT_A_JOB = ("check", "model7b", "small", "pytest")


@pytest.mark.parametrize("engine", ["trl", "unsloth"])
@pytest.mark.parametrize("precision", ["16bit", "4bit"])
def test_the_gpu_tests_specs(tmp_path: Path, engine: str, precision: str) -> None:
    spec = parse_spec(test_cuda.spec_of(tmp_path, engine, precision, loss={"beta": 0.04}))
    assert (spec.engine, spec.model.precision, spec.loss.beta) == (engine, precision, 0.04)


def test_the_stages_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(sitting, "_made", lambda *_: {})
    monkeypatch.setattr(sitting, "_left_on_card", lambda *_: nullcontext())
    monkeypatch.setattr(sitting, "_job", lambda _, name, spec, **__: asked.update({name: spec}) or {"asked": name})
    host = sitting.Host(tmp_path, tmp_path, False, {}, time.time() + 1000)
    jobs = [name for name in sitting.STAGES if not name.startswith(("baseline", *WITHOUT_A_JOB))]
    assert jobs == [sitting.STAGES[name][0](host)["asked"] for name in jobs]
    for name, spec in asked.items():
        spec["data"]["dataset"] = test_cuda.UPLOADED
        assert parse_spec(spec).training.steps >= 3, name
    assert parse_spec(asked["recipe4"]).model.gpu_memory_share == parse_spec({}).model.gpu_memory_share
