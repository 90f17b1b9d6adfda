"""A store that answers and has lost what was in it is not ready."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.local.process import Child
from deploy.local.seaweedfs import SeaweedFS
from jobs.errors import Damaged, Unavailable
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.sentinel import Sentinel
from tests.integration.running import RunningApi, wait_until
from tests.integration.store import new_store, shell


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SeaweedFS]:
    """One that a test may ruin."""
    config = new_store(tmp_path)
    child = Child(config.service())
    try:
        child.wait_ready()
        yield config
    finally:
        child.stop()


def settings(store: SeaweedFS) -> StorageSettings:
    return StorageSettings.model_validate(
        {"endpoint": store.endpoint, "access_key": store.access_key, "secret_key": store.secret_key}
    )


@pytest.mark.parametrize(
    "erase",
    ["collection.delete -collection grpo-jobs -force", "fs.rm -rf /buckets/grpo-jobs"],
    ids=["volumes", "names"],
)
def test_the_api_is_not_ready_once_the_bucket_was_erased(
    store: SeaweedFS, queue_settings: QueueSettings, erase: str
) -> None:
    api = RunningApi(JobService(settings(store), queue_settings))
    with api.run():
        url = f"{api.url}/readyz"
        wait_until(lambda: httpx.get(url).status_code == 200)
        shell(store.port, erase, store.data, timeout_s=60)
        # The store itself goes on answering, so that an answer alone proves nothing.
        assert store.client().list_buckets()
        wait_until(lambda: httpx.get(url).status_code == 503)
        assert httpx.get(url).json()["checks"] == {"valkey": "ok", "storage": "no answer"}


def test_processes_share_one_sentinel_and_see_it_change(storage_settings: StorageSettings) -> None:
    first, second = ObjectStore(storage_settings), ObjectStore(storage_settings)
    first.ping()
    second.ping()
    kept = first.get(object_keys.SENTINEL)
    assert kept is not None
    try:
        first.delete(object_keys.SENTINEL)
        with pytest.raises(Damaged, match="lost its objects"):
            first.ping()
        # A process that starts now knows no better and makes another; those from before are not fooled by it.
        ObjectStore(storage_settings).ping()
        with pytest.raises(Damaged, match="another bucket"):
            second.ping()
    finally:
        first.put(object_keys.SENTINEL, kept)
    second.ping()


def test_a_store_that_is_away_is_not_one_that_lost_its_data(storage_settings: StorageSettings) -> None:
    away = ObjectStore(storage_settings.model_copy(update={"endpoint": "http://127.0.0.1:9"}))
    with pytest.raises(Unavailable):
        Sentinel(away).check()
