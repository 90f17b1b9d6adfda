"""Which GPUs this host has, asked of the driver; the training process finds its own.

Invariant: a host without a driver has no GPUs, and asking never raises.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card."""

    name: str
    memory_bytes: int


def find_gpus() -> list[Gpu]:
    """The cards this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        import pynvml  # pyright: ignore[reportMissingImports] - only in the cuda extra
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = _visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [Gpu(_text(pynvml.nvmlDeviceGetName(h)), int(pynvml.nvmlDeviceGetMemoryInfo(h).total)) for h in handles]
    except pynvml.NVMLError:
        return []


def _visible(nvml: Any, names: str | None) -> list[Any]:
    """The driver's handles of the cards that CUDA would show: by index or by (the beginning of) their UUID.

    The driver lists every card of the host whatever `CUDA_VISIBLE_DEVICES` says, so a worker that was given one of
    four would otherwise take jobs for four. As in CUDA, the first name that is no card ends the list.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if names is None:
        return handles
    found: list[Any] = []
    for name in names.split(","):
        handle = _named(nvml, handles, name.strip())
        if handle is None:
            break
        found.append(handle)
    return found


def _named(nvml: Any, handles: list[Any], name: str) -> Any:
    if name.isdecimal():
        return handles[int(name)] if int(name) < len(handles) else None
    if name.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            return None
    return next(
        (h for h in handles if name.startswith("GPU-") and _text(nvml.nvmlDeviceGetUUID(h)).startswith(name)), None
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
