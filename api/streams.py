"""Jobs' events as server-sent events: replay from a number, then live, to any number of readers.

Owns the watchers and when they are woken; events come from `jobs.service` in pages, so a reader that is slow
holds one page and the socket's buffer, and no thread. One task asks for the newest event number of every watched
job, twice a second and in one round trip, and wakes those who watch a job that has moved on.

Invariant: a reader is sent every event above the number it named, in order and once; the stream ends by itself only
when the job has ended and all was sent, when the service shuts down, when the reader's key is valid no more, or after
an hour.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
import structlog

from api.places import Place, Places
from api.schemas import event_of
from api.threads import OWNER, FairThreads
from jobs.auth.rate_limit import RateLimited
from jobs.errors import Unavailable
from jobs.service import JobService

log = structlog.get_logger(__name__)

MEDIA_TYPE = "text/event-stream"
HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}

TICK_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
RETRY_MS = 2000
MAX_SECONDS = 3600.0
CHECK_SECONDS = 5.0
"""How long a stream goes on after its key was revoked, at most."""
THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Some of a job's events as they are sent; the rest as in `jobs.read.events.EventPage`."""

    frames: bytes
    after: int
    more: bool
    ended: bool


@dataclass
class _Watch:
    """One job that is watched."""

    readers: int = 0
    newest: int | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()


class EventStreams:
    """All streams of one process. Used from its event loop only."""

    def __init__(self, service: JobService, *, limit: int, per_owner: int) -> None:
        self._service = service
        self.places = Places(
            "too_many_streams",
            "event streams",
            per_owner=per_owner,
            in_all=limit,
            settings=("GRPO_MAX_OWNER_STREAMS", "GRPO_MAX_STREAMS"),
        )
        self._watched: dict[str, _Watch] = {}
        self._pulse: asyncio.Task[None] | None = None
        self._closing = False
        # Their own threads: a stream must not wait behind requests that wait for storage.
        self._threads = FairThreads(THREADS, per_owner=THREADS - 1, name="events")

    @property
    def readers(self) -> int:
        """How many streams are open."""
        return sum(watch.readers for watch in self._watched.values())

    def close(self) -> None:
        """End every stream now; each reader may come back to another process with what it read last."""
        self._closing = True
        for watch in self._watched.values():
            watch.wake()

    async def aclose(self) -> None:
        """Free the threads, once no stream is left."""
        self.close()
        if self._pulse is not None:
            self._pulse.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def page(self, job_id: str, after: int, types: Collection[str]) -> Frames:
        """The next events of a job; raises `Unavailable`."""

        def read() -> Frames:
            page = self._service.read_on(job_id, after=after, types=types)
            # Here and not in the loop: a page of samples may have megabytes.
            frames = b"".join(map(encode, page.events))
            return Frames(frames=frames, after=page.after, more=page.more, ended=page.ended)

        return await self._in_thread(read)

    async def follow(
        self, job_id: str, page: Frames, types: Collection[str], place: Place, is_allowed: Callable[[], object]
    ) -> AsyncGenerator[bytes]:
        """The stream of one reader, beginning with a page that was read for it; frees its place at the end.

        It ends once `is_allowed` returns None: the reader's key was revoked, or the session was ended.
        """
        yield f"retry: {RETRY_MS}\n\n".encode()
        sent = time.monotonic()
        deadline, checked = sent + MAX_SECONDS, sent
        with place, self._watch(job_id) as watch:
            while not self._closing:
                if page.frames:
                    yield page.frames
                    sent = time.monotonic()
                if page.ended or time.monotonic() > deadline:
                    return
                if not page.frames and time.monotonic() - sent >= HEARTBEAT_SECONDS:
                    yield b": still here\n\n"
                    sent = time.monotonic()
                if time.monotonic() - checked >= CHECK_SECONDS:
                    checked = time.monotonic()
                    if not await self._may_stay(is_allowed):
                        return
                # Looked at before the page is read: what happens in between wakes this reader at once.
                seen = watch.newest
                page = await self._next_page(job_id, page, types)
                if not page.frames and not page.ended and not page.more:
                    until = min(sent + HEARTBEAT_SECONDS, checked + CHECK_SECONDS)
                    await self._news(watch, seen, until - time.monotonic())

    async def _may_stay(self, is_allowed: Callable[[], object]) -> bool:
        try:
            return await self._in_thread(is_allowed) is not None
        except (Unavailable, RateLimited):
            return True  # nothing was decided

    async def _next_page(self, job_id: str, page: Frames, types: Collection[str]) -> Frames:
        try:
            return await self.page(job_id, page.after, types)
        except Unavailable as error:
            # Readers are kept: one that is sent away comes back, and a browser that is refused then does not.
            log.warning("stream.waiting", job_id=job_id, server=error.server)
            await asyncio.sleep(RETRY_MS / 1000)
            return Frames(frames=b"", after=page.after, ended=False, more=True)

    async def _news(self, watch: _Watch, seen: int | None, seconds: float) -> None:
        """Wait until the job has events after `seen`, or until the timeout."""
        if not self._closing and watch.newest == seen:
            with suppress(TimeoutError):
                await asyncio.wait_for(watch.news.wait(), max(0.0, seconds))

    @contextmanager
    def _watch(self, job_id: str) -> Generator[_Watch]:
        watch = self._watched.setdefault(job_id, _Watch())
        watch.readers += 1
        if self._pulse is None or self._pulse.done():
            self._pulse = asyncio.get_running_loop().create_task(self._beat(), name="events-pulse")
        try:
            yield watch
        finally:
            watch.readers -= 1
            if not watch.readers:
                del self._watched[job_id]

    async def _beat(self) -> None:
        """Ask for the newest numbers for as long as anyone watches."""
        OWNER.set("")  # it began for one reader, and serves all
        while self._watched:
            try:
                newest = await self._in_thread(partial(self._service.newest_events, [*self._watched]))
            except Unavailable:
                newest = {}  # the readers find out, and say so
            for job_id, number in newest.items():
                watch = self._watched.get(job_id)
                if watch is not None and watch.newest != number:
                    watch.newest = number
                    watch.wake()
            await asyncio.sleep(TICK_SECONDS)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def encode(event: dict[str, Any]) -> bytes:
    """One event as it is sent. Its JSON has no line breaks, so it is one line of data."""
    body = msgspec.json.encode(event_of(event))
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event["seq"], event["type"].encode(), body)
