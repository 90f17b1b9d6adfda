"""The parts of the Unsloth engine that need no GPU: seeds for each request, vLLM's own times, what it holds."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.compat import LibraryChanged
from grpo_core.compat.unsloth import score_in_equal_parts
from grpo_core.compat.vllm import SeededGeneration, StartUpTimes, tensors
from tests.lazy import lazy

torch = lazy("torch")
compat = lazy("grpo_core.compat.trl")
RecordingTrainer, completion_seed, rollout_seed = lazy(
    "grpo_core.engines.trainer", "RecordingTrainer completion_seed rollout_seed"
)
StartUp, _held_by_server = lazy("grpo_core.engines.unsloth", "StartUp _held_by_server")
empty = lazy("grpo_core.engines.vllm_server", "empty")


@dataclass
class Params:
    temperature: float
    seed: int | None = None
    detokenize: bool = True


class Calls:
    """What vLLM's `generate` was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any, dict[str, Any]]] = []

    def __call__(self, prompts: Any, sampling_params: Any = None, **options: Any) -> list[str]:
        self.seen.append((prompts, sampling_params, options))
        return ["said"]


def test_each_request_of_a_rollout_has_its_seed_and_wants_no_text() -> None:
    generate = Calls()
    seeded = SeededGeneration(generate)
    shared = Params(0.9)
    seeded.expect([11, 22])
    assert seeded(["a", "b"], sampling_params=shared, use_tqdm=False, lora_request="adapter") == ["said"]
    prompts, params, options = generate.seen[0]
    assert prompts == ["a", "b"]
    assert params == [Params(0.9, 11, detokenize=False), Params(0.9, 22, detokenize=False)]
    assert options == {"use_tqdm": False, "lora_request": "adapter"}
    assert shared == Params(0.9), "the caller's own object is left alone"


def test_other_calls_pass_as_they_are() -> None:
    generate = Calls()
    seeded = SeededGeneration(generate)
    seeded.expect([1])
    seeded(["a", "b"], Params(0.9))
    seeded(["a"], Params(0.9))
    assert [params for _, params, _ in generate.seen] == [Params(0.9), Params(0.9)], "seeds are for the next call only"


def test_seeds_are_stateless_and_differ() -> None:
    seeds = [completion_seed(3407, 5, index) for index in range(6)]
    assert len({*seeds, rollout_seed(3407, 5), completion_seed(3407, 6, 0), completion_seed(1, 5, 0)}) == 9
    assert seeds == [completion_seed(3407, 5, index) for index in range(6)]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("message", "phase", "seconds"),
    [
        ("Loading weights took 6.71 seconds", "vllm_weights", 6.71),
        ("torch.compile took 41.20 s in total", "vllm_compile", 41.2),
        ("Initial profiling/warmup run took 3.10 s", "vllm_profiling", 3.1),
        ("Graph capturing finished in 4 secs, took 0.42 GiB", "vllm_graphs", 4.0),
        (
            "init engine (profile, create kv cache, warmup model) took 12.34 s (compilation: 8.00 s)",
            "vllm_engine",
            12.34,
        ),
    ],
)
def test_vllms_own_times_are_read(message: str, phase: str, seconds: float) -> None:
    said: list[str] = []
    start_up = StartUp(said.append)
    StartUpTimes(start_up.note).emit(logging.LogRecord("vllm", logging.INFO, "", 0, message, None, None))
    assert start_up.seconds == {phase: pytest.approx(seconds, abs=0.05)}
    assert said == [f"start-up: {phase} {seconds:.1f} s"]


def test_other_lines_of_vllm_are_no_times() -> None:
    start_up = StartUp(lambda _: None)
    for message in ("Model loading took 14.25 GiB memory", "GPU KV cache size: 400,000 tokens"):
        StartUpTimes(start_up.note).emit(logging.LogRecord("vllm", logging.INFO, "", 0, message, None, None))
    assert start_up.seconds == {}


def test_what_the_server_holds_is_read_from_its_settings() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode="processed_logprobs", max_model_len=1024, enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_seqs=6),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8]),
        use_v2_model_runner=True,
    )
    held = _held_by_server(SimpleNamespace(shared_weights=True, llm_engine=SimpleNamespace(vllm_config=config)))
    assert held["shared_weights"] is True
    assert held["logprobs"] == "processed_logprobs"
    assert (held["max_sequence"], held["sequences_at_once"], held["graphs"]) == (1024, 6, [1, 2, 4, 8])
    assert held["model_runner"] == "v2"


