"""Follows the events file of a run: whole lines only, each kept until the ledger has it.

Invariant: an event is forgotten here only after it was taken there, so an outage between the two loses none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog

from jobs.ledger import JobEvent

log = structlog.get_logger()

BATCH = 200


class EventTail:
    """The events of one run that are still to be sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._waiting: list[JobEvent] = []
        self._sent = 0
        self.last_error: dict[str, Any] | None = None
        """The data of the newest `error` event. It is not sent: a later run may cure what ended this one."""
        self.phase: str | None = None
        """The run's phase, by its last status event."""

    def read(self) -> None:
        """Take in the lines that were completed since the last time."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError):  # a full disk leaves halves of lines
                log.warning("bad_event_line", folder=self._path.parent.name, bytes=len(line))

    def _take(self, body: dict[str, Any]) -> None:
        if body["type"] == "error":
            self.last_error = body["data"]
            return
        if body["type"] == "status":
            self.phase = body["data"].get("phase", self.phase)
        event = JobEvent(type=body["type"], data=body["data"], step=body.get("step") or 0, time=body["time"])
        self._waiting.append(event)

    def batch(self) -> tuple[int, list[JobEvent]]:
        """The ordinal of the first event to send, counted from 1 in this run, and the events from there."""
        return self._sent + 1, self._waiting[:BATCH]

    def taken(self, shipped: int) -> None:
        """Forget the events up to an ordinal."""
        del self._waiting[: max(0, shipped - self._sent)]
        self._sent = max(self._sent, shipped)
