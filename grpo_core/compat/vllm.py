"""Private uses of a vLLM engine in this process: its settings, its tensors, the times in its log, and serving by steps.

Owns how each request of a rollout gets its seed, how the engine's memory is released, and which names of vLLM serving
uses. Imports no torch, and vLLM only for serving. Invariant: if the settings of an engine cannot be read, or a name has
changed, the run fails before its first step or answer.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from grpo_core.compat import Use, reach, require

if TYPE_CHECKING:
    import torch

READ_IN: Final = "0.25.1"

_CONFIG: Final = "llm_engine.vllm_config"
_RUNNER: Final = "llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner"
_CORE: Final = "llm_engine.engine_core"

_TIMED: Final = re.compile(
    r"(?P<what>Loading weights|torch\.compile|Initial profiling|Graph capturing|init engine).*?"
    r"(?P<seconds>\d+(?:\.\d+)?) (?:s|secs|seconds)\b"
)
_PHASES: Final = {
    "Loading weights": "vllm_weights",
    "torch.compile": "vllm_compile",
    "Initial profiling": "vllm_profiling",
    "Graph capturing": "vllm_graphs",
    "init engine": "vllm_engine",
}


SERVING: Final = (
    Use(
        name="vllm:EngineArgs",
        named=(
            *("model", "dtype", "seed", "max_model_len", "max_num_seqs", "max_logprobs", "gpu_memory_utilization"),
            *("enable_prefix_caching", "distributed_executor_backend", "generation_config", "compilation_config"),
            *("disable_log_stats", "trust_remote_code", "quantization"),
            *("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank"),
        ),
    ),
    Use(name="vllm:LLMEngine.from_engine_args", positional=1),
    Use(name="vllm:LLMEngine.add_request", positional=4, named=("lora_request",)),
    Use(name="vllm:LLMEngine.abort_request", positional=2),
    Use(name="vllm:LLMEngine.add_lora", positional=2),
    Use(name="vllm:LLMEngine.step", positional=1),
    Use(
        name="vllm:SamplingParams",
        named=(
            *("n", "temperature", "top_p", "seed", "max_tokens", "logprobs", "stop_token_ids", "ignore_eos"),
            *("detokenize", "output_kind"),
        ),
    ),
    Use(name="vllm.sampling_params:RequestOutputKind.DELTA"),
    Use(
        name="vllm.lora.request:LoRARequest",
        named=("lora_name", "lora_int_id", "lora_path", "base_model_name"),
    ),
    Use(name="vllm.inputs.engine:tokens_input", positional=1),
)
"""What serving calls. Only the methods of an engine that runs in this process are used, step by step."""


@dataclass(frozen=True, slots=True)
class ServingParts:
    """The classes and functions of vLLM that serving calls."""

    arguments: Any
    engine: Any
    sampling: Any
    deltas: Any
    """Outputs have only what is new."""
    adapter: Any
    prompt: Any
    """Makes a prompt of token ids."""


@cache
def serving_parts() -> ServingParts:
    """Import vLLM's parts. Raises `LibraryChanged` if one is missing or takes other arguments."""
    require("vllm", READ_IN, SERVING)
    vllm: Any = import_module("vllm")
    return ServingParts(
        arguments=vllm.EngineArgs,
        engine=vllm.LLMEngine,
        sampling=vllm.SamplingParams,
        deltas=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        adapter=import_module("vllm.lora.request").LoRARequest,
        prompt=import_module("vllm.inputs.engine").tokens_input,
    )


class StartUpTimes(logging.Handler):
    """Reads from vLLM's log how long each part of its start took; vLLM reports it nowhere else."""

    def __init__(self, note: Callable[[str, float], None]) -> None:
        """`note` takes a phase and its seconds."""
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        found = _TIMED.search(record.getMessage())
        if found:
            self._note(_PHASES[found["what"]], float(found["seconds"]))


class SeededGeneration:
    """Replaces an engine's `generate` and gives each request of a rollout its own seed.

    Also asks for no text: the trainer reads token ids, and vLLM would decode each token twice, between its steps.
    """

    def __init__(self, generate: Callable[..., Any]) -> None:
        self._generate = generate
        self._seeds: list[int] = []

    def expect(self, seeds: Sequence[int]) -> None:
        """The seeds of the next call's requests."""
        self._seeds = list(seeds)

    def __call__(self, prompts: Any, sampling_params: Any = None, **options: Any) -> Any:
        seeds, self._seeds = self._seeds, []
        if seeds and not isinstance(sampling_params, list) and len(seeds) == len(prompts):
            sampling_params = [_for_rollout(sampling_params, seed) for seed in seeds]
        return self._generate(prompts, sampling_params, **options)


def seed_rollouts(llm: Any) -> Callable[[Sequence[int]], None] | None:
    """Make an engine take a seed for each request. Returns the function to call with the seeds before each rollout.

    None for the older model runner, which generates seeded requests one at a time: there, one seed per step must do.
    """
    if not _config(llm, "use_v2_model_runner"):
        return None
    llm.generate = seeded = SeededGeneration(llm.generate)
    return seeded.expect


def settings(llm: Any) -> dict[str, Any]:
    """The settings with which an engine was started."""
    mode = _config(llm, "model_config.logprobs_mode")
    return {
        "logprobs": str(getattr(mode, "value", mode)),
        "max_sequence": _config(llm, "model_config.max_model_len"),
        "sequences_at_once": _config(llm, "scheduler_config.max_num_seqs"),
        "graphs": list(_config(llm, "compilation_config.cudagraph_capture_sizes") or []),
        "eager": _config(llm, "model_config.enforce_eager"),
        "model_runner": "v2" if _config(llm, "use_v2_model_runner") else "v1",
    }


def tensors(llm: Any) -> list[torch.Tensor]:
    """The weights and the cache of keys and values of an engine."""
    runner = reach("vllm", READ_IN, llm, _RUNNER)
    return [*runner.model.parameters(), *runner.model.buffers(), *runner.kv_caches]


def shut_down(llm: Any) -> None:
    """Shut an engine down. The memory of its `tensors` stays in use if something else refers to them."""
    reach("vllm", READ_IN, llm, _CORE).shutdown()


def _config(llm: Any, path: str) -> Any:
    return reach("vllm", READ_IN, llm, f"{_CONFIG}.{path}")


def _for_rollout(params: Any, seed: int) -> Any:
    own = copy.copy(params)
    own.seed, own.detokenize = seed, False
    return own
