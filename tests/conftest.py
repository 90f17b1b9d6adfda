"""Real servers for the tests: one Valkey and one SeaweedFS for the whole session, started by the first test in need.

Tests share them and keep apart by `prefix`. A fault test may stop or kill a server, and starts it again when done.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deploy.local.ports import pick_port, pick_s3_port
from deploy.local.process import Child, Service
from deploy.local.seaweedfs import SeaweedFS
from deploy.local.valkey import Valkey
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from tests.clock import patience

# Before torch is imported: with a thread for each core it computes tiny models four times as slowly, and processes of
# `make test` that each have as many hold each other up. Children of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
LONGEST_FILES = (
    "test_long_outages.py",
    "test_soak.py",
    "test_worker.py",
    "test_training.py",
    "test_resume.py",
    "test_bench_cards.py",
    "test_playground_rows.py",
    "test_learning.py",
)
SLOWEST_FOLDERS = ("acceptance", "integration", "unit")
NEED_TORCH = (
    "unit/native",
    "unit/test_compat.py",
    "unit/test_logprobs.py",
    "unit/test_settings_translation.py",
    "unit/test_tensor_tree.py",
    "unit/test_tiny_model.py",
    "unit/test_unsloth_engine.py",
    "integration/test_export_formats.py",
    "integration/test_selftest.py",
)
"""Files whose tests import torch and TRL in their own process, for 7 seconds: one process of `make test` gets all."""

TRAIN = (
    "integration/native",
    "integration/test_judged_training.py",
    "integration/test_resume.py",
    "integration/test_trackers.py",
)
TRAIN_TOO = (
    "integration/test_evaluations.py",
    "integration/test_grader_examples.py",
    "integration/test_training.py",
)
"""Files with runs that are forked from a process that has imported torch: two such processes, which take as long."""


def pytest_configure() -> None:
    """Write the stack of each thread to a file when `.ci/run` ends this process at a stage's limit."""
    if folder := os.environ.get("GRPO_TEST_STACKS"):
        file = Path(folder) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'pytest')}-{os.getpid()}"
        faulthandler.register(signal.SIGTERM, os.open(file, os.O_WRONLY | os.O_CREAT), chain=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that processes that share the work end together. In a file, tests
    marked `last` end what the others share."""
    sizes = Counter(item.path for item in items)

    def rank(item: pytest.Item) -> tuple[int, int, str, int, str, bool]:
        name, folder = item.path.name, item.path.relative_to(HERE).parts[0]
        file = LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)
        place = SLOWEST_FOLDERS.index(folder) if folder in SLOWEST_FOLDERS else 0
        is_last = item.get_closest_marker("last") is not None
        return file, place, str(item.path.parent), -sizes[item.path], str(item.path), is_last

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files, as `--dist loadfile` does, and those together that share what is slow to import. A process
    that crashes fails one test, and never the run."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            groups = [
                group for group in (NEED_TORCH, TRAIN, TRAIN_TOO) if file.removeprefix("tests/").startswith(group)
            ]
            return groups[0][0] if groups else file

        def remove_node(self, node: Any) -> str | None:
            # xdist puts all files of a crashed process back, also those that are done; a process that is then given
            # one of these waits for ever (seen in 3.8.0).
            files = self.assigned_work[node]
            self.assigned_work[node] = {file: tests for file, tests in files.items() if not all(tests.values())}
            return super().remove_node(node)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A folder is not imported if all its tests are left out."""
    apart = collection_path.parent == HERE and collection_path.name in ("gpu", "browser", "containers")
    return True if apart and f"not {collection_path.name}" in config.getoption("markexpr") else None


def pytest_collection_finish(session: pytest.Session) -> None:
    doubles = [name for name, count in Counter(item.nodeid for item in session.items).items() if count > 1]
    if doubles:
        raise pytest.UsageError(f"Of tests with one name only the first would run: {', '.join(doubles)}")
    if hasattr(session.config, "workerinput") and "torch" in sys.modules:
        raise pytest.UsageError("A file of tests imports torch, in every process: use tests/lazy.py")


class Server:
    """A server that a test can end and bring back, on the same port and with the same data."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._child: Child | None = None

    def start(self) -> None:
        """Returns when it answers; starting a running server does nothing."""
        if self._child is None or not self._child.alive():
            self._child = Child(self._service)
            self._child.wait_ready(patience(30))

    def stop(self) -> None:
        """As an operator would: TERM, and everything is on disk."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """As a crash would: KILL."""
        if self._child is not None:
            self._child.kill()

    @property
    def pid(self) -> int:
        assert self._child is not None, "not started"
        return self._child.pid


class ValkeyServer(Server):
    def __init__(self, config: Valkey) -> None:
        super().__init__(config.service())
        self.url = config.url
        self.password = config.password
        self.port = config.port


class SeaweedFSServer(Server):
    def __init__(self, config: SeaweedFS) -> None:
        super().__init__(config.service())
        self.endpoint = config.endpoint
        self.port = config.port
        self.access_key = config.access_key
        self.secret_key = config.secret_key
        self.bucket = config.bucket
        self.region = config.region
        self.client = config.client
        self.certificates = config.certificates


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    folder = tmp_path_factory.mktemp("valkey")
    server = ValkeyServer(
        Valkey(data=folder / "data", port=pick_port(), password=secrets.token_urlsafe(24), log=folder / "valkey.log")
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFSServer]:
    folder = tmp_path_factory.mktemp("seaweedfs")
    server = SeaweedFSServer(
        SeaweedFS(
            data=folder / "data",
            port=pick_s3_port(),
            access_key=secrets.token_hex(10),
            secret_key=secrets.token_urlsafe(30),
            log=folder / "seaweedfs.log",
        )
    )
    try:
        server.start()
        yield server
    finally:
        server.kill()  # not stopped, which takes five seconds


@pytest.fixture
def prefix() -> str:
    """The first part of this test's keys in Valkey; no other test has it."""
    return f"t-{uuid.uuid4().hex[:16]}"


@pytest.fixture
def queue_settings(valkey: ValkeyServer, prefix: str) -> QueueSettings:
    # Validated, not constructed: construction would also read the environment.
    return QueueSettings.model_validate({"redis_url": valkey.url, "prefix": prefix})


@pytest.fixture
def storage_settings(seaweedfs: SeaweedFSServer) -> StorageSettings:
    return StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )


@pytest.fixture
def own_bucket(seaweedfs: SeaweedFSServer, storage_settings: StorageSettings, prefix: str) -> Iterator[StorageSettings]:
    """A bucket that no other test has. SeaweedFS has few volumes and gives each bucket some, so it is deleted."""
    yield storage_settings.model_copy(update={"bucket": prefix})
    client = seaweedfs.client()
    with suppress(client.exceptions.NoSuchBucket):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=prefix)
        for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
            client.delete_object(Bucket=prefix, Key=key)
        client.delete_bucket(Bucket=prefix)


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> Iterator[JobService]:
    """The facade, with its threads running."""
    service = JobService(storage_settings, queue_settings)
    service.start()
    service.check_storage()  # on a busy machine it may not have answered yet, and nothing is accepted before
    yield service
    service.close()
