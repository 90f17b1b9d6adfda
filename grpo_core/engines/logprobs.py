"""Token log-probabilities on a CPU, because TRL computes them in a Triton kernel, which needs a GPU.

Owns one function in plain torch with that kernel's signature, and its installation. Invariant: it is installed only in
a process that trains on the CPU, so it never slows a run on a GPU. Dimensions: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, log_softmax
from torch.utils.checkpoint import checkpoint

from grpo_core.compat.trl import use_log_probs

MAX_LOGITS = 2**25
"""Largest number of logits in memory (128 MB in fp32). More are computed in parts, and again in the backward pass."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    _chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
    """Return the log-probability of each target token (N) and, if requested, the entropy (N).

    `hidden` is N × H, `weight` V × H, `bias` V, and `targets` N. Both results can be differentiated.
    """

    def part(states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = linear(states, weight, bias).float() * logit_scale
        if final_logit_softcapping is not None:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        log_p = log_softmax(logits / temperature, dim=-1)
        chosen = log_p.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else torch.empty(0)
        return chosen, entropy

    rows = max(1, MAX_LOGITS // weight.shape[0])
    if hidden.shape[0] <= rows:
        chosen, entropy = part(hidden, targets)
    else:
        parts = [
            checkpoint(part, states, wanted, use_reentrant=False)
            for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        chosen, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return chosen, entropy if "entropy" in outputs else None, None, None, None


def install() -> None:
    """Make TRL use this function in this process."""
    use_log_probs(token_logprobs)
