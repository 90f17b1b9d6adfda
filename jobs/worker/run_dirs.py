"""Run folders below the worker's directory: one per epoch, locked while in use, then removed.

Beside each is a folder for the worker alone and, during the run, one for temporary files with a short name, because
sockets are created in it. Invariant: a folder that can be locked belongs to no running worker, so it may be removed and
processes in it may be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

import structlog

from jobs.worker import untrusted_files

log = structlog.get_logger()


@contextlib.contextmanager
def run_folder(root: Path, job_id: str, epoch: int) -> Generator[Path]:
    """Create a folder for one run, and remove it after the block."""
    folder = root / f"{job_id}-e{epoch}"
    with contextlib.ExitStack() as stack:
        with _lock(root, wait=True):  # workers may share the root, and must not remove each other's new folders
            _remove(folder)
            folder.mkdir(mode=0o700)
            stack.enter_context(_lock(folder))
        try:
            private(folder).mkdir(mode=0o700)
            _temporary_link(folder).symlink_to(tempfile.mkdtemp(prefix="grpo-"))
            yield folder
        finally:
            kill_orphans(folder)
            _remove(folder)


def private(folder: Path) -> Path:
    """Return the folder beside the run's that only the worker can access."""
    return folder.with_name(f".{folder.name}")


def temporary(folder: Path) -> Path:
    """Return the folder for the training process's temporary files."""
    return _temporary_link(folder).readlink()


def hand_over(folder: Path, user: int | None) -> None:
    """Give a prepared folder and the temporary one to the user of the training process."""
    if user is None:
        return
    for place in (temporary(folder), folder):
        for above, folders, files in os.walk(place, topdown=False):
            for name in (*folders, *files):
                os.chown(Path(above, name), user, user, follow_symlinks=False)
        os.chown(place, user, user)


def take_back(folder: Path) -> None:
    """Take a folder back after the run, so that its files can be read safely."""
    untrusted_files.clean(folder)


def _temporary_link(folder: Path) -> Path:
    return private(folder) / "tmp"


def _remove(folder: Path) -> None:
    """Remove as much as possible. Remaining files must not prevent the next run or a start."""
    places = [folder, private(folder)]
    with contextlib.suppress(OSError):
        places.insert(0, temporary(folder))
    for place in places:
        try:
            untrusted_files.remove(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("folder_not_removed", folder=str(place), reason=str(error))


def remove_abandoned(root: Path) -> list[Path]:
    """Remove the folders of runs whose worker has died. Returns them."""
    removed: list[Path] = []
    with _lock(root, wait=True):
        for folder in filter(Path.is_dir, root.glob("job-*-e*")):
            try:
                with _lock(folder) as held:
                    if held:
                        kill_orphans(folder)
                        _remove(folder)
                        removed.append(folder)
            except FileNotFoundError:
                continue  # its worker is removing it
            except OSError as error:
                log.warning("folder_not_removed", folder=str(folder), reason=str(error))
    return removed


def kill_orphans(folder: Path) -> None:
    """Kill processes that still work in the folder of an ended run; they may be in other process groups."""
    place = folder.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        # By a descriptor, because another process may get the same number meanwhile.
        with contextlib.suppress(OSError), _process(int(process.name)) as descriptor:
            if (process / "cwd").readlink().is_relative_to(place):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)


@contextlib.contextmanager
def _process(pid: int) -> Generator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fault_of(folder: Path) -> str:
    """Return why other users could replace files in the folder; empty if they cannot."""
    trusted = {0, os.geteuid()}
    state = folder.stat()
    if folder.is_symlink() and folder.lstat().st_uid not in trusted:
        return "is a link that another user has made"
    if state.st_uid not in trusted:
        return "belongs to another user"
    # The operator is responsible for a mounted volume; Kubernetes makes its volumes writable for everyone.
    if state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX and not folder.is_mount():
        return "can be written by everyone, who may then replace what is in it"
    return ""


def free_bytes(root: Path) -> int:
    """Return the free space for runs, in bytes."""
    return shutil.disk_usage(root).free


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = False) -> Generator[bool]:
    """Try to lock a folder, or wait for the lock. The kernel releases it when its holder dies."""
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
