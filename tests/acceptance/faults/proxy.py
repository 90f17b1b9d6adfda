"""A TCP proxy that misbehaves when told to: it stands between a process and the server it talks to.

Owns the ways in which a network, or a server behind it, fails; knows nothing of Redis, and of HTTP no more than what an
answer looks like. It runs in a thread of the test's process. Invariant: in the mode `open` bytes pass unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from deploy.local.ports import pick_port

Mode = Literal["open", "refused", "hole", "slow", "busy", "torn", "garbled"]
"""refused: nobody listens. hole: connections stand and no byte passes, until it is open again. slow: each piece of a
request waits. busy: HTTP 503 to everything. torn: an answer breaks off in the middle. garbled: a bit of each request's
body is turned."""
T = TypeVar("T")

_CHUNK = 65536
_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: 59\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>wait</Message></Error>"
)
_HTTP_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) ")


@dataclass(eq=False)
class Trap:
    """Something to do when a request that looks like this comes by."""

    pattern: re.Pattern[bytes]
    action: Callable[[], None]
    when: Literal["before", "after"]
    """before: the request waits for `release`. after: its answer came, and is not passed on."""
    sprung: threading.Event = field(default_factory=threading.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class Network:
    """The thread and event loop that all proxies of a test run in."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.servers: set[asyncio.Server] = set()
        self.transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()
        """Of every connection; the loop keeps those that are open, or that have bytes to send."""
        self._thread = threading.Thread(target=self.loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the loop, from outside."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def close(self) -> None:
        """End the thread with all that still runs in it, and every connection.

        One that were left open, or had bytes to send yet, would be closed when its memory is reclaimed: with a warning
        that fails whatever test runs then.
        """

        async def end() -> None:
            await _close(self.servers)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for transport in list(self.transports):
                transport.abort()
            await asyncio.sleep(0)  # a transport closes its socket in the loop's next round

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


class Proxy:
    """One line to one server."""

    def __init__(self, network: Network, target: int) -> None:
        self.port = pick_port()
        self._network = network
        self._target = target
        self._mode: Mode = "open"
        self._delay = 0.0
        self._flowing = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._traps: list[Trap] = []
        network.run(self._set("open", 0.0))

    def open(self) -> None:
        """Behave, from now on; what a hole held back goes on its way."""
        self._network.run(self._set("open", 0.0))

    def cut(self) -> None:
        """Reset every connection there is; new ones are welcome."""
        self._network.run(self._reset_all())

    @contextlib.contextmanager
    def fault(self, mode: Mode, *, delay: float = 0.0) -> Generator[None]:
        """Misbehave for the length of a block."""
        self._network.run(self._set(mode, delay))
        try:
            yield
        finally:
            self.open()

    def trap(self, pattern: bytes, action: Callable[[], None], *, when: Literal["before", "after"] = "after") -> Trap:
        """Do something once, when a request matches, at the named moment. The action must not block."""
        trap = Trap(re.compile(pattern, re.DOTALL), action, when)

        async def add() -> None:
            self._traps.append(trap)

        self._network.run(add())
        return trap

    def release(self, trap: Trap) -> None:
        """Let the request that sprang a trap before it was sent go on its way."""

        async def go() -> None:
            trap.released.set()

        self._network.run(go())

    async def _set(self, mode: Mode, delay: float) -> None:
        self._mode, self._delay = mode, delay
        if mode == "hole":
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode == "refused" and self._server is not None:
            await _close({self._server})
            self._network.servers.discard(self._server)
            self._server = None
            await self._reset_all()
        elif mode != "refused" and self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self._network.servers.add(self._server)

    async def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would print it
            await self._join(reader, writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._network.transports.add(writer.transport)
        await self._flowing.wait()
        try:
            there, onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        self._network.transports.add(onward.transport)
        link = _Link(self, writer, onward)
        self._writers |= {writer, onward}
        try:
            pumps = [asyncio.ensure_future(link.ask(reader)), asyncio.ensure_future(link.answer(there))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._writers -= {writer, onward}
            for end in (writer, onward):
                end.close()


class _Link:
    """The two directions of one connection."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._awaited: list[Trap] = []

    async def ask(self, reader: asyncio.StreamReader) -> None:
        proxy = self._proxy
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await proxy._flowing.wait()
                if proxy._mode == "slow":
                    await asyncio.sleep(proxy._delay)
                if proxy._mode == "busy":
                    await self._refuse(reader)
                    return
                if proxy._mode == "garbled" and not _HTTP_REQUEST.match(chunk):
                    chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
                await self._spring(chunk)
                self._server.write(chunk)
                await self._server.drain()

    async def answer(self, reader: asyncio.StreamReader) -> None:
        proxy = self._proxy
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await proxy._flowing.wait()
                if self._awaited and not chunk.startswith(b"HTTP/1.1 100"):
                    for trap in self._awaited:
                        trap.action()
                        trap.sprung.set()
                    _reset(self._client)
                    return
                if proxy._mode == "torn":
                    self._client.write(chunk[: len(chunk) // 2])
                    await self._client.drain()
                    _reset(self._client)
                    return
                self._client.write(chunk)
                await self._client.drain()

    async def _spring(self, chunk: bytes) -> None:
        for trap in list(self._proxy._traps):
            if not trap.pattern.search(chunk):
                continue
            self._proxy._traps.remove(trap)
            if trap.when == "after":
                self._awaited.append(trap)
                continue
            trap.action()
            trap.sprung.set()
            await trap.released.wait()

    async def _refuse(self, reader: asyncio.StreamReader) -> None:
        """Answer, and read on for a moment: a reset would hide the answer."""
        self._client.write(_BUSY)
        await self._client.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(1):
                while await reader.read(_CHUNK):
                    pass


async def _close(servers: set[asyncio.Server]) -> None:
    """Listen no longer."""
    await asyncio.sleep(0.05)  # a server that is closed drops what it has just accepted, and leaves its socket open
    for server in servers:
        server.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash of the host does: with RST, whatever was on its way."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
