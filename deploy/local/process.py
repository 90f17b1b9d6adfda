"""One child process: starts it in a separate session, logs its output, ends it with this process, stops its group.

Owns signals and log files. A probe says whether the child's service answers. Start children from the main thread only:
Linux kills them when the *thread* that started them ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deploy.local.errors import StackError, StartError
from grpo_core import processes

_POLL_S = 0.02
_MAX_LOG_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Service:
    """A program to run, and the probe that says whether it answers."""

    name: str
    argv: tuple[str, ...]
    """The program's absolute path and its arguments. `ps` shows them to everyone, so they hold no secret."""
    env: Mapping[str, str]
    cwd: Path
    log: Path
    stdin: bytes = b""
    probe: Callable[[], str | None] = lambda: None
    """Returns why the service does not answer yet, or None once it does."""
    settle_s: float = 0.0
    """Seconds after which it counts as started, for a service without a port."""
    stop_s: float = 15.0
    """Seconds that it may take to end after TERM, before its whole group is killed."""


class Child:
    """A running (or ended) service."""

    def __init__(self, service: Service) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise StackError(f"{service.name} must be started from the main thread, because it ends with its thread")
        self.service = service
        self.started = time.monotonic()
        # -I -S: the launcher needs nothing but the standard library, and this halves its start to 20 ms.
        launcher = [sys.executable, "-I", "-S", str(processes.__file__), str(os.getpid()), *service.argv]
        with open_log(service.log) as log:
            self._popen = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
                launcher,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=service.cwd,
                env=dict(service.env),
                start_new_session=True,
                umask=0o077,
            )
        self._feed(service.stdin)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started

    def alive(self) -> bool:
        return self._popen.returncode is None and not self._ended()

    def missing(self) -> str | None:
        """Return why this child is not ready; None once it is."""
        if not self.alive():
            return "it ended"
        if self.age_s < self.service.settle_s:
            return "it has only just started"
        return self.service.probe()

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the probe succeeds. Stops the child and raises if it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while (missing := self.missing()) is not None:
            if not self.alive() or time.monotonic() > deadline:
                self.kill()
                raise StartError(f"{self.service.name} did not start: {missing}\n{log_tail(self.service.log)}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Send TERM, and KILL after the grace time, to the whole group, even if only its leader has ended."""
        deadline = time.monotonic() + self.service.stop_s
        if self.alive():
            self._signal(signal.SIGTERM)
        while self.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """Send KILL to the whole group."""
        if self._popen.returncode is None:
            # Before the leader is reaped: until then no other process can get its number.
            self._signal(signal.SIGKILL)
            self._popen.wait()

    def _feed(self, text: bytes) -> None:
        assert self._popen.stdin is not None  # it is PIPE
        try:
            with self._popen.stdin as pipe:
                pipe.write(text)
        except BrokenPipeError:
            pass  # it has ended, and its log has the reason

    def _ended(self) -> bool:
        """Whether the leader has ended. Does not reap it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            # Between fork and setsid the group does not exist yet.
            self._popen.send_signal(number)


def open_log(log: Path) -> IO[bytes]:
    """Open a log for appending, readable by its owner only. A log that has grown large is rotated first."""
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def log_tail(log: Path, lines: int = 20) -> str:
    """Return the end of a log, with its path above it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        text = []
    return "\n".join([f"--- the end of {log}:", *text] if text else [f"--- {log} is empty"])
