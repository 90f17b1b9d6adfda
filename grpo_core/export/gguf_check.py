"""Reads a GGUF file back as others do: by transformers, which shares no code with what wrote it.

Owns which settings and tokens must be found in the file. Invariant: a file that was read as another model fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from grpo_core.engines.native.architecture import Architecture
from grpo_core.errors import fault
from grpo_core.export.gguf_tokenizer import GgufTokenizer
from grpo_core.hardware.models import Precision
from grpo_core.reasons import FailureCode

SIZES: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
"""Settings that transformers reads from a file of any of the families."""


def load_gguf(file: Path, architecture: Architecture, precision: Precision) -> Any:
    """The model in the file. Raises an `internal` failure if it has other settings than the base."""
    config = architecture.config
    found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for name in SIZES:
        _require(name, getattr(found, name), getattr(config, name))
    _require("rope_theta", found.rope_parameters["rope_theta"], config.rope_parameters["rope_theta"])
    # transformers reads neither the size of a head nor a scaled rotary embedding from the format.
    options: dict[str, Any] = {"config": _as_written(config), "dtype": getattr(torch, precision.dtype)}
    if precision.weights != "fp32":
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)


def _as_written(config: Any) -> Any:
    """The format has Mistral's models as Llama's: within their window they are the same."""
    if config.model_type != "mistral":
        return config
    return LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def require_tokenizer(file: Path, tokenizer: GgufTokenizer) -> None:
    """Fail unless the file has the tokens, their merges and the chat template."""
    fields: Mapping[str, Any] = GGUFReader(file).fields
    for name, wanted in {
        "tokenizer.ggml.pre": tokenizer.pre,
        "tokenizer.ggml.tokens": tokenizer.tokens,
        "tokenizer.ggml.merges": tokenizer.merges,
        "tokenizer.chat_template": tokenizer.chat_template,
    }.items():
        if isinstance(wanted, str | list) and not isinstance(tokenizer.chat_template, list):
            _require(name, fields[name].contents(), wanted)


def _require(name: str, found: object, wanted: object) -> None:
    if not _same(found, wanted):
        raise fault(FailureCode.EXPORT_DIFFERS, f"The GGUF file has another {name} than the model: {str(found)[:80]}.")


def _same(found: object, wanted: object) -> bool:
    """The format has numbers in 32 bits."""
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted
