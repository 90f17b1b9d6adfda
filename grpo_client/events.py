"""Follows the events of a job over HTTP, through broken connections, to the job's end.

Owns reconnecting and the time limit of waiting; `httpx-sse` reads the frames. Invariant: each event is yielded once, in
order, and only when it arrived whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator

import httpx
from httpx_sse import EventSource

from grpo_client.connection import NO_CONTENT, Connection, is_passing
from grpo_client.errors import ProblemError, UnreachableError, WaitTimeoutError
from grpo_client.results import Event

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
MAX_FRAME_BYTES = 16 * 1024**2
SILENCE_SECONDS = 45.0
"""The service sends a comment every 15 s; a connection that is silent for longer than this is dead."""
_HEARTBEAT_SECONDS = 16.0
_LATE_SECONDS = 1.0
"""How late the end of the time limit may be noticed."""


class Deadline:
    """The moment until which to wait; `None` seconds is for ever."""

    def __init__(self, job_id: str, seconds: float | None) -> None:
        self._job_id, self._seconds = job_id, seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raise `WaitTimeoutError` once the time is over."""
        if self.left <= 0:
            raise WaitTimeoutError(
                f"Job {self._job_id} has not ended within {self._seconds:g} s; it continues. Wait again, with a longer "
                "timeout, or cancel it."
            )


class EventStream:
    """The events of one job, from a number on."""

    def __init__(
        self, connection: Connection, path: str, *, after: int, pause: float, patience: float, deadline: Deadline
    ) -> None:
        self._connection, self._path = connection, path
        self._after, self._pause, self._patience = after, pause, patience
        self._deadline = deadline
        self._connected_at = time.monotonic()
        """When the service was last seen."""

    def __iter__(self) -> Iterator[Event]:
        while True:
            try:
                for event in self._read():
                    self._after = event.seq
                    yield event
                    if event.type == "status" and event.data.get("status") in TERMINAL:
                        return
                    self._deadline.check()
            except _NothingToCome:
                return
            except _DeadlineIsNear:
                continue
            except (UnreachableError, ProblemError) as error:
                self._deadline.check()
                if not is_passing(error) or time.monotonic() - self._connected_at > self._patience:
                    raise
            self._deadline.check()
            time.sleep(min(self._pause, max(0.0, self._deadline.left)))

    def _read(self) -> Iterator[Event]:
        """The events of one connection; ends when the service closes it."""
        self._deadline.check()
        http, left = self._connection.http, max(0.0, self._deadline.left)
        silence, connect = min(SILENCE_SECONDS, left), min(http.timeout.connect or SILENCE_SECONDS, left)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self._after)}
        timeout = httpx.Timeout(connect, read=silence)
        with self._connection.reaching(), http.stream("GET", self._path, headers=headers, timeout=timeout) as response:
            if response.status_code == NO_CONTENT:
                raise _NothingToCome
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.read()
                self._connection.answer(response)
                raise self._connection.not_this_api(response)
            self._connected_at = time.monotonic()
            watched = _WatchedStream(response.stream, lambda: self._arrived(silence))
            response.stream = watched
            try:
                for frame in EventSource(response).iter_sse():
                    if frame.data:
                        watched.pending = 0
                        yield _event(frame.data)
            except ValueError as error:
                raise self._connection.not_this_api(response) from error

    def _arrived(self, silence: float) -> None:
        """Something arrived, and the next read may take `silence` seconds."""
        self._connected_at = time.monotonic()
        self._deadline.check()
        left = self._deadline.left
        # The next heartbeat comes in time for any deadline but a near one; for that, connect with a shorter timeout.
        if left < _HEARTBEAT_SECONDS and silence - left > _LATE_SECONDS:
            raise _DeadlineIsNear


class _WatchedStream(httpx.SyncByteStream):
    """The bytes of a response, reporting each arrival: heartbeats are comments, which the parser passes over."""

    def __init__(self, stream: httpx.SyncByteStream | httpx.AsyncByteStream, arrived: Callable[[], None]) -> None:
        assert isinstance(stream, httpx.SyncByteStream)
        self._stream, self._arrived = stream, arrived
        self.pending = 0
        """Bytes since the last whole event."""

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self.pending += len(chunk)
            if self.pending > MAX_FRAME_BYTES + len(chunk):
                raise ValueError("an event without an end")
            yield chunk
            self._arrived()

    def close(self) -> None:
        self._stream.close()


class _NothingToCome(Exception):
    """The job has ended and every event of it was read."""


class _DeadlineIsNear(Exception):
    """The time limit may end before this connection's next read does."""


def _event(data: str) -> Event:
    raw = json.loads(data)
    if not isinstance(raw, dict) or not isinstance(raw.get("seq"), int):
        raise ValueError("not an event")
    return Event(raw)
