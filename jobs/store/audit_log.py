"""The audit log: one JSON line for each request that changes something or returns links, and each change of a key.

Owns the format and the destination of the lines, which are separate from request logs. Invariants: a line holds ids,
owners' names and addresses, and never a key, a link or a user's text; a line that cannot be written is counted and
stops no request.
"""

from __future__ import annotations

import getpass
import logging
import os
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core import strict_json
from jobs.errors import Misconfigured

if TYPE_CHECKING:
    from _typeshed import StrPath

log = structlog.get_logger()

STDOUT, OFF = "stdout", "off"


class AuditSettings(BaseSettings):
    """Destination of the audit log."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    sink: str = Field(default=STDOUT, min_length=1, validation_alias="GRPO_AUDIT_LOG")
    """`stdout`, `off`, or a file; each process needs a separate one."""
    megabytes: int = Field(default=100, ge=0, le=1_000_000, validation_alias="GRPO_AUDIT_LOG_MB")
    """Size in MB at which the file is rotated; 0 leaves rotation to another program."""
    files: int = Field(default=10, ge=1, le=1000, validation_alias="GRPO_AUDIT_LOG_FILES")
    """Number of rotated files to keep."""


class AuditLog:
    """Writes the audit lines of one process. Thread-safe."""

    def __init__(self, handler: logging.Handler | None) -> None:
        """Without a handler, nothing is written."""
        self._handler = handler
        self._lock = threading.Lock()
        self.failures = 0
        """Number of lines that could not be written since the process started."""
        if handler is not None:
            handler.handleError = self._count_failure
            handler.setFormatter(logging.Formatter("%(message)s"))

    @classmethod
    def of(cls, settings: AuditSettings) -> AuditLog:
        """Open the log in the settings. Raises `Misconfigured` if its file cannot be written."""
        if settings.sink == OFF:
            return cls(None)
        if settings.sink == STDOUT:
            return cls(logging.StreamHandler(sys.stdout))
        path = Path(settings.sink)
        try:
            return cls(_file_handler(path, settings))
        except OSError as error:
            fault = f"cannot be written ({error.strerror or error})"
            remedy = "Name a file in a folder that this process may write to, or `stdout`, or `off`."
            raise Misconfigured("GRPO_AUDIT_LOG", path, fault, remedy) from error

    @classmethod
    def of_command(cls, settings: AuditSettings) -> AuditLog:
        """Open the log for a command, which writes its result to standard output."""
        return cls(logging.StreamHandler(sys.stderr)) if settings.sink == STDOUT else cls.of(settings)

    def write(self, action: str, result: str, **facts: str | int | None) -> None:
        """Write one line: the action, its result, and facts such as owner, address and id."""
        if self._handler is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"v": 1, "log": "audit", "time": now, "action": action, "result": result, **facts}
        self._handler.handle(logging.makeLogRecord({"msg": strict_json.dumps(line)}))

    def write_command(self, action: str, **facts: str | int | None) -> None:
        """Write the line of a command that was run on a host of the service."""
        self.write(action, "done", client="local", user=_user(), **facts)
        self.close()

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._handler, logging.FileHandler):
            with suppress(OSError):  # raised for a line that could not be written and was counted
                self._handler.close()

    def _count_failure(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature of logging
        error = sys.exc_info()[1]
        with self._lock:
            self.failures += 1
            is_first = self.failures == 1
        write = log.error if is_first else log.debug
        write("audit.failed", error=type(error).__name__, failures=self.failures)


def _user() -> str:
    """Return the user's name, or the number of a user without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12, OSError later
        return str(os.getuid())


def _file_handler(path: Path, settings: AuditSettings) -> logging.Handler:
    size = settings.megabytes * 1_000_000
    if size:
        return _Rotating(path, maxBytes=size, backupCount=settings.files, encoding="utf-8")
    return _Watched(path, encoding="utf-8")


def _open_private(path: StrPath) -> TextIOWrapper:
    """Open a file that only its owner can read, because it shows who works when and from where."""
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))


class _Rotating(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        return _open_private(self.baseFilename)


class _Watched(WatchedFileHandler):
    def _open(self) -> TextIOWrapper:
        return _open_private(self.baseFilename)
