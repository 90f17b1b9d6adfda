"""Passes requests to sessions of served models and their answers back, for all requests of one API process.

Owns one thread that reads this process's stream of answers while any request is open, and the decision that an answer
will not come. Invariant: every request ends, with its last piece or with an error, within `LOST_SECONDS` after its
session was lost, in whatever way: its worker died, Valkey forgot a request or a piece, the session ended.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import structlog
from litestar.concurrency import sync_to_thread
from ulid import ULID

from grpo_core.serving.wire import ChatRequest, Piece, error
from jobs.errors import Unavailable
from jobs.service import JobService
from jobs.store.serving import ServedModels

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""Time without a piece after which the session is looked at."""
LOST_LOOKS: Final = 4
"""Looks in a row that must find the request lost: an announcement may be a second old."""
LOST_SECONDS: Final = 12.0
"""Time without an answer of Valkey after which a request is lost."""
BLOCK_MS: Final = 500
LINGER_SECONDS: Final = 5.0
"""How long the thread waits for a further request before it ends."""


class Relay:
    """The open requests of one process. `ask` belongs to its event loop."""

    def __init__(self, service: JobService) -> None:
        self._service = service
        self._reader = secrets.token_hex(8)
        self._queues: dict[str, asyncio.Queue[Piece]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """End the thread. Requests that are open end as lost."""
        self._closed.set()

    async def ask(self, served: ServedModels, asked: ChatRequest) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer, the last one with `done` or `error`. If closed before, the session stops."""
        request = replace(asked, id=f"chatcmpl-{ULID()}")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with self._lock:
            self._queues[request.id] = pieces
        self._keep_reading(loop)
        has_ended = False
        try:
            order = {"ask": request.as_dict(), "reader": self._reader}
            await sync_to_thread(self._service.ask_session, served, order)
            last = 0
            while not has_ended:
                piece = await self._next(served, request.id, pieces)
                number, has_ended = piece["k"], "done" in piece or "error" in piece
                if "error" not in piece and number <= last:
                    continue  # sent again, because an answer of Valkey was lost
                if "error" not in piece and number != last + 1:
                    piece, has_ended = _lost(request.id), True
                last = number
                yield piece
        finally:
            with self._lock:
                del self._queues[request.id]
            if not has_ended:
                # Not awaited: this may run while the task is being cancelled.
                loop.run_in_executor(None, self._cancel, served, request.id)

    def _cancel(self, served: ServedModels, request_id: str) -> None:
        with suppress(Unavailable):  # the session writes to nobody until it is done
            self._service.ask_session(served, {"cancel": request_id})

    async def _next(self, served: ServedModels, request_id: str, pieces: asyncio.Queue[Piece]) -> Piece:
        """Return the next piece, or an error if none will come."""
        lost, heard = 0, time.monotonic()
        while True:
            with suppress(TimeoutError):
                return await asyncio.wait_for(pieces.get(), LOOK_SECONDS)
            try:
                now = await sync_to_thread(self._service.session, served.session)
                heard = time.monotonic()
            except Unavailable:
                if time.monotonic() - heard > LOST_SECONDS:
                    return _lost(request_id)
                continue
            knows = now is not None and now.epoch == served.epoch and request_id in now.active
            lost = 0 if knows else lost + 1
            if lost >= LOST_LOOKS and pieces.empty():
                return _lost(request_id)

    def _keep_reading(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, args=(loop,), name="answers", daemon=True)
                self._thread.start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read answers while there is a request, and a little longer."""
        last, used = "0", time.monotonic()
        while not self._closed.is_set():
            with self._lock:
                used = time.monotonic() if self._queues else used
                if time.monotonic() - used > LINGER_SECONDS:
                    self._thread = None
                    return  # the stream is empty, and expires
            try:
                last, pieces = self._service.answers(self._reader, last, block_ms=BLOCK_MS)
            except Unavailable as fault:
                log.warning("answers.waiting", reason=str(fault))
                self._closed.wait(BLOCK_MS / 1000)
                continue
            except Exception:  # the thread's outermost loop: requests end as lost
                log.exception("answers.broken")
                self._closed.wait(BLOCK_MS / 1000)
                continue
            for piece in pieces:
                self._deliver(loop, piece)
        with suppress(Unavailable):
            self._service.forget_answers(self._reader)

    def _deliver(self, loop: asyncio.AbstractEventLoop, piece: Any) -> None:
        with self._lock:
            queue = self._queues.get(piece.get("id"))
        if queue is not None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)


def _lost(request_id: str) -> Piece:
    message = "The session that answered was lost. Send the request again; the session comes back if it can."
    return Piece(id=request_id, k=0, error=error("session_lost", message))
