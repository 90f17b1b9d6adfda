"""What must hold of model and adapter before a run may end as succeeded, and how it is found out.

Owns the checks: frozen base, adapter in 32 bits and not zero, saved file equal to the trainer's tensors, stock PEFT
and the rollout server agreeing with the trainer. `python -m grpo_core.selftest` asks stock PEFT in a process of its
own. Invariant: two copies of the base model are never asked for at once; the engine lets go of its own first.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_core.checkpoints import WEIGHTS_NAME
from grpo_core.errors import JobFailure
from grpo_core.lifetime import die_with_parent
from grpo_core.models import Precision
from grpo_core.prompts import messages_for
from grpo_core.runfolder import write_json

if TYPE_CHECKING:
    from grpo_core.engines import Engine
    from grpo_core.spec import DataSection

PROBES: Final = 4
PROBE_TOKENS: Final = 128
"""Tokens of a completion that are looked at."""
PEFT_BOUND: Final = 0.02
"""Mean absolute difference of log-probabilities between trainer and stock PEFT that rounding in 16 bits explains."""
PEFT_BOUND_FP32: Final = 1e-4
SERVED_BOUND: Final = 0.05
"""The same between stock PEFT and a rollout server, which computes in other kernels."""
OVER_BASE: Final = 1.25
"""A larger difference is accepted up to so many times what the two differ by on the base alone: where a model makes
more of rounding than usual, as one with random weights does, that says nothing of the adapter."""
MOST_ON_BASE: Final = 0.1
"""A larger difference on the base is no rounding, and excuses nothing."""
CHUNK: Final = 2**24
"""Words of a tensor summed at once: their 64-bit copy takes 128 MB."""

LogProbs = list[list[float]]
"""For each probe, the log-probability of each token of its completion, at temperature 1."""

Texts = Sequence[tuple[str, str]]
"""Questions, each with something that was answered to it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids of a templated prompt and of a completion."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StockRequest:
    """What stock PEFT is asked: everything it needs is on the disk."""

    base: Path
    adapter: Path
    precision: Precision
    probes: list[Probe]


@dataclass(frozen=True, slots=True, kw_only=True)
class StockAnswer:
    """What stock PEFT said."""

    base: LogProbs
    """Without the adapter."""
    adapter: LogProbs


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two sets of log-probabilities are apart."""

    mean: float
    max: float


def run_selftest(engine: Engine, texts: Texts, data: DataSection, adapter: Path) -> dict[str, Any]:
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
    request = StockRequest(base=engine.files.path, adapter=adapter, precision=engine.precision, probes=probes)
    engine.release()
    stock = ask_stock_apart(request) if engine.patches_libraries else ask_stock(request)
    bound = PEFT_BOUND_FP32 if engine.precision.weights == "fp32" else PEFT_BOUND
    return {
        "tensors": tensors,
        "probes": len(probes),
        "tokens": sum(len(probe.completion) for probe in probes),
        "adapter_effect": asdict(difference(stock.adapter, stock.base)),
        "peft": require_agreement(
            "peft_disagrees", "Stock PEFT", stock.adapter, trained, bound, difference(stock.base, trained_base)
        ),
        "served": require_served(stock, served, served_base),
        "seconds": round(time.perf_counter() - began, 3),
    }


def base_checksums(model: torch.nn.Module) -> dict[str, int]:
    """A sum of the raw bytes of every frozen parameter, by name, computed where the parameter is.

    Sums of 32-bit words, modulo 2**64: one reading of the weights, 15 GB of a 7B model at the memory's speed. Buffers
    are left out: some are tables that grow with the longest sequence.
    """
    return {name: _checksum(p) for name, p in model.named_parameters() if not p.requires_grad}


def require_base_unchanged(before: Mapping[str, int], model: torch.nn.Module) -> None:
    """Fail the job unless the base model is bit for bit what it was."""
    after = base_checksums(model)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed or after.keys() != before.keys():
        raise _failed(
            "base_changed",
            f"{len(changed)} tensors of the base model were changed by training, {', '.join(changed[:3])} among them: "
            "the adapter does not fit the base model that others load.",
        )


def require_adapter_precision(model: torch.nn.Module) -> None:
    """Fail the job unless every trained parameter has 32 bits: in 16 most updates would be rounded away."""
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if narrow:
        raise _failed("adapter_not_fp32", f"{len(narrow)} adapter tensors are not in 32 bits, {narrow[0]} among them.")


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
            "no_signal",
            "zero_update",
            "No step changed the adapter: it does what it did before the job.",
            hint="Either no group of completions had any variance in its rewards (look at the samples), or every step "
            "had a learning rate of 0, as the first step of warm-up has: train for more steps.",
        )
    if same:
        raise _failed("untrained_module", f"{len(same)} of {len(after)} adapted modules were never trained: {same[0]}.")


def require_saved(model: PeftModel, adapter: Path) -> int:
    """Fail the job unless the saved tensors are the trainer's byte for byte; returns how many there are."""
    saved, trained = load_file(adapter / WEIGHTS_NAME), _adapter_tensors(model)
    differing = sorted(
        name for name in saved.keys() | trained.keys() if not _same_bytes(saved.get(name), trained.get(name))
    )
    if differing:
        raise _failed(
            "adapter_differs",
            f"{len(differing)} of {len(trained)} tensors in the saved adapter are not the trainer's: {differing[0]}.",
        )
    return len(saved)


