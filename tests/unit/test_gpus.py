"""Which cards a worker and its training count, by a driver that lists all of the host, and the worker's queues."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.gpus import count_gpus, show_gpus
from grpo_core.spec import JobSpec
from jobs.gpus import find_gpus
from jobs.queue import queue_for, queues_served
from jobs.worker import WorkerSettings

CARDS = [("A100", "GPU-aaaa-1"), ("A100", "GPU-aabb-2"), ("L4", "GPU-cccc-3")]


class NVMLError(Exception):
    pass


def by_uuid(uuid: str) -> Any:
    if uuid == "MIG-7":
        return ("A100 MIG", uuid)
    raise NVMLError


class Driver:
    """The driver's own library, as far as training asks it."""

    def __init__(self, status: int = 0) -> None:
        self._status = status

    def nvmlInit_v2(self) -> int:  # noqa: N802 - the driver's name
        return self._status

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(CARDS)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, size: int) -> int:  # noqa: N802
        text.value = CARDS[handle.value - 1][1].encode()
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        return 0 if uuid == b"MIG-7" else 6


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
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())


@pytest.mark.parametrize(
    ("resources", "card_gb", "fits"),
    [
        ({"gpus": 0}, None, True),
        ({"gpus": 0}, 80.0, False),
        ({"gpus": 1}, None, False),
        ({"gpus": 1}, 12.0, True),
        ({"gpus": 1, "min_gpu_memory_gb": 20}, 25.8, True),
        ({"gpus": 1, "min_gpu_memory_gb": 25}, 25.8, False),
        ({"gpus": 1, "min_gpu_memory_gb": 200}, 192.0, False),
        ({"gpus": 1, "min_gpu_memory_gb": 200}, 288.4, True),
        ({"gpus": 1, "min_gpu_memory_gb": 500}, 288.4, False),
        ({"gpus": 1, "min_gpu_memory_gb": 500}, 1024.0, True),
    ],
)
def test_a_job_waits_where_a_card_that_can_run_it_is_heard(
    resources: dict[str, int], card_gb: float | None, fits: bool
) -> None:
    spec = JobSpec.model_validate({"resources": resources, "optimizer": {"name": "adamw_torch"}})
    assert (queue_for(spec) in queues_served(card_gb)) is fits


def test_a_worker_listens_for_the_largest_jobs_first_and_for_no_job_of_several_cards() -> None:
    assert queues_served(25.8, "mine") == ["mine.gpu1.24gb", "mine.gpu1.16gb", "mine.gpu1"]


def test_queues_are_given_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_QUEUES", "grpo.cpu, grpo.gpu1,")
    assert WorkerSettings().queues == ["grpo.cpu", "grpo.gpu1"]


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
def test_only_visible_cards_count_for_the_worker_and_for_training(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in find_gpus()] == names
    assert count_gpus() == len(names)


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert count_gpus() == 0
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status=9))
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("visible", "count", "shown"),
    [(None, 1, "0"), (None, 0, ""), ("3,1", 1, "3"), ("GPU-a,GPU-b", 1, "GPU-a"), ("", 0, "")],
)
def test_a_job_sees_no_more_gpus_than_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, shown: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
