"""Restrictions that a process puts on itself: no capabilities, hidden memory, an end with its parent, resource limits.

Owns `prctl`, `capset` and limits of resources.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

_SET_PDEATHSIG, _SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES = 64


def bind_to(parent: int) -> None:
    """Let the kernel kill this process when its parent dies. Raises `OSError` if `parent` has already died.

    This survives exec; a change of user ends it. The parent is the *thread* that started this process. A parent that
    died before this call sends no signal, so it is checked afterwards.
    """
    if sys.platform == "linux":
        prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the parent is already gone")


def hide_memory() -> None:
    """Hide this process's memory and environment from other processes of the user, and write no core file."""
    if sys.platform == "linux":
        prctl(_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forbid_new_privileges() -> None:
    """Prevent programs that are executed from now on from gaining rights, such as setuid programs."""
    prctl(_SET_NO_NEW_PRIVS, 1)


def bound_capabilities() -> None:
    """Prevent programs that are executed from now on from having capabilities. Only root can call this."""
    for capability in range(_CAPABILITIES):
        if libc().prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            break


def drop_capabilities() -> None:
    """Drop all capabilities of this process, for every user."""
    if (number := _CAPSET.get(os.uname().machine)) is not None:
        header, nothing = struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)
        check(libc().syscall(number, header, nothing), "capset")


def limit(*, memory_bytes: int, open_files: int) -> None:
    """Limit the address space and the number of open files, and forbid writing to files."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NOFILE, open_files),
    ):
        hard = resource.getrlimit(what)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bound, bound))


def libc() -> ctypes.CDLL:
    """Return the C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return the result of a call. Raises `OSError` if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process; raises `OSError`."""
    check(libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")
