"""The division of a GPU's memory between weights, keys of completions, and activations.

Owns the figures of the plan and the refusal of a model that has no room. Invariant: the plan depends only on the job,
the model and the type of GPU, so that a run that resumes on another such GPU computes the same.
"""

from __future__ import annotations

from typing import Final

from grpo_core.cost import QUESTIONS_AT_ONCE
from grpo_core.engines.gradient_checkpointing import bytes_per_token
from grpo_core.engines.native.architecture import Architecture
from grpo_core.engines.native.requirements import longest
from grpo_core.errors import JobFailure
from grpo_core.estimates import ASIDE_BYTES, LEAST_ROOM_BYTES, USABLE
from grpo_core.reasons import FailureCode
from grpo_core.spec import JobSpec

FULL_PASS_TOKENS: Final = 2048
"""Fewer tokens do not make a pass shorter: then a GPU waits for the launches of its kernels. Qwen2.5-7B's shape in FP8
with 24 GB of an H200: passes of 700 tokens took 16.2 s a step, those of 14,000 with more memory 2.4 s."""


def memory_to_plan(total: int, available: int) -> int:
    """Return the bytes of a GPU that a job may count on, of which `available` are free or already this process's.

    All of them if no other process holds much: a plan that depended on each byte would split a step differently after
    a resume, and round differently.
    """
    return total if available >= USABLE * total else available


def plan_memory(
    spec: JobSpec, architecture: Architecture, *, memory: int, held: int, size: int, sparing: bool = False
) -> tuple[int, int]:
    """Plan for a GPU with `memory` bytes, of which the weights take `held`; a number takes `size` bytes.

    Returns the tokens of the decoder's cache, and the tokens of a forward pass with kept activations. The cache gets
    half of the rest, and more only if one completion needs it. A step that does not fit is generated in turns and
    trained in parts. `sparing`: the pass keeps only each layer's input. Raises an `oom` failure if not even one
    completion fits.
    """
    room = max(LEAST_ROOM_BYTES, int(USABLE * memory) - held - ASIDE_BYTES)
    key_bytes = 2 * architecture.layers * architecture.keys * size
    least = longest(spec) + 1
    rows = max(spec.completions_per_step, min(spec.evaluation.questions, QUESTIONS_AT_ONCE))
    cache = min(rows * least, max(room // 2, min(least * key_bytes, room * 4 // 5)) // key_bytes)
    if cache < least:
        raise JobFailure(
            FailureCode.NO_ROOM_FOR_ROLLOUTS,
            f"The weights take {held / 1e9:.1f} GB, and the keys and values of one completion of {least} tokens "
            f"{least * key_bytes / 1e9:.1f} GB: more than a GPU with {memory / 1e9:.1f} GB has left.",
            hint="Lower sampling.max_completion_tokens, set model.precision to 8bit, or use a larger GPU.",
        )
    kept = bytes_per_token(_sizes(architecture)) or 1
    if sparing:
        kept = kept // architecture.layers + architecture.layers * architecture.hidden * size
    return cache, max(1, (room - cache * key_bytes) // kept)


def spares_activations(budget: int, tokens: int, *, shared: bool) -> bool:
    """Return whether activations are better computed twice, so that the `tokens` of a rank's step take fewer passes
    than `budget` tokens each.

    With a `shared` base, each further pass gathers every layer twice. Otherwise a pass of few tokens takes as long as
    one of `FULL_PASS_TOKENS`.
    """
    return budget < (tokens if shared else min(tokens, FULL_PASS_TOKENS))


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "num_hidden_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.inner,
    }


def require_room(spec: JobSpec, architecture: Architecture, *, memory: int, held: int, ranks: int) -> None:
    """Raise an `oom` failure unless a GPU has room to train beside the `held` bytes of weights that it has as one of
    `ranks` that share them out."""
    if held + ASIDE_BYTES + LEAST_ROOM_BYTES > USABLE * memory:
        shared = f", a part of every layer on each of {ranks} GPUs," if ranks > 1 else ""
        raise JobFailure(
            FailureCode.NO_ROOM_FOR_ROLLOUTS,
            f"The weights{shared} take {held / 1e9:.1f} GB of a GPU with {memory / 1e9:.1f} GB, and training needs "
            f"{(ASIDE_BYTES + LEAST_ROOM_BYTES) / 1e9:.0f} GB beside them.",
            hint="Use more GPUs (resources.gpus), GPUs with more memory, or a smaller model.",
        )
    plan_memory(spec, architecture, memory=memory, held=held, size=2)
