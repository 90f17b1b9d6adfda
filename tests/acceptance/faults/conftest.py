"""One stage for all faults, put in order before each, and the table of how each went."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.acceptance.faults import table
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import Stage

HERE = Path(__file__).parent
core = pytest.mark.core
"""One fault of each kind, for `make test`; `make long` has the others."""
Tell = Callable[[str, str, float | None], None]


def extend(*values: object) -> ParameterSet:
    """One more case of a `core` test, which `make test` leaves to `make long`."""
    return pytest.param(*values, marks=pytest.mark.long)


_LINES: list[table.Line] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.fault)


@pytest.fixture(scope="package")
def whole_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Stage:
    """Everything runs and every line is open, whatever the test before has done."""
    whole_stage.start()
    return whole_stage


@pytest.fixture(scope="package")
def oracle(whole_stage: Stage) -> Oracle:
    return Oracle(whole_stage)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Iterator[Tell]:
    """Say what was done, what happened and how long recovery took; a test that fails says nothing."""
    told: list[table.Line] = []

    def tell(done: str, happened: str, seconds: float | None = None) -> None:
        told.append(table.Line(group=request.module.GROUP, done=done, happened=happened, seconds=seconds))

    failed = request.session.testsfailed
    yield tell
    if request.session.testsfailed == failed:
        _LINES.extend(told)
        print(*told, sep="\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Of several processes each has some lines only: `make faults JOBS=0` runs all in one.
    is_whole = not hasattr(session.config, "workerinput")
    if os.environ.get("GRPO_FAULT_TABLE") and is_whole and not session.testsfailed:
        table.write(_LINES)
