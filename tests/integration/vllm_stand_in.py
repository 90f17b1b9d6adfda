"""A stand-in for vLLM on a CPU: stock transformers and PEFT behind the calls that the `trl` engine makes.

It loads the adapter from the folder of each request, as vLLM does, and writes down what it was asked in
`vllm-RANK.jsonl`. Fails on arguments that vLLM would not understand, and on an adapter's number that it saw before with
other files. Not covered: vLLM itself, memory, and speed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Arguments:
    model: str
    dtype: str
    trust_remote_code: bool
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_lora: bool
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int
    seed: int
    logprobs_mode: str
    disable_log_stats: bool
    distributed_executor_backend: str | None = None


class LLM:
    """One engine. `generate` is the only method."""

    def __init__(self, **options: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.options = Arguments(**options)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VLLM_ENABLE_V1_MULTIPROCESSING")
        self._number = os.environ.get("RANK", "0")
        self._say({"started": options, "environment": {name: os.environ.get(name) for name in names}})
        self._base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"]))
        self._adapters: dict[int, Any] = {}
        runner = SimpleNamespace(model=self._base, kv_caches=[])
        core = SimpleNamespace(
            engine_core=SimpleNamespace(
                model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            ),
            shutdown=lambda: self._say({"ended": True}),
        )
        config = SimpleNamespace(
            use_v2_model_runner=True,
            model_config=SimpleNamespace(
                logprobs_mode=options["logprobs_mode"], max_model_len=options["max_model_len"], enforce_eager=False
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=options["max_num_seqs"]),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[]),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=core)

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: LoRARequest | None = None
    ) -> list[Any]:
        assert not use_tqdm
        self._say(
            {
                "prompts": len(prompts),
                "adapter": None if lora_request is None else [lora_request.lora_int_id, lora_request.lora_path],
                "files": [] if lora_request is None else sorted(os.listdir(lora_request.lora_path)),  # noqa: PTH208
                "seeds": [params.seed for params in sampling_params] if isinstance(sampling_params, list) else [],
            }
        )
        model = self._with(lora_request)
        if not isinstance(sampling_params, list):
            return [self._scored(model, prompt["prompt_token_ids"]) for prompt in prompts]
        return self._drawn(model, [prompt["prompt_token_ids"] for prompt in prompts], sampling_params)

    def _with(self, request: LoRARequest | None) -> Any:
        """A merged copy: nothing of what was served before is left in it."""
        import copy

        from peft import PeftModel

        if request is None:
            return self._base
        if request.lora_int_id not in self._adapters:  # vLLM reads the files of a number once
            model: Any = PeftModel.from_pretrained(copy.deepcopy(self._base), request.lora_path)
            self._adapters = {request.lora_int_id: model.merge_and_unload()}
        return self._adapters[request.lora_int_id]

    def _scored(self, model: Any, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        told = [None, *({t: SimpleNamespace(logprob=float(logprobs[at, t]))} for at, t in enumerate(ids[1:]))]
        return SimpleNamespace(prompt_logprobs=told)

    def _drawn(self, model: Any, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        from grpo_core.engines.completions import Request
        from grpo_core.engines.native.sampling import Filters
        from grpo_core.engines.transformers_sampler import TransformersSampler

        one = params[0]
        assert all(getattr(one, f.name) == getattr(p, f.name) for p in params for f in fields(one) if f.name != "seed")
        assert (one.logprobs, one.detokenize) == (0, False)
        assert max(map(len, prompts)) < self.options.max_model_len
        sampler = TransformersSampler(
            model, stops=list(one.stop_token_ids), padding=0, filters=Filters(max(one.top_k, 0), one.top_p)
        )
        requests = [Request(ids, p.seed or 0) for ids, p in zip(prompts, params, strict=True)]
        drawn = sampler.generate(
            requests, tokens=one.max_tokens, temperature=one.temperature, penalty=one.repetition_penalty
        )
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=tuple(d.tokens),
                        logprobs=[{t: SimpleNamespace(logprob=v)} for t, v in zip(d.tokens, d.logprobs, strict=True)],
                    )
                ]
            )
            for d in drawn
        ]

    def _say(self, line: dict[str, Any]) -> None:
        with Path(os.environ["VLLM_STAND_IN"], f"vllm-{self._number}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def install() -> None:
    """Make this process's `vllm` the stand-in, and let the `trl` engine use it on a CPU."""
    import importlib.metadata

    library, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    library.LLM, library.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    library.__spec__ = ModuleSpec("vllm", None)
    sys.modules.update({"vllm": library, "vllm.lora": lora, "vllm.lora.request": request})
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.25.1" if name == "vllm" else version(name)
    from grpo_core.engines import trl
    from grpo_core.hardware.models import Hardware

    trl.TrlEngine._has_vllm = lambda _: True
    trl.find_hardware = lambda _: Hardware(gpu_memory_bytes=20 * 10**9, gpu_free_bytes=10**10)


def read(folder: Path, number: int = 0) -> list[dict[str, Any]]:
    """What the engine of a rank was asked."""
    return [json.loads(line) for line in (folder / f"vllm-{number}.jsonl").read_text("utf-8").splitlines()]
