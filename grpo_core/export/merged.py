"""The weights of a base model with its adapter merged in, one tensor at a time.

Owns which tensor is merged and with what precision; PEFT merges. Invariants: memory holds the adapter, one tensor of
the base and its merged copy, never the model; and every matrix of the adapter is merged, or nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from grpo_core.checkpoints.manifest import CONFIG_NAME, WEIGHTS_NAME
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode

PREFIX: Final = "base_model.model."
"""What PEFT puts before the name of a module of the base."""
NARROW: Final = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Kept:
    """How much of the adapter is left after rounding: 1 if rounding loses nothing, 0 if it restores the base.

    A weight in 16 bits moves only if the update exceeds half the distance to the next number, so that a small update
    may be lost in part.
    """

    _along: float = 0.0
    _whole: float = 0.0

    def add(self, base: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count one tensor: the base's, and the merged one before and after rounding, all in 32 bits."""
        update = exact - base
        self._along += float(((rounded - base) * update).sum(dtype=torch.float64))
        self._whole += float((update * update).sum(dtype=torch.float64))

    @property
    def share(self) -> float | None:
        """The share, or None if the adapter changes nothing."""
        return self._along / self._whole if self._whole else None


class MergedWeights:
    """The tensors of the merged model by transformers' names.

    Raises a `user_config` failure if a file cannot be read or the adapter does not fit the base.
    """

    def __init__(self, base: Path, adapter: Path, on_tensor: Callable[[int], None] = lambda _: None) -> None:
        """`on_tensor` is called with the number of parameters of each tensor that was read."""
        self._on_tensor = on_tensor
        try:
            self._files = _tensor_files(base)
            self._config = _read_config(adapter)
            self._lora = _by_module(load_file(adapter / WEIGHTS_NAME))
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise _does_not_fit(f"a file cannot be read ({error})") from error
        if missing := {f"{module}.weight" for module in self._lora} - self._files.keys():
            raise _does_not_fit(f"the base has no {min(missing)}")
        self.kept = Kept()
        """Of the tensors that were read so far."""

    @property
    def names(self) -> list[str]:
        """Every tensor in the order in which the base's files have them."""
        return list(self._files)

    @property
    def merged_modules(self) -> int:
        """The number of modules that the adapter changes."""
        return len(self._lora)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header of its file."""
        with safe_open(self._files[name], "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def stored_dtype(self) -> torch.dtype:
        """The base's 16-bit type; bfloat16 for a base in 32 bits."""
        dtypes = {self._read(name).dtype for name in self.names[:1]}
        return next((dtype for dtype in NARROW if dtype in dtypes), torch.bfloat16)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in a 16-bit type, or in 32 bits."""
        for name in self.names:
            yield name, self.tensor(name, dtype)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor. It is merged in 32 bits and rounded once."""
        stored = self._read(name)
        self._on_tensor(stored.numel())
        module = name.removesuffix(".weight")
        if module not in self._lora:
            return stored.to(dtype)
        base = stored.float()
        exact = self._merge(module, base)
        rounded = exact.to(dtype)
        self.kept.add(base, exact, rounded.float())
        return rounded

    def _merge(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """One linear layer by PEFT's own merge, which refuses values that are not finite."""
        root, linear = _module_tree(module, weight.clone())
        with torch.no_grad():
            inject_adapter_in_model(self._config, root, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(root, dict(self._lora[module]), low_cpu_mem_usage=True)
            if result.unexpected_keys:
                raise _does_not_fit(f"PEFT knows no {result.unexpected_keys[0]}")
            layer = root.get_submodule(module)
            assert isinstance(layer, BaseTunerLayer)  # it was injected there
            try:
                cast("Any", layer).merge(safe_merge=True)
            except ValueError as error:
                raise _does_not_fit(f"{module} is not finite once merged") from error
        return linear.weight.detach()

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model folder; a copy of an embedding that is the output head too is left out."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise ValueError("the base has no *.safetensors file")
    if json.loads((folder / "config.json").read_bytes()).get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return found


def _read_config(adapter: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig) or config.modules_to_save:
        raise ValueError(f"{CONFIG_NAME} is of no plain LoRA adapter")
    config.inference_mode = True
    return config


def _by_module(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's matrices by the base's module, under the names that PEFT has for an injected adapter."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, mark, _ = name.removeprefix(PREFIX).rpartition(".lora_")
        if not mark:
            raise ValueError(f"{name} is no matrix of a LoRA adapter")
        found.setdefault(module, {})[name.removeprefix(PREFIX)] = tensor
    return found


def _module_tree(path: str, weight: torch.Tensor) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """A module that has nothing but one linear layer, at this path."""
    outputs, inputs = weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    root = at = torch.nn.Module()
    *parents, name = path.split(".")
    for parent in parents:
        child = torch.nn.Module()
        at.add_module(parent, child)
        at = child
    at.add_module(name, linear)
    return root, linear


def _does_not_fit(what: str) -> JobFailure:
    return JobFailure(
        FailureCode.CHECKPOINT_DOES_NOT_FIT,
        f"The adapter cannot be merged into the base model: {what}.",
        hint="Use the base model, and its revision, that the adapter was trained on.",
    )