def require_agreement(
    code: str, who: str, found: LogProbs, expected: LogProbs, bound: float, on_base: Difference
) -> dict[str, float]:
    """Fail the job if two programs' log-probabilities are too far apart on average; the report's part.

    `on_base` is how far the two are apart on the base model alone.
    """
    apart = difference(found, expected)
    bound = max(bound, OVER_BASE * min(on_base.mean, MOST_ON_BASE))
    if not apart.mean <= bound:  # so that NaN fails too
        raise _failed(
            code,
            f"{who} computes other log-probabilities with the saved adapter than expected: {apart.mean:.3g} apart on "
            f"average ({apart.max:.3g} at most), and {bound:.3g} is accepted.",
        )
    return {**asdict(apart), "bound": bound, "on_base": on_base.mean}


def require_served(stock: StockAnswer, adapter: LogProbs | None, base: LogProbs | None) -> dict[str, float] | None:
    """Fail the job if the rollout server, where there is one, ignores the adapter or computes something else."""
    if adapter is None or base is None:
        return None
    effect = difference(adapter, base)
    if not effect.max > 0:
        raise _failed("adapter_not_served", "The rollout server computes the same with the adapter as without it.")
    agreement = require_agreement(
        "server_disagrees", "The rollout server", adapter, stock.adapter, SERVED_BOUND, difference(base, stock.base)
    )
    return {**agreement, "adapter_effect": effect.mean}


def make_probes(texts: Texts, data: DataSection, tokenizer: Any) -> list[Probe]:
    """Some texts as token ids, their answers cut; each question comes once before any comes twice."""
    given = [(question, answer) for question, answer in texts if answer]
    first_of_each = {question: (question, answer) for question, answer in reversed(given)}
    chosen = list(dict.fromkeys([*reversed(first_of_each.values()), *given]))[:PROBES]
    probes: list[Probe] = []
    for question, answer in chosen:
        prompt = tokenizer.apply_chat_template(
            messages_for(question, data), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        completion = tokenizer(answer, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
        probes.append(Probe(list(prompt["input_ids"]), list(completion)))
    return probes


def token_logprobs(model: Any, probes: Sequence[Probe]) -> LogProbs:
    """The model's log-probabilities, one probe at a time: padding could not make a difference then."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [_logprobs_of(model, probe) for probe in probes]
    finally:
        model.train(was_training)


def difference(one: LogProbs, other: LogProbs) -> Difference:
    """Mean and largest absolute difference over all tokens."""
    apart = [abs(a - b) for xs, ys in zip(one, other, strict=True) for a, b in zip(xs, ys, strict=True)]
    return Difference(sum(apart) / len(apart), max(apart))


def load_base(path: Path, precision: Precision) -> Any:
    """A base model by stock transformers, as every engine and the self-test hold it."""
    dtype = getattr(torch, precision.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if precision.weights != "fp32":
        options["device_map"] = {"": 0}
    if precision.weights == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(path, **options)


def ask_stock(request: StockRequest) -> StockAnswer:
    """Load base and adapter afresh, as a user of the result would, and compute with them."""
    model = PeftModel.from_pretrained(load_base(request.base, request.precision), request.adapter)
    with model.disable_adapter():
        base = token_logprobs(model, request.probes)
    return StockAnswer(base=base, adapter=token_logprobs(model, request.probes))


def ask_stock_apart(request: StockRequest) -> StockAnswer:
    """The same in a process of its own, for engines that patch the libraries they are built on."""
    with tempfile.TemporaryDirectory(prefix="grpo-selftest-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(
            asked,
            {
                "base": str(request.base),
                "adapter": str(request.adapter.absolute()),
                "precision": request.precision.as_dict(),
                "probes": [asdict(probe) for probe in request.probes],
            },
        )
        ended = subprocess.run(  # noqa: S603 - our own interpreter and paths, no shell
            [sys.executable, "-m", "grpo_core.selftest", str(asked), str(answered)], check=False
        )
        if ended.returncode:
            raise _failed("peft_cannot_load", f"Stock PEFT could not load the result (exit status {ended.returncode}).")
        return StockAnswer(**json.loads(answered.read_text("utf-8")))


def main(arguments: Sequence[str]) -> int:
    """Answer a request that `ask_stock_apart` wrote."""
    die_with_parent()
    # A request to stop is for the run, which waits for this.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked, answered = map(Path, arguments)
    request = json.loads(asked.read_text("utf-8"))
    stock = ask_stock(
        StockRequest(
            base=Path(request["base"]),
            adapter=Path(request["adapter"]),
            precision=Precision(**request["precision"]),
            probes=[Probe(**probe) for probe in request["probes"]],
        )
    )
    write_json(answered, asdict(stock))
    return 0


def _logprobs_of(model: Any, probe: Probe) -> list[float]:
    ids = torch.tensor([probe.prompt + probe.completion], device=model.device)
    # Each position foretells the next token.
    logits = model(input_ids=ids, use_cache=False).logits[0, len(probe.prompt) - 1 : -1]
    wanted = torch.tensor(probe.completion, device=logits.device).unsqueeze(-1)
    return logits.float().log_softmax(-1).gather(-1, wanted).squeeze(-1).tolist()


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _same_bytes(saved: torch.Tensor | None, trained: torch.Tensor | None) -> bool:
    if saved is None or trained is None or (saved.dtype, saved.shape) != (trained.dtype, trained.shape):
        return False
    one, other = (tensor.detach().to("cpu").contiguous().view(torch.uint8) for tensor in (saved, trained))
    return torch.equal(one, other)


def _checksum(tensor: torch.Tensor) -> int:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = raw if raw.numel() % 4 or raw.storage_offset() % 4 else raw.view(torch.int32)
    # The sum stays on its device, and wraps around where it must.
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(CHUNK):
        total += part.sum(dtype=torch.int64)
    return int(total)


def _failed(code: str, message: str) -> JobFailure:
    return JobFailure(
        "internal",
        code,
        message,
        hint="This is a fault of the service or of its library versions: install the locked versions, and report it.",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
