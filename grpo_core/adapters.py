"""The adapters that a run serves or exports: what `inputs/adapters/` holds and what each is called.

A worker writes it before it starts the process: `adapters.json` and, for each adapter, a folder with PEFT's two files,
whose SHA-256 it has checked. Without a service a folder can be filled by hand. Owns this layout and the names; knows no
engine. Invariant: a name is one of `NAME`'s form, made here, and never one that a request or a stored file gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grpo_core import strict_json
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode
from grpo_core.run_dir.layout import write_json

MAIN: Final = "main"
"""The job's best adapter by its evaluations, else its last one."""
NAME: Final = re.compile(r"main|step-[1-9]\d{0,6}")
WEIGHTS: Final = "adapter_model.safetensors"
_INDEX: Final = "adapters.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAdapter:
    """One adapter in a run folder."""

    name: str
    """`main`, or `step-50`."""
    step: int | None
    """The checkpoint's step; None for the adapter at the end of training."""
    folder: Path

    @property
    def weights(self) -> Path:
        """The file of its matrices."""
        return self.folder / WEIGHTS


def name_of(step: int) -> str:
    """The name of a checkpoint's adapter."""
    return f"step-{step}"


def write_index(folder: Path, adapters: Iterable[LocalAdapter]) -> None:
    """Write down which adapters are in `folder`."""
    listed = [{"name": one.name, "step": one.step, "folder": one.folder.name} for one in adapters]
    write_json(folder / _INDEX, {"v": 1, "adapters": listed})


def read_index(folder: Path) -> Sequence[LocalAdapter]:
    """The adapters in `folder`; none if it does not exist. Raises a `user_config` failure for one that is not there."""
    try:
        listed: list[dict[str, Any]] = strict_json.loads((folder / _INDEX).read_bytes())["adapters"]
    except FileNotFoundError:
        return []
    found = [LocalAdapter(name=one["name"], step=one["step"], folder=folder / one["folder"]) for one in listed]
    for one in found:
        if not NAME.fullmatch(one.name) or one.folder.parent != folder or not one.weights.is_file():
            raise JobFailure(
                FailureCode.ADAPTER_UNREADABLE,
                f"The adapter {one.name} is not among the run's inputs.",
                hint="Submit the job again; its worker prepares them.",
            )
    return found
