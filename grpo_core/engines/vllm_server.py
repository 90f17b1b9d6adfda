"""A vLLM engine in the training process, as a sampler that serves the adapter in training unmerged.

Owns how the engine is started, beside other ranks too, how it gets the adapter, and how its memory is released;
`compat.vllm` has its internals. Imports vLLM when it is started. Invariants: the adapter that generates is the one in
training, under a separate number, so that no cached prefix of an older one is used; the base model is never written.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from grpo_core.checkpoints.writer import write_peft_files
from grpo_core.compat import vllm
from grpo_core.engines.completions import Drawn, Request
from grpo_core.engines.settings import sequences_at_once
from grpo_core.engines.vllm_memory import is_short_of_memory, no_room, require_room
from grpo_core.hardware.models import Hardware, ModelFiles, Precision
from grpo_core.ranks import Rank
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs
from grpo_core.spec import JobSpec

MEMORY_FOLDER: Final = Path("/dev/shm")  # noqa: S108 - a new folder below it, for us alone
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters for which vLLM can be started."""
BATCHED_TOKENS: Final = 4096
"""Tokens of a forward pass. vLLM reserves memory for as many, and its default is larger than a rollout needs."""


def why_not(precision: Precision) -> str:
    """Return why vLLM cannot generate for a job on a GPU, or an empty string."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (the cuda extra)"
    if precision.weights != "16bit":
        return f"vLLM would hold other weights than the trainer's in {precision.weights}"
    return ""


class NotServed(Exception):
    """vLLM cannot serve a model, or no adapter of it."""


class VllmServer:
    """The engine of one rank."""

    is_apart = True
    _llm: Any

    def __init__(
        self,
        spec: JobSpec,
        files: ModelFiles,
        precision: Precision,
        *,
        rank: Rank,
        hardware: Hardware,
        context_length: int | None,
        stops: Sequence[int],
    ) -> None:
        """Start the engine. `hardware` is the GPU before the trainer's model was loaded. Raises an `oom` failure if the
        model does not fit into vLLM's share, and `NotServed` if vLLM cannot serve it."""
        require_room(spec.model.gpu_memory_share, hardware.gpu_free_bytes, files.parameters, "16bit")
        self._spec, self._stops, self._number = spec, list(stops), 0
        self._dtype: torch.dtype = getattr(torch, precision.dtype)
        self._served: Any = None
        self._model: Any = None
        self.seconds: dict[str, float] = {}
        began = time.perf_counter()
        times = vllm.StartUpTimes(self.seconds.__setitem__)
        library = import_module("vllm")
        logging.getLogger("vllm").addHandler(times)
        try:
            with _named_as(rank):
                self._llm = library.LLM(
                    **engine_arguments(
                        spec, files, precision, ranks=rank.count, hardware=hardware, context_length=context_length
                    )
                )
        except Exception as error:
            if is_short_of_memory(error):
                raise no_room(error, "16bit") from error
            first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise NotServed(f"vLLM does not serve this model: {first}") from error
        finally:
            logging.getLogger("vllm").removeHandler(times)
        self.seconds["vllm"] = round(time.perf_counter() - began, 2)

    def serve(self, model: Any) -> None:
        """Set the `PeftModel` whose adapter is served."""
        self._model = model

    @contextmanager
    def serving(self, *, adapter: bool) -> Generator[None]:
        """Generate with the adapter's present values in this block, or with the base model."""
        if not adapter:
            yield
            return
        folder = Path(tempfile.mkdtemp(prefix="grpo-adapter-", dir=_fast_folder()))
        try:
            write_peft_files(folder, self._model, self._spec, dtype=self._dtype)
            self._served = self._request(folder)
            yield
        finally:
            self._served = None
            shutil.rmtree(folder, ignore_errors=True)

    def generate(
        self, requests: Sequence[Request], *, tokens: int, temperature: float = 1.0, penalty: float = 1.0
    ) -> list[Drawn]:
        """Return a completion of at most `tokens` tokens for each request, in order. Temperature 0 is greedy."""
        sampling, make = self._spec.sampling, import_module("vllm").SamplingParams
        params = [
            make(
                temperature=temperature,
                top_p=sampling.top_p if temperature else 1.0,
                top_k=(sampling.top_k or -1) if temperature else -1,
                repetition_penalty=penalty,
                max_tokens=tokens,
                logprobs=0,
                seed=request.seed,
                stop_token_ids=self._stops,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        told = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._served)
        return [_drawn(output.outputs[0]) for output in told]

    def logprobs(self, probes: Sequence[LogprobProbe], adapter: Path | None) -> LogProbs:
        """Return the log-probabilities with the saved adapter in a folder, or of the base model."""
        return prompt_logprobs(self._llm, probes, None if adapter is None else self._request(adapter.absolute()))

    def report(self) -> dict[str, Any]:
        """Return the settings with which the engine was started."""
        return {
            "rollout_server": vllm.settings(self._llm),
            "start_up_seconds": self.seconds,
            "libraries": {"vllm": importlib.metadata.version("vllm")},
        }

    def release(self, say: Callable[[str], None]) -> None:
        """Free the engine's memory."""
        llm, self._llm, self._model = self._llm, None, None
        release(llm, say)

    def _request(self, folder: Path) -> Any:
        self._number += 1
        return import_module("vllm.lora.request").LoRARequest(f"version-{self._number}", self._number, str(folder))


def engine_arguments(
    spec: JobSpec,
    files: ModelFiles,
    precision: Precision,
    *,
    ranks: int,
    hardware: Hardware,
    context_length: int | None,
) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`."""
    asked = spec.evaluation.max_completion_tokens if spec.evaluation.questions else 0
    longest = spec.sampling.max_prompt_tokens + max(spec.sampling.max_completion_tokens, asked)
    longest = max(longest + 1, spec.model.max_sequence)
    rows = sequences_at_once(spec, ranks)
    return {
        "model": str(files.path),
        "dtype": precision.dtype,
        "trust_remote_code": False,
        "gpu_memory_utilization": spec.model.gpu_memory_share * hardware.gpu_free_bytes / hardware.gpu_memory_bytes,
        "max_model_len": longest if context_length is None else min(longest, context_length),
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(BATCHED_TOKENS, rows),
        "enable_lora": True,
        "max_lora_rank": next(size for size in RANKS if size >= spec.lora.rank),
        "max_loras": 1,
        "max_cpu_loras": 1,
        "seed": spec.training.seed % 2**32,
        # At the temperature, as the trainer computes them.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        # The ranks' process group exists already; each rank has a separate engine in it.
        **({"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}),
    }


def prompt_logprobs(llm: Any, probes: Sequence[LogprobProbe], request: Any) -> LogProbs:
    """Return an engine's log-probabilities of completions, with the adapter of a request or without one."""
    params = import_module("vllm").SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": probe.prompt + probe.completion} for probe in probes]
    told = llm.generate(prompts, params, use_tqdm=False, lora_request=request)
    return [
        _logprobs(output.prompt_logprobs[-len(probe.completion) :], probe.completion)
        for output, probe in zip(told, probes, strict=True)
    ]


def release(llm: Any, say: Callable[[str], None]) -> None:
    """Free an engine's memory. What cannot be freed is said, and freed with the process."""
    for let_go in (_empty_engine, vllm.shut_down):
        try:
            let_go(llm)
        except Exception as error:  # noqa: BLE001 - memory that is not released here is freed with the process
            say(f"the rollout server keeps its memory: {error}")
    del llm
    gc.collect()


def empty(tensors: Sequence[torch.Tensor]) -> None:
    """Release the memory of tensors, even if other objects refer to them or to parts of them.

    Shutting vLLM down does not release it: its adapter manager keeps the model, whose layers hold the cache, and the
    trained model keeps vLLM. On a GPU that is just large enough, the self-test's copy of the base model would not fit.
    """
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _empty_engine(llm: Any) -> None:
    empty(vllm.tensors(llm))


def _drawn(said: Any) -> Drawn:
    tokens = list(said.token_ids)
    return Drawn(tokens, _logprobs(said.logprobs, tokens))


def _logprobs(positions: Sequence[Any], tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of each token, from those that vLLM tells of its position."""
    return [float(position[token].logprob) for position, token in zip(positions, tokens, strict=True)]


def _fast_folder() -> str | None:
    """Return a folder in memory, or None for the usual one: an adapter is written in each step."""
    return str(MEMORY_FOLDER) if os.access(MEMORY_FOLDER, os.W_OK) else None


@contextmanager
def _named_as(rank: Rank) -> Generator[None]:
    """Set the variables by which vLLM finds its place among several ranks, each of which sees one GPU."""
    names = {"RANK": str(rank.number), "WORLD_SIZE": str(rank.count), "LOCAL_RANK": "0"} if rank.count > 1 else {}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
