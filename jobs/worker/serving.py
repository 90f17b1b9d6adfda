"""A session of a served model on its worker: passes requests to the serving process and pieces of answers back.

Owns the two threads between Valkey and the process's socket, the announcement, and when and why a session ends: its
time, no request for a while, or a job that waits for this worker. The process runs with little trust: of what it sends,
only pieces for requests that it was given are passed on, within their limits. Invariants: each request that was read is
answered by a last piece or by the session's end; after `close` nothing of this run is announced.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Any, Final, cast

import structlog

from grpo_core import strict_json
from grpo_core.serving.wire import SOCKET_VARIABLE, Piece, error, messages
from grpo_core.spec import JobSpec
from jobs.errors import Unavailable
from jobs.store.job import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.serving import ServedModels, ServingStore

log = structlog.get_logger()

ANNOUNCE_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 1.0
"""Time between two looks for jobs that wait."""
WAITED_SECONDS: Final = 2.0
"""A job that has waited for this long is one that no idle worker took."""
SHORT_IDLE_SECONDS: Final = 15.0
"""Time without a request after which a session gives way to another one."""
DRAIN_SECONDS: Final = 10.0
"""Time for the answers under way when a session ends."""
SILENT_SECONDS: Final = 120.0
"""Time without a sign of life after which a process that was ready counts as hung: longer than any prompt takes."""
RETRY_SECONDS: Final = 0.2
BLOCK_MS: Final = 500
_MAX_PIECES: Final = 4096


class ServingSession:
    """One run of a job of kind serving. `descriptor` is for the process; call `look` often, and `close` at the end."""

    def __init__(
        self, job_store: JobStore, record: JobRecord, epoch: int, spec: JobSpec, queues: Collection[str]
    ) -> None:
        self._job_store, self._store = job_store, ServingStore(job_store)
        self._record, self._epoch, self._spec, self._queues = record, epoch, spec, tuple(queues)
        self._socket, self._theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._active: dict[str, str] = {}
        """The reader of each request that is being answered, by the request's id."""
        self._served: ServedModels | None = None
        self._heard = self._asked_at = self._ready_at = time.monotonic()
        self._announced = self._looked = 0.0
        self._ended = self._wrong = ""
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"serving-{name}", daemon=True)
            for name, target in (("asked", self._pass_on), ("answers", self._bring_back))
        ]

    @property
    def descriptor(self) -> int:
        """The process's end of the socket."""
        return self._theirs.fileno()

    def environment(self) -> dict[str, str]:
        """What the process must know to find it."""
        return {SOCKET_VARIABLE: str(self.descriptor)}

    def start(self) -> None:
        """Begin to pass messages, once the process has been started."""
        self._theirs.close()
        for thread in self._threads:
            thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the process has loaded its model."""
        return self._served is not None

    def look(self) -> None:
        """Announce the session, and end it when its time is over. Never raises."""
        if self._served is None or self._closed.is_set():
            return
        try:
            if not self._ended and (over := self._over()):
                self._end(*over)
            if not self._ended and time.monotonic() - self._announced > ANNOUNCE_SECONDS:
                self._announced = time.monotonic()
                self._store.announce(self._announcement(self._served))
        except Unavailable as fault:
            log.warning("serving_not_announced", job_id=self._record.id, reason=str(fault))

    def stalled(self) -> str | None:
        """Return why the process counts as hung, or as not to be understood; or None."""
        if self._wrong:
            return self._wrong
        silent = time.monotonic() - self._heard
        return f"The serving process was silent for {silent:.0f} s." if silent > SILENT_SECONDS else None

    def close(self) -> None:
        """End the announcement and every request that is left. May be repeated."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2)
        self._socket.close()
        with contextlib.suppress(Unavailable):
            self._store.withdraw(self._record.id, self._record.owner)
            self._refuse_rest()
            self._store.close(self._record.id, self._epoch)

    def _over(self) -> tuple[str, str] | None:
        """Return why the session is over, as a word and a sentence, or None."""
        now, section = time.monotonic(), self._spec.serving
        if now - self._ready_at > section.ttl_seconds:
            return "ttl", f"Served for {section.ttl_seconds} s, as asked (serving.ttl_seconds)."
        idle = 0.0 if self._active else now - self._asked_at
        if idle > section.idle_seconds:
            return "idle", f"There was no request for {section.idle_seconds} s (serving.idle_seconds)."
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            waiting = self._job_store.get_many(self._store.waiting(self._queues, WAITED_SECONDS))
            kinds = {record.spec.get("kind", "training"): record.id for record in waiting}
            for kind, job in kinds.items():
                if kind != "serving" or idle > SHORT_IDLE_SECONDS:
                    return "job_waits", f"The worker is needed for job {job}, which waits for it."
        return None

    def _end(self, reason: str, message: str) -> None:
        """Tell the process to finish what it has and end."""
        self._ended = reason
        log.info("serving_ends", job_id=self._record.id, reason=reason)
        self._send({"end": {"reason": reason, "message": message, "seconds": DRAIN_SECONDS}})
        self._store.withdraw(self._record.id, self._record.owner)

    def _announcement(self, served: ServedModels) -> ServedModels:
        with self._lock:
            return ServedModels.read({**vars(served), "active": list(self._active)})

    def _pass_on(self) -> None:
        """Read requests from Valkey and give them to the process, until closed."""
        last = "0"
        while not self._closed.is_set():
            try:
                last, orders = self._store.asked(self._record.id, self._epoch, last, block_ms=BLOCK_MS)
            except Unavailable:
                self._closed.wait(RETRY_SECONDS)
                continue
            for order in orders:
                self._take(order)

    def _take(self, order: dict[str, Any]) -> None:
        if "ask" in order:
            with self._lock:
                self._active[order["ask"]["id"]] = order["reader"]
                self._asked_at = time.monotonic()
            self._send({"ask": order["ask"]})
        elif "cancel" in order:
            with self._lock:
                self._active.pop(order["cancel"], None)
            self._send({"cancel": order["cancel"]})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(f"{strict_json.dumps(message)}\n".encode())

    def _bring_back(self) -> None:
        """Read the process's messages and send its pieces to their readers, until it ends or writes something else."""
        try:
            with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
                for message in messages(lines):
                    self._heard = time.monotonic()
                    self._hear(message)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            self._wrong = f"The serving process sent what is no message of a session: {fault!r:.200}"

    def _hear(self, message: Any) -> None:
        if not isinstance(message, dict):
            return
        if "ready" in message and self._served is None:
            self._served = self._as_served(message["ready"])
        pieces = message.get("pieces")
        if isinstance(pieces, list):
            self._answer(pieces[:_MAX_PIECES])

    def _as_served(self, ready: Any) -> ServedModels:
        now, section = time.time(), self._spec.serving
        self._ready_at = self._asked_at = time.monotonic()
        return ServedModels(
            session=self._record.id,
            owner=self._record.owner,
            source=section.job,
            model=self._spec.model.name,
            epoch=self._epoch,
            models=tuple(str(name)[:32] for name in ready["models"][:16]),
            steps={str(name)[:32]: step for name, step in ready["steps"].items() if step is None or type(step) is int},
            engine=str(ready["engine"])[:32],
            context=int(ready["context"]),
            accepts=tuple(str(name)[:32] for name in ready["accepts"][:16]),
            ready_at=now,
            ends_at=now + section.ttl_seconds,
        )

    def _answer(self, pieces: list[Any]) -> None:
        by_reader: defaultdict[str, list[Piece]] = defaultdict(list)
        with self._lock:
            for given in pieces:
                piece = cast("Piece", given) if isinstance(given, dict) else Piece()
                reader = self._active.get(piece.get("id", ""))
                if reader is None:
                    continue  # it was cancelled
                by_reader[reader].append(piece)
                if "done" in piece or "error" in piece:
                    del self._active[piece.get("id", "")]
                self._asked_at = time.monotonic()
        # An answer of Valkey may be lost: readers leave out what comes twice, by its number.
        while by_reader and not self._closed.is_set():
            with contextlib.suppress(Unavailable):
                self._store.answer(by_reader.items())
                break
            self._closed.wait(RETRY_SECONDS)

    def _refuse_rest(self) -> None:
        """Tell the readers of all requests that are left that the session has ended."""
        _, orders = self._store.asked(self._record.id, self._epoch, "0", block_ms=1)
        for order in orders:
            if "ask" in order:
                self._active[order["ask"]["id"]] = order["reader"]
        fault = error("session_ended", "The session that answered has ended. Send the request again.")
        left = [(reader, [{"id": request, "k": 0, "error": fault}]) for request, reader in self._active.items()]
        self._active.clear()
        if left:
            self._store.answer(left)
