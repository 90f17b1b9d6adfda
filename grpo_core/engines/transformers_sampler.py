"""The sampler of the `trl` engine without vLLM: transformers' generation, with a seed for each completion.

Owns the padding of prompts and the choice of each token, by the random numbers of the native engine. Invariant: a
completion does not depend on the others of its batch, except for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grpo_core.engines.completions import Drawn, Request
from grpo_core.engines.native.sampling import Filters, draw


class SeededRows(LogitsProcessor):
    """Chooses the next token of each row by the row's seed: its score is 0, and that of all others minus infinity."""

    def __init__(self, requests: Sequence[Request], filters: Filters, knobs: torch.Tensor, *, penalises: bool) -> None:
        """`knobs` are those of `draw`, on the model's device."""
        self._seeds = torch.tensor([request.seed for request in requests], device=knobs.device)
        self._filters, self._knobs = filters, knobs
        self._prompts = [request.prompt for request in requests] if penalises else None
        self._seen: torch.Tensor | None = None
        """Tokens of a row's prompt and completion, without padding (rows × vocabulary)."""
        self.logprobs: list[torch.Tensor] = []
        """Log-probabilities of the chosen tokens: one tensor (rows) for each position."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.full_like(self._seeds, len(self.logprobs))
        tokens, told = draw(scores, self._seeds, counts, self._knobs, self._filters, self._look(input_ids, scores))
        self.logprobs.append(told)
        chosen: Any = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return chosen

    def _look(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        if self._prompts is None:
            return None
        if self._seen is None:
            self._seen = torch.zeros_like(scores, dtype=torch.bool)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, torch.tensor(prompt, device=scores.device)] = True
        else:
            self._seen.scatter_(1, input_ids[:, -1:], torch.ones_like(input_ids[:, -1:], dtype=torch.bool))
        return self._seen


class TransformersSampler:
    """Generates with the model in training."""

    is_apart = False

    def __init__(self, model: Any, *, stops: Sequence[int], padding: int, filters: Filters) -> None:
        """`model` is a `PeftModel`; `padding` is the token of padding."""
        self._model, self._stops, self._padding, self._filters = model, list(stops), padding, filters

    def serving(self, *, adapter: bool) -> AbstractContextManager[None]:
        """Generate with the adapter in this block, or without it."""
        return nullcontext() if adapter else self._model.disable_adapter()

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], *, tokens: int, temperature: float = 1.0, penalty: float = 1.0
    ) -> list[Drawn]:
        """Return a completion of at most `tokens` tokens for each request, in order. Temperature 0 is greedy."""
        model, width = self._model, max(len(request.prompt) for request in requests)
        short = [width - len(request.prompt) for request in requests]
        ids = [[self._padding] * n + list(request.prompt) for n, request in zip(short, requests, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in short]
        knobs = [1 / temperature, 1.0, penalty] if temperature else [1.0, 0.0, penalty]
        on_device = torch.tensor(knobs, device=model.device)
        rows = SeededRows(requests, self._filters, on_device, penalises=penalty != 1.0)
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,  # `rows` samples
            eos_token_id=self._stops,
            pad_token_id=self._padding,
            # Gradient checkpointing turns it off in the model's own settings.
            use_cache=True,
        )
        training = model.training
        model.eval()
        try:
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([rows]),
            )
        finally:
            model.train(training)
        told = torch.stack(rows.logprobs, 1).tolist()
        return [
            Drawn(said[:length], values[:length])
            for said, values in zip(output[:, width:].tolist(), told, strict=True)
            for length in [self._length(said)]
        ]

    def _length(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens up to the first stop token and with it."""
        return next((at + 1 for at, token in enumerate(tokens) if token in self._stops), len(tokens))
