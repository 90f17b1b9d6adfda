"""Served models in Valkey: which sessions answer now, the requests on their way to a worker, and the answers back.

A session is a running job of kind serving. Three kinds of keys, all of which expire by themselves:

- `serving:{session}`: what it serves, written each second by its worker (`ANNOUNCED_SECONDS`), and for each owner the
  set of session ids.
- `ask:{session}:{epoch}`: a stream of requests and cancellations for one run of the session.
- `answers:{reader}`: a stream of pieces of answers for one API process.

Owns these keys and their limits. Nothing here is needed after a loss of Valkey: an API that misses a piece, or whose
request is no longer known to the session, answers with an error. Invariant: no entry and no stream grows without bound
or outlives its expiry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, cast

from grpo_core import strict_json
from jobs.store.job_store import JobStore, guarded

ANNOUNCED_SECONDS: Final = 5
"""Life of an announcement: a worker that died is noticed after this time."""
ASK_SECONDS: Final = 60
"""Life of a stream of requests without a new one: they are read within a second."""
ANSWER_SECONDS: Final = 60
"""Life of a stream of answers without a new piece."""
MOST_ASKED: Final = 256
"""Largest number of requests that a worker has not read."""
MOST_PIECES: Final = 50_000
"""Largest number of entries of answers that an API process has not read."""
AT_ONCE: Final = 200


@dataclass(frozen=True, kw_only=True)
class ServedModels:
    """One session, as its worker announces it."""

    session: str
    """The id of the job of kind serving."""
    owner: str
    source: str | None
    """The job whose adapters it serves."""
    model: str
    """The name of the base model."""
    epoch: int
    models: tuple[str, ...]
    """`main`, `step-50` and `base`, as far as it has them."""
    steps: Mapping[str, int | None] = field(default_factory=dict[str, "int | None"])
    engine: str = ""
    context: int = 0
    accepts: tuple[str, ...] = ()
    """Parameters of requests that sessions of the previous release did not know."""
    ready_at: float = 0.0
    """Unix time at which it could answer first."""
    ends_at: float = 0.0
    """Unix time at which it ends at the latest."""
    active: tuple[str, ...] = ()
    """Ids of the requests that it has accepted and not answered completely."""

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ServedModels:
        """Read an announcement of this or a later release."""
        known = {one.name for one in fields(cls)}
        given: dict[str, Any] = {name: value for name, value in body.items() if name in known}
        lists: dict[str, Any] = {name: tuple(given.get(name, ())) for name in ("models", "accepts", "active")}
        return cls(**given | lists)


class ServingStore:
    """Sessions, requests and answers in Valkey. Raises `Unavailable`."""

    def __init__(self, job_store: JobStore) -> None:
        self._job_store, self._prefix = job_store, job_store.prefix

    @property
    def _client(self) -> Any:
        return self._job_store.client

    def announce(self, served: ServedModels) -> None:
        """Say that a session answers."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(self._session(served.session), strict_json.dumps(asdict(served)), ex=ANNOUNCED_SECONDS)
        pipeline.zadd(self._sessions(served.owner), {served.session: time.time()})
        pipeline.expire(self._sessions(served.owner), ASK_SECONDS)
        guarded(pipeline.execute)

    def withdraw(self, session: str, owner: str) -> None:
        """Say that it does no more."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.delete(self._session(session))
        pipeline.zrem(self._sessions(owner), session)
        guarded(pipeline.execute)

    def find(self, session: str) -> ServedModels | None:
        """Return a session that answers now."""
        body: str | None = guarded(lambda: self._client.get(self._session(session)))
        return ServedModels.read(strict_json.loads(body)) if body else None

    def of_owner(self, owner: str) -> list[ServedModels]:
        """Return an owner's sessions that answer now, the newest first."""
        names: list[str] = guarded(lambda: self._client.zrange(self._sessions(owner), 0, AT_ONCE, desc=True))
        if not names:
            return []
        bodies: list[str | None] = guarded(lambda: self._client.mget([self._session(name) for name in names]))
        found = [ServedModels.read(strict_json.loads(body)) for body in bodies if body]
        return sorted((one for one in found if one.owner == owner), key=lambda one: one.session, reverse=True)

    def ask(self, served: ServedModels, order: Mapping[str, Any]) -> None:
        """Send a request or a cancellation to a session."""
        key = self._ask(served.session, served.epoch)
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xadd(key, {"d": strict_json.dumps(order)}, maxlen=MOST_ASKED)
        pipeline.expire(key, ASK_SECONDS)
        guarded(pipeline.execute)

    def asked(self, session: str, epoch: int, after: str, *, block_ms: int) -> tuple[str, list[dict[str, Any]]]:
        """Return the orders after an entry, and the last entry's id; waits up to `block_ms` for the first."""
        return self._read(self._ask(session, epoch), after, block_ms)

    def close(self, session: str, epoch: int) -> None:
        """Remove the stream of requests of a run that has ended."""
        guarded(lambda: self._client.delete(self._ask(session, epoch)))

    def answer(self, pieces: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
        """Send pieces of answers, grouped by their reader."""
        pipeline = self._client.pipeline(transaction=False)
        for reader, some in pieces:
            key = self._answers(reader)
            pipeline.xadd(key, {"d": strict_json.dumps({"pieces": list(some)})}, maxlen=MOST_PIECES)
            pipeline.expire(key, ANSWER_SECONDS)
        guarded(pipeline.execute)

    def answers(self, reader: str, after: str, *, block_ms: int) -> tuple[str, list[dict[str, Any]]]:
        """Return the pieces after an entry, and the last entry's id; what was read is removed."""
        last, found = self._read(self._answers(reader), after, block_ms)
        return last, [piece for message in found for piece in cast("list[dict[str, Any]]", message["pieces"])]

    def forget(self, reader: str) -> None:
        """Remove the stream of answers of a reader that has ended."""
        guarded(lambda: self._client.delete(self._answers(reader)))

    def waiting(self, queues: Sequence[str], seconds: float) -> list[str]:
        """Return the ids of jobs that have waited in one of these queues for `seconds`, a few of each."""
        latest = self._job_store.now_ms() - int(seconds * 1000)
        pipeline = self._client.pipeline(transaction=False)
        for queue in queues:
            pipeline.zrangebyscore(f"{self._prefix}:waiting:{queue}", 0, latest, start=0, num=10)
        found: list[list[str]] = guarded(pipeline.execute)
        return [job for some in found for job in some]

    def _read(self, key: str, after: str, block_ms: int) -> tuple[str, list[dict[str, Any]]]:
        found: Any = guarded(lambda: self._client.xread({key: after}, count=AT_ONCE, block=block_ms))
        if not found:
            return after, []
        entries = cast("list[tuple[str, dict[str, str]]]", next(iter(found))[1])
        guarded(lambda: self._client.xdel(key, *(entry for entry, _ in entries)))
        # Not strict_json: the service wrote them, and an answer may hold NUL.
        return entries[-1][0], [json.loads(body["d"]) for _, body in entries]

    def _session(self, session: str) -> str:
        return f"{self._prefix}:serving:{session}"

    def _sessions(self, owner: str) -> str:
        return f"{self._prefix}:serving-of:{owner}"

    def _ask(self, session: str, epoch: int) -> str:
        return f"{self._prefix}:ask:{session}:{epoch}"

    def _answers(self, reader: str) -> str:
        return f"{self._prefix}:answers:{reader}"
