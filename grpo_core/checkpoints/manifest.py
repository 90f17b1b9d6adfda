"""Reading a checkpoint: its files, whether they are complete, and what its run knew.

Owns the file names, the manifest and the reasons for refusing a checkpoint; the tensors are in `writer`. Imports no
torch, so that a bad one is refused before anything is loaded. Invariant: no file of a checkpoint is read before its
size and hash are those of the manifest, and no file is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from grpo_core import strict_json
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureClass, FailureCode
from grpo_core.run_dir.layout import sha256_of, write_json
from grpo_core.spec import JobSpec

CHECKPOINT_VERSION: Final = 1

WEIGHTS_NAME: Final = "adapter_model.safetensors"
CONFIG_NAME: Final = "adapter_config.json"
STATE_TENSORS_NAME: Final = "state.safetensors"
STATE_NAME: Final = "state.json"
PROGRESS_NAME: Final = "progress.json"
METRICS_NAME: Final = "metrics.jsonl"
MANIFEST_NAME: Final = "manifest.json"
FILE_NAMES: Final = frozenset(
    {WEIGHTS_NAME, CONFIG_NAME, STATE_TENSORS_NAME, STATE_NAME, PROGRESS_NAME, METRICS_NAME},
)
"""The files of a checkpoint, besides the manifest."""

"""The code of every refusal, by which the worker knows to try the previous checkpoint."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A whole checkpoint of the job that is being run."""

    folder: Path
    step: int
    """Optimizer steps done."""
    epoch: int
    """The run of the job that wrote it."""
    progress: Mapping[str, Any]
    """What the run's parts knew, by the name each gave to `CheckpointWriter.carry`."""

    @property
    def metrics(self) -> Path:
        """The lines of `metrics.jsonl` up to the step."""
        return self.folder / METRICS_NAME


def open_saved_run(folder: Path, spec: JobSpec) -> SavedRun:
    """Verify the checkpoint in `folder`; raises `JobFailure` with the code `checkpoint_unreadable`."""
    try:
        found = strict_json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, strict_json.StrictJsonError):
        found = None
    manifest = _object(found, folder, "it has no manifest, so it was never finished")
    version = manifest.get("v")
    if not isinstance(version, int) or version < 1:
        _damaged(folder, "its manifest has no version")
    if version > CHECKPOINT_VERSION:
        raise unreadable(
            f"The checkpoint in {folder.name} has version {version}; this release reads up to {CHECKPOINT_VERSION}.",
            failure_class=FailureClass.USER_CONFIG,
            hint="Continue the job with the release that wrote it, or a newer one.",
        )
    if manifest.get("spec_digest") != spec.digest():
        raise unreadable(
            f"The checkpoint in {folder.name} was made by another job: its spec differs from this one.",
            failure_class=FailureClass.USER_CONFIG,
            hint="Continue with the very spec that the checkpoint was made with. To start a new job from its adapter "
            "name it in from_checkpoint, or put it into inputs/checkpoint of the run folder.",
        )
    _verify_files(folder, manifest.get("files"))
    step, epoch = manifest.get("step"), manifest.get("epoch")
    if not isinstance(step, int) or not isinstance(epoch, int) or not 0 < step <= spec.training.steps:
        _damaged(folder, f"its manifest names step {step!r}")
    return SavedRun(folder, step, epoch, _progress(folder))


def write_manifest(folder: Path, *, step: int, epoch: int, spec_digest: str) -> None:
    """Write the manifest of `folder`, last: every file with its size and hash."""
    files = [
        {"path": file.name, "size": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())
    ]
    manifest = {"v": CHECKPOINT_VERSION, "step": step, "epoch": epoch, "spec_digest": spec_digest, "files": files}
    write_json(folder / MANIFEST_NAME, manifest)


def unreadable(
    message: str, *, failure_class: FailureClass | None = None, hint: str = "An earlier checkpoint may be whole."
) -> JobFailure:
    """The failure of a run that cannot resume from its checkpoint."""
    return JobFailure(FailureCode.CHECKPOINT_UNREADABLE, message, hint=hint, failure_class=failure_class)


def _verify_files(folder: Path, listed: object) -> None:
    files = _entries(folder, listed)
    if missing := FILE_NAMES - files.keys():
        _damaged(folder, f"its manifest does not name {', '.join(sorted(missing))}")
    for name, (size, sha256) in files.items():
        file = folder / name
        try:
            if file.stat().st_size != size or sha256_of(file) != sha256:
                _damaged(folder, f"{name} is not what its manifest says")
        except OSError:
            _damaged(folder, f"{name} is missing or cannot be read")


def _entries(folder: Path, listed: object) -> dict[str, tuple[object, object]]:
    """Size and hash by name; a name is one part, so that no manifest leads out of its folder."""
    found: dict[str, tuple[object, object]] = {}
    for item in cast("list[object]", listed) if isinstance(listed, list) else []:
        entry = cast("dict[str, object]", item) if isinstance(item, dict) else {}
        name = entry.get("path")
        if not isinstance(name, str) or Path(name).name != name:
            _damaged(folder, f"its manifest names the file {name!r}")
        found[name] = entry.get("size"), entry.get("sha256")
    return found


def _progress(folder: Path) -> dict[str, Any]:
    """Our own bytes, by their hash; completions in it may hold what is refused of others, as NUL."""
    try:
        value = json.loads((folder / PROGRESS_NAME).read_bytes())
    except (OSError, ValueError):
        value = None
    return _object(value, folder, "what its run knew cannot be read")


def _object(value: object, folder: Path, otherwise: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _damaged(folder, otherwise)
    return cast("dict[str, Any]", value)


def _damaged(folder: Path, what: str) -> NoReturn:
    raise unreadable(f"The checkpoint in {folder.name} cannot be continued from: {what}.") from None
