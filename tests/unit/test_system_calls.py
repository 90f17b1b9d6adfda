"""The numbers of system calls and of Landlock's rights are the kernel's, on both processors.

arm64 has the kernel's generic table. This checks numbers alone: the confinement was not run on an arm64 machine.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo_core.confinement import landlock, seccomp

HEADERS = Path("/usr/include")
TABLES = {
    "x86_64": HEADERS / "x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": HEADERS / "asm-generic/unistd.h",
}
SAME_CALL = {"newfstatat": "fstatat"}
"""Calls whose name in the generic table is another one."""


def numbers(header: Path) -> dict[str, int]:
    """Every call of a header; the generic one marks those that differ in width on processors of 32 bits."""
    if not header.is_file():
        pytest.skip(f"{header} is not installed: apt install linux-libc-dev")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_has_the_kernels_numbers(machine: str) -> None:
    known = numbers(TABLES[machine])
    assert len(known) > 250
    for name, number in (seccomp._COMPUTE[machine] | seccomp._FORK[machine]).items():
        assert known.get(name, known.get(SAME_CALL.get(name, ""))) == number, name
    assert known["clone3"] == seccomp._CLONE3
    assert known["landlock_create_ruleset"] == landlock._CREATE
    assert known["landlock_add_rule"] == landlock._ADD
    assert known["landlock_restrict_self"] == landlock._RESTRICT


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_names_the_processor_as_the_kernel_does(machine: str) -> None:
    number = {"x86_64": 62, "aarch64": 183}[machine]  # ELF's EM_X86_64 and EM_AARCH64
    assert seccomp._MACHINE[machine] == 0x8000_0000 | 0x4000_0000 | number  # 64 bits, little endian


def test_each_processor_may_make_the_same_calls() -> None:
    """arm64 never had the older forms; each call that it lacks has a newer form in its list."""
    older = {
        *("open", "stat", "lstat", "poll", "access", "select", "alarm", "readlink", "arch_prctl", "time"),
        *("dup2", "fork"),
    }
    for lists in (seccomp._COMPUTE, seccomp._FORK):
        assert set(lists["x86_64"]) - set(lists["aarch64"]) <= older
        assert set(lists["aarch64"]) - set(lists["x86_64"]) <= {"dup3"}


def test_landlocks_rights_are_the_kernels() -> None:
    header = HEADERS / "linux/landlock.h"
    if not header.is_file():
        pytest.skip(f"{header} is not installed: apt install linux-libc-dev")
    rights = dict(re.findall(r"#define LANDLOCK_ACCESS_FS_(\w+)\s+\(1ULL << (\d+)\)", header.read_text()))
    ours = {
        "EXECUTE": landlock._EXECUTE,
        "WRITE_FILE": landlock._WRITE_FILE,
        "READ_FILE": landlock._READ_FILE,
        "READ_DIR": landlock._READ_DIR,
        "REFER": landlock._REFER,
        "TRUNCATE": landlock._TRUNCATE,
        "IOCTL_DEV": landlock._IOCTL_DEVICE,
    }
    for name, bit in ours.items():
        if name in rights:  # headers of older kernels lack the newer ones
            assert bit == 1 << int(rights[name]), name
    assert {"EXECUTE", "READ_FILE", "READ_DIR"} <= set(rights)
