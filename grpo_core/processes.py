"""Parents and children: processes that die with their parent, adopt orphans, and end what they started.

Owns these system calls and what /proc says of a process's descendants. Needs the standard library alone, since the
guardian of a training process and the launcher below run without site-packages:
`python -I -S processes.py PARENT_PID PROGRAM ARG...` becomes another program that dies with its parent. It is run by a
fresh interpreter rather than as a `preexec_fn`, which would run Python between fork and exec of a process that may have
threads, where any lock they held stays locked. Invariant: only unreaped children of this process are killed, so that no
number that the kernel has given to somebody else is ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # -I and -S leave only the standard library

from grpo_core.confinement.rights import bind_to, libc, prctl

_POLL_SECONDS = 0.01
_WATCH_SECONDS = 1.0
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


def die_with_parent() -> None:
    """Be killed when the parent dies: by the kernel, and by a watch where a container forgets the kernel's promise."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        bind_to(parent)
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def adopt() -> None:
    """Become the parent of every descendant whose own parent ends."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def adopts() -> bool:
    """Whether this process called `adopt`."""
    found = ctypes.c_int(0)
    libc().prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0)
    return bool(found.value)


def children(pid: int) -> list[int]:
    """The processes whose parent is this one, those that it adopted with them."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(number) for number in (task / "children").read_text().split()]
    except FileNotFoundError:  # it has ended, or the kernel was built without these files
        return [child for child, parent in _parents().items() if parent == pid]
    except ProcessLookupError:
        return []
    return found


def descendants(pid: int) -> list[int]:
    """Everything below this process."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children(waiting.pop())
        found += below
        waiting += below
    return found


def end_children(*, seconds: float) -> bool:
    """Kill the children of this process and, since it adopts them, theirs; whether all are gone in time."""
    until = time.monotonic() + seconds
    while found := children(os.getpid()):
        for child in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def reap() -> None:
    """Forget the children that have ended, those that it adopted with them; where nobody waits for any."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def memory(pids: list[int]) -> int:
    """Private memory of these processes in bytes. Pages that a fork shares with its parent count for each."""
    return sum(map(_own_bytes, pids))


def exact_memory(pids: list[int]) -> int | None:
    """The same with shared pages divided among those that share them; None where that may not be read."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            return None
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024
    return total


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) * 1024


def _parents() -> dict[int, int]:
    """Of every process its parent."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name of the program, in brackets, may hold anything.
            found[int(process.name)] = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
    return found


def main() -> None:
    """Become another program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    try:
        bind_to(parent)
    except OSError as error:
        sys.exit(str(error))
    os.execv(program[0], program)  # noqa: S606 - the point of it


if __name__ == "__main__":
    main()
