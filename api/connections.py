"""Limits for a connection before it is authenticated: header bytes, time, and a share of the descriptors.

uvicorn has no such limits, so its protocol is extended here. Owns which connections are closed; requests are the
application's. Invariants: however many clients send nothing, or a byte now and then, a new connection gets a
descriptor; and a connection whose request is being answered is never closed for another.
"""

from __future__ import annotations

import ipaddress
import json
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn

from api.compat import HttpProtocol
from api.problems import MEDIA_TYPE, PROBLEMS, type_uri

if TYPE_CHECKING:
    import asyncio

    from litestar import Litestar
    from pydantic import IPvAnyNetwork

    from api.settings import ApiSettings

log = structlog.get_logger(__name__)

MAX_HEADERS = 100
MAX_PIPELINED = 8
"""Requests that a client may send ahead on one connection: each is held in memory until its turn."""
BODY_SECONDS = 20.0
"""How long a body may take."""
UPLOAD_BYTES_PER_SECOND = 64 * 1024
"""A data set may take a second more for each such number of bytes that came: it holds one of few places."""
UPLOADS = "/datasets"
OWNER_SHARE = 4
"""The divisor of all connections that gives the share of one owner, besides those that are being answered."""
UNREAD_SECONDS = 60.0
"""How long an answer may wait for its reader to take some of it."""
GRACE_SECONDS = 1.0
"""A younger connection is not ended to make room: its request may be on its way."""
RANKS = range(3)
BACKLOG = 256
MAX_FILES = 65_536
OWN_FILES = 128
"""Descriptors kept for all else: connections to storage and Valkey, uploads, logs."""


