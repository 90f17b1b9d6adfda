"""The application on a fake service: one for each module of tests, empty at the start of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from tests.unit.fakes import FakeJobService, bearer


@pytest.fixture(scope="module")
def _running() -> Iterator[tuple[TestClient[Litestar], FakeJobService]]:
    service = FakeJobService()
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.headers.update(bearer())
        yield client, service


@pytest.fixture
def service(_running: tuple[TestClient[Litestar], FakeJobService]) -> FakeJobService:
    """What the application asks; tests put jobs into it."""
    _running[1].reset()
    return _running[1]


@pytest.fixture
def client(_running: tuple[TestClient[Litestar], FakeJobService], service: FakeJobService) -> TestClient[Litestar]:
    """Sends requests with alice's key."""
    return _running[0]