def test_releasing_gives_back_memory_that_others_still_refer_to() -> None:
    model, cache = torch.nn.Linear(8, 4), torch.zeros(2, 16)
    model.register_buffer("table", torch.zeros(3))
    query = model.weight[:2].detach()  # as the model in training has parts of vLLM's fused projections
    runner = SimpleNamespace(model=model, kv_caches=[cache])
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))
    empty(tensors(llm))
    kept = (model.weight, model.bias, model.get_buffer("table"), cache, query)
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [0] * 5


class Trainer:
    """As much of a trainer as comparing a rollout takes; it scores each completion token as -id/10."""

    model = None
    num_generations = 2

    def __init__(self, step: int, logprobs: list[list[float | None]] | None) -> None:
        self.state = SimpleNamespace(global_step=step - 1)
        self.logprobs = logprobs
        self.scored: list[Any] = []

    def compares(self) -> bool:
        return RecordingTrainer.compares(self)  # pyright: ignore[reportArgumentType]

    def token_logprobs(self, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        assert mask.shape == ids.shape
        self.scored.append(ids.tolist())
        return -ids[:, -keep:] / 10


# Two prompts of different length, padded on the left; two completions each, padded on the right.
BATCH = {
    "prompt_ids": [[0, 1, 2]] * 2 + [[4, 5, 6]] * 2,
    "prompt_mask": [[0, 1, 1]] * 2 + [[1, 1, 1]] * 2,
    "completion_ids": [[7, 8, 0], [7, 0, 0], [9, 9, 9], [9, 0, 0]],
    "completion_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]],
}
TOLD: list[list[float | None]] = [[-0.7, -0.8], [-0.7], [-0.9, -0.9, -0.9], [-0.9]]


def compare(trainer: Trainer) -> tuple[float, float] | None:
    batch = {name: torch.tensor(rows) for name, rows in BATCH.items()}
    if trainer.logprobs is not None:  # as TRL makes them a column
        rows = [torch.tensor([math.nan if value is None else value for value in row]) for row in trainer.logprobs]
        batch[compat.SAMPLER_LOGPROBS] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return RecordingTrainer._compare(trainer, batch)  # pyright: ignore[reportArgumentType]


def test_a_rollout_is_compared_with_the_trainer_without_padding() -> None:
    trainer = Trainer(step=1, logprobs=TOLD)
    difference = compare(trainer)
    assert difference == pytest.approx((0, 0), abs=1e-6)
    assert trainer.scored == [[[4, 5, 6, 9, 9, 9], [4, 5, 6, 9, 0, 0]]]
    short = Trainer(step=10, logprobs=[[-0.7, -0.9], [-0.7], *TOLD[2:]])
    assert compare(short) == pytest.approx((0.1 / 3, 0.1), abs=1e-6), "tokens are counted, padding is not"
    assert short.scored == [[[1, 2, 7, 8, 0], [1, 2, 7, 0, 0]]], "the shorter prompt's padding is cut off"


def test_what_the_sampler_cannot_tell_is_not_compared() -> None:
    assert compare(Trainer(step=1, logprobs=[*TOLD[:2], [None, -0.9, -0.9], [None]])) == pytest.approx((0, 0), abs=1e-6)
    assert compare(Trainer(step=1, logprobs=[*TOLD[:2], [None] * 3, [None]])) is None


def test_comparing_is_for_some_steps_and_for_another_sampler_only() -> None:
    assert compare(Trainer(step=2, logprobs=TOLD)) is None
    assert compare(Trainer(step=1, logprobs=None)) is None


def test_completions_are_scored_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts = object()
    scoring = SimpleNamespace(
        chunked_hidden_states_selective_log_softmax=object(),
        chunked_hidden_states_selective_log_softmax_recompute=in_parts,
    )
    monkeypatch.setitem(sys.modules, "unsloth_zoo", SimpleNamespace(rl_replacements=scoring))
    monkeypatch.setitem(sys.modules, "unsloth_zoo.rl_replacements", scoring)
    score_in_equal_parts()
    assert scoring.chunked_hidden_states_selective_log_softmax is in_parts


def test_another_version_of_unsloth_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth_zoo", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "unsloth_zoo.rl_replacements", SimpleNamespace())
    with pytest.raises(LibraryChanged, match="has no unsloth_zoo"):
        score_in_equal_parts()
