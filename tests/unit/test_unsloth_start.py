"""Unsloth comes before what it patches; what it compiles is kept; what the operator has set stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core import models
from grpo_core.engines import choose_engine, unsloth_start
from grpo_core.errors import JobFailure
from grpo_core.models import count_gpus, show_gpus
from grpo_core.spec import parse_spec

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
import sys
early = [name for name in ("trl", "transformers", "peft", "torch") if name in sys.modules]
open({out!r}, "w").write(",".join(early) or "first")
"""


def test_unsloth_is_imported_before_all_it_patches(tmp_path: Path) -> None:
    """As a run does it: the data set is read and the engine chosen, and torch is not there yet."""
    out = tmp_path / "order"
    (tmp_path / "unsloth.py").write_text(FAKE.format(out=str(out)))
    code = (
        "import grpo_core.training, grpo_core.engines as e\ntry: e.import_engine('unsloth')\nexcept ImportError: pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert out.read_text() == "first"


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace())
    with pytest.raises(RuntimeError, match="imported before trl"):
        unsloth_start.start()


def test_compiled_code_is_kept_below_the_cache() -> None:
    added = unsloth_start.environment_defaults({"XDG_CACHE_HOME": "/cache", "TRITON_CACHE_DIR": "/fast/triton"})
    assert added["UNSLOTH_COMPILE_LOCATION"] == "/cache/unsloth/unsloth_compiled_cache"
    assert added["TORCHINDUCTOR_CACHE_DIR"] == "/cache/inductor"
    assert added["VLLM_CACHE_ROOT"] == "/cache/vllm"
    assert "TRITON_CACHE_DIR" not in added
    assert unsloth_start.environment_defaults({"HOME": "/root"})["VLLM_CACHE_ROOT"] == "/root/.cache/vllm"


def test_nobody_is_told_and_nothing_is_asked_of_the_hub() -> None:
    added = unsloth_start.environment_defaults({"VLLM_USE_FLASHINFER_SAMPLER": "1"})
    assert added["VLLM_NO_USAGE_STATS"] == added["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in added, "the operator's choice stands"
    assert not [name for name in added if name.startswith("HF_")], "whether the hub is used is the operator's choice"


def test_this_process_is_as_old_as_it_is() -> None:
    assert 0 < unsloth_start.seconds_since_start() < 24 * 3600


class Driver:
    """NVML, as far as it is asked."""

    def __init__(self, count: int, status: int = 0) -> None:
        self._count, self._status = count, status

    def nvmlInit_v2(self) -> int:  # noqa: N802 - the driver's name
        return self._status

    def nvmlDeviceGetCount_v2(self, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = self._count
        return 0


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,1", 2), ("0,-1,1", 1), ("0,1,2,3,4,5", 4)]
)
def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int) -> None:
    monkeypatch.setattr(models.ctypes, "CDLL", lambda name: Driver(4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == expected


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(models.ctypes, "CDLL", missing)
    assert count_gpus() == 0
    monkeypatch.setattr(models.ctypes, "CDLL", lambda name: Driver(4, status=9))
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("visible", "count", "shown"), [(None, 1, "0"), (None, 0, ""), ("3,1", 1, "3"), ("GPU-a,GPU-b", 1, "GPU-a")]
)
def test_a_job_sees_no_more_gpus_than_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, shown: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


def test_unsloth_is_the_choice_where_it_and_vllm_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"unsloth", "vllm"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    assert choose_engine(parse_spec({}), 1) == "unsloth"
    assert choose_engine(parse_spec({"engine": "trl"}), 1) == "trl"
    installed.discard("vllm")
    assert choose_engine(parse_spec({}), 1) == "trl"
    with pytest.raises(JobFailure, match="cannot run the unsloth engine"):
        choose_engine(parse_spec({"engine": "unsloth"}), 1)
