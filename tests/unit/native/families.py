"""Small random models of every family the engine knows, made on the spot, with an adapter that is not zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lazy import lazy

torch = lazy("torch")
transformers = lazy("transformers")
LoraConfig, PeftModel, get_peft_model = lazy("peft", "LoraConfig PeftModel get_peft_model")
Adapter = lazy("grpo_core.engines.native.adapter", "Adapter")
read_architecture = lazy("grpo_core.engines.native.architecture", "read_architecture")
Weights, load_weights = lazy("grpo_core.engines.native.weights", "Weights load_weights")


SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2.5-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 6


@dataclass
class Twin:
    """One model twice: as transformers and PEFT have it, and as the engine has it."""

    stock: PeftModel
    weights: Weights
    adapter: Adapter
    folder: Path


def save_base(family: str, folder: Path, *, shards: str = "5GB", **changes: Any) -> None:
    name, settings = FAMILIES[family]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for tensor_name, parameter in model.named_parameters():
        if "norm" in tensor_name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.3 if tensor_name.endswith("bias") else 0.15)
    model.save_pretrained(folder, max_shard_size=shards)


def make_twin(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    targets: Sequence[str] = ALL,
    shards: str = "5GB",
    **changes: Any,
) -> Twin:
    dtype = dtype or torch.float64
    save_base(family, folder, shards=shards, **changes)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM")
    stock: Any = get_peft_model(base, settings, autocast_adapter_dtype=False).eval()
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    architecture = read_architecture(folder)
    device = torch.device("cpu")
    weights = load_weights(architecture, folder, device=device, dtype=dtype)
    adapter = Adapter(architecture, rank=RANK, scale=ALPHA / RANK, targets=targets, device=device, dtype=dtype)
    for layer in range(architecture.layers):
        for name, view in adapter.named(layer).items():
            view.copy_(stock.get_parameter(name.replace(".weight", ".default.weight")).data)
    return Twin(stock, weights, adapter, folder)


def stock_logprobs(twin: Twin, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = twin.stock(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
