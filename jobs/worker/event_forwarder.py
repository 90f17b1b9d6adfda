"""Forwards the training process's events from its file to the job's event stream in Valkey.

Owns which lines were read and which events Valkey has accepted. Invariants: only whole lines are read, and events are
sent in order until Valkey has accepted them; a repetition does no harm, because Valkey counts the events of a run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from grpo_core.reasons import EventType, Phase, WarningCode
from grpo_core.run_dir.records import STOPPED_EARLY
from jobs.errors import Unavailable
from jobs.lifecycle.outcomes import apply_outcome
from jobs.store.job import HELD
from jobs.store.job_store import JobEvent, JobStore
from jobs.store.write_once import Outcome
from jobs.worker import trainer_events, untrusted_files
from jobs.worker.lease import Lease

log = structlog.get_logger()


BATCH = 200
BATCH_BYTES = 1024**2
"""Largest size of one batch, because the script that accepts it blocks Valkey."""
CHUNK_BYTES = 1024**2
LINE_BYTES = 256 * 1024
"""Largest size of an event."""
WAITING_MOST = 100_000
WAITING_BYTES = 32 * 1024**2
"""Largest size of the events kept in memory while Valkey is unavailable; the others stay in the file."""
TEXTS_BYTES = 64 * 1024**2
"""Size of a run's events after which its samples and logs are left out; metrics and warnings are still sent."""
EVENTS_BYTES = 128 * 1024**2
"""Largest size of a run's events, because Valkey holds them until a week after the job's end."""
LOGGED_FAULTS = 5
"""Number of invalid lines per run that the worker logs."""

_MOST_BYTES = {"sample": TEXTS_BYTES, "log": TEXTS_BYTES, "status": EVENTS_BYTES + 1024**2}
"""Bounds other than `EVENTS_BYTES`, by type. That of `status` is higher, so that the phase is shown to the end."""


class EventTail:
    """The events of one run that must still be sent.

    Only the file decides the events and their positions, so reading it again gives the same events.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._logged = 0
        self.last_error: dict[str, Any] | None = None
        """The data of the newest `error` event. It is not sent, because a later run of the job may succeed."""
        self.phase: Phase | None = None
        """The run's phase, by its last status event."""
        self.best_step: int | None = None
        """The step whose evaluation was best so far."""
        self._start_over()

    def _start_over(self) -> None:
        self._offset = 0
        self._waiting: list[tuple[int, JobEvent]] = []
        """Events with their size in bytes."""
        self._waiting_bytes = 0
        self._sent = 0
        self._all_bytes = 0
        self._long = 0
        """Number of bytes read of a line that is too long."""
        self._warned: set[str] = set()

    def read(self) -> None:
        """Read the lines that were completed since the last call."""
        try:
            with untrusted_files.file(self._path.parent, self._path) as source, source.open("rb") as file:
                file.seek(self._offset)
                while not self._is_full and self._read_chunk(file):
                    pass
        except FileNotFoundError:
            return
        except untrusted_files.Refused as error:
            log.warning("file_refused", folder=self._path.parent.name, file=self._path.name, reason=str(error))

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= WAITING_MOST or self._waiting_bytes >= WAITING_BYTES

    def _read_chunk(self, file: BinaryIO) -> bool:
        """Read the whole lines of the next chunk; False if there is none."""
        text = file.read(CHUNK_BYTES)
        end = text.rfind(b"\n") + 1
        if not end and len(text) < CHUNK_BYTES:
            return False
        if not end:
            self._long += len(text)
            self._offset += len(text)
            return True
        self._offset += end
        file.seek(self._offset)
        for line in text[: end - 1].split(b"\n"):
            length, self._long = self._long + len(line), 0
            if length > LINE_BYTES:
                self._leave_out(
                    WarningCode.EVENT_TOO_LONG, f"an event of {length} bytes, more than {LINE_BYTES}", length
                )
            else:
                self._take(line)
        return True

    def _take(self, line: bytes) -> None:
        try:
            event = trainer_events.parse(line)
        except ValueError as error:  # for example, half a line after the disk was full
            fault = str(error) if type(error) is ValueError else type(error).__name__
            self._leave_out(WarningCode.EVENT_INVALID, f"a line that is not an event ({fault})", len(line))
            return
        if event.type == EventType.ERROR:
            self.last_error = dict(event.data)
            return
        if event.type == EventType.STATUS:
            self.phase = Phase(event.data["phase"])
        if event.type == EventType.EVALUATION:
            self.best_step = event.data.get("best_step") or self.best_step
        most = _MOST_BYTES.get(event.type, EVENTS_BYTES)
        if self._all_bytes + len(line) > most:
            what = WarningCode.SAMPLES_LEFT_OUT if most == TEXTS_BYTES else WarningCode.EVENTS_LEFT_OUT
            self._leave_out(what, f"an event of type {event.type} after {most} bytes of events", len(line))
        else:
            self._add(event, len(line))

    def _add(self, event: JobEvent, size: int) -> None:
        self._waiting.append((size, event))
        self._waiting_bytes += size
        self._all_bytes += size

    def _leave_out(self, code: WarningCode, what: str, size: int) -> None:
        """Count a line that is not sent. The owner gets one warning, and the worker logs the first few."""
        if self._logged < LOGGED_FAULTS:
            self._logged += 1
            log.warning("bad_event_line", folder=self._path.parent.name, code=code, bytes=size)
        if code in self._warned:
            return
        self._warned.add(code)
        message = f"The training process wrote {what}. It is left out, and so are all further ones of this kind."
        told = JobEvent(type=EventType.WARNING, data={"code": code, "message": message})
        self._add(told, len(message))

    def rewind(self, shipped: int) -> None:
        """Send events again from an ordinal on, because the job store has lost them."""
        self._start_over()
        self.read()
        while self._waiting and self._sent < shipped:
            self.taken(min(shipped, self._sent + len(self._waiting)))
            self.read()

    def batch(self) -> tuple[int, list[JobEvent]]:
        """Return the events to send, and the ordinal of the first, counted from 1 in this run."""
        events: list[JobEvent] = []
        room = BATCH_BYTES
        for size, event in self._waiting[:BATCH]:
            room -= size
            if events and room < 0:
                break
            events.append(event)
        return self._sent + 1, events

    def taken(self, shipped: int) -> None:
        """Drop the events up to an ordinal."""
        gone = max(0, shipped - self._sent)
        self._waiting_bytes -= sum(size for size, _ in self._waiting[:gone])
        del self._waiting[:gone]
        self._sent = max(self._sent, shipped)


