"""One stage for all faults, put in order before each, and the table of how each went."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from _pytest.mark import ParameterSet

from tests.acceptance.faults import table
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import Stage

extended = pytest.mark.extended
"""More moments and ways of a fault whose worst is tried in any case: for `make faults`, not for every `make test`."""
Tell = Callable[[str, str, float | None], None]


def extend(*values: object) -> ParameterSet:
    """One more case of a parametrised test, of the same kind."""
    return pytest.param(*values, marks=extended)


_LINES: list[table.Line] = []


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
    if os.environ.get("GRPO_FAULT_TABLE") and not session.testsfailed:
        table.write(_LINES)