@dataclass(eq=False)
class Connections:
    """The connections of one process."""

    header_bytes: int
    header_seconds: float
    max_connections: int
    max_strangers: int
    max_owned: int
    proxies: frozenset[IPvAnyNetwork] = frozenset()
    """Their addresses stand for all their clients, and so have no share."""
    _open: dict[Connection, None] = field(default_factory=dict[Any, None])
    """Oldest first."""

    def add(self, connection: Connection) -> None:
        """Take in a new connection; where that is one too many, the oldest that waits for its client goes."""
        if len(self._open) >= self.max_connections:
            waiting = (found for rank in RANKS for found in self._open if found.rank == rank and found.waits_for_client)
            next(waiting, connection).end("too many connections")
        if not connection.is_over:
            self._open[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._open.pop(connection, None)

    def sweep(self, now: float) -> None:
        """End what takes too long, and what an address or owner holds beyond its share. To be called every second."""
        strangers: dict[str, list[Connection]] = {}
        owned: dict[str, list[Connection]] = {}
        for connection in [*self._open]:
            connection.check_time(now)
            if connection.waits_for_client and now - connection.opened > GRACE_SECONDS:
                if connection.is_stranger:
                    strangers.setdefault(connection.address, []).append(connection)
                else:
                    owned.setdefault(connection.owner, []).append(connection)
        for address, waiting in strangers.items():
            if not self._is_proxy(address):
                waiting.sort(key=lambda connection: connection.rank)
                for connection in waiting[: -self.max_strangers]:
                    connection.end("too many connections of one address")
        for waiting in owned.values():
            for connection in waiting[: -self.max_owned]:
                connection.end("too many connections of one owner")

    def _is_proxy(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address.partition("/")[0])
        except ValueError:
            return False
        return any(parsed in network for network in self.proxies)


class Connection(HttpProtocol):
    """One connection."""

    def __init__(self, config: GuardedConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self._all = config.connections
        self.opened = time.monotonic()
        self.address = ""
        self.is_over = False
        self.owner = ""
        """The owner of the first valid key on this connection."""
        self._is_known = False
        self._answered = 0
        self._since = self.opened
        """When the client's turn began: to send a request, or what is missing of one."""
        self._in_headers = False
        self._in_body = False
        self._body_bytes = 0
        self._header_bytes = 0
        self._idle_bytes = 0
        """Taken since the last byte of a body or the last whole header."""
        self._unread_since: float | None = None

    @property
    def is_stranger(self) -> bool:
        """Whether no request that came on it had a valid key."""
        if not self._is_known:
            self._is_known = bool(self.user)
            self.owner = getattr(self.user, "owner", "")
        return not self._is_known

    @property
    def rank(self) -> int:
        """Which goes first where some must: one that never sent a request, then another stranger's."""
        return (0 if self._answered == 0 else 1) if self.is_stranger else 2

    @property
    def waits_for_client(self) -> bool:
        """Whether nothing goes on before the client sends, or takes, something."""
        return not self.is_answering or self._in_headers or self._in_body or self._unread_since is not None

    def check_time(self, now: float) -> None:
        """End it where the client lets us wait for too long."""
        if self.transport.is_closing():
            self._unread_since = self._unread_since or now
        if self._unread_since is not None:
            if now - self._unread_since > UNREAD_SECONDS:
                self.end("unread")
        elif self._in_body and self.is_body_held_up:
            self._since = now  # it is our turn
        elif self._in_body:
            more = self._body_bytes / UPLOAD_BYTES_PER_SECOND if self.path == UPLOADS else 0.0
            if now - self._since > BODY_SECONDS + more:
                self._refuse("too_slow", "The body of the request comes too slowly. Send it at once.")
        elif (self._in_headers or self.waits_for_client) and now - self._since > self._all.header_seconds:
            limit = self._all.header_seconds
            self._refuse("too_slow", f"The headers of the request did not come within {limit:g} seconds.")

    def end(self, why: str) -> None:
        """Cut it off."""
        log.debug("connection.ended", why=why, address=self.address)
        self.is_over = True
        self._all.remove(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = group_of(self.peer)
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_over = True
        self._all.remove(self)

    def data_received(self, data: bytes) -> None:
        if self.is_over:
            return
        self._idle_bytes += len(data)
        super().data_received(data)
        # What the parser holds of a header, a trailer or a chunk's extension until it has seen the end.
        if self._idle_bytes > self._all.header_bytes:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = self._idle_bytes = 0
        self._in_headers = True
        if self.requests_ahead >= MAX_PIPELINED:
            self.end("too many requests ahead of their answers")
            raise _RefusedError

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_headers, self._in_body = False, True
        self._since, self._body_bytes = time.monotonic(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._idle_bytes = 0
        self._since = time.monotonic()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        _ = self.is_stranger  # looked at while the request is there
        self._answered += 1
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if not self.is_over:
            super().send_400_response(msg)

    def _count(self, size: int) -> None:
        self._idle_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self._all.header_bytes or self.header_count > MAX_HEADERS:
            self._refuse_headers()
            raise _RefusedError

    def _refuse_headers(self) -> None:
        limit = self._all.header_bytes
        self._refuse("headers_too_large", f"Address and headers may have {limit} bytes and {MAX_HEADERS} fields.")

    def _refuse(self, code: str, detail: str) -> None:
        """Say why, where nothing else is being said, and close."""
        if self.is_over:
            return
        self.is_over = True
        if self.is_answering and (self.has_begun_answer or not self._in_body):
            self.transport.abort()  # it would be taken for the answer to an earlier request
            return
        kind = PROBLEMS[code]
        document = {"type": type_uri(code), "title": kind.title, "status": kind.status, "detail": detail, "code": code}
        body = json.dumps(document).encode()
        head = b"content-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.write_answer(kind.status, head % (MEDIA_TYPE.encode(), len(body)), body)


class GuardedConfig(uvicorn.Config):
    """uvicorn's settings, with what the protocol above must know."""

    def __init__(self, app: Litestar, settings: ApiSettings, **options: Any) -> None:
        most = max(1, min(settings.max_connections, _descriptors() - OWN_FILES - BACKLOG))
        self.connections = Connections(
            header_bytes=settings.max_header_bytes,
            header_seconds=settings.header_seconds,
            max_connections=most,
            max_owned=max(1, most // OWNER_SHARE),
            max_strangers=settings.max_address_connections,
            proxies=settings.trusted_proxies,
        )
        super().__init__(
            app,
            http=Connection,
            # Even where vLLM has installed uvloop: it was no faster here, and reports of crashes in it are open.
            loop="asyncio",
            ws="none",
            backlog=BACKLOG,
            # An empty list and not None, which trusts this host: anything on it could name any address.
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=[str(network) for network in settings.trusted_proxies],
            **options,
        )


class _RefusedError(Exception):
    """Stops the parser."""


def group_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 that one host of IPv6 can choose from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _descriptors() -> int:
    """How many files this process may open, once it has asked for as many as it may."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return wanted
