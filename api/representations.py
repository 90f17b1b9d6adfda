"""What every GET has in common: HEAD, strong ETags with `If-None-Match`, and gzip where it pays.

An ASGI wrapper between the edge and the application. Litestar's own compression is not used: it holds back the events
of a stream until its buffer is full, compresses in the event loop, and knows no ETag, which must differ between the
compressed and the plain form. Owns none of the contents. Invariants: an answer that may hold a secret (any answer to
another method, and routes marked `SECRET`) is never compressed, so that its length reveals nothing of it (BREACH), and
has no ETag; an event stream is sent as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

SECRET: Final = {"secret": True}
"""The `opt` of a route whose answers hold secrets, such as links that work without a key."""
CHANGING: Final = {"changing": True}
"""The `opt` of a route whose answer is another one each time: it gets no ETag."""

LEAST_BYTES: Final = 1400
"""Smaller answers fit into one packet as they are."""
_INLINE_BYTES: Final = 32 * 1024
"""Larger ones are compressed and hashed in a thread, so that other requests do not wait."""
_LEVEL: Final = 5
_TEXT: Final = re.compile(rb"application/([a-z.-]+\+)?json|application/(jsonl|x-ndjson)|image/svg\+xml|text/.+")
_TAG: Final = re.compile(r'(?:W/)?("[^"]*")')


class Representations:
    """Wraps the ASGI application."""

    def __init__(self, app: ASGIApp, threads: ThreadPoolExecutor) -> None:
        self._app, self._threads = app, threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send, self._threads)
        scope["method"] = "GET"
        try:
            await self._app(scope, answer.receive, answer.send)
        finally:
            scope["method"] = answer.method


class _Answer:
    """The answer to one request."""

    def __init__(self, scope: Any, receive: Receive, send: Send, threads: ThreadPoolExecutor) -> None:
        self._scope, self._receive, self._send, self._threads = scope, receive, send, threads
        self.method: Any = scope["method"]
        self._asked: dict[bytes, bytes] = dict(scope["headers"])
        self._start: Any = None
        self._headers: dict[bytes, bytes] = {}
        self._packer: Any = None
        self._begun = False
        self._whole = asyncio.Event()
        """Set once everything that a HEAD is answered with was sent."""
        self._has_asked = False

    async def receive(self) -> Any:
        """The request; for HEAD, the client is gone as soon as the headers are sent, which ends a stream."""
        if self.method == "GET" or not self._has_asked:
            self._has_asked = True
            return await self._receive()
        await self._whole.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Hold back the start of the answer until it is known whether its body follows at once."""
        if message["type"] == "http.response.start":
            self._start = message
            self._headers = {name.lower(): value for name, value in message["headers"]}
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._whole.is_set():
            return
        elif self._begun:
            await self._send_on(message)
        else:
            self._begun = True
            await (self._begin_stream(message) if message.get("more_body") else self._send_whole(message["body"]))

    @property
    def _opt(self) -> dict[str, Any]:
        return getattr(self._scope.get("route_handler"), "opt", {})

    @property
    def _is_packable(self) -> bool:
        """Whether it may be compressed for a client that takes it."""
        media_type = self._headers.get(b"content-type", b"").partition(b";")[0]
        return (
            self._start["status"] == 200
            and "secret" not in self._opt
            and b"content-encoding" not in self._headers
            and media_type != b"text/event-stream"
            and _TEXT.fullmatch(media_type) is not None
        )

    @property
    def _takes_gzip(self) -> bool:
        return takes_gzip(self._asked.get(b"accept-encoding", b"").decode("latin-1"))

    async def _send_whole(self, body: bytes) -> None:
        is_packable = self._is_packable and len(body) >= LEAST_BYTES
        packs = is_packable and self._takes_gzip
        if is_packable:
            self._vary()
        if tag := await self._tag(body):
            self._headers[b"etag"] = tag = _packed_tag(tag) if packs else tag
            self._keep()
            if is_known(tag.decode("latin-1"), self._asked.get(b"if-none-match", b"").decode("latin-1")):
                await self._send_unchanged()
                return
        if packs:
            body = await self._compute(self._pack(), body)
            self._headers |= {b"content-encoding": b"gzip", b"content-length": str(len(body)).encode()}
        await self._send_start()
        await self._finish(body)

    async def _tag(self, body: bytes) -> bytes | None:
        """A strong ETag: the route's own, or one by the content."""
        if self._start["status"] != 200 or {"secret", "changing"} & self._opt.keys():
            return None
        return self._headers.get(b"etag") or await self._compute(_tag_of, body)

    def _pack(self) -> Callable[[bytes], bytes]:
        """What needs no key is the same for all, and compressed once."""
        return _pack_once if self._opt.get("exclude_from_auth") else _pack

    async def _compute(self, call: Callable[[bytes], bytes], body: bytes) -> bytes:
        if len(body) <= _INLINE_BYTES:
            return call(body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, body)

    def _keep(self) -> None:
        """Let scripts keep the answer and ask again; what a browser's session reads stays out of its cache."""
        if b"cache-control" in self._headers:
            return
        if self._opt.get("exclude_from_auth"):
            self._headers[b"cache-control"] = b"no-cache"
        elif b"authorization" in self._asked:
            self._headers[b"cache-control"] = b"private, no-cache"

    def _vary(self) -> None:
        given = self._headers.get(b"vary")
        self._headers[b"vary"] = given + b", Accept-Encoding" if given else b"Accept-Encoding"

    async def _send_unchanged(self) -> None:
        self._start["status"] = 304
        for name in (b"content-length", b"content-type"):
            self._headers.pop(name, None)
        await self._send_start()
        await self._finish(b"")

    async def _begin_stream(self, message: Any) -> None:
        if self._is_packable:
            self._vary()
            if self._takes_gzip:
                self._packer = zlib.compressobj(_LEVEL, wbits=31)
                self._headers.pop(b"content-length", None)
                self._headers[b"content-encoding"] = b"gzip"
        await self._send_start()
        await (self._finish(b"") if self.method == "HEAD" else self._send_on(message))

    async def _send_on(self, message: Any) -> None:
        """Send a piece of a stream."""
        if self._packer is not None:
            piece: bytes = self._packer.compress(message["body"])
            message["body"] = piece if message.get("more_body") else piece + self._packer.flush()
        await self._send(message)

    async def _send_start(self) -> None:
        # The method as it was asked: the server sends no body for HEAD, and the log has HEAD too.
        self._scope["method"] = self.method
        cookies = [(name, value) for name, value in self._start["headers"] if name.lower() == b"set-cookie"]
        others = [(name, value) for name, value in self._headers.items() if name != b"set-cookie"]
        self._start["headers"] = [*others, *cookies]
        await self._send(self._start)

    async def _finish(self, body: bytes) -> None:
        await self._send(
            {"type": "http.response.body", "body": b"" if self.method == "HEAD" else body, "more_body": False}
        )
        self._whole.set()


def takes_gzip(accepted: str) -> bool:
    """Whether an `Accept-Encoding` lets an answer be compressed with gzip."""
    qualities: dict[str, float] = {}
    for one in accepted.lower().split(","):
        name, *parameters = (part.strip() for part in one.split(";"))
        given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            qualities[name] = float(given)
        except ValueError:
            qualities[name] = 0.0
    return qualities.get("gzip", qualities.get("*", 0.0)) > 0


def is_known(tag: str, asked: str) -> bool:
    """Whether an `If-None-Match` names this ETag, by the weak comparison that RFC 9110 prescribes."""
    return asked.strip() == "*" or tag in _TAG.findall(asked)


def _tag_of(body: bytes) -> bytes:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()


def _packed_tag(tag: bytes) -> bytes:
    return tag[:-1] + b'-gzip"'


def _pack(body: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, wbits=31)
    return packer.compress(body) + packer.flush()


_pack_once = lru_cache(maxsize=128)(_pack)
