"""The process between a worker and its training process: `python -I -S guardian.py PLAN`, the plan being JSON.

It starts the training process with limited rights, forwards signals to it, and watches its memory and that of its
children. It kills all of them when the training process ends, when the worker closes this process's standard input, and
when the worker dies, which closes it too. Its exit status is that of the training process. It is a separate process,
because a killed worker cannot clean up. Invariant: it ends after all its descendants have ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # with -I and -S, only the standard library is found

from grpo_core import processes
from grpo_core.confinement import landlock, rights

EXIT_MEMORY = 96
"""Exit status if the training process and its children exceeded their memory limit."""
EXIT_NOT_STARTED = 97
SWEEP_SECONDS = 3600.0
"""Time limit for killing descendants; the worker gives up long before."""

_MEMORY_SECONDS = 0.1
_TREE_SECONDS = 1.0
_OOM_SCORE = 500
"""Makes the kernel kill the training process before the worker and the servers beside it."""


class Guardian:
    """Starts one training process and ends after all its descendants."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._plan = plan
        self._pid = 0
        self._asked: list[int] = []
        self._status: int | None = None
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._cgroup: Path | None = None
        self._tree: list[int] = []
        self._tree_at = 0.0

    def run(self) -> int:
        """Watch until the end. Returns the wait status of the training process."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGCHLD, _wake_up)
        self._cgroup = make_cgroup(self._plan.get("memory"))
        self._start()
        try:
            return self._watch()
        finally:
            self._end_all()

    def _start(self) -> None:
        everything = signal.valid_signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, everything)
        guardian = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            become(self._plan, guardian, self._cgroup)
        self._pid = pid
        os.chdir("/")  # so that this process is not among those that work in the run's folder
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _watch(self) -> int:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        limit: int | None = self._plan.get("memory")
        while True:
            self._reap()
            if self._status is not None:
                return self._status
            for descriptor, _ in poll.poll(_MEMORY_SECONDS * 1000 if limit else None):
                if not os.read(descriptor, 512) and descriptor == 0:
                    return int(signal.SIGKILL)
            if limit and self._is_over(limit):
                sys.stderr.write(f"The training process and its children use more than {limit} bytes: killed.\n")
                return EXIT_MEMORY << 8

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid:
                    self._status = status

    def _is_over(self, limit: int) -> bool:
        now = time.monotonic()
        if now - self._tree_at > _TREE_SECONDS:
            self._tree, self._tree_at = processes.descendants(os.getpid()), now
        if processes.memory(self._tree) <= limit:
            return False
        self._tree = processes.descendants(os.getpid())
        exact = processes.exact_memory(self._tree)
        # If the exact use cannot be read, pages that forks share were counted several times; use the machine's total.
        return (used_memory() if exact is None else exact) > limit

    def _end_all(self) -> None:
        if self._cgroup is not None:
            with contextlib.suppress(OSError):
                (self._cgroup / "cgroup.kill").write_text("1")
        processes.end_children(seconds=SWEEP_SECONDS)
        if self._cgroup is not None:
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()

    def _pass_on(self, number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pid and self._status is None:
                os.kill(self._pid, signal.SIGTERM if number == signal.SIGINT else number)


def _wake_up(_number: int, _frame: object) -> None:
    """Do nothing. A signal needs a handler to interrupt the wait."""


def become(plan: Mapping[str, Any], guardian: int, cgroup: Path | None) -> None:
    """In the forked process: drop rights by the plan, then execute the training process."""
    try:
        os.setsid()
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if plan.get("file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan["file_bytes"], plan["file_bytes"]))
        rules = rule_set(plan)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        give_up_rights(plan.get("user"), plan.get("groups", []))
        if rules is not None:
            rules.enforce()
        # After the change of user, which would undo it.
        rights.bind_to(guardian)
        if "probe" in plan:
            os._exit(probe(plan["probe"]))
        os.execvp(plan["argv"][0], plan["argv"])  # noqa: S606 - the operator's launcher, no shell
    except BaseException as error:  # noqa: BLE001 - nothing may return into the guardian's own code
        os.write(2, f"The training process could not be started: {error!r}\n".encode())
        os._exit(EXIT_NOT_STARTED)


def probe(paths: Mapping[str, list[str]]) -> int:
    """Check access to these paths, and print those without. Returns the exit status."""
    for name, mode in (("readable", os.R_OK), ("writable", os.W_OK)):
        for path in paths[name]:
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                reached = os.access(path, mode | (os.X_OK if os.path.isdir(path) else 0))  # noqa: PTH112
            except OSError:
                reached = False
            if not reached:
                os.write(1, f"user {os.getuid()} has no access to {path}\n".encode())
                return 1
    return 0


def rule_set(plan: Mapping[str, Any]) -> landlock.RuleSet | None:
    """Prepare the plan's rules while this process can still open the files; None if the plan has none."""
    if "writable" not in plan:
        return None
    rules = landlock.RuleSet()
    rules.allow(plan["readable"], rights=landlock.READ)
    rules.allow(plan["listable"], rights=landlock.LIST)
    rules.allow(plan["usable"], rights=landlock.USE)
    rules.allow(plan["writable"])
    return rules


def give_up_rights(user: int | None, groups: list[int]) -> None:
    """Become `user`, if given, and drop all capabilities permanently."""
    if os.geteuid() == 0:
        rights.bound_capabilities()
    if user is not None:
        os.setgroups(groups)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    rights.drop_capabilities()
    rights.forbid_new_privileges()


def make_cgroup(memory: int | None) -> Path | None:
    """Create a cgroup (v2) below this process's, if allowed: all its processes can be killed at once."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        root = next(
            mount
            for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
            if (mount / "cgroup.procs").exists()
        )
        folder = root / line.removeprefix("0::").lstrip("/") / f"grpo-run-{os.getpid()}"
        folder.mkdir()
    except (OSError, StopIteration):
        return None
    if not (folder / "cgroup.kill").exists():  # before Linux 5.14
        folder.rmdir()
        return None
    if memory and (folder / "memory.max").exists():
        with contextlib.suppress(OSError):
            (folder / "memory.max").write_text(str(memory))
    return folder


def used_memory() -> int:
    """Return the memory in use on the whole machine, in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) * 1024


def end_like(status: int) -> None:
    """End this process with the wait status of another."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.stdout.flush()
    os._exit(os.waitstatus_to_exitcode(status))


def main() -> None:
    """Guard one training process."""
    processes.adopt()
    rights.hide_memory()
    end_like(Guardian(json.loads(sys.argv[1])).run())


if __name__ == "__main__":
    main()
