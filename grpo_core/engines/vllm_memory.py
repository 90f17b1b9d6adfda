"""Check that the model fits into vLLM's share of GPU memory.

Owns the failure `no_room_for_rollouts` and its remedies. Imports no torch. Invariant: before the model is loaded, a job
fails only if the weights alone cannot fit.
"""

from __future__ import annotations

import math
from typing import Final

from grpo_core.errors import JobFailure
from grpo_core.estimates import Precision, weight_bytes
from grpo_core.reasons import FailureCode

BESIDES: Final = 1.2e9
"""Approximate bytes that vLLM needs beside the weights: a 7B model used 0.6 GB without a cache, the cache of eight
sequences of 1,024 tokens takes 0.5 GB, and Unsloth reserves a little more."""
LARGEST_SHARE: Final = 0.9
"""Largest share of vLLM; above it, nothing is left for the trainer."""


def require_room(share: float, free: int, parameters: int, weights: Precision) -> None:
    """Fail the job if `share` of the `free` bytes cannot hold the weights, at 4 or 16 bits per parameter.

    vLLM would fail too, but after minutes of loading and compiling, and without saying how much is missing.
    """
    least = parameters * (4 if weights == "4bit" else 16) // 8
    if least <= share * free:
        return
    enough = math.ceil(100 * (weight_bytes(parameters, weights) + BESIDES) / free) / 100
    if enough <= LARGEST_SHARE:
        remedy = f"Raise model.gpu_memory_share to about {enough:g}."
    elif weights == "16bit":
        remedy = "Set model.precision to 4bit, or use a GPU with more free memory."
    else:
        remedy = "Use a GPU with more free memory, or a smaller model."
    raise JobFailure(
        FailureCode.NO_ROOM_FOR_ROLLOUTS,
        f"The weights take at least {least / 1e9:.1f} GB, and vLLM may use {share * free / 1e9:.1f} GB: "
        f"model.gpu_memory_share {share:g} of the {free / 1e9:.1f} GB that are free on the GPU.",
        hint=remedy,
    )


def is_short_of_memory(error: Exception) -> bool:
    """Whether an error of vLLM's start says that it has too little memory."""
    said = str(error).lower()
    return "memory" in said and "illegal memory access" not in said


def no_room(reason: object, weights: Precision) -> JobFailure:
    """Return the failure of vLLM if it started with too little memory, for `reason`."""
    smaller = "" if weights == "4bit" else ", or set model.precision to 4bit"
    return JobFailure(
        FailureCode.NO_ROOM_FOR_ROLLOUTS,
        f"vLLM has too little memory for the model and its sequences: {str(reason).splitlines()[0][:300]}",
        hint=f"Raise model.gpu_memory_share or lower model.max_sequence{smaller}.",
    )
