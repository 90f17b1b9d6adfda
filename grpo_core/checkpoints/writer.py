"""Writes adapters and checkpoints, decides which are kept, and loads a run from one.

Owns the tensors in a checkpoint folder and the result folder `adapter/`; file names, manifest and verification are in
`checkpoints.manifest`. Nothing is pickled: tensors go to safetensors, all else to JSON. Invariant: a checkpoint's
`manifest.json` is written last and names every other file.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo_core import strict_json
from grpo_core.checkpoints import tensor_tree
from grpo_core.checkpoints.manifest import (
    CHECKPOINT_VERSION,
    CONFIG_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    PROGRESS_NAME,
    STATE_NAME,
    STATE_TENSORS_NAME,
    WEIGHTS_NAME,
    SavedRun,
    unreadable,
    write_manifest,
)
from grpo_core.checkpoints.model_card import CardFacts, model_card
from grpo_core.errors import JobFailure
from grpo_core.reasons import EventType, FailureCode
from grpo_core.run_dir.layout import RunFolder, new_folder, step_of, write_json, write_text
from grpo_core.run_dir.records import EventWriter
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

KEPT: Final = 2
"""Number of latest checkpoints to keep on this disk, besides those at `save_steps` and the best."""


class CheckpointWriter:
    """Writes a run's checkpoints and forgets the old ones."""

    def __init__(
        self, *, spec: JobSpec, folder: RunFolder, events: EventWriter, epoch: int, spec_digest: str | None = None
    ) -> None:
        """`spec_digest` is of the spec as requested, where the run's own differs from it."""
        self._spec, self._folder, self._events, self._epoch = spec, folder, events, epoch
        self._digest = spec_digest or spec.digest()
        self._carried: dict[str, Callable[[], Any]] = {}
        self._kept: Callable[[], int | None] = lambda: None
        self._saved = time.monotonic()
        """When the latest checkpoint was written, or this run began."""

    def carry(self, name: str, state: Callable[[], Any]) -> None:
        """Put what `state` returns, which must be JSON, into every checkpoint: `SavedRun.progress[name]`."""
        self._carried[name] = state

    def keep(self, step: Callable[[], int | None]) -> None:
        """Never prune the checkpoint of the step that `step` returns."""
        self._kept = step

    def is_due(self, step: int) -> bool:
        """Whether the spec asks for a checkpoint after this step."""
        training = self._spec.training
        return step % training.checkpoint_every == 0 or step % training.save_steps == 0

    def is_overdue(self) -> bool:
        """Whether the latest checkpoint is older than the spec asks for, by this rank.s clock: the lead decides."""
        is_trial = self._spec.kind == "try"
        return not is_trial and time.monotonic() - self._saved >= 60 * self._spec.training.checkpoint_minutes

    def has(self, step: int) -> bool:
        return self._folder.checkpoint(step).exists()

    def write(self, step: int, model: PeftModel, state: Mapping[str, Any]) -> None:
        """Save the adapter and `state` (a tree of dicts, lists, tensors and JSON values), then prune and announce."""
        with new_folder(self._folder.checkpoint(step)) as part:
            write_peft_files(part, model, self._spec)
            tensors: dict[str, torch.Tensor] = {}
            tree = tensor_tree.pack({**state, "rng": random_states()}, tensors)
            save_file(tensors, part / STATE_TENSORS_NAME)
            write_json(part / STATE_NAME, {"v": CHECKPOINT_VERSION, "step": step, **tree})
            progress = {name: know() for name, know in self._carried.items()}
            write_json(part / PROGRESS_NAME, {"v": CHECKPOINT_VERSION, **progress})
            shutil.copyfile(self._folder.metrics, part / METRICS_NAME)
            write_manifest(part, step=step, epoch=self._epoch, spec_digest=self._digest)
        self._saved = time.monotonic()
        self._prune()
        path = self._folder.checkpoint(step).relative_to(self._folder.root).as_posix()
        self._events.emit(EventType.CHECKPOINT, {"path": path, "step": step}, step=step)

    def _prune(self) -> None:
        written = sorted(self._folder.checkpoints.glob("step-*"))
        for old in written[:-KEPT]:
            if step_of(old) % self._spec.training.save_steps and step_of(old) != self._kept():
                # The manifest first: without it, no reader takes the folder for a checkpoint.
                (old / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)


