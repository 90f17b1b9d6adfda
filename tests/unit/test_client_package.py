"""What the client promises as a package: its names, its types, and that waiting ends."""

from __future__ import annotations

import ast
import inspect
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import grpo_client
from api.app import create_app
from grpo_client import GrpoClient, WaitTimeoutError, results
from grpo_client.json_object import JsonObject, fields
from scripts import client_types
from tests.clock import patience
from tests.unit.fakes import FakeJobService

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "grpo_client" / "README.md"]
CLIENT_PAGE = (ROOT / "docs" / "reference" / "client.md").read_text()
JOB = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_the_exported_names_are_those_that_are_documented() -> None:
    classes = {name for name in re.findall(r"`([A-Z]\w+)`", CLIENT_PAGE) if not name.isupper() and name[1].islower()}
    assert classes - {"TimeoutError"} == set(grpo_client.__all__)
    assert [name for name in grpo_client.__all__ if not isinstance(getattr(grpo_client, name), type)] == []
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        grpo_client.nothing_of_this_name  # type: ignore[attr-defined]  # noqa: B018


def test_every_method_of_the_client_is_documented() -> None:
    section = re.search(r"## Methods of `GrpoClient`\n(.*?)\n## ", CLIENT_PAGE, re.DOTALL)
    assert section is not None
    documented = {
        name for row in re.findall(r"^\| (`.*?`) \|", section[1], re.M) for name in re.findall(r"`(\w+)", row)
    }
    methods = {name for name, value in vars(GrpoClient).items() if inspect.isfunction(value) and name[0] != "_"}
    assert documented == methods


def test_the_types_are_those_that_make_docs_would_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["client_types.py", "--check"])
    assert client_types.main() == 0, "run make docs"


DOCUMENT = create_app(FakeJobService()).openapi_schema.to_schema()  # type: ignore[arg-type]
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def references(node: Any) -> Iterator[str]:
    """The names of all schemas that a part of the document refers to, and those that they refer to."""
    for name in re.findall(r"'#/components/schemas/(\w+)'", repr(node)):
        yield name
        yield from references(SCHEMAS[name])


def answered() -> set[str]:
    """The objects that a successful request to the API is answered with, but for probes and what OpenAI's SDK reads."""
    successes = [
        response
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        for status, response in operation["responses"].items()
        if status.startswith("2") and not path.startswith(("/health", "/ready", "/live"))
    ]
    names = {name for response in successes for name in references(response) if SCHEMAS[name].get("properties")}
    return {name for name in names if not name.startswith(client_types.NOT_OURS)}


def test_every_field_that_the_api_answers_with_is_typed() -> None:
    names = answered()
    assert {"JobDetail", "RolloutList", "UsageReport", "ArtifactFile"} <= names
    for name in names:
        kind = getattr(results, client_types.python_name(name))
        typed = {field.rstrip("_") for field in fields(kind)}
        assert typed == set(SCHEMAS[name]["properties"]), f"{name}: run make docs"


@pytest.mark.parametrize("name", sorted(grpo_client.__all__))
def test_no_field_of_a_result_is_without_a_type(name: str) -> None:
    kind = getattr(grpo_client, name)
    if issubclass(kind, JsonObject):
        assert [field for field, hint in fields(kind).items() if hint is Any] == []


def test_times_are_times_and_nested_objects_are_typed() -> None:
    job = grpo_client.JobDetail(
        {"created_at": "2026-01-02T03:04:05Z", "error": {"class": "oom"}, "waiting": None, "new": 1}
    )
    assert isinstance(job.created_at, datetime)
    assert job.error is not None
    assert job.error.class_ == "oom"
    assert job.waiting is None
    assert job["new"] == 1


class Listener:
    """A service that answers every request with `head`, then sends `piece` every `pause` seconds, and never ends."""

    def __init__(self, head: bytes, piece: bytes = b"", pause: float = 0.05) -> None:
        self._head, self._piece, self._pause = head, piece, pause
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                connection.sendall(self._head)
                while self._piece:
                    connection.sendall(self._piece)
                    time.sleep(self._pause)
                connection.recv(1)
            except OSError:
                return


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


LOG = b'data: {"seq": 1, "type": "log", "data": {}}\n\n'
LAST = b'data: {"seq": 1, "type": "status", "data": {"status": "succeeded"}}\n\n'


@pytest.mark.parametrize(
    "listener",
    [
        pytest.param(lambda: Listener(b""), id="never answers"),
        pytest.param(lambda: Listener(HEAD), id="answers and is silent"),
        pytest.param(lambda: Listener(HEAD, chunk(b": alive\n\n")), id="only heartbeats"),
        pytest.param(lambda: Listener(HEAD, chunk(LOG)), id="events"),
        pytest.param(lambda: Listener(HEAD + chunk(LAST)), id="the last event, and the job cannot be read"),
        pytest.param(lambda: Listener(HEAD, chunk(b"data: x")), id="half an event"),
        pytest.param(lambda: Listener(HEAD + b"0\r\n\r\n"), id="ends at once"),
    ],
)
def test_waiting_ends_in_time_whatever_the_service_does(listener: Any) -> None:
    service = listener()
    with closing(service), GrpoClient(service.url, "grpo_key", timeout=30) as client:
        started = time.monotonic()
        with pytest.raises(WaitTimeoutError, match=f"{JOB} has not ended within 0.5 s"):
            client.wait(JOB, poll=0.05, timeout=0.5)
        assert 0.4 < time.monotonic() - started < patience(5)


def python_blocks() -> list[tuple[str, ast.Module]]:
    return [
        (f"{page.relative_to(ROOT)}: {block.strip().splitlines()[0]}", ast.parse(block))
        for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def test_no_printed_example_can_wait_for_ever() -> None:
    waits = [
        (where, call)
        for where, block in python_blocks()
        for call in ast.walk(block)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("wait", "stream")
    ]
    assert len(waits) >= 3
    assert [where for where, call in waits if "timeout" not in {keyword.arg for keyword in call.keywords}] == []
