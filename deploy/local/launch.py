"""Turns itself into another program that dies with its parent: `python -I -S launch.py PARENT_PID PROGRAM ARG...`.

A file of its own, run by a fresh interpreter, rather than `preexec_fn`: that would run Python between fork and exec
of a process that may have threads, where any lock they held stays locked. Imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    # The kernel's promise survives exec, and holds for the *thread* that forked us.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # A parent that died before the promise was made sends no signal: we belong to someone else by now.
    if os.getppid() != parent:
        sys.exit("the parent is already gone")
    os.execv(program[0], program)  # noqa: S606 - the point of this file


if __name__ == "__main__":
    main()
