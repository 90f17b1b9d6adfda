"""Who may submit now, and what a repeated submission gets: limits on waiting jobs, and Idempotency-Key.

Owns what Valkey remembers of submissions that are under way or done; writes nothing about a job. How a crash at
any point loses and doubles nothing:

1. `admit` reserves the key together with the id that the job shall have, before anything is written.
2. `job.json` is put once under that id, then the record is created under it; creating the record marks the key as
   done in the same script. So a key is done exactly when its job is accepted.
3. `job.json` is the acceptance: from there on the job is run, whatever its client heard. Where the record does not
   follow, `jobs.unfinished` makes it some minutes later, and `grpo admin rebuild` does after a loss of Valkey.
4. An attempt that dies between leaves the key reserved. Once its hold is over (at once, where it could say that it
   failed) the next attempt is given the same id and goes through the same steps; those that were done stay done.
   Two attempts that overlap, because the first was only slow, therefore make one job between them.

Invariant: a key leads to one id for as long as it is remembered, unless the request was refused and made nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from grpo_core import strict_json
from jobs.errors import JobsError, Unavailable
from jobs.ledger import Ledger, guarded

REMEMBER_SECONDS = 48 * 3600
"""How long a key is remembered after it was last written, as docs/api.md promises."""
HOLD_SECONDS = 10.0
"""After so long an attempt that said nothing counts as dead."""


class TooManyJobs(JobsError):
    """A limit on jobs that wait or run is reached; the same request may succeed once some have ended."""


class KeyReused(JobsError):
    """The Idempotency-Key was used for another request."""

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was sent before with another body. Use a new key for a new request.")


class InProgress(JobsError):
    """A request with this Idempotency-Key is being served now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__("A request with this Idempotency-Key is being served. Send it again shortly for its answer.")


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """An Idempotency-Key with the request it stands for; both as digests, so that neither is kept."""

    digest: str
    fingerprint: str

    @classmethod
    def of(cls, operation: str, key: str, body: str) -> Self:
        """The key of one request; `operation` keeps the keys of different routes apart."""
        return cls(digest=_digest(f"{operation}\n{key}"), fingerprint=_digest(body))


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Leave to write down one thing."""

    id: str
    owner: str
    holder: str
    state: Literal["new", "resumed", "done"]
    """`resumed`: an earlier attempt may have written some of it. `done`: there is nothing left to do."""
    key: str | None


class Admission:
    """The gate before all that is submitted. Raises `TooManyJobs`, `KeyReused`, `InProgress`, `Unavailable`."""

    def __init__(self, ledger: Ledger, *, max_queued: int = 0, max_owned: int = 0) -> None:
        """Limits of 0 are none."""
        self._ledger = ledger
        self._max_queued = max_queued
        self._max_owned = max_owned

    def admit_job(self, owner: str, job_id: str, request: RequestKey | None = None) -> Ticket:
        """Leave to write down a job, within the limits."""
        limits = {"queued": self._max_queued or None, "owned": self._max_owned or None}
        return self._admit(owner, job_id, request, job=True, **limits)

    def admit(self, owner: str, new_id: str, request: RequestKey) -> Ticket:
        """Leave to write down something that takes no place in the queue."""
        return self._admit(owner, new_id, request)

    def _admit(self, owner: str, new_id: str, request: RequestKey | None, **limits: int | None) -> Ticket:
        holder = secrets.token_hex(8)
        order: dict[str, Any] = {"owner": owner, "holder": holder, "hold": int(HOLD_SECONDS * 1000), **limits}
        if request is not None:
            order |= {"key": request.digest, "print": request.fingerprint, "keep": REMEMBER_SECONDS * 1000}
        verdict, found_id, wait_ms = self._run("admit", new_id, order)
        match verdict:
            case "reused":
                raise KeyReused
            case "busy":
                raise InProgress(int(wait_ms) / 1000)
            case "queue_full":
                raise TooManyJobs(
                    f"{self._max_queued} jobs are queued, as many as this service keeps. Submit again when some "
                    "have been run."
                )
            case "owner_full":
                raise TooManyJobs(
                    f"You have {self._max_owned} jobs that are queued or running, as many as you may. Submit again "
                    "when some have ended, or cancel some."
                )
            case _:
                key = request.digest if request else None
                return Ticket(id=found_id, owner=owner, holder=holder, state=verdict, key=key)

    def finish(self, ticket: Ticket) -> None:
        """Mark the key as done, for what has no record in the ledger."""
        name = f"{self._ledger.prefix}:idempotency:{ticket.owner}:{ticket.key}"

        def write() -> None:
            pipeline = self._ledger.client.pipeline()
            pipeline.hset(name, mapping={"id": ticket.id, "done": "1"})
            pipeline.expire(name, REMEMBER_SECONDS)
            pipeline.execute()

        guarded(write)

    def withdraw(self, ticket: Ticket, *, forget: bool) -> None:
        """Give a ticket back unused; `forget` also frees its key, for a request that was refused.

        Never raises: what cannot be given back now runs out by itself.
        """
        order = {"owner": ticket.owner, "holder": ticket.holder, "key": ticket.key, "forget": forget}
        with suppress(Unavailable):
            self._run("withdraw", ticket.id, order)

    def _run(self, script: str, subject: str, order: dict[str, Any]) -> Any:
        present = {name: value for name, value in order.items() if value is not None}
        return self._ledger.run_script(script, subject, strict_json.dumps(present))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
