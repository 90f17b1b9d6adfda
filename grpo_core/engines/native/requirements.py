"""The jobs and models that the engine refuses, with the reasons. Checked by `auto`, and again when the model is loaded.

Owns the rules about a job, and reads a model's configuration and the headers of its weights; `architecture` has the
rules about architectures. Invariant: a job that passes these checks fails later only because of its device or
tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from grpo_core.eight_bits import CAPABILITY
from grpo_core.engines.native.architecture import Architecture, read_architecture, require_window
from grpo_core.engines.native.weights import require_tensors
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import Precision
from grpo_core.reasons import FailureCode
from grpo_core.spec import JobSpec


def require_known(spec: JobSpec, folder: Path) -> Architecture:
    """Return the architecture of the model in the folder. Raises a `user_config` failure if the engine cannot run the
    job."""
    if spec.lora.dropout > 0:
        raise _refused("has no dropout", "Set lora.dropout to 0, or engine to trl.")
    architecture = read_architecture(folder)
    require_window(architecture, longest(spec))
    try:
        require_tensors(architecture, folder)
    except ValueError as error:
        raise JobFailure(
            FailureCode.MODEL_UNREADABLE,
            f"The weights of {spec.model.name} cannot be loaded: {error}.",
            hint="Use a causal language model with safetensors weights, as transformers saves it.",
        ) from error
    return architecture


def require_precision(precision: Precision) -> None:
    """Raise a `user_config` failure if the engine does not support this precision on this device."""
    if precision.weights == "4bit":
        raise _refused("does not support weights in 4 bits", "Set model.precision to 16bit, or engine to unsloth.")
    if precision.weights == "8bit" and torch.cuda.get_device_capability() < CAPABILITY:
        raise _refused(
            "needs a GPU of the Ada or Hopper generation or later for weights in 8 bits",
            "Set model.precision to 16bit, or to 4bit and engine to unsloth.",
        )
    if precision.dtype == "float16":
        raise _refused("needs a GPU that computes in bfloat16", "Set engine to trl or unsloth.")


def longest(spec: JobSpec) -> int:
    """Return the tokens of the longest sequence of a job."""
    asked = spec.evaluation.max_completion_tokens if spec.evaluation.questions else 0
    return spec.sampling.max_prompt_tokens + max(spec.sampling.max_completion_tokens, asked)


def _refused(what: str, hint: str) -> JobFailure:
    return JobFailure(FailureCode.ENGINE_NOT_AVAILABLE, f"The native engine {what}.", hint=hint)
