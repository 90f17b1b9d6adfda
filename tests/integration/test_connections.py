"""Connections of strangers: half a request, an endless one, a slow one. The API goes on answering everyone else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

import api.connections
from deploy.local.ports import pick_port
from jobs.auth.sessions import Session
from tests.clock import patience
from tests.integration.running import RunningApi, wait_until
from tests.unit.fakes import FakeJobService, bearer

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"


@contextlib.contextmanager
def running(**settings: Any) -> Generator[RunningApi]:
    service: Any = FakeJobService()
    server = RunningApi(service, **settings)
    with server.run():
        yield server


def connect(server: RunningApi) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def answer(sock: socket.socket) -> bytes:
    """All there is until the other side closes, however it does."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            found += chunk
    return found


def sent_before_the_end(sock: socket.socket, piece: bytes, *, pause: float = 0) -> int:
    """How much the other side takes, of 50 MB at most."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 50 * 1024**2:
            sent += sock.send(piece)
            time.sleep(pause)
    return sent


def test_a_thousand_half_requests_leave_the_api_reachable_with_1024_descriptors(tmp_path: Path) -> None:
    """A process of its own, as its descriptors are what the attack takes."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent("""
            import resource
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
            from api.app import create_app
            from api.server import make_server
            from api.settings import ApiSettings
            from tests.unit.fakes import FakeJobService
            settings = ApiSettings()
            make_server(create_app(FakeJobService(), settings), settings).run()
        """)
    )
    port = pick_port()
    environment = {**os.environ, "GRPO_API_PORT": str(port), "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held: list[socket.socket] = []
    try:
        wait_until(lambda: _answers(port), seconds=60)
        for _ in range(1200):
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            sock.sendall(REQUEST)
            held.append(sock)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=2) as client:
            for _ in range(20):
                assert client.get("/healthz", headers={"Connection": "close"}).status_code == 200
        wait_until(lambda: len([*Path(f"/proc/{process.pid}/fd").iterdir()]) < 150)
    finally:
        for sock in held:
            sock.close()
        process.terminate()
        process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    return False


@pytest.mark.parametrize(
    "start",
    [
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: ",
        b"GET /",
        b"POST /jobs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
        b"POST /jobs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
    ids=["header", "address", "trailer", "extension"],
)
def test_what_has_no_end_is_cut_off(start: bytes) -> None:
    with running() as server, connect(server) as sock:
        sock.sendall(start)
        assert sent_before_the_end(sock, b"a" * 8192) < 5 * 1024**2, "what socket buffers hold, and no more"


def test_headers_that_are_too_large_are_told_so() -> None:
    with running() as server:
        for headers in ({"x-long": "a" * 40_000}, {f"x-{n}": "a" for n in range(150)}):
            found = httpx.get(f"{server.url}/healthz", headers=headers)
            assert (found.status_code, found.json()["code"]) == (431, "headers_too_large")
            assert found.headers["content-type"] == "application/problem+json"
        assert httpx.get(f"{server.url}/healthz", headers={"x-long": "a" * 30_000}).status_code == 200


@pytest.mark.parametrize("start", [b"", b"\r\n", REQUEST, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" + REQUEST])
def test_half_a_request_is_ended_in_time(start: bytes) -> None:
    with running(header_seconds=0.5) as server, connect(server) as sock:
        begun = time.monotonic()
        sock.sendall(start)
        found = answer(sock)
        assert time.monotonic() - begun < patience(3)
        assert found.rpartition(b"HTTP/1.1 ")[2].startswith(b"408 ")


def test_a_header_now_and_then_does_not_prolong_it() -> None:
    with running(header_seconds=0.5) as server, connect(server) as sock:
        sock.sendall(REQUEST)
        assert sent_before_the_end(sock, b"X-More: a\r\n", pause=0.1) < 30 * len(b"X-More: a\r\n")


def test_a_body_that_trickles_is_ended_and_one_that_flows_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.connections, "BODY_SECONDS", 2.0)
    head = "POST /datasets HTTP/1.1\r\nHost: a\r\nAuthorization: {}\r\nContent-Type: application/x-ndjson\r\n"
    head = head.format(bearer()["Authorization"])
    line = b'{"question": "1+1?", "answer": "%s"}\n' % (b"2" * 60_000)
    with running() as server, connect(server) as slow, connect(server) as steady:
        slow.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())
        steady.sendall(f"{head}Content-Length: {10 * len(line)}\r\nConnection: close\r\n\r\n".encode())
        for _ in range(10):
            steady.sendall(line)
            with contextlib.suppress(OSError):
                slow.sendall(b"{")
            time.sleep(0.4)
        assert b"201" in answer(steady).partition(b"\r\n")[0]
        assert answer(slow).partition(b"\r\n")[0] in (b"", b"HTTP/1.1 408 Request Timeout")


def test_a_small_body_that_trickles_has_no_more_time_for_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.connections, "BODY_SECONDS", 0.5)
    head = f"POST /jobs HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
    with running() as server, connect(server) as sock:
        sock.sendall(head.encode())
        assert sent_before_the_end(sock, b" " * 4096, pause=0.1) < 30 * 4096


def test_one_owner_holds_no_more_than_a_share_for_long() -> None:
    head = f"POST /jobs HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\nContent-Length: 9\r\n\r\n"
    with running(max_connections=40) as server:
        opened = [connect(server) for _ in range(30)]
        for sock in opened:
            sock.sendall(head.encode())
        wait_until(lambda: len(server.server.server_state.connections) <= 10)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        for sock in opened:
            sock.close()


def test_requests_sent_ahead_are_held_by_the_dozen_and_not_by_the_thousand() -> None:
    with running() as server, connect(server) as sock:
        sock.sendall(b"GET /schema/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 5000)
        assert answer(sock).count(b"HTTP/1.1 200") <= api.connections.MAX_PIPELINED + 1
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.connections, "UNREAD_SECONDS", 0.5)
    with running() as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"GET /schema/redoc.js HTTP/1.1\r\nHost: a\r\n\r\n" * 8)
        wait_until(lambda: len(server.server.server_state.connections) == 1)
        wait_until(lambda: not server.server.server_state.connections)


def test_who_has_shown_a_key_keeps_the_connection_when_strangers_fill_the_rest() -> None:
    async def attack(server: RunningApi) -> None:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=60)
        async with httpx.AsyncClient(base_url=server.url, headers=bearer(), limits=limits) as client:
            assert (await client.get("/jobs")).status_code == 200
            before = [found for found in server.server.server_state.connections if not found.is_stranger]  # type: ignore[union-attr]
            opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(60)]
            assert (await client.get("/jobs")).status_code == 200
            after = [found for found in server.server.server_state.connections if not found.is_stranger]  # type: ignore[union-attr]
            assert before == after
            assert len(server.server.server_state.connections) <= 20
            for _, writer in opened:
                writer.close()

    with running(max_connections=20) as server:
        asyncio.run(attack(server))


def test_one_address_holds_no_more_than_its_share_for_long() -> None:
    with running(max_address_connections=5) as server:
        opened = [connect(server) for _ in range(30)]
        wait_until(lambda: len(server.server.server_state.connections) <= 5)
        for sock in opened:
            sock.close()


def test_the_refusals_of_connections_are_problem_documents() -> None:
    with running(header_seconds=0.3) as server, connect(server) as sock:
        sock.sendall(REQUEST)
        head, _, body = answer(sock).partition(b"\r\n\r\n")
        assert b"application/problem+json" in head
        assert json.loads(body)["code"] == "too_slow"


class _Addresses(FakeJobService):
    """Remembers where wrong keys came from."""

    seen: list[str]

    def log_in(self, key: str, address: str) -> Session | None:
        self.seen.append(address)
        return super().log_in(key, address)


@pytest.mark.parametrize(
    ("proxies", "forwarded", "counted"),
    [
        (set(), "203.0.113.7", "127.0.0.1"),
        ({"127.0.0.1"}, "203.0.113.7", "203.0.113.7"),
        ({"127.0.0.0/8", "10.0.0.0/8"}, "1.2.3.4, 203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ({"127.0.0.1"}, "1.2.3.4, 2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ],
)
def test_an_address_is_believed_of_proxies_only(proxies: set[str], forwarded: str, counted: str) -> None:
    fake: Any = _Addresses()
    fake.seen = []
    server = RunningApi(fake, trusted_proxies=proxies)
    with server.run():
        headers = {"X-Forwarded-For": forwarded, "X-GRPO-Page": "1"}
        assert httpx.post(f"{server.url}/session", json={"key": "grpo_wrong"}, headers=headers).status_code == 401
    assert fake.seen == [counted]
