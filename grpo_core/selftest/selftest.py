"""The checks that model and adapter must pass before a run may succeed.

Owns the checks: frozen base, adapter in 32 bits and not zero, saved file equal to the trainer's tensors, stock PEFT
and the rollout server agreeing with the trainer. Invariant: there are never two copies of the base model at once; the
engine frees its copy first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from grpo_core.checkpoints.writer import WEIGHTS_NAME
from grpo_core.errors import JobFailure, fault
from grpo_core.reasons import FailureCode
from grpo_core.selftest.logprob_probes import Difference, LogProbs, Texts, difference, make_probes
from grpo_core.selftest.peft_reference import ReferenceAnswer, ReferenceRequest, ask_reference, ask_reference_apart

if TYPE_CHECKING:
    from grpo_core.selftest.protocol import CheckedEngine
    from grpo_core.spec import DataSection

PEFT_BOUND: Final = 0.02
"""Mean absolute difference of log-probabilities between trainer and stock PEFT that rounding in 16 bits explains."""
PEFT_BOUND_FP32: Final = 1e-4
SERVED_BOUND: Final = 0.05
"""The same between stock PEFT and a rollout server, which computes in other kernels."""
OVER_BASE: Final = 1.25
"""A larger difference is accepted up to this factor times the difference on the base model alone: if a model amplifies
rounding, as one with random weights does, the difference says nothing about the adapter."""
MOST_ON_BASE: Final = 0.1
"""A larger difference on the base is no rounding, and excuses nothing."""
CHUNK: Final = 2**24
"""Words of a tensor summed at once: their 64-bit copy takes 128 MB."""


def run_selftest(engine: CheckedEngine, texts: Texts, data: DataSection, adapter: Path) -> dict[str, Any]:
    """Check the saved adapter against the engine, release the engine's model, ask stock PEFT; the report's part.

    Raises an `internal` failure where the result is not what was trained.
    """
    began = time.perf_counter()
    tensors = require_saved(engine.model, adapter)
    probes = make_probes(texts, data, engine.tokenizer)
    trained = engine.logprobs(probes)
    with engine.model.disable_adapter():
        trained_base = engine.logprobs(probes)
    served = engine.served_logprobs(probes, adapter)
    served_base = engine.served_logprobs(probes, None)
    # A base that ranks share out may be larger than this process's GPU; another process may see all of them.
    spread = engine.shares_base and engine.precision.weights != "fp32"
    request = ReferenceRequest(
        base=engine.files.path, adapter=adapter, precision=engine.precision, probes=probes, spread=spread
    )
    apart = engine.patches_libraries or spread
    engine.release()
    reference = ask_reference_apart(request) if apart else ask_reference(request)
    bound = PEFT_BOUND_FP32 if engine.precision.weights == "fp32" else PEFT_BOUND
    return {
        "tensors": tensors,
        "probes": len(probes),
        "tokens": sum(len(probe.completion) for probe in probes),
        "adapter_effect": asdict(difference(reference.adapter, reference.base)),
        "peft": require_agreement(
            FailureCode.PEFT_DISAGREES,
            "Stock PEFT",
            reference.adapter,
            trained,
            bound,
            difference(reference.base, trained_base),
        ),
        "served": require_served(reference, served, served_base),
        **on_16bit(reference),
        "seconds": round(time.perf_counter() - began, 3),
    }


def on_16bit(reference: ReferenceAnswer) -> dict[str, Any]:
    """For an adapter that was trained on a base in 8 bits: how differently it answers on the base in 16."""
    if reference.adapter_16bit is None:
        return {}
    return {"on_16bit": asdict(difference(reference.adapter_16bit, reference.adapter))}


def base_checksums(model: torch.nn.Module) -> dict[str, int]:
    """A sum of the raw bytes of every frozen parameter, by name, computed where the parameter is.

    Sums of 32-bit words, modulo 2**64: one reading of the weights, 15 GB of a 7B model at the memory's speed. Buffers
    are left out: some are tables that grow with the longest sequence.
    """
    return {name: _checksum(p) for name, p in model.named_parameters() if not p.requires_grad}


def require_base_unchanged(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Fail the job unless the base model is bit for bit what it was, by its `base_checksums`."""
    changed = [name for name in before if after.get(name) != before[name]]
    if changed or after.keys() != before.keys():
        raise fault(
            FailureCode.BASE_CHANGED,
            f"{len(changed)} tensors of the base model were changed by training, {', '.join(changed[:3])} among them: "
            "the adapter does not fit the base model that others load.",
        )


