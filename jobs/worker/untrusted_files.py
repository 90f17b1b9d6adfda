"""Opens files in a folder while an untrusted training process may be changing it.

Invariant: only regular files in that folder are opened. Links in the path, pipes that would block the reader, and hard
links to the worker's own files are refused.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Generator
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

DEEPEST = 32
"""Largest depth of a run's folders."""


class Refused(OSError):
    """It is not a regular file of the folder."""


@contextlib.contextmanager
def folder(root: Path, path: Path) -> Generator[int]:
    """Open the folder `path`, which is `root` or below it. Yields its descriptor."""
    descriptor = os.open(root, _FOLDER)
    try:
        for name in path.relative_to(root).parts:
            above, descriptor = descriptor, _open(name, _FOLDER, descriptor)
            os.close(above)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file(root: Path, path: Path) -> Generator[Path]:
    """Open the file `path` below `root`. Yields a path that stays valid if the file is replaced. Raises `Refused`."""
    with folder(root, path.parent) as above:
        descriptor = _open(path.name, _FILE, above)
    try:
        _check(descriptor, root, path)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(root: Path, path: Path) -> Generator[Path]:
    """Yield a path for writing a file, which gets the name `path` below `root` once it is complete."""
    partial = f".{path.name}.part"
    with folder(root, path.parent) as above:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=above)
        descriptor = os.open(partial, _NEW, 0o644, dir_fd=above)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
            os.rename(partial, path.name, src_dir_fd=above, dst_dir_fd=above)
        finally:
            os.close(descriptor)


def link(source: Path, path: Path) -> None:
    """Create a hard link `path` to a file that `file` opened."""
    with folder(path.parent, path.parent) as above:
        # With two descriptors, because only then the link in `source` is followed.
        os.link(source, path.name, src_dir_fd=above, dst_dir_fd=above, follow_symlinks=True)


def clean(root: Path) -> None:
    """Remove everything that `file` would refuse from the folder of an ended run, and make the rest accessible.

    Folders deeper than `DEEPEST` are removed too, because walking through the folder is recursive.
    """
    user = root.stat().st_uid
    with _accessible(str(root), None) as top:
        _clean(top, user, 0)


def remove(root: Path) -> None:
    """Remove a folder with its content, of any depth: a path inside it may be longer than Linux accepts."""
    with _accessible(str(root), None) as top:
        _empty(top)
    root.rmdir()


def _clean(above: int, user: int, depth: int) -> None:
    for name in os.listdir(above):
        state = os.stat(name, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISDIR(state.st_mode):
            if not stat.S_ISREG(state.st_mode) or _is_second_name(state, user):
                os.unlink(name, dir_fd=above)
            elif not state.st_mode & stat.S_IRUSR:
                _change_mode(name, above, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            continue
        with _accessible(name, above) as descriptor:
            if depth < DEEPEST:
                _clean(descriptor, user, depth + 1)
            else:
                _empty(descriptor)
        if depth == DEEPEST:
            os.rmdir(name, dir_fd=above)


def _empty(top: int) -> None:
    """Move the folders inside each folder to the top before it is removed, so that none is deeper than two levels."""
    mark = secrets.token_hex(8)
    numbers = itertools.count()
    waiting = _unlink_files(top)
    while waiting:
        name = waiting.pop()
        with _accessible(name, top) as descriptor:
            for inner in _unlink_files(descriptor):
                _change_mode(inner, descriptor, _PLACE, 0o700)
                moved = f".{mark}-{next(numbers)}"
                os.rename(inner, moved, src_dir_fd=descriptor, dst_dir_fd=top)
                waiting.append(moved)
        os.rmdir(name, dir_fd=top)


def _unlink_files(above: int) -> list[str]:
    """Remove all files. Returns the names of folders."""
    folders: list[str] = []
    for name in os.listdir(above):
        if stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=above)
    return folders


@contextlib.contextmanager
def _accessible(name: str, above: int | None) -> Generator[int]:
    """Open a folder and take it over, so that other users that have it open cannot add files."""
    _change_mode(name, above, _PLACE, 0o700)
    descriptor = os.open(name, _FOLDER, dir_fd=above)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            os.fchown(descriptor, os.geteuid(), os.getegid())
        yield descriptor
    finally:
        os.close(descriptor)


def _change_mode(name: str, above: int | None, flags: int, mode: int) -> None:
    """Change the mode without following links, also links created at this moment."""
    descriptor = os.open(name, flags, dir_fd=above)
    try:
        state = os.fstat(descriptor)
        if stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode):
            Path(f"/proc/self/fd/{descriptor}").chmod(mode)
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, above: int) -> int:
    try:
        return os.open(name, flags, dir_fd=above)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EACCES):
            raise Refused(error.errno, error.strerror, name) from error
        raise


def _check(descriptor: int, root: Path, path: Path) -> None:
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or _is_second_name(state, root.stat().st_uid):
        raise Refused(errno.EPERM, "is not a plain file of this folder", str(path))


def _is_second_name(state: os.stat_result, user: int) -> bool:
    """Whether it is a hard link to a file of this process's user in another user's folder."""
    mine = os.geteuid()
    return user != mine and state.st_uid == mine and state.st_nlink > 1
