"""Private uses of Unsloth: the function that scores completions, and the attributes of the objects it makes."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from grpo_core.compat import LibraryChanged, Use, require

READ_IN: Final = "2026.10.7"
"""Of both `unsloth` and `unsloth_zoo`, which are released together."""
TAKEN_FOR_NOT_GIVEN: Final = 256
"""Unsloth's default for `max_num_seqs`. Exactly this number is replaced by what Unsloth thinks fits the GPU."""

_SCORING: Final = "unsloth_zoo.rl_replacements"
_USUAL: Final = "chunked_hidden_states_selective_log_softmax"
_IN_EQUAL_PARTS: Final = f"{_USUAL}_recompute"
USES: Final = (Use(name=f"{_SCORING}:{_USUAL}"), Use(name=f"{_SCORING}:{_IN_EQUAL_PARTS}"))


def check() -> None:
    """Raise `LibraryChanged` if Unsloth differs from what this module relies on."""
    require("unsloth_zoo", READ_IN, USES)


def score_in_equal_parts() -> None:
    """Make Unsloth compute log-probabilities with one compiled part, run in a loop.

    Its usual function is compiled with the loop unrolled, a part or more for each completion: a graph that grows with
    the batch, and took over two minutes to compile for 64 completions. The variant it keeps for saving memory computes
    a part's logits again in the backward pass, which costs one matrix product of the output head more.
    """
    check()
    scoring: Any = import_module(_SCORING)
    setattr(scoring, _USUAL, getattr(scoring, _IN_EQUAL_PARTS))


def rollout_server(model: Any) -> Any:
    """The vLLM engine that Unsloth made for a model."""
    try:
        return model.vllm_engine
    except AttributeError as error:
        raise LibraryChanged("unsloth", READ_IN, "made no vllm_engine for the model") from error


def shares_weights(llm: Any) -> bool:
    """Whether the engine has no copy of the model's weights."""
    return getattr(llm, "shared_weights", False)


def in_four_bits(model: Any) -> bool:
    """Whether any of the model's layers are held in 4 bits."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


def checkpoints_gradients(model: Any) -> bool:
    """The setting that Unsloth trains by. For short sequences it treats "unsloth" as True."""
    return bool(getattr(model, "_unsloth_gradient_checkpointing", None))
