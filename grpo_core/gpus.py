"""Which of the host's GPUs this process may use, asked of the driver: torch must not be imported before the engine is
known.

Owns what `CUDA_VISIBLE_DEVICES` names, for training and for the worker that starts it. Invariant: both count the cards
that CUDA would show, and a host without a driver has none.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
_UUID_BYTES: Final = 96

Card = TypeVar("Card")


def visible(
    cards: Sequence[Card], uuid_of: Callable[[Card], str], find_part: Callable[[str], Card | None]
) -> list[Card]:
    """Those of the host's `cards` that CUDA would show, in its order; `find_part` looks up a part of one (MIG).

    The driver lists every card of the host whatever `CUDA_VISIBLE_DEVICES` says. As in CUDA, a card is named by its
    index or by (the beginning of) its UUID, and the first name that is no card ends the list.
    """
    names = _names()
    if names is None:
        return list(cards)
    found: list[Card] = []
    for name in names:
        if name.isdecimal():
            card = cards[int(name)] if int(name) < len(cards) else None
        elif name.startswith("MIG-"):
            card = find_part(name)
        else:
            card = next((c for c in cards if name.startswith("GPU-") and uuid_of(c).startswith(name)), None)
        if card is None:
            break
        found.append(card)
    return found


def count_gpus() -> int:
    """How many cards this process may use. By the driver's own library: what wraps it may not be installed."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if driver.nvmlInit_v2() != 0 or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    shown = visible(range(count.value), lambda index: _uuid(driver, index), lambda name: _find_part(driver, name))
    return len(shown)


def show_gpus(count: int) -> None:
    """Hide all GPUs but the first `count` from this process: libraries spread over all they see. Before torch."""
    names = _names()
    os.environ[_VARIABLE] = ",".join((list(map(str, range(count))) if names is None else names)[:count])


def _names() -> list[str] | None:
    """What the environment names; None where it says nothing, which is every card."""
    setting = os.environ.get(_VARIABLE)
    return None if setting is None else [name.strip() for name in setting.split(",")]


def _uuid(driver: Any, index: int) -> str:
    handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES)
    if driver.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
        driver.nvmlDeviceGetUUID(handle, text, _UUID_BYTES)
    return text.value.decode()


def _find_part(driver: Any, uuid: str) -> int | None:
    """Any number for a part that there is: only how many there are is asked."""
    handle = ctypes.c_void_p()
    return 0 if driver.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0 else None
