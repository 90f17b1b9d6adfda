"""The model for serving by transformers and PEFT: for families that the `native` engine does not know, and 4 bits.

Owns PEFT's adapters and the switch between them. Rows are computed one by one. Invariant: no adapter's configuration is
read from a file; the job's own settings make it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import DynamicCache

from grpo_core.adapters import LocalAdapter
from grpo_core.engines.settings import adapter_settings
from grpo_core.serving.native_model import MAX_CONTEXT, unfit
from grpo_core.serving.wire import BASE, CPU_ROWS
from grpo_core.spec import JobSpec


@dataclass(slots=True)
class Cache:
    """Keys and values of one row, which grow with it."""

    values: DynamicCache


class TransformersModel:
    """A causal language model with its adapters."""

    name = "transformers"
    rows, prompt_tokens = CPU_ROWS, 0
    cache_tokens: int | None = None

    def __init__(
        self, spec: JobSpec, base: Any, adapters: Sequence[LocalAdapter], tokenizer: Any, stops: Sequence[int]
    ) -> None:
        self.tokenizer, self.stops = tokenizer, frozenset(stops)
        self.context = min(MAX_CONTEXT, getattr(base.config, "max_position_embeddings", None) or MAX_CONTEXT)
        base.eval()
        self._model: Any = base
        for adapter in adapters:
            self._add(adapter, spec)
        self._model.eval()

    def reserve(self, tokens: int) -> Cache:  # noqa: ARG002
        """Return an empty cache."""
        return Cache(DynamicCache(config=self._model.config))

    def release(self, cache: Cache) -> None:
        """Nothing is kept of a cache."""

    @torch.no_grad()
    def prefill(self, prompts: Sequence[tuple[str, Sequence[int], Cache]]) -> torch.Tensor:
        """Read each prompt."""
        return torch.stack([self._forward(adapter, list(ids), cache.values) for adapter, ids, cache in prompts])

    def copy(self, cache: Cache, into: Cache) -> None:
        """Copy a cache."""
        into.values = copy.deepcopy(cache.values)

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[str, int, Cache]]) -> torch.Tensor:
        """Add a token to each row."""
        return torch.stack([self._forward(adapter, [token], cache.values) for adapter, token, cache in rows])

    def _forward(self, adapter: str, ids: list[int], cache: Any) -> torch.Tensor:
        model = self._model
        if adapter != BASE:
            model.set_adapter(adapter)
        without = model.disable_adapter() if adapter == BASE and isinstance(model, PeftModel) else nullcontext()
        with without:
            given = torch.tensor([ids], device=model.device)
            return model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def _add(self, adapter: LocalAdapter, spec: JobSpec) -> None:
        config = LoraConfig(**adapter_settings(spec))
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(adapter.name, config)
        else:
            self._model = get_peft_model(self._model, config, adapter_name=adapter.name)
        model: Any = self._model
        weights = load_file(adapter.weights)
        own = get_peft_model_state_dict(model, adapter_name=adapter.name, save_embedding_layers=False)
        if weights.keys() != own.keys():
            raise unfit(adapter)
        try:
            set_peft_model_state_dict(model, weights, adapter_name=adapter.name)
        except RuntimeError as error:
            raise unfit(adapter) from error
