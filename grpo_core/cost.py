"""What training costs on a GPU of the size that a job asks for: seconds of a step and peak memory, both about.

Owns the measured rates (docs/appendix/gpu-measurements.md) and how they carry over to other GPUs: reading weights by
memory bandwidth, the update by 16-bit arithmetic. Invariant: what was never measured, such as a CPU or the `trl`
engine, has no estimate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from grpo_core.spec import JobSpec

GIB: Final = 1024**3
"""The unit in which GPU memory is sold: an 80 GB GPU has 80 of these."""
USABLE: Final = 0.88
"""Share of a GPU's memory that the native engine plans with."""
ASIDE_BYTES: Final = 5 * 10**9
"""What it keeps free of that for logits, gradients of the output layer and other short-lived tensors."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that stands for its size, by its vendor's data sheet."""

    name: str
    memory_gb: int
    bandwidth: float
    """TB/s."""
    arithmetic: float
    """TFLOP/s in 16 bits."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * GIB


_H100: Final = Gpu(name="H100 80 GB", memory_gb=80, bandwidth=3.35, arithmetic=989)
_H200: Final = Gpu(name="H200 141 GB", memory_gb=141, bandwidth=4.8, arithmetic=989)
GPUS: Final = (
    Gpu(name="A10 24 GB", memory_gb=24, bandwidth=0.6, arithmetic=125),
    Gpu(name="L40S 48 GB", memory_gb=48, bandwidth=0.864, arithmetic=362),
    _H100,
    _H200,
)
"""By size. The last two were measured; the others follow from their data sheets."""
_FURTHER: Final = (
    Gpu(name="L4 24 GB", memory_gb=24, bandwidth=0.3, arithmetic=121),
    Gpu(name="RTX 3090 24 GB", memory_gb=24, bandwidth=0.936, arithmetic=71),
    Gpu(name="RTX 4090 24 GB", memory_gb=24, bandwidth=1.008, arithmetic=165),
    Gpu(name="RTX 5090 32 GB", memory_gb=32, bandwidth=1.792, arithmetic=210),
    Gpu(name="A100 40 GB", memory_gb=40, bandwidth=1.555, arithmetic=312),
    Gpu(name="A40 48 GB", memory_gb=48, bandwidth=0.696, arithmetic=150),
    Gpu(name="RTX A6000 48 GB", memory_gb=48, bandwidth=0.768, arithmetic=155),
    Gpu(name="A100 80 GB", memory_gb=80, bandwidth=2.0, arithmetic=312),
    Gpu(name="B200 180 GB", memory_gb=180, bandwidth=8.0, arithmetic=2250),
)
"""GPUs that a worker may have beside those, by their data sheets."""
USUAL: Final = _H100
"""For a job that any GPU may get."""


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """Seconds of an engine on the GPU it was measured on."""

    on: Gpu
    token: float
    """For a token of all completions together, whatever the model."""
    token_per_billion: float
    """The same, to read a billion parameters in 16-bit."""
    row: float
    """For each completion beside it, and billion parameters."""
    update: float
    update_row: float
    """For each completion in an update. Unsloth launches the attention of each apart; the GPU computes meanwhile."""
    trained_token: float
    """For each token and billion parameters."""


_UNSLOTH: Final = _Speed(
    on=_H100, token=4e-3, token_per_billion=5.8e-4, row=5e-6, update=0.45, update_row=0.0215, trained_token=9e-6
)
_NATIVE: Final = _Speed(
    on=_H200, token=1.5e-3, token_per_billion=4.7e-4, row=2.6e-6, update=0.15, update_row=0.0, trained_token=8e-6
)
_4BIT_SLOWER: Final = 1.8
_8BIT_FASTER: Final = (0.87, 0.77)
"""Of generation and of the update."""
_PROMPT_SHARE: Final = 0.6
"""Part of `max_prompt_tokens` that prompts take on average: 160 of 256 in the measurements."""
QUESTIONS_AT_ONCE: Final = 256
"""Held-out questions that the native engine answers together."""
_MORE_GPUS: Final = 0.8
"""Exponent: two GPUs make a step 1.74 times as fast."""
_KV_BYTES: Final = 57_344
"""Keys and values of a token, and what a token's forward pass keeps, at the shape of Qwen2.5-7B in 16 bits."""
_KEPT_BYTES: Final = {"native": 4_200_000, "unsloth": 2_500_000}
_SEVEN: Final = 7e9


def engine_of(spec: JobSpec, precision: str) -> Literal["native", "unsloth", "trl"]:
    """The engine that a job gets on a GPU, in this precision there."""
    if spec.engine == "auto":
        return "unsloth" if precision == "4bit" else "native"
    return spec.engine


