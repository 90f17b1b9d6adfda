"""The base model and an adapter as a user of the result loads them: with stock transformers and stock PEFT.

Owns how a base is loaded in each precision, for engines and the self-test alike. `python -m grpo_core.stock` answers a
request in a process of its own, where no engine has changed the libraries it is built on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_core.errors import fault
from grpo_core.lifetime import die_with_parent
from grpo_core.models import Precision
from grpo_core.probes import LogProbs, Probe, token_logprobs
from grpo_core.runfolder import write_json


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
        base = token_logprobs(model, request.probes, request.precision)
    return StockAnswer(base=base, adapter=token_logprobs(model, request.probes, request.precision))


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
            [sys.executable, "-m", "grpo_core.stock", str(asked), str(answered)], check=False
        )
        if ended.returncode:
            raise fault("peft_cannot_load", f"Stock PEFT could not load the result (exit status {ended.returncode}).")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
