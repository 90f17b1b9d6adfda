"""Fifty watchers of one job miss nothing; `scripts/bench_watchers.py` is the same for longer, with the memory."""

from __future__ import annotations

import asyncio
import os

from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from scripts.bench_watchers import watch
from tests.integration.running import RunningApi

SECONDS = float(os.environ.get("GRPO_WATCH_SECONDS", "6"))


def test_no_watcher_misses_an_event(storage_settings: StorageSettings, queue_settings: QueueSettings) -> None:
    api = RunningApi(JobService(storage_settings, queue_settings))
    key, _ = api.service.keys.create("ann")
    with api.run():
        found = asyncio.run(watch(api.service, api.url, key, "ann", watchers=50, seconds=SECONDS, rate=5, rss=None))
    assert (found["missed"], found["twice"], found["out_of_order"]) == (0, 0, 0), found
    assert found["read"] == 50 * found["events"] > 50 * SECONDS * 5
    assert found["connections"] > 50, "some hung up and came back"
    assert api.streams.readers == 0
