"""The models that the engine supports, by their `config.json`, and why it refuses others.

Owns the sizes of a dense Llama-like decoder and the angles of its rotary embedding. Invariant: a setting that would
change the arithmetic is either implemented or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_core.engines.native import FAMILIES
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode

ROPES: Final = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on how long the sequence is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes and switches of one model."""

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    """Size of an attention head."""
    vocabulary: int
    epsilon: float
    tied: bool
    """Whether the output head is the embedding."""
    window: int | None
    """The longest sequence whose tokens all see each other, where attention slides."""
    config: Any
    """transformers' own, which knows the rotary embedding's rules."""

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    def widths(self, linear: str) -> dict[str, int]:
        """The projections fused in a linear, by PEFT's name, and the outputs of each."""
        return {
            "qkv": {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys},
            "o": {"o_proj": self.hidden},
            "gate_up": {"gate_proj": self.inner, "up_proj": self.inner},
            "down": {"down_proj": self.hidden},
        }[linear]

    def inputs(self, linear: str) -> int:
        """The inputs of a linear."""
        return {"o": self.queries, "down": self.inner}.get(linear, self.hidden)


LINEARS: Final = ("qkv", "o", "gate_up", "down")
"""A layer's four matrix products, in their order."""
MODULES: Final = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
"""The transformers module that a linear's projections are in."""


def read_architecture(folder: Path) -> Architecture:
    """What is in the folder; raises a `user_config` failure for a model that this engine does not know."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise _unknown(f"has a configuration that transformers cannot read ({type(error).__name__})") from error
    return of_config(config)


def of_config(config: Any) -> Architecture:
    """The same of a transformers config."""
    kind, heads = config.model_type, getattr(config, "num_attention_heads", 0)
    _require(kind in FAMILIES, f"is of the family {kind!r}, and the engine knows {', '.join(FAMILIES)}")
    _require(config.hidden_act == "silu", f"has the activation {config.hidden_act!r}, and the engine knows 'silu'")
    rope = dict(config.rope_parameters)
    _require(rope["rope_type"] in ROPES, f"has a rotary embedding of type {rope['rope_type']!r}")
    _require(rope.get("partial_rotary_factor", 1.0) == 1.0, "turns only a part of each attention head")
    _require(getattr(config, "attention_dropout", 0.0) == 0.0, "has dropout in its attention")
    _require(getattr(config, "quantization_config", None) is None, "has quantised weights")
    return Architecture(
        family=kind,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        window=_window(config),
        config=config,
    )


def rotary_angles(architecture: Architecture, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of the positions, for half a head: in 32 bits, then rounded, as transformers does."""
    frequencies, scale = rotary_frequencies(architecture.config)
    turns = positions.float()[:, None] * frequencies.to(positions.device, torch.float32)
    return (turns.cos() * scale).to(dtype), (turns.sin() * scale).to(dtype)


def rotary_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """The turns a token of each pair of a head's values, and the scale of what is turned, as transformers has them.

    The class that has them in transformers brings a whole model along: a second of each process's start.
    """
    kind: str = config.rope_parameters["rope_type"]
    if kind != "default":
        scaled: Any = ROPE_INIT_FUNCTIONS[kind]
        return scaled(config, None)
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float) / head), 1.0


def require_window(architecture: Architecture, longest: int) -> None:
    """Raises a `user_config` failure if a sequence of this length would reach beyond the model's sliding window."""
    window = architecture.window
    if window is not None and longest > window:
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            f"The native engine has no sliding attention: the model's window is {window} tokens, and prompt and "
            f"completion may take {longest}.",
            hint="Lower sampling.max_prompt_tokens or max_completion_tokens, or set engine to trl.",
        )


def _window(config: Any) -> int | None:
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        _require(set(kinds) <= {"full_attention", "sliding_attention"}, f"has layers of the kinds {sorted(set(kinds))}")
        return sliding if "sliding_attention" in kinds else None
    return sliding if getattr(config, "use_sliding_window", True) else None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _unknown(what)


def _unknown(what: str) -> JobFailure:
    return JobFailure(
        FailureCode.ENGINE_NOT_AVAILABLE,
        f"The native engine cannot run this model: it {what}.",
        hint="Set engine to trl or unsloth, which run every model that transformers knows.",
    )
