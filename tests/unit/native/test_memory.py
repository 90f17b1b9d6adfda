"""The division of a GPU's memory: long completions get room, one by one if need be, or are refused with figures."""

from __future__ import annotations

from functools import cache

import pytest

from grpo_core.engines.gradient_checkpointing import bytes_per_token
from grpo_core.errors import JobFailure
from grpo_core.estimates import ASIDE_BYTES, USABLE, shared_weight_bytes
from grpo_core.spec import JobSpec, parse_spec
from tests.lazy import lazy

torch = lazy("torch")
matrix_bytes = lazy("grpo_core.engines.native.weights", "matrix_bytes")
Qwen2Config = lazy("transformers", "Qwen2Config")
Architecture, of_config = lazy("grpo_core.engines.native.architecture", "Architecture of_config")
memory_to_plan, plan_memory, require_room, spares_activations = lazy(
    "grpo_core.engines.native.memory", "memory_to_plan plan_memory require_room spares_activations"
)


GIB = 1024**3


@cache
def seven() -> Architecture:
    """The shape of Qwen2.5-7B."""
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    return of_config(config)


HELD = {"16bit": 15_200_000_000, "8bit": 8_700_000_000}
KEYS = 2 * 28 * 4 * 128 * 2
"""Bytes of a token's keys and values."""


def job(completion: int, prompts: int = 32, generations: int = 8) -> JobSpec:
    return parse_spec(
        {
            "model": {"max_sequence": completion + 256},
            "sampling": {
                "prompts_per_step": prompts,
                "generations": generations,
                "max_prompt_tokens": 256,
                "max_completion_tokens": completion,
            },
        }
    )


@pytest.mark.parametrize("completion", [200, 2048, 8192, 32768])
@pytest.mark.parametrize(("gigabytes", "precision"), [(24, "8bit"), (48, "16bit"), (80, "16bit"), (141, "16bit")])
def test_what_is_planned_fits_and_holds_a_completion(gigabytes: int, precision: str, completion: int) -> None:
    spec = job(completion, prompts=32 if completion < 8192 else 2)
    cache, budget = plan_memory(spec, seven(), memory=gigabytes * GIB, held=HELD[precision], size=2)
    assert cache >= completion + 257
    kept = bytes_per_token({"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}) or 0
    assert HELD[precision] + ASIDE_BYTES + cache * KEYS + budget * kept <= USABLE * gigabytes * GIB
    assert budget >= 256


def test_the_bars_shape_is_drawn_at_once_and_trained_in_few_parts() -> None:
    cache, budget = plan_memory(job(200), seven(), memory=141 * GIB, held=HELD["16bit"], size=2)
    assert cache == 256 * 457
    assert budget > 10_000


def test_a_part_of_a_base_has_room_where_the_whole_base_has_not() -> None:
    """Qwen2.5-32B on 48 GB: refused alone, planned on two GPUs and more."""
    large = of_config(
        Qwen2Config(
            hidden_size=5120,
            intermediate_size=27648,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            vocab_size=152064,
            tie_word_embeddings=False,
        )
    )

    def held(ranks: int) -> int:
        return matrix_bytes(large, ranks=ranks, dtype=torch.bfloat16, spare_rank=32)

    with pytest.raises(JobFailure, match=r"The weights take 65\.\d GB of a GPU with 51\.5 GB") as caught:
        require_room(job(200), large, memory=48 * GIB, held=held(1), ranks=1)
    assert caught.value.report.code == "no_room_for_rollouts"
    for ranks in (2, 4, 8):
        require_room(job(200), large, memory=48 * GIB, held=held(ranks), ranks=ranks)
        assert held(ranks) == pytest.approx(held(1) / ranks + 3.5e9, rel=0.02)
        guess = shared_weight_bytes(32_000_000_000, "16bit", ranks)
        assert guess == pytest.approx(held(ranks), rel=0.05)


def test_a_completion_that_has_no_room_is_refused_with_the_figures() -> None:
    with pytest.raises(JobFailure, match=r"15\.2 GB.*one completion of 65793 tokens 3\.8 GB.*25\.8 GB") as caught:
        plan_memory(job(65536, 2), seven(), memory=24 * GIB, held=HELD["16bit"], size=2)
    assert caught.value.report.code == "no_room_for_rollouts"


def test_a_gpu_that_another_process_uses_is_planned_by_what_is_free() -> None:
    assert memory_to_plan(141 * GIB, 139 * GIB) == memory_to_plan(141 * GIB, 130 * GIB) == 141 * GIB
    assert memory_to_plan(141 * GIB, 24 * GIB) == 24 * GIB


@pytest.mark.parametrize(
    ("gigabytes", "precision", "spares"), [(24, "8bit", True), (48, "16bit", False), (80, "16bit", False)]
)
def test_a_gpu_that_is_too_small_for_full_passes_computes_activations_twice(
    gigabytes: int, precision: str, spares: bool
) -> None:
    room = {"memory": gigabytes * GIB, "held": HELD[precision], "size": 2}
    _, budget = plan_memory(job(200), seven(), **room)
    tokens = 32 * (256 + 8 * 200)
    assert spares_activations(budget, tokens, shared=False) == spares
    assert not spares_activations(budget, min(budget, 200), shared=False), "all of it fits"
    _, more = plan_memory(job(200), seven(), **room, sparing=True)
    assert more > 10 * budget
    assert not spares_activations(more, tokens, shared=False)
