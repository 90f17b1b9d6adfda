"""How a training process is asked to end, and that it never outlives its parent.

Owns its signal handlers and the watch on the parent. Invariant: a step is never torn by TERM, and before the first
step there is nothing to finish, so TERM ends the process at once.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 1.0


class StoppedEarly(BaseException):
    """Asked to stop before the first step; no Exception, so that no library on the way swallows it."""


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


def dump_stacks_when_asked() -> None:
    """On SIGUSR1 write what every thread is doing to stderr, and go on; works while a library is stuck in C too."""
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def die_with_parent() -> None:
    """Be killed when the parent dies: by the kernel, and by a watch where the kernel's promise does not hold.

    The kernel means the parent's thread that started this process, and forgets the promise in some containers.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
