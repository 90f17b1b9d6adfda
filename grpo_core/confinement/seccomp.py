"""seccomp: limits the system calls of a process and its children to a list, on x86-64 and aarch64.

Owns the lists and the filter program. Calls that are not in the list fail with EPERM; `clone3` fails with ENOSYS, so
that glibc uses `clone`; a call for another architecture kills the process. Invariant: a filter is permanent, and a
later filter can only forbid more.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from grpo_core.confinement import rights

_COMPUTE = {
    "x86_64": {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "nanosleep": 35, "getitimer": 36, "alarm": 37,
        "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "getcwd": 79, "readlink": 89,
        "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
        "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "arch_prctl": 158,
        "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
        "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267,
        "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getcpu": 309, "getrandom": 318,
        "membarrier": 324, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "fcntl": 25, "ioctl": 29, "faccessat": 48, "openat": 56, "close": 57,
        "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
        "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94,
        "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102,
        "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "getcpu": 168,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
        "mprotect": 226, "madvise": 233, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
        "close_range": 436, "faccessat2": 439,
    },
}  # fmt: skip
"""Calls for computing, for reading files that Landlock allows, and for writing to open files."""
_FORK = {
    "x86_64": {
        "dup2": 33, "clone": 56, "fork": 57, "wait4": 61, "kill": 62, "prctl": 157, "pipe2": 293, "seccomp": 317,
    },
    "aarch64": {"dup3": 24, "pipe2": 59, "kill": 129, "prctl": 167, "clone": 220, "wait4": 260, "seccomp": 277},
}  # fmt: skip
"""Calls for forking, for dropping more rights in the child, and for killing it."""
_MACHINE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE3 = 435
_X32 = 0x40000000
"""Bit in the numbers of x86-64's x32 calls, which would otherwise bypass the list."""

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NUMBER, _OFFSET_MACHINE = 0, 4
_SET_MODE_FILTER = 1


def is_known(machine: str | None = None) -> bool:
    """Whether this processor has a list."""
    return (machine or os.uname().machine) in _COMPUTE


def program(machine: str, *, forks: bool) -> bytes:
    """Return the filter program as the kernel reads it: eight bytes per instruction."""
    allowed = {**_COMPUTE[machine], **(_FORK[machine] if forks else {})}
    instructions = [
        (_LOAD, 0, 0, _OFFSET_MACHINE),
        (_IF_EQUAL, 1, 0, _MACHINE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    ]
    for number in sorted(allowed.values()):
        instructions += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    instructions.append((_RETURN, 0, 0, _FAIL | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def enforce(*, forks: bool = False) -> None:
    """Enforce the filter for this process and all its future children. It must have set `no_new_privs`.

    Raises `OSError`.
    """
    machine = os.uname().machine
    if not is_known(machine):
        raise OSError(errno.ENOSYS, f"system calls cannot be filtered on {machine}")
    code = program(machine, forks=forks)
    buffer = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    number = _FORK[machine]["seccomp"]
    result = rights.libc().syscall(number, ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(0), described)
    rights.check(result, "seccomp")
