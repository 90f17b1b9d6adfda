"""Ranks: the processes that train one job together, and the launcher of those on this host.

Owns the environment variables that set a process's rank, the heartbeat of a rank, and the launcher, which starts one
process per GPU and ends them together. The engine owns what ranks exchange. With several hosts, each has a launcher,
and what started the launchers ends the others after one has failed. Imports no torch. Invariants: only rank 0
writes the run folder, and its launcher after its death; when a rank fails, the others of its host end within seconds.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Generator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, EXIT_RANK_LOST, FailureReport, JobFailure
from grpo_core.reasons import FailureCode
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import append_error, last_error

ADDRESS: Final = "GRPO_RANKS_ADDRESS"
"""Variable with the address where the ranks meet, as torch's `init_method`."""
PULSE: Final = "GRPO_RANK_PULSE"
"""Variable with the file descriptor to which a rank writes its heartbeat."""
_OTHERS: Final = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
MAX_RANKS: Final = 8

BEAT_SECONDS: Final = 1.0
SILENT_SECONDS: Final = 20.0
"""Longest time in seconds without a heartbeat of a rank, after its first."""
WAITING_SECONDS: Final = 30.0
"""Longest time in seconds for which all ranks may wait for each other: then none of them can continue."""
GRACE_SECONDS: Final = 5.0
"""Time in seconds for the other ranks to report their errors after one failed."""
TORN_SECONDS: Final = 1.0
"""Time in seconds for the other ranks to end after one was killed, which reports no error."""
_LOOK_SECONDS: Final = 0.1

_WORKING, _DONE = b"w", b"d"
_SIOCGIFADDR: Final = 0x8915
_WAITING: Final = 128
"""Smallest heartbeat byte of a waiting rank; the byte changes with each wait."""
_WAITS: Final = 64


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a job."""

    number: int = 0
    count: int = 1
    address: str = ""
    pulse: Pulse | None = None
    local: int = 0
    """Its number among the ranks of its host."""
    interface: str | None = "lo"
    """The network interface to the other ranks; None: unknown."""

    @property
    def is_lead(self) -> bool:
        return self.number == 0

    @property
    def is_launched(self) -> bool:
        """Whether our launcher started it. The launcher interprets the death of a rank."""
        return self.pulse is not None


ALONE: Final = Rank()


@dataclass(frozen=True, slots=True)
class Host:
    """One of the hosts whose ranks train together."""

    number: int = 0
    count: int = 1
    meeting: str = ""
    """`ADDRESS:PORT` on host 0 where the ranks meet; empty with one host."""


def take_rank(environment: MutableMapping[str, str]) -> Rank | None:
    """Return the rank that the environment names, if any, and remove it there, so that libraries form no groups."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    number, count = int(environment.pop("RANK")), int(environment.pop("WORLD_SIZE"))
    others = {name: environment.pop(name, "") for name in _OTHERS}
    meeting = f"tcp://{others['MASTER_ADDR'] or '127.0.0.1'}:{others['MASTER_PORT'] or 29500}"
    address, pulse = environment.pop(ADDRESS, meeting), environment.pop(PULSE, None)
    spans_hosts = int(others["LOCAL_WORLD_SIZE"] or count) < count
    return Rank(
        number,
        count,
        address,
        None if pulse is None else Pulse(int(pulse)),
        local=int(others["LOCAL_RANK"] or number),
        # Now, because later the process may connect only to hosts that it needs for data.
        interface=interface_to(address) if spans_hosts else "lo",
    )


