"""Room for the rollout engine: what vLLM needs of the card's memory at the least, and what helps where it has less.

Owns the failure `no_room_for_rollouts` and its remedies. Imports no torch. Invariant: a job is turned away before its
model is loaded only if the weights cannot fit, however little vLLM needs besides.
"""

from __future__ import annotations

import math
from typing import Final

from grpo_core.errors import JobFailure
from grpo_core.estimates import Precision, weight_bytes
from grpo_core.micro_batch import NO_ROOM_FOR_ROLLOUTS

BESIDES: Final = 1.2e9
"""Bytes vLLM takes besides the weights, about: a 7B model was seen to use 0.6 GB without any cache, the cache of eight
sequences of 1,024 tokens takes 0.5 GB, and Unsloth counts a little more."""
LARGEST_SHARE: Final = 0.9
"""Beyond it nothing is left for the trainer."""


def require_room(share: float, free: int, parameters: int, weights: Precision) -> None:
    """Fail the job where `share` of the bytes that are `free` cannot hold the weights, at 4 or 16 bits a parameter.

    vLLM would find it out too, but after minutes of loading and compiling, and could not say by how much.
    """
    least = parameters * (4 if weights == "4bit" else 16) // 8
    if least <= share * free:
        return
    enough = math.ceil(100 * (weight_bytes(parameters, weights) + BESIDES) / free) / 100
    if enough <= LARGEST_SHARE:
        remedy = f"Raise model.gpu_memory_share to about {enough:g}."
    elif weights == "16bit":
        remedy = "Set model.precision to 4bit, or take a card with more memory free."
    else:
        remedy = "Take a card with more memory free, or a smaller model."
    raise JobFailure(
        "oom",
        NO_ROOM_FOR_ROLLOUTS,
        f"The weights take at least {least / 1e9:.1f} GB, and vLLM may have {share * free / 1e9:.1f} GB: "
        f"model.gpu_memory_share {share:g} of the {free / 1e9:.1f} GB that are free on the card.",
        hint=remedy,
    )


def no_room(reason: object, weights: Precision) -> JobFailure:
    """The failure of a vLLM that was started and had too little memory, for the `reason` it gave."""
    smaller = "" if weights == "4bit" else ", or set model.precision to 4bit"
    return JobFailure(
        "oom",
        NO_ROOM_FOR_ROLLOUTS,
        f"vLLM has too little memory for the model and its sequences: {str(reason).splitlines()[0][:300]}",
        hint=f"Raise model.gpu_memory_share or lower model.max_sequence{smaller}.",
    )
