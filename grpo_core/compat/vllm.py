"""Private uses of a vLLM engine in this process: its settings, its tensors, and the times in its log.

Owns how each request of a rollout gets its seed, and how the engine's memory is released. Imports neither vLLM nor
torch. Invariant: if the settings of an engine cannot be read, the run fails before its first step.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from grpo_core.compat import reach

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