def gpu_for(spec: JobSpec) -> Gpu | None:
    """The GPU that a job is estimated for: of the smallest size that it allows."""
    least = spec.resources.min_gpu_memory_gb
    if spec.resources.gpus == 0:
        return None
    return USUAL if least is None else next((gpu for gpu in GPUS if gpu.memory_gb >= least), None)


def gpu_of(device: str) -> Gpu | None:
    """The GPU that a worker announces, such as `NVIDIA A100-SXM4-80GB`; None for a CPU and one that is not known."""
    words = set(re.findall(r"[A-Z0-9]+", re.sub(r"(\d)\s+GB", r"\1GB", device.upper())))
    found = [gpu for gpu in (*GPUS, *_FURTHER) if set(gpu.name.split()[:-2]) <= words]
    exact = [gpu for gpu in found if f"{gpu.memory_gb}GB" in words]
    return max(exact or found[:1], key=lambda gpu: len(gpu.name), default=None)


def step_seconds(spec: JobSpec, gpu: Gpu, parameters: int, precision: str) -> float | None:
    """Seconds of one step, about; None for an engine that was not measured.

    Generation reads the weights once a token, and each completion adds a little; the update takes time for each token
    and parameter. Completions are counted as long as they may get.
    """
    if spec.engine == "trl":
        return None
    native = engine_of(spec, precision) == "native"
    speed, sampling, billions = _NATIVE if native else _UNSLOTH, spec.sampling, parameters / 1e9
    rows, prompts = spec.completions_per_step, sampling.prompts_per_step if native else spec.completions_per_step
    reading, computing = speed.on.bandwidth / gpu.bandwidth, speed.on.arithmetic / gpu.arithmetic
    token = speed.token + speed.token_per_billion * billions * reading + speed.row * billions * rows * computing
    trained = rows * sampling.max_completion_tokens + prompts * sampling.max_prompt_tokens * _PROMPT_SHARE
    passes = 1 + (1 / 3 if spec.loss.beta > 0 else 0)
    arithmetic = speed.trained_token * billions * trained * passes * computing
    generation = token * sampling.max_completion_tokens / spec.loss.iterations
    launches = speed.update + speed.update_row * rows
    update = launches + arithmetic if native else max(launches, arithmetic)
    if precision == "4bit":
        generation *= _4BIT_SLOWER
    elif precision == "8bit":
        generation, update = generation * _8BIT_FASTER[0], update * _8BIT_FASTER[1]
    return float(f"{(generation + update) / spec.resources.ranks**_MORE_GPUS:.2g}")


def answer_seconds(spec: JobSpec, gpu: Gpu, parameters: int, precision: str, questions: int) -> float | None:
    """Seconds in which held-out questions are answered once, about; None for an engine that was not measured.

    Answers are counted as long as they may get.
    """
    if spec.engine == "trl":
        return None
    native = engine_of(spec, precision) == "native"
    speed, billions = _NATIVE if native else _UNSLOTH, parameters / 1e9
    reading, computing = speed.on.bandwidth / gpu.bandwidth, speed.on.arithmetic / gpu.arithmetic
    batches = -(-questions // QUESTIONS_AT_ONCE)
    token = (speed.token + speed.token_per_billion * billions * reading) * batches
    token += speed.row * billions * questions * computing
    slower = {"4bit": _4BIT_SLOWER, "8bit": _8BIT_FASTER[0]}.get(precision, 1.0)
    return float(f"{slower * token * spec.evaluation.max_completion_tokens / spec.resources.ranks**_MORE_GPUS:.2g}")


def peak_memory_bytes(spec: JobSpec, gpu: Gpu, parameters: int, precision: str, weights: int) -> int | None:
    """Peak memory of one GPU, about, with `weights` bytes in this precision; None for an engine that was not measured.

    `native` splits a step so that it fits; `unsloth` gives vLLM its share, in which the weights are, and trains beside.
    """
    if spec.engine == "trl":
        return None
    scale, sampling = (parameters / _SEVEN) ** (2 / 3), spec.sampling
    whole = sampling.max_prompt_tokens + sampling.max_completion_tokens
    if engine_of(spec, precision) == "unsloth":
        kept = spec.micro_batch * whole * _KEPT_BYTES["unsloth"] * scale
        return round(min(spec.model.gpu_memory_share * gpu.memory_bytes + kept, 0.9 * gpu.memory_bytes))
    cache = spec.completions_per_step * whole * _KV_BYTES * scale
    tokens = sampling.prompts_per_step * sampling.max_prompt_tokens
    tokens += spec.completions_per_step * sampling.max_completion_tokens
    # The plan counts what a pass keeps before it is compiled, 1.6 times as much.
    room = (USABLE * gpu.memory_bytes - weights - ASIDE_BYTES - cache) / 1.6
    kept = min(tokens * _KEPT_BYTES["native"] * scale, max(room, 0))
    return round(min(weights + ASIDE_BYTES + cache + kept, USABLE * gpu.memory_bytes))
