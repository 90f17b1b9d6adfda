"""The folders runs work in, below one directory of the worker: made per epoch, locked while in use, removed after.

Invariant: a folder whose lock can be had belongs to nobody alive, so it may be removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def run_folder(root: Path, job_id: str, epoch: int) -> Generator[Path]:
    """A fresh folder for one run, removed when the run is over."""
    folder = root / f"{job_id}-e{epoch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    with _lock(folder) as held:
        if not held:
            raise RuntimeError(f"{folder} is in use by another worker; give each its own GRPO_WORK_DIR.")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(root: Path) -> list[Path]:
    """Remove the folders of runs that died with their worker; returns them."""
    removed: list[Path] = []
    for folder in root.glob("job-*-e*"):
        with _lock(folder) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


@contextlib.contextmanager
def _lock(folder: Path) -> Generator[bool]:
    """Try to lock a folder; the kernel lets go of the lock when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
