"""Landlock: limits the files that a process and its children can access. The kernel enforces it, without root.

Owns the system calls. Invariant: a rule set opens every path when it is prepared, so that it can be enforced after the
process has lost the right to see them. Landlock cannot hide that a path exists, or close a socket.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

from grpo_core.confinement.rights import check, libc

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""Numbers of the system calls, which are the same on every processor."""
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_EVERYTHING_V1 = (1 << 13) - 1
_IOCTL_DEVICE = 1 << 15
_TCP = 0b11
_SCOPE_ABSTRACT_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1
_PATH_BENEATH = 1

OLDEST = 2
"""Oldest supported version: with version 1, a process cannot move files between folders, as compilers' caches do."""
_TRUNCATES, _PORTS, _DEVICES, _SCOPES = 3, 4, 5, 6

READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
LOOK = _READ_FILE | _READ_DIR
USE = READ | _WRITE_FILE | _TRUNCATE
"""Read, write and truncate files that exist, such as devices. CUDA truncates the files with its threads' names."""


def version() -> int:
    """Return the version of the kernel's Landlock; 0 if it has none or a container forbids it."""
    if sys.platform != "linux":
        return 0
    return max(0, libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


class RuleSet:
    """The allowed accesses below each path. After `enforce`, every other access fails."""

    def __init__(self, *, connects: bool = True) -> None:
        """Without `connects`, also forbid TCP ports, abstract sockets and device controls, if the kernel supports
        it."""
        self._version = version()
        self._handled = _EVERYTHING_V1 | _REFER | (_TRUNCATE if self._version >= _TRUNCATES else 0)
        ports = scopes = 0
        if not connects:
            self._handled |= _IOCTL_DEVICE if self._version >= _DEVICES else 0
            ports, scopes = _TCP, _SCOPE_ABSTRACT_SOCKET
        attributes = struct.pack("=Q", self._handled)
        if self._version >= _PORTS:
            attributes += struct.pack("=Q", ports)
        if self._version >= _SCOPES:  # forbids signals to processes outside
            attributes += struct.pack("=Q", scopes | _SCOPE_SIGNAL)
        self._descriptor = check(
            libc().syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)),
            "Landlock",
        )

    def allow(self, paths: Iterable[str], *, rights: int | None = None) -> None:
        """Allow every access below these paths, or only `rights`. Paths that do not exist are left out."""
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                self._add(descriptor, self._handled & (rights or self._handled))
            finally:
                os.close(descriptor)

    def _add(self, descriptor: int, rights: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 - few imports
            rights &= _EXECUTE | _READ_FILE | _WRITE_FILE | (_TRUNCATE & self._handled)
        if rights == 0:
            return
        rule = struct.pack("=Qi", rights, descriptor)
        call = (ctypes.c_int(self._descriptor), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
        check(libc().syscall(_ADD, *call), "Landlock")

    def enforce(self) -> None:
        """Enforce the rules for this process and all its future children. It must have set `no_new_privs`."""
        check(libc().syscall(_RESTRICT, ctypes.c_int(self._descriptor), ctypes.c_uint32(0)), "Landlock")
        os.close(self._descriptor)
