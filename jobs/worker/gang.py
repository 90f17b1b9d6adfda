"""The hosts of one run: reserved through Ray before the job is claimed, and watched while it trains.

Owns the worker's end of `gang_driver`, which alone knows Ray, and the interpretation of several hosts' ends as one.
Host 0 is the worker's own: its ranks are started as on any host. Invariant: a run has the cards that Ray has given to
it and no others, and they are free again when the reservation is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, EXIT_RANK_LOST, FailureReport
from grpo_core.ranks import lost
from grpo_core.spec import JobSpec
from jobs.worker.trainer_process import TrainerProcess

log = structlog.get_logger()

START_SECONDS: Final = 120.0
"""Longest time in seconds for the driver to reach Ray."""
GRACE_SECONDS: Final = 5.0
"""Time in seconds for host 0 to end after another one has failed."""
EXPLAIN_SECONDS: Final = 15.0
"""Time in seconds for the driver to notice which host is lost, after the ranks of host 0 have lost it."""
CLOSE_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.2


class Reservation:
    """The cards of one run. `hosts` is empty if they were not free."""

    def __init__(self, driver: subprocess.Popen[bytes]) -> None:
        assert driver.stdin is not None and driver.stdout is not None  # noqa: PT018 - both are PIPE
        self._driver, self._orders, self._answers = driver, driver.stdin, driver.stdout
        os.set_blocking(self._answers.fileno(), False)
        self._half = b""
        self._closed = False
        self.hosts: list[str] = []
        self.fitting: int | None = None
        """The number of hosts with enough cards, free or not; None: Ray did not answer."""
        self.meeting = ""
        self.cards: str | None = None
        """The cards on this host, as CUDA_VISIBLE_DEVICES names them; None: all."""
        self.code: int | None = None
        """The exit status of the first host that has failed."""
        self.report: FailureReport | None = None
        self.said: list[str] = []
        """What the ranks of other hosts wrote at their end."""
        self._opened = False

    def await_hosts(self, seconds: float) -> bool:
        """Wait for the reservation. Returns whether it has been made."""
        until = time.monotonic() + seconds
        while not self.hosts and self.fitting is None and self.report is None and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            self.look()
        return bool(self.hosts)

    def start(self, *, job: str, epoch: int, owner: str, folder: Path, arguments: Sequence[str]) -> None:
        """Start the ranks of the other hosts. When it returns, the inputs in `folder` have been opened."""
        order = {"job": job, "epoch": epoch, "owner": owner, "folder": str(folder), "arguments": list(arguments)}
        self._order(order)
        until = time.monotonic() + START_SECONDS
        while not self._opened and self.report is None and time.monotonic() < until:
            time.sleep(0.01)
            self.look()

    def signal(self, number: int) -> None:
        """Pass a signal to the ranks of the other hosts."""
        self._order({"signal": number})

    def look(self) -> None:
        """Read what the driver has said."""
        try:
            read = self._answers.read()
        except ValueError:  # closed
            return
        *lines, self._half = (self._half + (read or b"")).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        if read == b"" and not self._closed and self.report is None:
            self._fail(EXIT_RANK_LOST, lost("The connection to the Ray cluster was lost.").report)

    def close(self) -> None:
        """End the ranks of the other hosts and free all cards. May be repeated."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._orders.close()
        try:
            self._driver.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()
        self._answers.close()

    def _order(self, order: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `look` will see
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()

    def _take(self, told: dict[str, Any]) -> None:
        match told["event"]:
            case "placed":
                self.hosts, self.meeting, self.cards = told["hosts"], told["meeting"], told["cards"]
            case "refused":
                self.fitting = told["hosts"]
            case "opened":
                self._opened = True
            case "ended":
                self._note_end(told)
            case _:
                self._fail(EXIT_RANK_LOST, lost(told["message"]).report)

    def _note_end(self, told: dict[str, Any]) -> None:
        code, error, host = told["code"], told["error"], told["host"]
        if code in (EXIT_DONE, EXIT_CHECKPOINTED):
            return
        log.warning("gang_host_ended", host=host, code=code)
        self.said.append(f"--- {host} ended with {code}:\n{told['said']}")
        if error is None or code < 0:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
            self._fail(EXIT_RANK_LOST, lost(f"The training process on host {host} {how}.").report)
            return
        message = f"On host {host}: {error['message']}"
        fields = {name: error[name] for name in ("code", "hint", "retryable") if name in error}
        self._fail(code, FailureReport(failure_class=error["class"], message=message, **fields))

    def _fail(self, code: int, report: FailureReport) -> None:
        """Keep the cause: the first failure that is more than the loss of another host."""
        if self.code is None or (self.code == EXIT_RANK_LOST and code != EXIT_RANK_LOST):
            self.code, self.report = code, report


@contextlib.contextmanager
def reserve(address: str, spec: JobSpec, *, seconds: float) -> Generator[Reservation]:
    """Ask Ray for the cards of a job, and hold them for the block. `hosts` is empty if they are not free in time."""
    asked = spec.resources
    least = asked.min_hosts or asked.hosts
    counts = [count for count in range(asked.hosts, 0, -1) if count >= least]
    request = {
        "address": address,
        "hosts": counts,
        "gpus": asked.gpus,
        "memory_bytes": (asked.min_gpu_memory_gb or 0) * 10**9,
        "seconds": seconds / len(counts),
    }
    driver = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "jobs.worker.gang_driver", json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    reservation = Reservation(driver)
    try:
        reservation.await_hosts(START_SECONDS + seconds)
        yield reservation
    finally:
        reservation.close()


class GangProcess:
    """The training processes of all hosts, as one: `TrainerProcess` of host 0, and the reservation with the others."""

    def __init__(self, lead: TrainerProcess, reservation: Reservation) -> None:
        self._lead, self._reservation = lead, reservation
        self._since: float | None = None
        """When a failure was first seen."""
        self._told = 0
        """The number of texts of other hosts that are in the output."""

    @property
    def failure(self) -> FailureReport | None:
        """What the other hosts say of the end; None if host 0 knows it."""
        code, found = self._lead.exit_code, self._reservation
        knows = code is not None and code > 0 and code != EXIT_RANK_LOST
        return None if knows else found.report

    @property
    def exit_code(self) -> int | None:
        """Return the exit status of the gang; None while it runs, or while the cause of its end is not known yet."""
        self._reservation.look()
        self._note_said()
        code, theirs = self._lead.exit_code, self._reservation.code
        if code in (EXIT_DONE, EXIT_CHECKPOINTED) or (code is None and theirs is None):
            return code
        if self._since is None:
            self._since = time.monotonic()
        waited = time.monotonic() - self._since
        if theirs is None:
            return None if code == EXIT_RANK_LOST and waited < EXPLAIN_SECONDS else code
        if code is None:
            if waited < GRACE_SECONDS:
                return None
            self._lead.kill()
            return theirs
        return code if code > 0 and code != EXIT_RANK_LOST else theirs

    def terminate(self) -> None:
        """Ask all ranks to finish their step, checkpoint and exit."""
        self._lead.terminate()
        self._reservation.signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Ask all ranks to write the stack of each thread to their output."""
        self._lead.dump_stacks()
        self._reservation.signal(signal.SIGUSR1)

    def wait(self, seconds: float) -> None:
        """Wait for the end of host 0, for `seconds` at most."""
        if self._lead.exit_code is None:
            self._lead.wait(seconds)
        else:
            time.sleep(seconds)

    def kill(self) -> None:
        """Kill all ranks of all hosts, and free their cards."""
        self._lead.kill()
        self._reservation.close()

    def _note_said(self) -> None:
        for text in self._reservation.said[self._told :]:
            self._lead.note(text)
        self._told = len(self._reservation.said)
