"""Writes a merged model as one GGUF file, for llama.cpp, Ollama and other programs that read this format.

Owns names, order and types of the tensors and the metadata about the architecture; the format itself is `gguf`'s.
Invariant: memory holds one tensor, and a setting that would change the arithmetic is either written or refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

from grpo_core.engines.native.architecture import Architecture
from grpo_core.errors import JobFailure
from grpo_core.export.gguf_tokenizer import GgufTokenizer
from grpo_core.export.merged import MergedWeights
from grpo_core.reasons import FailureCode

GgufType = Literal["f16", "bf16", "q8_0"]

TYPES: Final[Mapping[str, tuple[GGMLQuantizationType, LlamaFileType, torch.dtype]]] = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, torch.float16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, torch.bfloat16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, torch.float32),
}
"""For each type: of the matrices, of the whole file, and what the weights are rounded to before."""
ARCHITECTURES: Final = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""GGUF's architecture by the native engine's families."""
ROTATED: Final = ("self_attn.q_proj", "self_attn.k_proj")
Q8_BLOCK: Final = 32
"""Weights that share a scale in Q8_0; a row of another length stays in 16 bits."""


def write_gguf(
    weights: MergedWeights,
    architecture: Architecture,
    tokenizer: GgufTokenizer,
    file: Path,
    *,
    kind: GgufType,
    about: Mapping[str, str],
) -> None:
    """Write the file. `about` has `name` and, where known, `base`, `license` and `description`."""
    arch = ARCHITECTURES[architecture.family]
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _write_about(writer, about, kind)
    _write_architecture(writer, architecture)
    tokenizer.write(writer)
    names = _names(weights, arch, architecture.layers)
    factors = _rope_factors(architecture)
    try:
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for name, stored in names.items():
            shape, of = weights.shape(name), _type_of(weights.shape(name), kind)
            size = math.prod(gguf.quant_shape_to_byte_shape(shape, of))
            writer.add_tensor_info(stored, shape, np.dtype(np.float32), size, raw_dtype=of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for data in _tensors(weights, architecture, names, kind):
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _tensors(
    weights: MergedWeights, architecture: Architecture, names: Mapping[str, str], kind: GgufType
) -> Iterator[np.ndarray[Any, Any]]:
    for name in names:
        of = _type_of(weights.shape(name), kind)
        dtype = torch.float32 if of is GGMLQuantizationType.F32 else TYPES[kind][2]
        tensor = weights.tensor(name, dtype).float()
        if not bool(tensor.isfinite().all()):
            raise refused(f"{name} has a value that is not finite as {kind}", "Use bf16 or q8_0.")
        # Not inside `weights`: only this format orders the rows of a head otherwise.
        yield gguf.quantize(_rotated(tensor, name, architecture).numpy(), of)


def _names(weights: MergedWeights, arch: gguf.MODEL_ARCH, layers: int) -> dict[str, str]:
    """GGUF's name of each tensor by transformers'."""
    known = gguf.get_tensor_name_map(arch, layers)
    found: dict[str, str] = {}
    for name in weights.names:
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise refused(f"the format has no place for {name}", "Export the merged model instead.")
        found[name] = stored
    return found


def _type_of(shape: tuple[int, ...], kind: GgufType) -> GGMLQuantizationType:
    """Norms and biases stay in 32 bits, as llama.cpp has them."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % Q8_BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[kind][0]


def _rotated(tensor: torch.Tensor, name: str, architecture: Architecture) -> torch.Tensor:
    """The rows of queries and keys in the order in which llama.cpp's architecture `llama` turns them.

    transformers turns dimension i of a head with i + half; that architecture turns 2i with 2i + 1.
    """
    module, _, _ = name.rpartition(".")
    if ARCHITECTURES[architecture.family] is not gguf.MODEL_ARCH.LLAMA or not module.endswith(ROTATED):
        return tensor
    heads = architecture.heads if module.endswith("q_proj") else architecture.kv_heads
    halves = tensor.view(heads, 2, architecture.head // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _write_about(writer: GGUFWriter, about: Mapping[str, str], kind: GgufType) -> None:
    writer.add_type("model")
    writer.add_name(about["name"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(TYPES[kind][1])
    if "license" in about:
        writer.add_license(about["license"])
    if "description" in about:
        writer.add_description(about["description"])
    if "base" in about:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about["base"])


def _write_architecture(writer: GGUFWriter, architecture: Architecture) -> None:
    config = architecture.config
    # Beyond its window a model of this kind would answer otherwise, and the format cannot say so.
    longest = min(config.max_position_embeddings, architecture.window or config.max_position_embeddings)
    writer.add_context_length(longest)
    writer.add_embedding_length(architecture.hidden)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.inner)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head)
    writer.add_value_length(architecture.head)
    writer.add_rope_dimension_count(architecture.head)
    writer.add_layer_norm_rms_eps(architecture.epsilon)
    writer.add_vocab_size(architecture.vocabulary)
    _write_rope(writer, config.rope_parameters)


def _write_rope(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "default" | "llama3":  # whose factors are a tensor
            pass
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case kind:
            raise refused(f"its rotary embedding is of the type {kind!r}", "Export the merged model instead.")


def _rope_factors(architecture: Architecture) -> np.ndarray[Any, Any] | None:
    """By how much each angle is slower than its base says, for the type `llama3`."""
    if architecture.config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled: Any = LlamaRotaryEmbedding(architecture.config)
    base = architecture.config.rope_parameters["rope_theta"]
    steps = torch.arange(0, architecture.head, 2, dtype=torch.float32) / architecture.head
    return (1.0 / base**steps / scaled.inv_freq).numpy().astype(np.float32)


def refused(what: str, hint: str) -> JobFailure:
    """The failure of a model that cannot be exported in this form."""
    return JobFailure(FailureCode.EXPORT_NOT_POSSIBLE, f"The model cannot be written as GGUF: {what}.", hint=hint)
