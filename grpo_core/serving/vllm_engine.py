"""vLLM in the serving process: how it is started, which adapters it has, and what it may open.

Owns the engine's settings and the folder of each adapter. No adapter's configuration is read from a file that training
stored: the job's own settings make it. Invariants: the engine runs in this process and opens no port that another host
can reach; the adapters are loaded before the first request, and no request can name another folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grpo_core import strict_json
from grpo_core.adapters import WEIGHTS, LocalAdapter
from grpo_core.compat import vllm as compat
from grpo_core.engines import vllm_env
from grpo_core.engines.settings import adapter_settings
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import ModelFiles, Precision
from grpo_core.reasons import FailureCode
from grpo_core.serving.native_model import MAX_CONTEXT, unfit
from grpo_core.serving.wire import GPU_ROWS, MAX_TOP_LOGPROBS
from grpo_core.spec import JobSpec

MEMORY_SHARE: Final = 0.9
"""Share of the free memory that the engine takes at once: weights, keys and values."""
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes for adapters that the engine knows; each takes memory as if it had the next larger one."""
GRAPHS: Final = (1, 2, 4, 8, 16, 32, 64, 96, GPU_ROWS)
"""Numbers of rows for which a CUDA graph is captured."""
_QUANTIZATION: Final = {"8bit": "fp8", "4bit": "bitsandbytes"}


def architectures_in(folder: Path) -> set[str]:
    """The classes that a model's `config.json` names."""
    try:
        return set(strict_json.loads((folder / "config.json").read_bytes()).get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return set()


def known_architectures() -> set[str]:
    """The classes of models that vLLM has; it is imported."""
    vllm_env.prepare_to_serve(os.environ)
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    registry: Any = ModelRegistry
    return set(registry.get_supported_archs())


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The new tokens of one answer, each with its log-probability and those of the likeliest ones, by their ids."""

    id: str
    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]] | None
    has_ended: bool


class VllmEngine:
    """A started engine with its adapters. Used from one thread."""

    name = "vllm"
    rows = GPU_ROWS

    def __init__(self, engine: Any, adapters: Mapping[str, Any]) -> None:
        """`adapters` are the engine's requests for each adapter, by our names."""
        self._engine, self._adapters = engine, adapters
        self.context: int = engine.model_config.max_model_len

    @classmethod
    def start(
        cls,
        spec: JobSpec,
        files: ModelFiles,
        precision: Precision,
        adapters: Sequence[LocalAdapter],
        folder: Path,
    ) -> VllmEngine:
        """Load the base model and the adapters; `folder` is for files that the engine reads. Call
        `vllm_env.prepare_to_serve` before."""
        parts = compat.serving_parts()
        _join_alone(folder / "vllm-group")
        engine = parts.engine.from_engine_args(
            parts.arguments(**engine_settings(spec, files, precision, len(adapters)))
        )
        requests: dict[str, Any] = {}
        for number, adapter in enumerate(adapters, 1):
            where = write_adapter(adapter, spec, folder / "vllm" / adapter.name)
            requests[adapter.name] = parts.adapter(
                lora_name=adapter.name, lora_int_id=number, lora_path=str(where), base_model_name=None
            )
            try:
                engine.add_lora(requests[adapter.name])
            except (ValueError, RuntimeError, KeyError, AssertionError) as error:
                raise unfit(adapter) from error
        return cls(engine, requests)

    def add(
        self,
        request_id: str,
        adapter: str,
        prompt: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stops: Sequence[int],
        logprobs: int | None,
    ) -> None:
        """Begin an answer of at most `tokens` tokens, which ends with one of `stops`."""
        parts = compat.serving_parts()
        sampling = parts.sampling(
            n=1,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=tokens,
            logprobs=logprobs,
            stop_token_ids=list(stops),
            # The stop tokens are all given, and text is made of the tokens as by the other engines.
            ignore_eos=True,
            detokenize=False,
            output_kind=parts.deltas,
        )
        self._engine.add_request(
            request_id, parts.prompt(list(prompt)), sampling, lora_request=self._adapters.get(adapter)
        )

    def stop(self, request_ids: Sequence[str]) -> None:
        """End answers early."""
        self._engine.abort_request(list(request_ids))

    def step(self) -> list[Output]:
        """Compute the next token of the answers that have a place."""
        outputs: list[Output] = []
        for one in self._engine.step():
            (part,) = one.outputs
            logprobs = None
            if part.logprobs is not None:
                logprobs = [{token: entry.logprob for token, entry in given.items()} for given in part.logprobs]
            outputs.append(
                Output(id=one.request_id, tokens=list(part.token_ids), logprobs=logprobs, has_ended=one.finished)
            )
        return outputs


def engine_settings(spec: JobSpec, files: ModelFiles, precision: Precision, adapters: int) -> dict[str, Any]:
    """The arguments of vLLM's engine."""
    import torch
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(files.path)
    longest: int = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_CONTEXT
    free, memory = torch.cuda.mem_get_info(0)
    settings: dict[str, Any] = {
        "model": str(files.path),
        "dtype": precision.dtype,
        "seed": 0,
        "max_model_len": min(MAX_CONTEXT, longest),
        "max_num_seqs": GPU_ROWS,
        "max_logprobs": MAX_TOP_LOGPROBS,
        "gpu_memory_utilization": round(MEMORY_SHARE * free / memory, 3),
        "enable_prefix_caching": True,
        "distributed_executor_backend": "uni",
        # The files' own defaults of sampling do not count: a request has every setting.
        "generation_config": "vllm",
        # Compiling takes minutes, and a session lives for minutes: graphs of the decoding steps bring most of it.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(GRAPHS),
        },
        "disable_log_stats": True,
        "trust_remote_code": False,
    }
    if quantization := _QUANTIZATION.get(precision.weights):
        settings["quantization"] = quantization
    if adapters:
        rank = next((rank for rank in RANKS if rank >= spec.lora.rank), None)
        if rank is None:
            raise JobFailure(
                FailureCode.ENGINE_NOT_AVAILABLE,
                f"vLLM serves adapters up to rank {RANKS[-1]}, and this job's have rank {spec.lora.rank}.",
                hint="Set serving.engine to transformers.",
            )
        settings |= {"enable_lora": True, "max_loras": adapters, "max_cpu_loras": adapters, "max_lora_rank": rank}
    return settings


def write_adapter(adapter: LocalAdapter, spec: JobSpec, folder: Path) -> Path:
    """Make the folder from which vLLM reads an adapter: its checked weights, and a configuration of the job's settings.

    Raises a `user_config` failure if the weights are not those of these settings.
    """
    from safetensors import safe_open

    settings = adapter_settings(spec)
    targets, rank = set(settings["target_modules"]), settings["r"]
    try:
        with safe_open(adapter.weights, "pt") as stored:
            found: set[str] = set()
            for name in stored.keys():  # noqa: SIM118 - no mapping
                module, _, matrix = name.removesuffix(".weight").rpartition(".lora_")
                shape = stored.get_slice(name).get_shape()
                found.add(module.rpartition(".")[2])
                if matrix not in ("A", "B") or len(shape) != 2 or shape[0 if matrix == "A" else 1] != rank:
                    raise unfit(adapter)
    except (OSError, ValueError) as error:
        raise unfit(adapter) from error
    if found != targets:
        raise unfit(adapter)
    folder.mkdir(parents=True)
    (folder / WEIGHTS).symlink_to(adapter.weights.resolve())
    kept = {name: value for name, value in settings.items() if name != "lora_dropout"}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **kept}))
    return folder


def _join_alone(file: Path) -> None:
    """Make torch's process group of this process alone, by a file: vLLM would make it by a port."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl", init_method=f"file://{file.resolve()}", rank=0, world_size=1)
