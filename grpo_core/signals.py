"""Stopping a training process.

Owns its signal handlers; that it never outlives its parent is `processes`'. Invariant: TERM never interrupts a step,
and before the first step there is nothing to finish, so TERM ends the process at once.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading


class StoppedEarly(BaseException):
    """Raised by a request to stop before the first step; not an Exception, so that no library swallows it."""


class StopRequest:
    """Set by TERM or Ctrl-C. Raises `StoppedEarly` in the main thread until `finish_steps` is called."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._at_once = True

    def listen(self) -> None:
        """Take over TERM and INT; a second Ctrl-C ends the process as usual."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def finish_steps(self) -> None:
        """From now on a request waits for the end of the step."""
        self._at_once = False
        if self.event.is_set():  # it came between the last check and now
            raise StoppedEarly

    def _on_signal(self, number: int, _frame: object) -> None:
        self.event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once:
            raise StoppedEarly


def end_on_term() -> None:
    """As process 1 of a container, end on TERM until somebody handles it: Linux gives that process no other way."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def dump_stacks_when_asked() -> None:
    """On SIGUSR1 write what every thread is doing to stderr, and go on; works while a library is stuck in C too."""
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
