"""Outages as long as in production, with its leases: minutes of waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.acceptance.faults.conftest import Tell
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import Stage

GROUP = "Outages of minutes, leases of 60 s"
STORAGE_SECONDS = 300
VALKEY_SECONDS = 60

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(
        tmp_path_factory.mktemp("patient"),
        workers=1,
        lease_seconds=60,
        worker_settings={"GRPO_STALL_FLOOR_SECONDS": "600", "GRPO_STALL_QUIET_SECONDS": "1800"},
    )
    try:
        stage.start()
        yield stage
    finally:
        stage.close()


def test_training_goes_on_without_storage_and_without_valkey(patient: Stage, tell: Tell) -> None:
    job = patient.submit(steps=800, checkpoint_every=20, step_seconds="0.5")
    patient.until_committed(job, 20)
    before = patient.record(job).step
    with patient.workers[0].storage.fault("hole"):
        time.sleep(STORAGE_SECONDS)
        trained = patient.record(job).step - before
    assert trained > STORAGE_SECONDS / 0.5 * 0.8, "it waited for storage"
    began = time.monotonic()
    patient.until_committed(job, before + trained // 20 * 20)
    storage_seconds = time.monotonic() - began

    before = patient.record(job).step
    with patient.valkey.down():
        time.sleep(VALKEY_SECONDS)
    began = time.monotonic()
    patient.until(lambda: patient.record(job).step >= min(800, before + 100), 60, "nothing was told of its steps")
    valkey_seconds = time.monotonic() - began
    patient.until_ended(job, seconds=120)
    Oracle(patient).check(job, epochs=1, attempts=0)
    tell(
        f"object storage silent for {STORAGE_SECONDS} s",
        f"{trained} steps were trained meanwhile; the checkpoints were sent when it was back; one run",
        storage_seconds,
    )
    tell(
        f"Valkey killed for {VALKEY_SECONDS} s, back with its file",
        "training continued, its events were sent when it was back; one run",
        valkey_seconds,
    )
