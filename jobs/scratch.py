"""The folders runs work in, below one directory of the worker: made per epoch, locked while in use, removed after.

Invariant: a folder whose lock can be had belongs to no worker alive, so it and what still works in it may go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def run_folder(root: Path, job_id: str, epoch: int) -> Generator[Path]:
    """A fresh folder for one run, removed when the run is over."""
    folder = root / f"{job_id}-e{epoch}"
    with contextlib.ExitStack() as stack:
        with _lock(root, wait=True):  # workers may share the root: none may clear what another is making
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            stack.enter_context(_lock(folder))
        try:
            yield folder
        finally:
            kill_orphans(folder)
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(root: Path) -> list[Path]:
    """Remove the folders of runs that died with their worker; returns them."""
    removed: list[Path] = []
    with _lock(root, wait=True):
        for folder in filter(Path.is_dir, root.glob("job-*-e*")):
            # Unless its worker removes it just now.
            with contextlib.suppress(FileNotFoundError), _lock(folder) as held:
                if held:
                    kill_orphans(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
    return removed


def kill_orphans(folder: Path) -> None:
    """End what still works in the folder of a run that is over: its launcher may have made groups of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder.resolve():
                os.kill(int(process.name), signal.SIGKILL)


def free_bytes(root: Path) -> int:
    """Room left for runs."""
    return shutil.disk_usage(root).free


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = False) -> Generator[bool]:
    """Try to lock a folder, or wait for it; the kernel lets go of the lock when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