def read_state(saved: SavedRun) -> dict[str, Any]:
    """The tree that `CheckpointWriter.write` was given, with `rng` in it; tensors are on the CPU."""
    try:
        tree = strict_json.loads((saved.folder / STATE_NAME).read_bytes())
        return tensor_tree.unpack(tree, load_file(saved.folder / STATE_TENSORS_NAME))
    except (OSError, strict_json.StrictJsonError, SafetensorError, KeyError) as error:
        raise unreadable(f"The state in {saved.folder.name} cannot be read: {error}") from error


def continue_adapter(saved: SavedRun, model: PeftModel, spec: JobSpec) -> None:
    """Give the model's adapter the weights it had; raises `JobFailure` with the code `checkpoint_unreadable`."""
    try:
        load_adapter(saved.folder, model, spec)
    except JobFailure as error:
        raise unreadable(error.report.message) from error


def write_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: JobSpec,
    *,
    steps: int,
    rewards: Mapping[str, float | int | None],
) -> None:
    """Write the result: the adapter in PEFT's format, the tokenizer and a model card without an evaluation."""
    with new_folder(folder) as part:
        write_peft_files(part, model, spec)
        tokenizer.save_pretrained(part)
        write_text(part / "README.md", model_card(spec, CardFacts(steps=steps, rewards=rewards)))


def load_adapter(folder: Path, model: PeftModel, spec: JobSpec) -> None:
    """Give the model's adapter the weights in `folder`; raises a `user_config` failure if they do not fit it.

    Done on the built trainer's model, so that the reference of the KL term stays the base model.
    """
    config = _read_adapter_config(folder)
    wanted = {
        "base_model_name_or_path": spec.model.name,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "target_modules": sorted(spec.lora.target_modules),
    }
    found = {**config, "target_modules": sorted(config.get("target_modules") or [])}
    differing = [
        f"{name} is {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value
    ]
    if differing:
        raise _bad_start(f"The checkpoint is of another adapter: {'; '.join(differing)}.")
    # PEFT skips what it does not know and leaves what is missing at its initial value: compare names first.
    weights = load_file(folder / WEIGHTS_NAME)
    if weights.keys() != get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise _bad_start("The checkpoint's weights have other names than the job's adapter.")
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise _bad_start("The checkpoint's weights have other shapes than the job's adapter.") from error


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_start("The checkpoint to start from holds no readable adapter.") from error


def _bad_start(message: str) -> JobFailure:
    return JobFailure(
        FailureCode.CHECKPOINT_DOES_NOT_FIT,
        message,
        hint="Use the model and lora settings of the job that made the checkpoint.",
    )


def write_peft_files(folder: Path, model: PeftModel, spec: JobSpec, dtype: torch.dtype | None = None) -> None:
    """PEFT's two files, not by its own saving: that asks the hub about the base model and names a path of here. `dtype`
    is that of the tensors; None: as they are."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()},
        folder / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    config = model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": spec.model.name,
        "revision": spec.model.revision,
        "inference_mode": True,
        "target_modules": sorted(spec.lora.target_modules),
    }
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True, default=_config_value) + "\n")


def _config_value(value: object) -> object:
    """What PEFT keeps in its settings besides JSON types."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def random_states() -> dict[str, Any]:
    """Every generator's state; sampling itself is seeded anew at each rollout and needs none of them."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set every generator to a state that a checkpoint holds as `rng`."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    # On a different number of devices there is no state to resume from; sampling does not depend on it.
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