def interface_to(address: str) -> str | None:
    """Return the name of the network interface through which this host reaches `tcp://ADDRESS:PORT`; None: unknown."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((host, int(port)))  # sends nothing; the kernel chooses the route
            own = socket.inet_aton(asking.getsockname()[0])
            return next((name for _, name in socket.if_nameindex() if _address_of(name, asking) == own), None)
    except OSError:
        return None


def _address_of(interface: str, asking: socket.socket) -> bytes:
    try:
        return fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))[20:24]
    except OSError:  # it has none
        return b""


def lost(what: str) -> JobFailure:
    """Return the failure of a run that lost one of its ranks."""
    return JobFailure(
        FailureCode.RANK_LOST,
        what,
        hint="The run can resume from its last checkpoint. If it happens again, look at the host: its log names GPUs "
        "that fell off the bus and processes that were killed.",
    )


class Pulse:
    """The heartbeat of a rank: one byte per second, which says whether it works or waits for the others."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._says, self._waits = _WORKING, 0
        self._lock = threading.Lock()
        """Held while a byte is chosen and written, so that the heartbeat never sends an old byte after a newer one."""
        threading.Thread(target=self._beat, name="rank-pulse", daemon=True).start()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Mark this block as waiting for the other ranks."""
        self._waits += 1
        self._says = bytes([_WAITING + self._waits % _WAITS])
        try:
            yield
        finally:
            self._says = _WORKING

    def done(self) -> None:
        """Report that the other ranks no longer need this one."""
        self._says = _DONE
        self._write()

    def _beat(self) -> None:
        while self._write():
            time.sleep(BEAT_SECONDS)

    def _write(self) -> bool:
        try:
            with self._lock:
                return os.write(self._descriptor, self._says) > 0
        except OSError:
            return False  # the launcher has died, so this process will be killed


@dataclass(slots=True)
class _Child:
    """The launcher's record of a rank."""

    number: int
    process: subprocess.Popen[bytes]
    descriptor: int
    heard_at: float | None = None
    says: bytes = _WORKING
    since: float = field(default_factory=time.monotonic)
    """When it first sent this byte."""

    @property
    def waits(self) -> bool:
        return self.says[0] >= _WAITING

    @property
    def code(self) -> int | None:
        """Its exit status; None while it runs. After `done`, every exit status counts as success."""
        code = self.process.poll()
        return EXIT_DONE if code is not None and self.says == _DONE and self.number else code