def require_adapter_precision(model: torch.nn.Module) -> None:
    """Fail the job unless every trained parameter has 32 bits: in 16 most updates would be rounded away."""
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if narrow:
        raise fault(
            FailureCode.ADAPTER_NOT_FP32, f"{len(narrow)} adapter tensors are not in 32 bits, {narrow[0]} among them."
        )


def adapter_checksums(model: PeftModel) -> dict[str, int]:
    """A sum of the raw bytes of every `lora_B`, by name: what training must change. Before it they are zero, unless the
    job starts from another's adapter."""
    return {name: _checksum(tensor) for name, tensor in _adapter_tensors(model).items() if ".lora_B." in name}


def require_update(model: PeftModel, start: Mapping[str, int]) -> None:
    """Fail the job if training left the adapter as it was when the job started, `start` by `adapter_checksums`."""
    after = adapter_checksums(model)
    same = [name for name, checksum in after.items() if checksum == start.get(name)]
    if len(same) == len(after):
        raise JobFailure(
            FailureCode.ZERO_UPDATE,
            "No step changed the adapter: it does what it did before the job.",
            hint="Either no group of completions had any variance in its rewards (look at the samples), or every step "
            "had a learning rate of 0, as the first step of warm-up has: train for more steps.",
        )
    if same:
        raise fault(
            FailureCode.UNTRAINED_MODULE, f"{len(same)} of {len(after)} adapted modules were never trained: {same[0]}."
        )


def require_saved(model: PeftModel, adapter: Path) -> int:
    """Fail the job unless the saved tensors are the trainer's byte for byte; returns how many there are."""
    saved, trained = load_file(adapter / WEIGHTS_NAME), _adapter_tensors(model)
    differing = sorted(
        name for name in saved.keys() | trained.keys() if not _same_bytes(saved.get(name), trained.get(name))
    )
    if differing:
        raise fault(
            FailureCode.ADAPTER_DIFFERS,
            f"{len(differing)} of {len(trained)} tensors in the saved adapter are not the trainer's: {differing[0]}.",
        )
    return len(saved)


def require_agreement(
    code: FailureCode, who: str, found: LogProbs, expected: LogProbs, bound: float, on_base: Difference
) -> dict[str, float]:
    """Fail the job if two programs' log-probabilities are too far apart on average; the report's part.

    `on_base` is how far the two are apart on the base model alone.
    """
    apart = difference(found, expected)
    bound = max(bound, OVER_BASE * min(on_base.mean, MOST_ON_BASE))
    if not apart.mean <= bound:  # so that NaN fails too
        raise fault(
            code,
            f"{who} computes other log-probabilities with the saved adapter than expected: {apart.mean:.3g} apart on "
            f"average ({apart.max:.3g} at most), and {bound:.3g} is accepted.",
        )
    return {**asdict(apart), "bound": bound, "on_base": on_base.mean}


def require_served(
    reference: ReferenceAnswer, adapter: LogProbs | None, base: LogProbs | None
) -> dict[str, float] | None:
    """Fail the job if the rollout server, where there is one, ignores the adapter or computes something else."""
    if adapter is None or base is None:
        return None
    effect = difference(adapter, base)
    if not effect.max > 0:
        raise fault(
            FailureCode.ADAPTER_NOT_SERVED, "The rollout server computes the same with the adapter as without it."
        )
    agreement = require_agreement(
        FailureCode.SERVER_DISAGREES,
        "The rollout server",
        adapter,
        reference.adapter,
        SERVED_BOUND,
        difference(base, reference.base),
    )
    return {**agreement, "adapter_effect": effect.mean}


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _same_bytes(saved: torch.Tensor | None, trained: torch.Tensor | None) -> bool:
    if saved is None or trained is None or (saved.dtype, saved.shape) != (trained.dtype, trained.shape):
        return False
    one, other = (tensor.detach().to("cpu").contiguous().view(torch.uint8) for tensor in (saved, trained))
    return torch.equal(one, other)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, in its order."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _checksum(tensor: torch.Tensor) -> int:
    raw = bytes_of(tensor)
    return checksum(raw, len(raw))


def checksum(raw: torch.Tensor, size: int) -> int:
    """The sum of a tensor's bytes as words, or of a part of them: the parts' sums are the sum of all `size` bytes."""
    words = raw if size % 4 or raw.storage_offset() % 4 else raw.view(torch.int32)
    # The sum stays on its device, and wraps around where it must.
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(CHUNK):
        total += part.sum(dtype=torch.int64)
    return int(total)
