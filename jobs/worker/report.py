"""Writes `report.html`, a page about all runs of a job, after fetching files of earlier runs.

Owns `report.html`, and `inputs/earlier/` in the run folder, with the files of earlier runs, which are not uploaded
again. Invariant: no error of a server, a disk or a page changes how a job ends; files that are not available in time
are left out.
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
from grpo_core.run_dir.layout import new_file
from grpo_core.spec.sections import STEPPING
from jobs.errors import Damaged, Denied, JobsError, Unavailable
from jobs.store import commits, event_log
from jobs.store.write_once import FinalStatus, ManifestEntry
from jobs.worker.interruptible_retry import Interrupt, TooSlow
from jobs.worker.run_context import RunContext

log = structlog.get_logger()

ROLLOUT_BYTES = 64 * 1024**2
"""Limit for the rollouts that are fetched from earlier runs: the newest that the page would show."""
EVENT_BYTES = 32 * 1024**2
"""Limit for events fetched from earlier runs, newest first."""
FETCH_SECONDS = 20.0
"""Longest delay of a job's end by the report; if the end must be quick, half of the time that is left."""
EVENTS_AT_ONCE = 500

_SHOWN_ELSEWHERE = frozenset({"metric", "sample"})
"""Events whose content the page reads from other files."""
_SAVED_METRICS = re.compile(r"checkpoints/step-\d+/metrics\.jsonl")


def write_report(
    context: RunContext,
    status: FinalStatus,
    error: FailureReport | None,
    interrupts: Collection[Interrupt],
    *,
    until: float | None = None,
) -> None:
    """Write `report.html` for the job's runs so far, unless it is of a kind without steps.

    Raises only what `InterruptibleRetry` raises.
    """
    if context.record.spec.get("kind", "training") not in STEPPING:
        return
    if context.epoch > 1:
        seconds = FETCH_SECONDS if until is None else min(FETCH_SECONDS, max(0.1, (until - time.monotonic()) / 2))
        earlier = EarlierRuns(context, until=time.monotonic() + seconds)
        with contextlib.suppress(TooSlow):
            context.retry(earlier.fetch, interrupts, seconds=seconds)
    context.retry(lambda: _write(context.folder, status, error), interrupts, until=until)


def _write(folder: Path, status: FinalStatus, error: FailureReport | None) -> None:
    if not (folder / "events.jsonl").exists() and not (folder / report_page.EARLIER).exists():
        return
    try:
        report_page.write(folder, status=status, error=error.as_dict() if error else None)
    except Exception:  # the job must not depend on the page, and other files have all numbers
        log.exception("report_page_failed", folder=folder.name)


class EarlierRuns:
    """Fetches the files of earlier runs that the page needs."""

    def __init__(self, context: RunContext, *, until: float) -> None:
        self._context = context
        self._store = context.deps.store
        self._target = context.folder / report_page.EARLIER
        self._until = until

    def fetch(self) -> None:
        """Fetch as much as time and limits allow. May be repeated; every file that exists is complete."""
        try:
            # Without parents, because the run's folder may have been removed meanwhile.
            self._target.mkdir(exist_ok=True)
            objects = self._objects()
        except (JobsError, OSError) as error:
            self._log("objects", error)
            return
        for fetch in (self._fetch_events, self._fetch_metrics, self._fetch_rollouts):
            try:
                fetch(objects)
            except Exception as error:  # noqa: BLE001 - the page is then made without these files
                self._log(fetch.__name__, error)

    def _objects(self) -> Sequence[ManifestEntry]:
        """Return the valid objects of earlier runs."""
        context = self._context
        if context.base is not None:
            return context.base.objects
        commit = commits.newest_commit(self._store, context.job_id, context.epoch - 1)
        return commit.objects if commit else []

    def _fetch_events(self, objects: Sequence[ManifestEntry]) -> None:
        """Fetch the job's events so far, because no other file has the workers' events."""
        kept = newest((entry for entry in objects if event_log.event_files([entry.key])), EVENT_BYTES)
        files = event_log.event_files(entry.key for entry in kept)
        after = max((file.last for file in files), default=0)
        with new_file(self._target / "events.jsonl") as path, path.open("w", encoding="utf-8") as lines:
            for event in chain(event_log.read_events(self._store, files), self._later_events(after)):
                self._check_time()
                if event["type"] not in _SHOWN_ELSEWHERE:
                    lines.write(f"{strict_json.dumps(event)}\n")

    def _later_events(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield events that no run had stored when this one started, if the job store has them."""
        try:
            while events := self._context.deps.job_store.events(
                self._context.job_id, after=after, limit=EVENTS_AT_ONCE
            ):
                yield from events
                after = events[-1]["seq"]
        except Unavailable as error:
            self._log("later events", error)

    def _fetch_metrics(self, objects: Sequence[ManifestEntry]) -> None:
        """Fetch the metrics so far, for a run that ended before it had its checkpoint."""
        folder = self._context.folder
        known = (folder / "metrics.jsonl", folder / "inputs" / "resume" / "metrics.jsonl")
        saved = [entry for entry in objects if _SAVED_METRICS.fullmatch(entry.path)]
        if saved and not any(path.exists() for path in known):
            self._download(max(saved, key=lambda entry: entry.path), self._target / "metrics.jsonl")

    def _fetch_rollouts(self, objects: Sequence[ManifestEntry]) -> None:
        """Fetch the rollout files with steps that the page shows."""
        shown = report_page.steps_shown(self._context.folder)
        wanted = [
            entry
            for entry in objects
            for file in commits.listed_rollouts([entry])
            if any(file.first <= step <= file.last for step in shown)
        ]
        (self._target / "rollouts").mkdir(exist_ok=True)
        for entry in newest(wanted, ROLLOUT_BYTES):
            try:
                self._download(entry, self._target / "rollouts" / entry.name)
            except (Damaged, Denied) as error:
                self._log(entry.path, error)  # the other files are still useful

    def _download(self, entry: ManifestEntry, target: Path) -> None:
        if target.exists():
            return
        self._store.stream(entry.key, target, lambda _: self._check_time(), sha256=entry.sha256)

    def _check_time(self) -> None:
        """Raise after the time limit, so that an abandoned fetch does not continue in its thread."""
        if time.monotonic() > self._until:
            raise TimeoutError("the time limit of the report is over")

    def _log(self, what: str, error: Exception) -> None:
        log.warning("report_without", job_id=self._context.job_id, what=what, error=repr(error))


def newest(entries: Iterable[ManifestEntry], limit: int) -> list[ManifestEntry]:
    """Return the last entries by name with at most `limit` bytes together, in order."""
    kept: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda entry: entry.path, reverse=True):
        limit -= entry.size
        if limit < 0:
            break
        kept.append(entry)
    return kept[::-1]
