"""Which cards a worker counts, by a driver that lists all of the host."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.gpus import find_gpus

CARDS = [("A100", "GPU-aaaa-1"), ("A100", "GPU-aabb-2"), ("L4", "GPU-cccc-3")]


class NVMLError(Exception):
    pass


def by_uuid(uuid: str) -> Any:
    if uuid == "MIG-7":
        return ("A100 MIG", uuid)
    raise NVMLError


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=lambda index: CARDS[index],
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda card: card[1].encode(),
        nvmlDeviceGetName=lambda card: card[0],
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=80 << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A100", "A100", "L4"]),
        ("", []),
        ("-1", []),
        ("2", ["L4"]),
        ("2, 0", ["L4", "A100"]),
        ("0,7,1", ["A100"]),
        ("0,-1,1", ["A100"]),
        ("GPU-cccc-3", ["L4"]),
        ("GPU-cc", ["L4"]),
        ("GPU-dd", []),
        ("MIG-7", ["A100 MIG"]),
        ("MIG-8", []),
        ("1,MIG-8,0", ["A100"]),
        ("nonsense", []),
    ],
)
def test_only_visible_cards_count(visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in find_gpus()] == names