class EventForwarder:
    """Sends the training process's events to the job store, after an outage later."""

    def __init__(self, job_store: JobStore, lease: Lease, job_id: str, epoch: int, folder: Path) -> None:
        self._job_store = job_store
        self._lease = lease
        self._job_id = job_id
        self._epoch = epoch
        self._stop_noted = False
        self.tail = EventTail(folder / "events.jsonl")

    def send_new(self) -> None:
        """Send new events, if the job store is available."""
        try:
            self.send_all()
        except Unavailable:
            return

    def send_all(self) -> None:
        """Send all events. Raises `Unavailable` while the job store does not accept them."""
        while True:
            self.tail.read()
            first, batch = self.tail.batch()
            if not batch:
                return
            change = self._job_store.change(
                self._job_id,
                from_statuses=HELD,
                epoch=self._epoch,
                fields=_progress(batch),
                events=batch,
                first_ordinal=first,
            )
            if change.refusal == "missing" or change.epoch < self._epoch:
                raise Unavailable(
                    "Valkey", "it has lost the record"
                )  # until `valkey_recovery` or the lease has put it back
            if change.refusal == "events":
                self.tail.rewind(change.shipped)
                continue
            if not change.done:
                self._lease.lose()
                return
            self.tail.taken(change.shipped)

    def settle(self, outcome: Outcome) -> None:
        """End the record by the outcome, once it has all events of the run. Raises `Unavailable`."""
        while True:
            first, _ = self.tail.batch()
            change = apply_outcome(
                self._job_store, self._job_id, outcome, add_error=True, first_ordinal=first, epoch=self._epoch
            )
            if change.refusal == "epoch":
                if change.epoch < self._epoch and self._lease.reclaim():
                    continue  # the claim was lost, and with it the events of this run
                apply_outcome(self._job_store, self._job_id, outcome, add_error=True)
                return
            if change.refusal != "events":
                return
            self.tail.rewind(change.shipped)
            self.send_all()

    def note_stop(self) -> None:
        """Record that this run's worker was asked to stop, in case it is killed before it has finished."""
        if self._stop_noted:
            return
        with contextlib.suppress(Unavailable):
            self._job_store.change(self._job_id, epoch=self._epoch, fields={"stopped_epoch": self._epoch})
            self._stop_noted = True


def _progress(events: list[JobEvent]) -> dict[str, object] | None:
    """Return the fields of the record that a batch of events changes."""
    fields: dict[str, object] = {}
    for event in events:
        if event.type == EventType.METRIC:
            fields["step"] = event.step
            if event.data.get("reward") is not None:
                fields["reward"] = event.data["reward"]
        elif event.type == EventType.EVALUATION and event.data.get("best_step") is not None:
            fields["best_step"] = event.data["best_step"]
        elif event.type == EventType.LOG and event.data.get("code") == STOPPED_EARLY:
            fields["stopped"] = event.data["message"]
        elif event.type == EventType.STATUS and "phase" in event.data:
            fields["phase"] = event.data["phase"]
    return fields or None
