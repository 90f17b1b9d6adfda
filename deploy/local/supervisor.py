"""Keeps a list of services running: starts them in waves, restarts those that die, stops them in reverse order.

Knows neither Valkey, S3 nor the API. During the start, it gives up if a service keeps dying at once. Once all are
running, it never gives up, because a crashing worker must not stop the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from deploy.local.errors import StackError, StartError
from deploy.local.process import Child, Service, log_tail

_POLL_S = 0.1
_AT_ONCE_S = 10.0
"""A service that ends sooner than this after its start has died "at once"."""
_MAX_DEATHS = 5
_MAX_DELAY_S = 10.0

log = logging.getLogger(__name__)


class StopRequestedError(StackError):
    """The stack was stopped while it was starting."""


class Kept:
    """One service, and how often it was restarted."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.child: Child | None = None
        self.restarts = -1
        self.deaths = 0
        """Number of deaths in a row, each at once after a start."""
        self._due = 0.0

    def tend(self) -> None:
        """Record its death, and start it again when its delay is over."""
        if self.child is None:
            if time.monotonic() >= self._due:
                self.child = Child(self.service)
                self.restarts += 1
        elif not self.child.alive():
            self.deaths = self.deaths + 1 if self.child.age_s < _AT_ONCE_S else 1
            delay_s = min(0.125 * 2.0**self.deaths, _MAX_DELAY_S)
            log.warning("%s (pid %d) died; starting it again in %.2f s", self.service.name, self.child.pid, delay_s)
            self.child.kill()
            self.child = None
            self._due = time.monotonic() + delay_s

    def missing(self) -> str | None:
        return "it died" if self.child is None else self.child.missing()

    def stop(self) -> None:
        if self.child is not None:
            log.info("stopping %s", self.service.name)
            self.child.stop()
            self.child = None


class Supervisor:
    """Runs services in waves. Calls `on_change` when a process or `waiting_for` has changed."""

    def __init__(self, waves: Sequence[Sequence[Service]], on_change: Callable[[], None]) -> None:
        self._waves = [[Kept(service) for service in wave] for wave in waves]
        self._on_change = on_change
        self._stop_requested = False
        self.kept: list[Kept] = []
        """Services started so far, in order."""
        self.waiting_for: dict[str, str] = {}

    def request_stop(self) -> None:
        """Request the stop. Can be called in a signal handler."""
        self._stop_requested = True

    def start(self, timeout_s: float) -> None:
        """Start all waves, each after the one before it answers. Returns once everything answers."""
        deadline = time.monotonic() + timeout_s
        for wave in self._waves:
            self.kept += wave
            waiting = wave
            # Before the first check, which may last until the service is ready.
            self._wait_for({kept.service.name: "not started yet" for kept in wave})
            while waiting:
                self._tend()
                self._refuse_to_go_on(waiting, deadline)
                lacks = [(kept, kept.missing()) for kept in waiting]
                waiting = [kept for kept, missing in lacks if missing is not None]
                self._wait_for({kept.service.name: missing for kept, missing in lacks if missing is not None})
                if waiting:
                    time.sleep(_POLL_S)

    def watch(self) -> None:
        """Restart services that die, until the stop is requested."""
        while not self._stop_requested:
            self._tend()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop the services in reverse order, so that each still has the services it depends on."""
        while self.kept:
            self.kept[-1].stop()
            self.kept.pop()
            self._on_change()

    def _tend(self) -> None:
        before = [kept.child for kept in self.kept]
        for kept in self.kept:
            kept.tend()
        if before != [kept.child for kept in self.kept]:
            self._on_change()

    def _wait_for(self, names: dict[str, str]) -> None:
        if names.keys() != self.waiting_for.keys():
            self.waiting_for = names
            self._on_change()
        self.waiting_for = names

    def _refuse_to_go_on(self, waiting: Sequence[Kept], deadline: float) -> None:
        if self._stop_requested:
            raise StopRequestedError("the stack was stopped while it was starting")
        for kept in self.kept:
            if kept.deaths >= _MAX_DEATHS:
                raise StartError(f"{kept.service.name} died {kept.deaths} times in a row\n{log_tail(kept.service.log)}")
        if time.monotonic() > deadline:
            name, log_file = waiting[0].service.name, waiting[0].service.log
            raise StartError(f"{name} did not start in time: {self.waiting_for.get(name)}\n{log_tail(log_file)}")
