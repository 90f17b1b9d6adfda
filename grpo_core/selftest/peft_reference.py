"""Loads the base model and an adapter as a user would: with stock transformers and stock PEFT.

Owns how a base model is loaded in each precision, for engines and the self-test. `python -m
grpo_core.selftest.peft_reference` answers a request in a separate process, in which no engine has patched the
libraries.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_core import egress, eight_bits, hub
from grpo_core.eight_bits import Quantised
from grpo_core.errors import fault
from grpo_core.estimates import weight_bytes
from grpo_core.hardware.gpus import showing_all
from grpo_core.hardware.models import Precision, count_parameters
from grpo_core.processes import die_with_parent
from grpo_core.reasons import FailureCode
from grpo_core.run_dir.layout import write_json
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs, token_logprobs
from grpo_core.spec.sections import PROJECTIONS

SPREAD_SHARE: Final = 0.8
"""Share of the GPUs' free memory that a base may take that is spread over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRequest:
    """A request to the reference process; everything it needs is on disk."""

    base: Path
    adapter: Path
    precision: Precision
    probes: list[LogprobProbe]
    spread: bool = False
    """Whether the base may be larger than a GPU: then it is on all of the host's GPUs, or on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceAnswer:
    """What stock PEFT said."""

    base: LogProbs
    """Without the adapter."""
    adapter: LogProbs
    adapter_16bit: LogProbs | None = None
    """With the adapter on the base in 16 bits, where it was trained on one in 8."""


def load_base(path: Path, precision: Precision, *, spread: bool = False) -> Any:
    """A base model by stock transformers, as every engine and the self-test hold it; one in 8 bits is in 16 here.

    `spread`: over all GPUs that are visible, or on the CPU if they have too little free memory together.
    """
    dtype = getattr(torch, precision.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if precision.weights != "fp32":
        options["device_map"] = _placement(path) if spread else {"": 0}
    if precision.weights == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(path, **options)


def _placement(path: Path) -> Any:
    """Return where a base in 16 bits goes, as transformers' `device_map`."""
    free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    return "auto" if weight_bytes(count_parameters(path), "16bit") <= SPREAD_SHARE * free else {"": "cpu"}


def ask_reference(request: ReferenceRequest) -> ReferenceAnswer:
    """Load base and adapter afresh, as a user of the result would, and compute with them."""
    base = load_base(request.base, request.precision, spread=request.spread)
    model = PeftModel.from_pretrained(base, request.adapter)
    wide: LogProbs | None = None
    if request.precision.weights == "8bit":
        wide = token_logprobs(model, request.probes, request.precision)
        multiply_in_eight_bits(model)
    with model.disable_adapter():
        base = token_logprobs(model, request.probes, request.precision)
    adapter = token_logprobs(model, request.probes, request.precision)
    return ReferenceAnswer(base=base, adapter=adapter, adapter_16bit=wide)


def multiply_in_eight_bits(model: torch.nn.Module) -> None:
    """Let every projection of a decoder's layers multiply as the base in 8 bits does that an adapter was trained on."""

    def multiply(weight: Quantised, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        y = eight_bits.linear(x.flatten(0, -2), weight.values, weight.scales).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    for name, module in model.named_modules():
        projection = "lora_" not in name and any(f".{known}" in name for known in PROJECTIONS)
        if projection and isinstance(module, torch.nn.Linear):
            linear: Any = module  # whose own `forward` is replaced
            linear.forward = partial(multiply, eight_bits.quantise(module.weight.detach()), module.bias)


def ask_reference_apart(request: ReferenceRequest) -> ReferenceAnswer:
    """The same in a separate process, for engines that patch the libraries."""
    with tempfile.TemporaryDirectory(prefix="grpo-selftest-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(
            asked,
            {
                "base": str(request.base),
                "adapter": str(request.adapter.absolute()),
                "precision": request.precision.as_dict(),
                "spread": request.spread,
                "probes": [asdict(probe) for probe in request.probes],
            },
        )
        ended = subprocess.run(  # noqa: S603 - our own interpreter and paths, no shell
            [sys.executable, "-m", "grpo_core.selftest.peft_reference", str(asked), str(answered)],
            check=False,
            env=showing_all() if request.spread else None,
        )
        if ended.returncode:
            raise fault(
                FailureCode.PEFT_CANNOT_LOAD, f"Stock PEFT could not load the result (exit status {ended.returncode})."
            )
        return ReferenceAnswer(**json.loads(answered.read_text("utf-8")))


def main(arguments: Sequence[str]) -> int:
    """Answer a request that `ask_stock_apart` wrote."""
    die_with_parent()
    egress.install()
    hub.turn_off()
    # A request to stop is for the run, which waits for this.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked, answered = map(Path, arguments)
    request = json.loads(asked.read_text("utf-8"))
    reference = ask_reference(
        ReferenceRequest(
            base=Path(request["base"]),
            adapter=Path(request["adapter"]),
            precision=Precision(**request["precision"]),
            probes=[LogprobProbe(**probe) for probe in request["probes"]],
            spread=request["spread"],
        )
    )
    write_json(answered, asdict(reference))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
