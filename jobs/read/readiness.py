"""Whether the servers that this process needs answer. A separate thread checks each server repeatedly.

Owns when servers are checked and how long a result is valid; the check function owns how. Invariant: reading the result
never waits, no matter what a server or a check does; a result that is too old counts as a failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import structlog

from jobs.errors import JobsError

log = structlog.get_logger()

INTERVAL_SECONDS = 1.0
STALE_SECONDS = 4.0
"""Age in seconds after which a result counts as a failure, because its check waits for a server."""

Check = Callable[[], object]
"""A check; it raises if the server cannot be used."""


class Readiness:
    """The latest results."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        """`checks` by their names in the answer of GET /readyz."""
        self._checks = dict(checks)
        self._latest: dict[str, tuple[float, str]] = {}
        self._answered = {name: threading.Event() for name in checks}
        self._closed = threading.Event()

    def start(self, seconds: float) -> None:
        """Start the checks. Returns once all have a result, or after `seconds`."""
        for name in self._checks:
            threading.Thread(target=self._ask, args=(name,), name=f"readiness-{name}", daemon=True).start()
        deadline = time.monotonic() + seconds
        for answered in self._answered.values():
            answered.wait(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Stop the checks."""
        self._closed.set()

    def verdicts(self) -> dict[str, str]:
        """Return `ok` for each check, or why it failed."""
        return {name: self._verdict(name) for name in self._checks}

    def _verdict(self, name: str) -> str:
        if name not in self._latest:
            return "has not answered yet"
        at, verdict = self._latest[name]
        age = time.monotonic() - at
        return verdict if age <= STALE_SECONDS else f"has not answered for {age:.0f} s"

    def _ask(self, name: str) -> None:
        before = ""
        while not self._closed.is_set():
            verdict = _verdict_of(self._checks[name])
            if verdict != before:
                (log.info if verdict == "ok" else log.warning)("readiness", check=name, verdict=verdict)
                before = verdict
            self._latest[name] = (time.monotonic(), verdict)
            self._answered[name].set()
            self._closed.wait(INTERVAL_SECONDS)


def _verdict_of(check: Check) -> str:
    try:
        check()
    except JobsError as error:
        return str(error)
    except Exception as error:
        log.exception("readiness_broken")
        return type(error).__name__
    return "ok"
