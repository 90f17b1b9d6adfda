"""What tests of one service share: its API over a separate bucket, and runs forked from one process that holds the
libraries."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from tests.integration.children import MODELS, Run, prepare, run_main
from tests.integration.running import RunningApi

pytest.register_assert_rewrite("tests.integration.rank_runs")


@pytest.fixture
def api(own_bucket: StorageSettings, queue_settings: QueueSettings) -> Iterator[RunningApi]:
    service = JobService(own_bucket, queue_settings)
    service.check_storage()
    api = RunningApi(service)
    with api.run():
        yield api


@pytest.fixture(scope="session")
def forks() -> Iterator[Callable[..., ForkServerProcess]]:
    """Starts runs from a process that holds the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo_core.training.run", "grpo_core.engines.native.engine"])
    started: list[ForkServerProcess] = []

    def fork(
        root: Path,
        spec: dict[str, Any],
        *more: str,
        epoch: int = 2,
        models: Path = MODELS,
        fault: Callable[[], None] | None = None,
        log: str = "stderr.log",
        variables: dict[str, str] | None = None,
    ) -> ForkServerProcess:
        arguments = prepare(root, spec, *more, epoch=epoch)
        environment = {"GRPO_MODEL_DIR": str(models), **(variables or {})}
        process = context.Process(target=run_main, args=(arguments, str(root / log), environment, fault))
        process.start()
        started.append(process)
        return process

    yield fork
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


@pytest.fixture(scope="session")
def finish(forks: Callable[..., ForkServerProcess]) -> Callable[..., Run]:
    def run(root: Path, spec: dict[str, Any], *more: str, **options: Any) -> Run:
        process = forks(root, spec, *more, **options)
        process.join()
        assert process.exitcode is not None
        return Run(root, process.exitcode)

    return run
