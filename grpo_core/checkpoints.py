"""Adapters and checkpoints on disk: how they are written, which are kept, and how a run starts from one.

Owns the checkpoint folder, its manifest and the result folder `adapter/`. Nothing is pickled: tensors go to
safetensors, all else to JSON. Invariant: a checkpoint's `manifest.json` is written last and names every other file.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from grpo_core.errors import JobFailure
from grpo_core.model_card import model_card
from grpo_core.records import EventWriter
from grpo_core.runfolder import RunFolder, new_folder, step_of, write_json, write_text
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

CHECKPOINT_VERSION: Final = 1
KEPT: Final = 2
"""Latest checkpoints that stay on this disk, besides those at `save_steps`."""

WEIGHTS_NAME: Final = "adapter_model.safetensors"
CONFIG_NAME: Final = "adapter_config.json"
STATE_TENSORS_NAME: Final = "state.safetensors"
STATE_NAME: Final = "state.json"
MANIFEST_NAME: Final = "manifest.json"

_TENSOR: Final = "$tensor"


class CheckpointWriter:
    """Writes a run's checkpoints and forgets the old ones."""

    def __init__(self, *, spec: JobSpec, folder: RunFolder, events: EventWriter, epoch: int) -> None:
        self._spec, self._folder, self._events, self._epoch = spec, folder, events, epoch

    def is_due(self, step: int) -> bool:
        """Whether the spec asks for a checkpoint after this step."""
        training = self._spec.training
        return step % training.checkpoint_every == 0 or step % training.save_steps == 0

    def has(self, step: int) -> bool:
        return self._folder.checkpoint(step).exists()

    def write(self, step: int, model: PeftModel, state: Mapping[str, Any]) -> None:
        """Save the adapter and `state` (a tree of dicts, lists, tensors and JSON values), then prune and announce."""
        with new_folder(self._folder.checkpoint(step)) as part:
            _save_adapter_files(part, model, self._spec)
            tensors: dict[str, torch.Tensor] = {}
            tree = _without_tensors({**state, "rng": _random_states()}, "", tensors)
            save_file(tensors, part / STATE_TENSORS_NAME)
            write_json(part / STATE_NAME, {"v": CHECKPOINT_VERSION, "step": step, **tree})
            write_json(part / MANIFEST_NAME, self._manifest(step, part))
        self._prune()
        path = self._folder.checkpoint(step).relative_to(self._folder.root).as_posix()
        self._events.emit("checkpoint", {"path": path, "step": step}, step=step)

    def _manifest(self, step: int, folder: Path) -> dict[str, Any]:
        files = sorted(folder.iterdir())
        return {
            "v": CHECKPOINT_VERSION,
            "step": step,
            "epoch": self._epoch,
            "spec_digest": self._spec.digest(),
            "files": [{"path": file.name, "size": file.stat().st_size, "sha256": _sha256(file)} for file in files],
        }

    def _prune(self) -> None:
        written = sorted(self._folder.checkpoints.glob("step-*"))
        for old in written[:-KEPT]:
            if step_of(old) % self._spec.training.save_steps:
                # First the manifest: a checkpoint without one is no checkpoint, whoever is looking.
                (old / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)


def write_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: JobSpec,
    *,
    steps: int,
    rewards: Mapping[str, float | int | None],
) -> None:
    """Write the result: the adapter in PEFT's format, the tokenizer and a model card."""
    with new_folder(folder) as part:
        _save_adapter_files(part, model, spec)
        tokenizer.save_pretrained(part)
        write_text(part / "README.md", model_card(spec, steps=steps, rewards=rewards))


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
        "user_config",
        "checkpoint_does_not_fit",
        message,
        hint="Use the model and lora settings of the job that made the checkpoint.",
    )


def _save_adapter_files(folder: Path, model: PeftModel, spec: JobSpec) -> None:
    """PEFT's two files, not by its own saving: that asks the hub about the base model and names a path of here."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()},
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


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, each tensor in it moved to `tensors` and named in its place."""
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory, and paged ones must leave their pages.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _random_states() -> dict[str, Any]:
    """Every generator's state; sampling itself is seeded anew at each rollout and needs none of them."""
    version, state, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(state), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
