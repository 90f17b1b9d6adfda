"""Copies a run folder into the bucket while the run goes on, and makes the manifest of what is valid.

Owns which files are sent and when; a thread of its own, so that slow storage never holds up a heartbeat.
Invariant: it writes only below its own epoch's prefix, and lists only files that were sent whole.
"""

from __future__ import annotations

import threading
from pathlib import Path

import structlog

from grpo_core import strict_json
from jobs import layout, rollouts
from jobs.archive import ManifestEntry
from jobs.errors import Unavailable
from jobs.journal import events_name
from jobs.ledger import Ledger
from jobs.storage import ObjectStore

log = structlog.get_logger()

SYNC_SECONDS = 3.0
EVENTS_AT_ONCE = 500
"""Events are sent in files of about so many, so that a long job leaves few; the rest goes at the end."""
FINAL_FILES = ("metrics.jsonl", "evaluation.parquet", "report.json", "spec.json", "stderr.log")
"""Files that change until the run ends."""


class Shipper:
    """The copy of one run in the bucket."""

    def __init__(self, store: ObjectStore, ledger: Ledger, job_id: str, epoch: int, folder: Path) -> None:
        self._store = store
        self._ledger = ledger
        self._job_id = job_id
        self._folder = folder
        self._prefix = layout.run(job_id, epoch)
        self._sent: dict[str, ManifestEntry] = {}
        self._last_event = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"shipper-{job_id}", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the file at hand and copy no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SYNC_SECONDS):
            try:
                self.sync()
            except Unavailable as error:
                log.warning("ship_failed", job_id=self._job_id, reason=str(error))

    def sync(self) -> None:
        """Send what is finished and not yet sent; drop the checkpoints the run has pruned."""
        self._drop_pruned()
        for checkpoint in sorted(self._folder.glob("checkpoints/step-*")):
            self._send_checkpoint(checkpoint)
        for _, path in rollouts.step_files(self._folder / "rollouts"):
            self._send(path)
        self._send_events(at_least=EVENTS_AT_ONCE)

    def finish(self) -> list[ManifestEntry]:
        """Send everything the run left; returns all objects that may be read. Call it after `stop`."""
        self._drop_pruned()
        self._merge_rollouts(None)
        for checkpoint in sorted(self._folder.glob("checkpoints/step-*")):
            self._send_checkpoint(checkpoint)
        for path in sorted(self._folder.glob("adapter/*")):
            self._send(path)
        for name in FINAL_FILES:
            if (self._folder / name).exists():
                self._send(self._folder / name, again=True)
        self._send_events(at_least=1)
        return [self._sent[path] for path in sorted(self._sent)]

    def _send_checkpoint(self, folder: Path) -> None:
        """Send a whole checkpoint, its manifest last; then the rollouts up to it become one part."""
        manifest = folder / "manifest.json"
        if not manifest.exists() or self._name(manifest) in self._sent:
            return
        for path in sorted(folder.iterdir()):
            if path != manifest:
                self._send(path)
        self._send(manifest)
        self._merge_rollouts(int(folder.name.removeprefix("step-")))

    def _drop_pruned(self) -> None:
        """Delete checkpoints that are gone here, their manifests first: half of one must never look whole."""
        gone = [name for name in self._sent if name.startswith("checkpoints/") and not (self._folder / name).exists()]
        for name in sorted(gone, key=lambda name: not name.endswith("/manifest.json")):
            self._store.delete(self._prefix + name)
            del self._sent[name]

    def _merge_rollouts(self, up_to: int | None) -> None:
        merged = rollouts.merge(self._folder / "rollouts", up_to)
        if merged is None:
            return
        part, replaced = merged
        self._send(part)
        for path in replaced:
            if self._sent.pop(self._name(path), None):
                self._store.delete(self._prefix + self._name(path))
            path.unlink()

    def _send_events(self, at_least: int) -> None:
        """Send the events the ledger numbered since the last time, unless they are too few."""
        while len(events := self._ledger.events(self._job_id, after=self._last_event, limit=1000)) >= at_least:
            first, last = events[0]["seq"], events[-1]["seq"]
            path = self._folder / events_name(first, last)
            path.write_text("".join(f"{strict_json.dumps(event)}\n" for event in events), encoding="utf-8")
            self._send(path)
            self._last_event = last

    def _send(self, path: Path, *, again: bool = False) -> None:
        name = self._name(path)
        if name in self._sent and not again:
            return
        try:
            sha256, size = self._store.upload(path, self._prefix + name)
        except FileNotFoundError:
            return  # the run pruned an old checkpoint under our hands
        self._sent[name] = ManifestEntry(path=name, key=self._prefix + name, sha256=sha256, size=size)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()
