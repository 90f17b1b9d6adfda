"""The GPUs that this process may use, according to the driver, because torch must not be imported before the engine is
known. Owns the interpretation of `CUDA_VISIBLE_DEVICES`, for training and for the worker that starts it. Invariants:
both count the GPUs that CUDA would show; a host without a driver has none; asking never raises.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
_BEFORE: Final = "GRPO_VISIBLE_DEVICES"
"""What the first was before `show_gpus` changed it; empty: not set."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or a part of one (MIG)."""

    name: str
    memory_bytes: int
    capability: tuple[int, int] = (0, 0)
    """CUDA's compute capability."""


def find_gpus() -> list[Gpu]:
    """The cards that this process may use, in CUDA's order."""
    try:
        nvml: Any = import_module("pynvml")  # the worker and cuda extras have it
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [_gpu(nvml, card) for card in _visible(nvml, cards)]
    except nvml.NVMLError:
        return []


def _gpu(nvml: Any, card: Any) -> Gpu:
    name, memory = _text(nvml.nvmlDeviceGetName(card)), int(nvml.nvmlDeviceGetMemoryInfo(card).total)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    except nvml.NVMLError:  # some drivers do not say it of a part (MIG); only cards of 8.0 and above have parts
        major, minor = 8, 0
    return Gpu(name, memory, (int(major), int(minor)))


def show_gpus(count: int, *, first: int = 0) -> None:
    """Hide all GPUs but `count` of them from this process: libraries spread over all they see. Before torch."""
    names = _names()
    os.environ.setdefault(_BEFORE, os.environ.get(_VARIABLE, ""))
    shown = range(first, first + count)
    os.environ[_VARIABLE] = ",".join(map(str, shown) if names is None else names[shown.start : shown.stop])


def showing_all() -> dict[str, str]:
    """Return the environment of a child process that sees all GPUs that this process saw at first."""
    environment = {name: value for name, value in os.environ.items() if name != _VARIABLE}
    before = os.environ.get(_BEFORE, os.environ.get(_VARIABLE, ""))
    return {**environment, _VARIABLE: before} if before else environment


def _visible(nvml: Any, cards: list[Any]) -> list[Any]:
    """Those of the host's `cards` that CUDA would show, in its order.

    The driver lists every card of the host whatever `CUDA_VISIBLE_DEVICES` says. As in CUDA, a card is named by its
    index or by (the beginning of) its UUID, and the first name that is no card ends the list.
    """
    names = _names()
    if names is None:
        return cards
    found: list[Any] = []
    for name in names:
        if name.isdecimal():
            card = cards[int(name)] if int(name) < len(cards) else None
        elif name.startswith("MIG-"):
            card = _find_part(nvml, name)
        else:
            uuids = {_text(nvml.nvmlDeviceGetUUID(card)): card for card in cards}
            card = next((uuids[uuid] for uuid in uuids if name.startswith("GPU-") and uuid.startswith(name)), None)
        if card is None:
            break
        found.append(card)
    return found


def _find_part(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None


def _names() -> list[str] | None:
    """What the environment names; None where it says nothing, which is every card."""
    setting = os.environ.get(_VARIABLE)
    return None if setting is None else [name.strip() for name in setting.split(",")]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
