"""Unsloth comes before what it patches; what it compiles is kept; what the operator has set stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.engines import choose_engine, unsloth_env, vllm_env
from grpo_core.errors import JobFailure
from grpo_core.hardware.gpus import Gpu
from grpo_core.spec import parse_spec

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "models" / "tiny-arithmetic"
FAKE = """
import sys
early = [name for name in ("trl", "transformers", "peft", "torch") if name in sys.modules]
open({out!r}, "w").write(",".join(early) or "first")
raise ImportError("what comes after it takes seconds to import, and is not asked here")
"""


def test_unsloth_is_imported_before_all_it_patches(tmp_path: Path) -> None:
    """As a run does it: the data set is read and the engine chosen, and torch is not there yet."""
    out = tmp_path / "order"
    (tmp_path / "unsloth.py").write_text(FAKE.format(out=str(out)))
    code = (
        "import grpo_core.training.run, grpo_core.engines as e\n"
        "try: e.import_engine('unsloth')\nexcept ImportError: pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert out.read_text() == "first"


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace())
    with pytest.raises(RuntimeError, match="imported before trl"):
        unsloth_env.start()


def test_compiled_code_is_kept_below_the_cache() -> None:
    added = unsloth_env.environment_defaults({"XDG_CACHE_HOME": "/cache", "TRITON_CACHE_DIR": "/fast/triton"})
    assert added["UNSLOTH_COMPILE_LOCATION"] == "/cache/unsloth/unsloth_compiled_cache"
    assert added["TORCHINDUCTOR_CACHE_DIR"] == "/cache/inductor"
    assert added["VLLM_CACHE_ROOT"] == "/cache/vllm"
    assert "TRITON_CACHE_DIR" not in added
    assert unsloth_env.environment_defaults({"HOME": "/root"})["VLLM_CACHE_ROOT"] == "/root/.cache/vllm"


def test_nobody_is_told_and_nothing_is_asked_of_the_hub() -> None:
    added = unsloth_env.environment_defaults({"VLLM_USE_FLASHINFER_SAMPLER": "1"})
    assert added["VLLM_NO_USAGE_STATS"] == added["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in added, "the operator's choice stands"
    assert not [name for name in added if name.startswith("HF_")], "whether the hub is used is the operator's choice"


VLLM = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LORA_ENABLE_DUAL_STREAM": "1",
    "TORCHINDUCTOR_CACHE_DIR": "/c/inductor",
    "TRITON_CACHE_DIR": "/c/triton",
    "VLLM_CACHE_ROOT": "/c/vllm",
}


def test_each_engine_gets_its_own_variables_and_no_others() -> None:
    before = {"XDG_CACHE_HOME": "/c"}
    trainer, server = dict(before), dict(before)
    vllm_env.prepare(trainer)
    vllm_env.prepare_to_serve(server)
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "INFO"}
    assert trainer == {**before, **VLLM, **in_process}
    assert server == {**trainer, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    unsloth = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_VLLM_MERGED_ROLLOUT": "0",
        "UNSLOTH_VLLM_STANDBY": "0",
        "UNSLOTH_COMPILE_LOCATION": "/c/unsloth/unsloth_compiled_cache",
        "UNSLOTH_MEGA_CACHE_DIR": "/c/unsloth/mega_cache",
    }
    assert unsloth_env.environment_defaults(before) == {**VLLM, **unsloth}


def test_this_process_is_as_old_as_it_is() -> None:
    assert 0 < unsloth_env.seconds_since_start() < 24 * 3600


def test_unsloth_is_the_choice_in_4_bits_where_it_and_vllm_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"unsloth", "vllm"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    card = Gpu("H100", 80 << 30, (9, 0))

    def chosen(**spec: Any) -> str:
        return choose_engine(parse_spec(spec), [card], model=TINY, parameters=10**6).name

    four_bits = {"precision": "4bit"}
    assert chosen(model=four_bits) == "unsloth"
    assert chosen(model=four_bits, engine="trl") == "trl"
    installed.discard("vllm")
    assert chosen(model=four_bits) == "trl"
    with pytest.raises(JobFailure, match="cannot run the unsloth engine"):
        chosen(engine="unsloth")
