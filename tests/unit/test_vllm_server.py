"""vLLM beside the trainer: for which jobs it generates, how it is started, and by which names it finds its place."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from grpo_core.hardware.models import Hardware, ModelFiles, Precision
from grpo_core.ranks import ALONE, Rank
from grpo_core.spec import parse_spec
from tests.lazy import lazy

vllm_server = lazy("grpo_core.engines.vllm_server")

BF16 = Precision("auto", "16bit", "bfloat16", "")
FILES = ModelFiles("m", None, "folder", Path("/models/m"), 7_600_000_000)
CARD = Hardware(1, 140 * 10**9, bf16=True, gpu_free_bytes=70 * 10**9)


def arguments(spec: dict[str, Any], ranks: int = 1, context: int | None = None) -> dict[str, Any]:
    return vllm_server.engine_arguments(
        parse_spec(spec), FILES, BF16, ranks=ranks, hardware=CARD, context_length=context
    )


def test_without_vllm_or_in_4_bits_transformers_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not, installed = vllm_server.why_not, False
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: installed or None)
    assert "vLLM is not installed" in why_not(BF16)
    installed = True
    assert not why_not(BF16)
    assert "4bit" in why_not(Precision("4bit", "4bit", "bfloat16", ""))


def test_the_share_is_of_the_memory_that_is_free() -> None:
    assert arguments({"model": {"gpu_memory_share": 0.4}})["gpu_memory_utilization"] == pytest.approx(0.2)


def test_a_rank_has_room_for_its_share_of_a_step_and_the_longest_sequence() -> None:
    spec = {
        "sampling": {"prompts_per_step": 32, "generations": 8, "max_prompt_tokens": 300, "max_completion_tokens": 900},
        "model": {"max_sequence": 1200},
        "lora": {"rank": 48},
    }
    alone, shared = arguments(spec), arguments(spec, ranks=2)
    assert (alone["max_num_seqs"], shared["max_num_seqs"]) == (257, 128)
    assert (alone["max_model_len"], arguments(spec, context=1200)["max_model_len"]) == (1201, 1200)
    assert alone["max_lora_rank"] == 64
    assert "distributed_executor_backend" not in alone
    assert shared["distributed_executor_backend"] == "external_launcher"


def test_vllm_reads_the_rank_only_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with vllm_server._named_as(Rank(3, 4)):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "0"]
    assert ("RANK" in os.environ, os.environ["LOCAL_RANK"]) == (False, "7")
    with vllm_server._named_as(ALONE):
        assert "RANK" not in os.environ
