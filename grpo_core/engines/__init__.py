"""The engines that run GRPO. All implement one protocol and write the same records.

Owns the choice of the engine, and imports only the chosen one. `trl` is plain TRL with PEFT, and `native` this
project's own model in TRL's loop. `unsloth` patches other libraries, so it is imported before them, in a separate
process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_core import strict_json
from grpo_core.engines import native, unsloth_env, vllm_env
from grpo_core.engines.protocol import Engine, EngineContext, EngineName
from grpo_core.errors import JobFailure
from grpo_core.estimates import resolve_precision
from grpo_core.hardware.gpus import Gpu
from grpo_core.reasons import FailureCode

if TYPE_CHECKING:
    from grpo_core.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine of a job."""

    name: EngineName
    reason: str = ""
    """Why it is not the engine that `auto` prefers."""


def choose_engine(
    spec: JobSpec,
    gpus: Sequence[Gpu],
    ranks: int = 1,
    *,
    model: Path,
    parameters: int,
    wrote: EngineName | None = None,
) -> Choice:
    """The engine for a job on a machine with these GPUs, trained by `ranks` processes together; raises a `user_config`
    failure if it has none.

    `model` is the folder of the job's model, which has `parameters`, and `wrote` the engine that wrote the checkpoint
    to resume from. Imports transformers only where the engine is `native`, as far as `config.json` tells.
    """
    if spec.resources.gpus > len(gpus):
        raise JobFailure(
            FailureCode.TOO_FEW_GPUS,
            f"The job asks for {spec.resources.gpus} GPU(s) and this machine has {len(gpus)}.",
            hint="Set resources.gpus to 0 (with optimizer.name adamw_torch) to train on a CPU, or use a GPU worker.",
        )
    choice = Choice(spec.engine) if spec.engine != "auto" else _resumed(wrote)
    choice = choice or _choose_automatically(spec, gpus[: spec.resources.gpus], ranks, model, parameters)
    if ranks > 1 and choice.name == "unsloth":
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            f"The engine unsloth trains in one process, not in {ranks}"
            + (f", and the job runs on it: {choice.reason}." if choice.reason else "."),
            hint="Set engine to native or trl, or resources.gpus to 1.",
        )
    if ranks > 1 and spec.lora.dropout > 0:
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            f"What lora.dropout drops would depend on the number of processes, {ranks}.",
            hint="Set lora.dropout to 0, or resources.gpus to 1.",
        )
    if choice.name == "unsloth" and not _unsloth_is_ready():
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            "This worker cannot run the unsloth engine.",
            hint="Set engine to trl, or install the cuda extra on the worker.",
        )
    return choice


def _resumed(wrote: EngineName | None) -> Choice | None:
    if wrote == "unsloth" and not _unsloth_is_ready():
        return Choice("trl", "unsloth wrote the checkpoint, and is not installed")
    return None if wrote is None else Choice(wrote, "it wrote the checkpoint")


def _choose_automatically(spec: JobSpec, gpus: Sequence[Gpu], ranks: int, model: Path, parameters: int) -> Choice:
    # Checks that need no transformers come first, because Unsloth must be imported before transformers.
    if reason := _why_not_native(spec, gpus, model, parameters):
        return Choice("unsloth" if gpus and ranks == 1 and _unsloth_is_ready() else "trl", reason)
    requirements = import_module("grpo_core.engines.native.requirements")
    try:
        requirements.require_known(spec, model)
    except JobFailure as failure:
        return Choice("trl", failure.report.message)
    return Choice("native")


def _why_not_native(spec: JobSpec, gpus: Sequence[Gpu], model: Path, parameters: int) -> str:
    """Why the engine `native` cannot run the job, as far as can be known without importing transformers; or nothing."""
    if spec.lora.dropout > 0:
        return "The native engine has no dropout."
    if gpus:
        memory = min(gpu.memory_bytes for gpu in gpus)
        # Shared out, a base needs no 4 bits, which only other engines have.
        asked = "16bit" if spec.model.sharding == "full" and spec.model.precision == "auto" else spec.model.precision
        if resolve_precision(asked, device="cuda", parameters=parameters, gpu_memory_bytes=memory) == "4bit":
            return "The native engine has no weights in 4 bits."
        if min(gpu.capability for gpu in gpus) < native.CAPABILITY:
            return "The native engine needs a GPU of the Ampere generation or later."
    family = _family(model)
    if family not in native.FAMILIES:
        return f"The model is of the family {family!r}, and the native engine knows {', '.join(native.FAMILIES)}."
    return ""


def _family(model: Path) -> str | None:
    try:
        return strict_json.loads((model / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def import_engine(name: EngineName) -> Callable[[EngineContext], Engine]:
    """Import an engine, which imports torch. Unsloth is imported before the libraries that it patches."""
    if name == "unsloth":
        unsloth_env.start()
        return import_module("grpo_core.engines.unsloth").UnslothEngine
    if name == "native":
        return import_module("grpo_core.engines.native.engine").NativeEngine
    vllm_env.prepare(os.environ)
    from grpo_core.engines.trl import TrlEngine

    return TrlEngine


def _unsloth_is_ready() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("unsloth", "vllm"))
