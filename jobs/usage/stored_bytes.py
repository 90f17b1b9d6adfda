"""Bytes of each owner in the bucket: data sets and all files of jobs, counted every hour.

The housekeeper calls `step`, which walks through the bucket folder by folder. Uploads and deletions are added when they
begin, also to the current walk, so that an owner who deletes something can store more at once. Invariant: the reported
bytes are those of one complete walk and of every later change, each counted once, even if several processes walk or a
change is sent twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import structlog

from grpo_core import strict_json
from jobs.errors import Unavailable
from jobs.store import object_keys
from jobs.store.job import utc
from jobs.store.job_store import JobStore, guarded
from jobs.store.write_once import WriteOnceStore

log = structlog.get_logger()

EVERY_SECONDS = 3600.0
STEP_SECONDS = 1.0
"""Approximate duration of one step."""
_ROOTS = (object_keys.DATASETS, object_keys.JOBS)
_END = "\x7f"
"""Sorts after every name in a folder."""
_MEASURED = " measured"
"""Name of a field beside those of owners, whose names have no spaces."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Bytes of one owner in the bucket."""

    bytes: int
    measured_at: datetime | None
    """End of the last complete walk; None before the first."""


class Census:
    """The bytes of all owners."""

    def __init__(self, job_store: JobStore, write_once: WriteOnceStore) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._store = write_once.store
        self._state = f"{job_store.prefix}:census"
        self._changed = f"{job_store.prefix}:census-changed"
        self._stored = f"{job_store.prefix}:stored"

    def of(self, owner: str) -> Stored:
        """Return the counted bytes of an owner."""
        count, at = guarded(lambda: self._job_store.client.hmget(self._stored, [owner, _MEASURED]))
        return Stored(bytes=max(0, int(count or 0)), measured_at=utc(int(at)) if at else None)

    def owners(self) -> set[str]:
        """Return all owners with bytes in the bucket."""
        names: list[str] = guarded(lambda: self._job_store.client.hkeys(self._stored))
        return set(names) - {_MEASURED}

    @contextmanager
    def change(self, owner: str, folder: str, *, before: int, after: int) -> Generator[None]:
        """Record that a folder's size changes from `before` to `after`, and undo that if the block fails.

        Recorded before the change, so that a walk that passes the folder meanwhile knows what to count.
        """
        self._add(owner, after - before, folder, str(after))
        try:
            yield
        except BaseException:
            self._add(owner, before - after, folder, "")
            raise

    def _add(self, owner: str, count: int, folder: str, after: str) -> None:
        self._job_store.run_script("census", "add", secrets.token_hex(8), owner, str(count), folder, after)

    def step(self) -> None:
        """Count a few more folders. Raises `Unavailable`; the next step continues from there."""
        under_way: list[str] = self._job_store.run_script("census", "begin")
        if not under_way:
            return
        (number, at), until = under_way, time.monotonic() + STEP_SECONDS
        for root in _ROOTS:
            end = root + _END
            if at >= end:
                continue
            reached, counts = self._count(root, at if at.startswith(root) else "", until)
            if not self._note(number, at, reached, counts):
                return  # another process walks too
            at = reached
            if reached != end:
                return
        self._job_store.run_script("census", "publish", number, at, str(int(EVERY_SECONDS * 1000)))

    def _count(self, root: str, after: str, until: float) -> tuple[str, dict[str, tuple[str, int]]]:
        """Count folders below a root. Returns the position reached, and owner and bytes of each folder."""
        counts: dict[str, tuple[str, int]] = {}
        folder, owner = "", ""
        for item in self._store.list(root, after=after):
            name = f"{root}{item.key.removeprefix(root).partition('/')[0]}/"
            if name != folder:
                if folder and time.monotonic() > until:
                    return folder + _END, counts  # only whole folders, so each change is before or after the position
                folder, owner = name, self._owner(root, name.removeprefix(root).removesuffix("/"))
            counts[folder] = (owner, counts.get(folder, (owner, 0))[1] + item.size)
        return root + _END, counts

    def _owner(self, root: str, name: str) -> str:
        """Return the owner of a folder; an empty name if it cannot be read."""
        try:
            if root == object_keys.DATASETS:
                body = self._store.get_json(object_keys.dataset(name))
            else:
                owner: str | None = guarded(
                    lambda: self._job_store.client.hget(f"{self._job_store.prefix}:job:{name}", "owner")
                )
                body = {"owner": owner} if owner else self._write_once.job(name)
            return str(body["owner"]) if body else ""
        except Unavailable:
            raise
        except Exception:  # an error in one object must not prevent counting the others
            log.exception("owner_unreadable", folder=root + name)
            return ""

    def _note(self, number: str, at: str, reached: str, counts: dict[str, tuple[str, int]]) -> bool:
        """Store the counts and the position, with later changes; False if another process was first."""
        while True:
            notes: str = guarded(lambda: self._job_store.client.hget(self._state, "notes")) or "0"
            changed: dict[str, str] = guarded(lambda: self._job_store.client.hgetall(self._changed))
            truth = dict(counts)
            for folder, text in changed.items():
                if at < folder < reached:
                    size, _, owner = text.partition(" ")
                    truth[folder] = (owner, int(size))
            sums: dict[str, int] = {}
            for owner, size in truth.values():
                if owner:
                    sums[owner] = sums.get(owner, 0) + size
            done = self._job_store.run_script("census", "note", number, at, reached, notes, strict_json.dumps(sums))
            if done >= 0:
                return bool(done)
