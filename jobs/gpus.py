"""What this host's GPUs are, asked of the driver; which of them may be used is `grpo_core.gpus`'s to say.

Invariant: a host without a driver has no GPUs, and asking never raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_core import gpus


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card."""

    name: str
    memory_bytes: int


def find_gpus() -> list[Gpu]:
    """The cards this process may use."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports] - only in the cuda extra
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        cards: list[Any] = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        handles = gpus.visible(
            cards, lambda card: _text(pynvml.nvmlDeviceGetUUID(card)), lambda uuid: _find_part(pynvml, uuid)
        )
        return [Gpu(_text(pynvml.nvmlDeviceGetName(h)), int(pynvml.nvmlDeviceGetMemoryInfo(h).total)) for h in handles]
    except pynvml.NVMLError:
        return []


def _find_part(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
