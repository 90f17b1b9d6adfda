"""What the page's guide to a new job offers: models with settings that suit them, system prompts, judges.

Owns the presets; the spec's rules are `grpo_core.spec`'s, and its cost `grpo_core.estimates`'. Invariant: every preset
is a valid spec without a warning, and its model fits the GPU that it asks for.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Final, Literal

from litestar import get
from msgspec import Meta, Struct

from api.auth import scope
from api.dependencies import Owner, Service
from grpo_core.estimates import estimate
from grpo_core.rewards.graders.operator import BadRegistration, judges
from grpo_core.rewards.tags import Tags
from grpo_core.spec import SYSTEM_PROMPT, parse_spec
from jobs.read.queue_position import WaitReason

PresetName = Literal["tiny", "small", "medium", "recipe", "large"]

_CPU: Final = {
    "loss": {"type": "dapo", "beta": 0.0},
    "resources": {"gpus": 0},
}
_GPU_STEP: Final = {"prompts_per_step": 8, "generations": 8, "gradient_accumulation": 8}

PRESETS: Final[dict[PresetName, dict[str, Any]]] = {
    "tiny": {
        **_CPU,
        "model": {"name": "tiny-arithmetic", "max_sequence": 256},
        "lora": {"rank": 16, "alpha": 16, "gradient_checkpointing": "off"},
        "optimizer": {
            "name": "adamw_torch",
            "learning_rate": 0.002,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup_ratio": 0.06,
            "max_grad_norm": 1.0,
        },
        "training": {"steps": 50, "save_steps": 50},
        "sampling": {
            "prompts_per_step": 8,
            "generations": 8,
            "max_prompt_tokens": 128,
            "max_completion_tokens": 48,
            "temperature": 1.0,
        },
        "evaluation": {"max_completion_tokens": 48},
    },
    "small": {
        "model": {"name": "Qwen/Qwen2.5-1.5B-Instruct", "gpu_memory_share": 0.5},
        "lora": {"rank": 16, "alpha": 16},
        "optimizer": {"learning_rate": 1e-5},
        "sampling": {"prompts_per_step": 4, "gradient_accumulation": 4},
        "resources": {"min_gpu_memory_gb": 15},
    },
    "medium": {
        "model": {"name": "Qwen/Qwen2.5-3B-Instruct"},
        "optimizer": {"learning_rate": 1e-5},
        "sampling": _GPU_STEP,
        "resources": {"min_gpu_memory_gb": 22},
    },
    "recipe": {},
    "large": {
        "model": {"gpu_memory_share": 0.3},
        "optimizer": {"learning_rate": 2e-5},
        "training": {"steps": 100, "save_steps": 50, "checkpoint_every": 10},
        "sampling": {"prompts_per_step": 32, "generations": 8, "gradient_accumulation": 16, "temperature": 1.0},
        "loss": {"type": "dapo", "beta": 0.0},
        "resources": {"min_gpu_memory_gb": 70},
    },
}
"""From the smallest model to the largest, each the part of a spec that depends on the model."""


LABELS: Final = {
    "en": "Answer with exactly one of these and nothing else: {labels}",
    "zh": "只回答以下之一，不要写别的：{labels}",
}
"""System prompts for answers that are one of a few labels."""


class GuidePreset(Struct, frozen=True, kw_only=True):
    """A model with settings that suit it."""

    name: PresetName
    model: str
    spec: Annotated[dict[str, Any], Meta(description="What it sets")]
    gpu_gb: Annotated[int | None, Meta(description="Memory of the smallest GPU for it; null: it needs none")]
    gpu: Annotated[str | None, Meta(description="The GPU that the time is estimated for")]
    training_seconds: float | None
    has_worker: Annotated[bool, Meta(description="Whether a worker that can run it is connected")]


class Guide(Struct, frozen=True, kw_only=True):
    """What the guide offers."""

    presets: list[GuidePreset]
    prompts: Annotated[dict[str, str], Meta(description="System prompts that ask for the tags, by language")]
    label_prompts: Annotated[dict[str, str], Meta(description="The same for `{labels}`")]
    judges: Annotated[list[str], Meta(description="Names of the judges that the operator registered")]


@get("/page/guide", opt=scope("jobs:read"), include_in_schema=False, sync_to_thread=True)
def guide(owner: Owner, service: Service) -> Guide:  # noqa: ARG001 - whose key it is does not matter here
    """What a new job can be made of."""
    return Guide(
        presets=[_preset(service, name, spec) for name, spec in PRESETS.items()],
        prompts={"en": Tags().prompt, "zh": SYSTEM_PROMPT},
        label_prompts=LABELS,
        judges=_judges(),
    )


def _preset(service: Service, name: PresetName, given: dict[str, Any]) -> GuidePreset:
    spec = parse_spec(given)
    size = estimate(spec)
    waits = set(WaitReason) - {WaitReason.TURN}
    return GuidePreset(
        name=name,
        model=spec.model.name,
        spec=given,
        gpu_gb=_gpu_gb(spec.resources.gpus, spec.resources.min_gpu_memory_gb, size.gpu_memory_bytes),
        gpu=size.gpu,
        training_seconds=size.training_seconds,
        has_worker=not any(warning.code in waits for warning in service.warnings(spec)),
    )


def _gpu_gb(gpus: int, asked: int | None, least: dict[str, int] | None) -> int | None:
    if gpus == 0 or asked is not None or least is None:
        return asked
    return -(-least["4bit"] // 1024**3)


def _judges() -> list[str]:
    try:
        return sorted(judges(os.environ))
    except BadRegistration:
        return []
