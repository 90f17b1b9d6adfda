"""The page that a job leaves for people, of all its runs: fetches what the runs before this one left, then writes it.

Owns `report.html`, and `inputs/earlier/` in the run folder, which the page is made from and which is never shipped: the
bucket has it already. Invariant: no server, no disk and no completion can make a job end otherwise than it would have
without a page; what cannot be had in time is left out of it.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import structlog

from grpo_core import report_page, strict_json
from grpo_core.errors import FailureReport
from grpo_core.runfolder import new_file
from jobs import journal, lineage
from jobs.archive import Ending, ManifestEntry
from jobs.errors import Damaged, Denied, JobsError, Unavailable
from jobs.patience import Order, TooSlow
from jobs.tenure import Tenure

log = structlog.get_logger()

ROLLOUT_BYTES = 64 * 1024**2
"""Of earlier runs' rollouts, at most so much is fetched: the newest that the page would show."""
EVENT_BYTES = 32 * 1024**2
"""Of earlier runs' events, the same: the newest."""
FETCH_SECONDS = 20.0
"""What the end of a job may be held up by all of this; where it has to be quick, half of the time there is."""
EVENTS_AT_ONCE = 500

_UNTOLD = frozenset({"metric", "sample"})
"""Events whose content the page has from elsewhere."""
_SAVED_METRICS = re.compile(r"checkpoints/step-\d+/metrics\.jsonl")


def write_report(
    tenure: Tenure, status: Ending, error: FailureReport | None, heed: Collection[Order], *, until: float | None = None
) -> None:
    """Leave `report.html`, of a run that has begun or of those before it. Raises as `Patience` does and never else."""
    if tenure.epoch > 1:
        seconds = FETCH_SECONDS if until is None else min(FETCH_SECONDS, max(0.1, (until - time.monotonic()) / 2))
        earlier = EarlierRuns(tenure, until=time.monotonic() + seconds)
        with contextlib.suppress(TooSlow):
            tenure.patience(earlier.fetch, heed, seconds=seconds)
    tenure.patience(lambda: _write(tenure.folder, status, error), heed, until=until)


def _write(folder: Path, status: Ending, error: FailureReport | None) -> None:
    if not (folder / "events.jsonl").exists() and not (folder / report_page.EARLIER).exists():
        return
    try:
        report_page.write(folder, status=status, error=error.as_dict() if error else None)
    except Exception:  # whatever a page may trip over, the numbers are all in other files
        log.exception("report_page_failed", folder=folder.name)


class EarlierRuns:
    """What the page needs of a job's earlier runs, brought into the folder of this one."""

    def __init__(self, tenure: Tenure, *, until: float) -> None:
        self._tenure = tenure
        self._store = tenure.tools.store
        self._target = tenure.folder / report_page.EARLIER
        self._until = until

    def fetch(self) -> None:
        """Bring as much as there is time and room for. A file that is there is whole; it may be repeated."""
        try:
            # Not its parents: the run's folder may have been removed meanwhile.
            self._target.mkdir(exist_ok=True)
            objects = self._objects()
        except (JobsError, OSError) as error:
            self._log("objects", error)
            return
        for fetch in (self._fetch_events, self._fetch_metrics, self._fetch_rollouts):
            try:
                fetch(objects)
            except Exception as error:  # noqa: BLE001 - whatever it trips over, the page is made without it
                self._log(fetch.__name__, error)

    def _objects(self) -> Sequence[ManifestEntry]:
        """What is valid of earlier runs."""
        tenure = self._tenure
        if tenure.base is not None:
            return tenure.base.objects
        commit = lineage.newest_commit(self._store, tenure.job_id, tenure.epoch - 1)
        return commit.objects if commit else []

    def _fetch_events(self, objects: Sequence[ManifestEntry]) -> None:
        """What happened in the job so far, as the service numbers it: what workers told stands nowhere else."""
        kept = newest((entry for entry in objects if journal.event_files([entry.key])), EVENT_BYTES)
        files = journal.event_files(entry.key for entry in kept)
        after = max((file.last for file in files), default=0)
        with new_file(self._target / "events.jsonl") as path, path.open("w", encoding="utf-8") as lines:
            for event in chain(journal.read_events(self._store, files), self._later_events(after)):
                self._check_time()
                if event["type"] not in _UNTOLD:
                    lines.write(f"{strict_json.dumps(event)}\n")

    def _later_events(self, after: int) -> Iterator[dict[str, Any]]:
        """Those that no run had stored when this one began, as far as the ledger can tell."""
        try:
            while events := self._tenure.tools.ledger.events(self._tenure.job_id, after=after, limit=EVENTS_AT_ONCE):
                yield from events
                after = events[-1]["seq"]
        except Unavailable as error:
            self._log("later events", error)

    def _fetch_metrics(self, objects: Sequence[ManifestEntry]) -> None:
        """The steps so far, for a run that ended before it had its checkpoint."""
        folder = self._tenure.folder
        known = (folder / "metrics.jsonl", folder / "inputs" / "resume" / "metrics.jsonl")
        saved = [entry for entry in objects if _SAVED_METRICS.fullmatch(entry.path)]
        if saved and not any(path.exists() for path in known):
            self._download(max(saved, key=lambda entry: entry.path), self._target / "metrics.jsonl")

    def _fetch_rollouts(self, objects: Sequence[ManifestEntry]) -> None:
        """The files with steps that the page shows."""
        shown = report_page.steps_shown(self._tenure.folder)
        wanted = [
            entry
            for entry in objects
            for file in lineage.listed_rollouts([entry])
            if any(file.first <= step <= file.last for step in shown)
        ]
        (self._target / "rollouts").mkdir(exist_ok=True)
        for entry in newest(wanted, ROLLOUT_BYTES):
            try:
                self._download(entry, self._target / "rollouts" / entry.name)
            except (Damaged, Denied) as error:
                self._log(entry.path, error)  # the others are worth as much as before

    def _download(self, entry: ManifestEntry, target: Path) -> None:
        if target.exists():
            return
        self._store.stream(entry.key, target, lambda _: self._check_time(), sha256=entry.sha256)

    def _check_time(self) -> None:
        """Whoever gave this up must not have it go on beside."""
        if time.monotonic() > self._until:
            raise TimeoutError("the page is not waited for any longer")

    def _log(self, what: str, error: Exception) -> None:
        log.warning("report_without", job_id=self._tenure.job_id, what=what, error=repr(error))


def newest(entries: Iterable[ManifestEntry], limit: int) -> list[ManifestEntry]:
    """The last of these by name, with no more than `limit` bytes of them together; in order."""
    kept: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda entry: entry.path, reverse=True):
        limit -= entry.size
        if limit < 0:
            break
        kept.append(entry)
    return kept[::-1]
