"""Which cards a worker and its training count, by a driver that lists all of the host, and the worker's queues."""

from __future__ import annotations

import os
import sys
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.hardware.gpus import find_gpus, show_gpus, showing_all
from grpo_core.spec import JobSpec, parse_spec
from jobs.store.queues import queue_for, queues_served, with_formats
from jobs.worker.worker import WorkerSettings

CARDS = [("A100", "GPU-aaaa-1"), ("A100", "GPU-aabb-2"), ("L4", "GPU-cccc-3")]


class NVMLError(Exception):
    pass


def by_uuid(uuid: str) -> Any:
    if uuid == "MIG-7":
        return ("A100 MIG", uuid)
    raise NVMLError


def capability(card: Any) -> tuple[int, int]:
    if card[1] == "MIG-7":
        raise NVMLError
    return (9, 0)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=CARDS.__len__,
        nvmlDeviceGetHandleByIndex=CARDS.__getitem__,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda card: card[1].encode(),  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetName=itemgetter(0),
        nvmlDeviceGetCudaComputeCapability=capability,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=80 << 30),  # pyright: ignore[reportUnknownLambdaType]
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


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
    two = ["grpo.gpu2.16gb", "grpo.gpu2", "grpo.gpu1.16gb", "grpo.gpu1"]
    assert queues_served(17.0, gpus=2) == two  # all of its GPUs, or as many as a job asks for
    several = parse_spec({"engine": "native", "resources": {"gpus": 2}})
    assert several.needed_format() == 2
    assert queue_for(several) in with_formats(two)
    assert queue_for(several) not in with_formats(queues_served(17.0))


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


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NVMLError

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", missing)
    assert find_gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpus() == [], "the package that asks it is not installed"


@pytest.mark.parametrize(
    ("visible", "count", "shown"),
    [(None, 1, "0"), (None, 0, ""), ("3,1", 1, "3"), ("GPU-a,GPU-b", 1, "GPU-a"), ("", 0, "")],
)
def test_a_job_sees_no_more_gpus_than_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, shown: str
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "GRPO_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, visible or "")
        if visible is None or name.startswith("GRPO"):
            monkeypatch.delenv(name)
    show_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
    # A child process may see all of them again.
    assert showing_all().get("CUDA_VISIBLE_DEVICES") == (visible or None)
