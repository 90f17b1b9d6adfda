"""Admission of submissions: limits on unfinished jobs, and the Idempotency-Key of repeated requests.

Owns what Valkey stores about submissions; writes nothing about a job. Why a crash at any point neither loses nor
doubles a job:

1. `admit` reserves the key together with the id of the future job, before anything is written. 2. `job.json` is written
once under that id, then the record is created. The script that creates the record also marks the
   key as done, so a key is done exactly when its job has a record.
3. `job.json` is the acceptance: from then on the job is run, also if its client got no answer. If the record is
missing,
   `jobs.lifecycle.recovery` creates it some minutes later. `job.json` holds the key's digest: if Valkey lost its most
   recent writes, record and key are restored from it before the next key is checked
   (`jobs.lifecycle.valkey_recovery`).
4. An attempt that dies in between leaves the key reserved. After `HOLD_SECONDS` (or at once, if it could report its
   failure) the next attempt gets the same id and repeats the same steps, which change nothing if they were done before.
   Two attempts that overlap, because the first was slow, therefore create one job together.

Invariant: while a key is stored it leads to one id, unless the request was refused and wrote nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from grpo_core import strict_json
from jobs.errors import JobsError, Unavailable
from jobs.store.job_store import JobStore, guarded

REMEMBER_SECONDS = 48 * 3600
"""How long a key is stored after its last use, as docs/reference/api.md promises."""
HOLD_SECONDS = 10.0
"""Time after which an attempt that has not reported counts as dead."""


class TooManyJobs(JobsError):
    """A limit on unfinished jobs is reached. The same request may succeed once some have ended."""


class KeyReused(JobsError):
    """The Idempotency-Key was used before for another request."""

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was sent before with another body. Use a new key for a new request.")


class InProgress(JobsError):
    """A request with this Idempotency-Key is being served now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__("A request with this Idempotency-Key is being served. Send it again shortly for its answer.")


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """An Idempotency-Key and its request, both as digests, so that neither is stored."""

    digest: str
    fingerprint: str

    @classmethod
    def of(cls, operation: str, key: str, body: str) -> Self:
        """Make the key of one request. `operation` separates the keys of different routes."""
        return cls(digest=_digest(f"{operation}\n{key}"), fingerprint=_digest(body))


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Permission to create one job or data set."""

    id: str
    owner: str
    holder: str
    state: Literal["new", "resumed", "done"]
    """`resumed`: an earlier attempt may have written parts of it. `done`: it was created before."""
    key: str | None
    members: int = 1
    """Number of jobs; more than 1 only for a group, and `id` is then the group's."""


class Admission:
    """Admits submissions. Raises `TooManyJobs`, `KeyReused`, `InProgress` and `Unavailable`."""

    def __init__(
        self,
        job_store: JobStore,
        *,
        max_queued: int = 0,
        max_owned: int = 0,
        recover: Callable[[], object] | None = None,
    ) -> None:
        """A limit of 0 means no limit. `recover` restores keys that Valkey may have lost, or raises `Unavailable`."""
        self._recover = recover
        self._job_store = job_store
        self._max_queued = max_queued
        self._max_owned = max_owned

    def admit_job(self, owner: str, job_id: str, request: RequestKey | None = None) -> Ticket:
        """Admit a job, within the limits."""
        limits = {"queued": self._max_queued or None, "owned": self._max_owned or None}
        return self._admit(owner, job_id, request, job=True, **limits)

    def admit_group(self, owner: str, group_id: str, members: int, request: RequestKey | None = None) -> Ticket:
        """Admit a group of jobs: all of them within the limits, or none."""
        limits = {"queued": self._max_queued or None, "owned": self._max_owned or None}
        return self._admit(owner, group_id, request, members=members, **limits)

    def admit(self, owner: str, new_id: str, request: RequestKey) -> Ticket:
        """Admit an upload, which takes no place in the queue."""
        return self._admit(owner, new_id, request)

    def _admit(self, owner: str, new_id: str, request: RequestKey | None, **limits: int | None) -> Ticket:
        holder = secrets.token_hex(8)
        order: dict[str, Any] = {"owner": owner, "holder": holder, "hold": int(HOLD_SECONDS * 1000), **limits}
        if request is not None:
            order |= {"key": request.digest, "print": request.fingerprint, "keep": REMEMBER_SECONDS * 1000}
        verdict, found_id, wait_ms = self._run("admit", new_id, {**order, "careful": self._recover is not None})
        match verdict:
            case "forgot":
                assert self._recover is not None
                self._recover()
                return self._admit(owner, new_id, request, **limits)
            case "reused":
                raise KeyReused
            case "busy":
                raise InProgress(int(wait_ms) / 1000)
            case "queue_full" | "owner_full" if (members := limits.get("members") or 1) > 1:
                limit = self._max_queued if verdict == "queue_full" else self._max_owned
                whose = "queued jobs in this service" if verdict == "queue_full" else "unfinished jobs of yours"
                raise TooManyJobs(
                    f"With these {members} jobs there would be more than {limit} {whose}, which is the limit. None was "
                    "accepted. Submit fewer, or again when some have ended."
                )
            case "queue_full":
                raise TooManyJobs(
                    f"{self._max_queued} jobs are queued, which is the limit of this service. Submit again when some "
                    "have started."
                )
            case "owner_full":
                raise TooManyJobs(
                    f"You have {self._max_owned} unfinished jobs, which is your limit. Submit again when some have "
                    "ended, or cancel some."
                )
            case _:
                key = request.digest if request else None
                members = limits.get("members") or 1
                return Ticket(id=found_id, owner=owner, holder=holder, state=verdict, key=key, members=members)

    def finish(self, ticket: Ticket) -> None:
        """Mark the key of an upload or a group as done; for a job, creating its record does that."""
        name = f"{self._job_store.prefix}:idempotency:{ticket.owner}:{ticket.key}"

        def write() -> None:
            pipeline = self._job_store.client.pipeline()
            pipeline.hset(name, mapping={"id": ticket.id, "done": "1"})
            pipeline.expire(name, REMEMBER_SECONDS)
            pipeline.execute()

        guarded(write)

    def withdraw(self, ticket: Ticket, *, forget: bool) -> None:
        """Return an unused ticket. `forget` also frees its key, for a request that was refused.

        Never raises: a ticket that cannot be returned expires.
        """
        order = {"owner": ticket.owner, "holder": ticket.holder, "key": ticket.key, "forget": forget}
        order |= {"members": ticket.members}
        with suppress(Unavailable):
            self._run("withdraw", ticket.id, order)

    def finish_group(self, ticket: Ticket) -> None:
        """Give back what a group's jobs, which have records now, took of the limits; and mark its key as done."""
        if ticket.key is not None:
            self.finish(ticket)
        self.withdraw(replace(ticket, key=None), forget=False)

    def _run(self, script: str, subject: str, order: dict[str, Any]) -> Any:
        present = {name: value for name, value in order.items() if value is not None}
        return self._job_store.run_script(script, subject, strict_json.dumps(present))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