class Launcher:
    """Starts the ranks of a job on this host and ends them."""

    def __init__(
        self, command: Sequence[str], folder: RunFolder, here: int, *, epoch: int, host: Host | None = None
    ) -> None:
        """`command` starts each of `here` ranks; the environment sets which rank it is."""
        self._command, self._folder, self._here, self._epoch = command, folder, here, epoch
        self._host = host or Host()
        self._count = here * self._host.count
        self._children: list[_Child] = []
        self._signals = selectors.DefaultSelector()
        self._meeting = folder.ranks.absolute() / f"meeting-{os.getpid()}"
        self._asked = False
        self._failed: list[tuple[int, int]] = []
        """Ranks that failed, with their exit status, in the order in which the launcher saw it."""
        self._report: FailureReport | None = None

    def run(self) -> int:
        """Start the ranks, wait for them, and return the exit status of the job."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        self._folder.ranks.mkdir(parents=True, exist_ok=True)
        try:
            for local in range(self._here):
                self._children.append(self._start(local))
            self._watch()
        finally:
            self._kill()
        return self._conclude()

    def _start(self, local: int) -> _Child:
        number = self._host.number * self._here + local
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        environment = {
            **os.environ,
            "RANK": str(number),
            "WORLD_SIZE": str(self._count),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self._here),
            ADDRESS: f"tcp://{self._host.meeting}" if self._host.meeting else self._meeting.as_uri(),
            PULSE: str(writing),
            "OMP_NUM_THREADS": str(max(1, _threads() // self._here)),
        }
        process = subprocess.Popen(  # noqa: S603 - our interpreter and arguments, no shell
            self._command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[writing]
        )
        os.close(writing)
        self._signals.register(reading, selectors.EVENT_READ, local)
        return _Child(number, process, reading)

    def _watch(self) -> None:
        """Wait until all have ended, or until one has failed and the others have had time to report why."""
        until = float("inf")
        while True:
            self._listen()
            until = min(until, self._look_at_ends())
            if all(child.code is not None for child in self._children) or time.monotonic() > until:
                return
            self._report = self._missing() if until == float("inf") else None
            if self._report is not None:
                return

    def _look_at_ends(self) -> float:
        """Record the ranks that failed. Returns until when to wait for the others."""
        now, until = time.monotonic(), float("inf")
        known = {number for number, _ in self._failed}
        for child in self._children:
            if child.process.poll() is None or child.number in known:
                continue
            self._read_heartbeats(child)  # `done` may have arrived after the last read
            code = child.code
            if code is not None and code not in (EXIT_DONE, EXIT_CHECKPOINTED):
                self._failed.append((child.number, code))
                until = min(until, now + (TORN_SECONDS if code < 0 else GRACE_SECONDS))
            elif child.number == 0:
                until = min(until, now + GRACE_SECONDS)
        return until

    def _listen(self) -> None:
        for key, _ in self._signals.select(_LOOK_SECONDS):
            child = self._children[key.data]
            if not self._read_heartbeats(child):
                self._signals.unregister(key.fileobj)
        if not self._signals.get_map():
            time.sleep(_LOOK_SECONDS)

    def _read_heartbeats(self, child: _Child) -> bool:
        """Read what a rank has written; return False at the end of its pipe."""
        try:
            said = os.read(child.descriptor, 4096)
        except BlockingIOError:
            return True
        if said:
            child.heard_at = time.monotonic()
            if said[-1:] != child.says:
                child.says, child.since = said[-1:], time.monotonic()
        return bool(said)

    def _missing(self) -> FailureReport | None:
        """Return the failure of ranks that are still running: one is silent, or all wait for each other."""
        now, alive = time.monotonic(), [child for child in self._children if child.code is None]
        for child in alive:
            if child.number and child.says == _DONE:
                continue  # the end of a process says nothing
            if child.heard_at is not None and now - child.heard_at > SILENT_SECONDS:
                return lost(
                    f"Rank {child.number} of {self._count} sent no heartbeat for {SILENT_SECONDS:.0f} s."
                ).report
        # With several hosts, the ranks of this one may wait for one of another, which works.
        if (
            self._host.count == 1
            and alive
            and all(child.waits and now - child.since > WAITING_SECONDS for child in alive)
        ):
            return lost(f"The ranks waited {WAITING_SECONDS:.0f} s for each other, and none of them worked.").report
        return None

    def _kill(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()
        for child in self._children:
            child.process.wait()
            os.close(child.descriptor)
        self._signals.close()
        self._meeting.unlink(missing_ok=True)

    def _conclude(self) -> int:
        """Return the exit status of the job. Writes the failure if rank 0 wrote none."""
        codes = [child.code for child in self._children]
        # A rank that only lost another one does not know the cause.
        first = next(((n, c) for n, c in self._failed if c != EXIT_RANK_LOST), None)
        if first is None and EXIT_CHECKPOINTED in codes:
            return EXIT_CHECKPOINTED
        if first is None and self._report is None and not self._failed:
            return EXIT_DONE
        if first is not None and first[1] > 0:
            number, code = first
            said = last_error(self._folder.of_rank(number).events)
            if number and said is not None and last_error(self._folder.events) is None:
                append_error(self._folder.events, said, epoch=self._epoch)
            return code
        if self._asked and first is not None and first[1] == -signal.SIGTERM:
            return EXIT_CHECKPOINTED  # it was stopped before it could handle signals: nothing was trained yet
        report = self._report
        if report is None:
            how = "was lost" if first is None else f"was killed by signal {-first[1]}"
            report = lost(f"Rank {self._failed[0][0] if first is None else first[0]} of {self._count} {how}.").report
        if last_error(self._folder.events) is None:
            append_error(self._folder.events, report.as_dict(), epoch=self._epoch)
        return EXIT_RANK_LOST

    def _pass_on(self, number: int, _frame: object) -> None:
        self._asked |= number != signal.SIGUSR1
        for child in self._children:
            with suppress(ProcessLookupError):
                if child.process.returncode is None:
                    # A terminal has sent Ctrl-C to the ranks too, and a second SIGINT would end them at once.
                    child.process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def _threads() -> int:
    """Return the number of threads for all ranks together, from the environment or the machine."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else len(os.sched_getaffinity(0))
