"""The engines that run GRPO. All implement one protocol and write the same records.

Owns the choice of the engine, and imports only the chosen one. `trl` is plain TRL with PEFT, and `native` this
project's own model in TRL's loop. `unsloth` patches other libraries, so it is imported before them, in a separate
process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_core.engines import unsloth_env
from grpo_core.engines.protocol import Engine, EngineContext, EngineName
from grpo_core.errors import JobFailure
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
    spec: JobSpec, cuda_count: int, ranks: int = 1, *, model: Path, wrote: EngineName | None = None
) -> Choice:
    """The engine for a job on a machine with `cuda_count` GPUs, trained by `ranks` processes together; raises a
    `user_config` failure if it has none.

    `model` is the folder of the job's model, and `wrote` the engine that wrote the checkpoint to resume from. Imports
    torch only for `auto` on a CPU.
    """
    if spec.resources.gpus > cuda_count:
        raise JobFailure(
            FailureCode.TOO_FEW_GPUS,
            f"The job asks for {spec.resources.gpus} GPU(s) and this machine has {cuda_count}.",
            hint="Set resources.gpus to 0 (with optimizer.name adamw_torch) to train on a CPU, or use a GPU worker.",
        )
    choice = _choose_automatically(spec, model, wrote) if spec.engine == "auto" else Choice(spec.engine)
    if ranks > 1 and choice.name != "native":
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            f"Only the engine native trains in {ranks} processes, and the job runs on {choice.name}"
            + (f": {choice.reason}" if choice.reason else "."),
            hint="Set engine to native, or resources.gpus to 1.",
        )
    if choice.name == "unsloth" and not _unsloth_is_ready():
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            "This worker cannot run the unsloth engine.",
            hint="Set engine to trl, or install the cuda extra on the worker.",
        )
    return choice


def _choose_automatically(spec: JobSpec, model: Path, wrote: EngineName | None) -> Choice:
    if wrote is not None and (wrote != "unsloth" or _unsloth_is_ready()):
        return Choice(wrote, "it wrote the checkpoint")
    if spec.resources.gpus:
        return Choice("unsloth" if _unsloth_is_ready() else "trl")
    # This imports torch, which the engine would do next anyway.
    requirements = import_module("grpo_core.engines.native.requirements")
    try:
        requirements.require_known(spec, model)
    except JobFailure as failure:
        return Choice("trl", failure.report.message)
    return Choice("native")


def import_engine(name: EngineName) -> Callable[[EngineContext], Engine]:
    """Import an engine, which imports torch. Unsloth is imported before the libraries that it patches."""
    if name == "unsloth":
        unsloth_env.start()
        return import_module("grpo_core.engines.unsloth").UnslothEngine
    if name == "native":
        return import_module("grpo_core.engines.native.engine").NativeEngine
    from grpo_core.engines.trl import TrlEngine

    return TrlEngine


def _unsloth_is_ready() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("unsloth", "vllm"))
