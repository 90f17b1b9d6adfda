"""Writes a merged model as transformers saves one: safetensors with an index, configuration, tokenizer.

Owns the split into files and which of the base's files are copied. Invariant: memory holds one shard, and everything
but the weights and their type is the base's, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from grpo_core.export.merged import MergedWeights
from grpo_core.run_dir.layout import write_text

SHARD_BYTES: Final = 2_000_000_000
COPIED: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is copied from the base's folder, where it is there."""
LICENCES: Final = ("LICENSE*", "NOTICE*")
INDEX_NAME: Final = "model.safetensors.index.json"


def write_model_folder(
    weights: MergedWeights, base: Path, out: Path, *, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model into the existing folder `out`; the weights last."""
    _copy(base, out, COPIED)
    copy_licence(base, out)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(out / "config.json", config)
    _write_shards(weights, out, dtype, shard_bytes)


def copy_licence(base: Path, out: Path) -> None:
    """Copy the texts that the base's licence asks to be passed on."""
    _copy(base, out, LICENCES)


def _copy(base: Path, out: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for file in base.glob(pattern):
            shutil.copyfile(file, out / file.name)


def _write_shards(weights: MergedWeights, out: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    # Sizes alone decide the split, so that nothing is read for it.
    sketch = {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in weights.names}
    plan = split_state_dict_into_shards_factory(
        sketch,
        get_storage_size=_bytes_of,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: weights.tensor(name, dtype).contiguous() for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # save_file lets only the owner read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(out / INDEX_NAME, index)


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
