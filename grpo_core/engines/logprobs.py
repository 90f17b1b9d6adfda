"""Token log-probabilities on a CPU, where TRL's own come from a Triton kernel and need a GPU.

Owns one function with that kernel's signature, in plain torch, and its installation. Invariant: installed only in
a process that trains on the CPU, so that no GPU run is ever slowed by it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, log_softmax
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25
"""Logits that are alive at once (128 MB in fp32); more are taken in parts and computed again going back."""


class CpuLogProbs:
    """Stands in for TRL's autograd function: only `apply` is called."""

    @staticmethod
    def apply(
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
        """Log-probability of each target token and, if asked for, the entropy there; both can be differentiated."""

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
    """Make TRL use it, in this process."""
    import trl.trainer.utils

    # The name TRL looks up at each call; private, so a new TRL is tried before its version is raised.
    trl.trainer.utils.__dict__["_ChunkedLogProbFunction"] = CpuLogProbs
