"""The data folder of a local stack: settings, secrets, state and lock, each in a file that only its owner can read.

Owns the format of these files. Invariant: only the stack's supervisor, or an `up` that starts it, holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.local.errors import StackError

Phase = Literal["starting", "running", "stopping", "failed", "stopped"]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True)


class Commands(_File):
    """The commands that the stack runs beside the two servers."""

    api: tuple[str, ...]
    worker: tuple[str, ...]
    create_key: tuple[str, ...]
    """Command that prints a JSON object with the new `key`."""


class Config(_File):
    """The options of the last `up`; the next `up` keeps the ports."""

    api_port: int
    valkey_port: int
    s3_port: int
    worker: bool
    model_dir: Path | None
    start_s: float
    commands: Commands

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"


def _token() -> str:
    return secrets.token_urlsafe(32)


class Secrets(_File):
    """Secrets, made once per data folder."""

    valkey_password: str = Field(default_factory=_token, repr=False)
    s3_access_key: str = Field(default_factory=lambda: secrets.token_hex(10), repr=False)
    s3_secret_key: str = Field(default_factory=_token, repr=False)
    sealing_keys: str = Field(default="", repr=False)
    """Value of `GRPO_SEALING_KEYS`. Empty only until the first start of this release."""
    api_key: str = Field(default="", repr=False)
    """Known only after the API's first start."""


class ProcessState(_File):
    pid: int | None
    """None between a death and the next start."""
    restarts: int


class State(_File):
    """State of the stack. Only the supervisor writes it."""

    phase: Phase
    url: str = ""
    pid: int | None = None
    """Process id of the supervisor."""
    processes: dict[str, ProcessState] = {}
    waiting_for: dict[str, str] = {}
    """Why each service is not ready, by service."""
    error: str = ""


class Folder:
    def __init__(self, data: Path) -> None:
        self.root = data.resolve()
        self.logs = self.root / "logs"
        self.env = self.root / "env"
        self._config = self.root / "stack.json"
        self._secrets = self.root / "secrets.json"
        self._state = self.root / "state.json"

    def create(self) -> None:
        """Create the folder, or check that an existing one is a stack's, because its mode will change."""
        if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / "lock").exists():
            raise StackError(f"{self.root} holds something else: choose an empty or a new folder with --data")
        self.root.mkdir(parents=True, exist_ok=True)
        # First of all, so that an `up` at the same moment finds either no folder or a stack's folder.
        (self.root / "lock").touch(mode=0o600)
        self.logs.mkdir(exist_ok=True)
        self.logs.chmod(0o700)
        # A worker that runs as root trains as other users, who must reach their folders below `work`.
        self.root.chmod(0o711 if os.geteuid() == 0 else 0o700)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def lock(self, patience_s: float = 0.5) -> IO[bytes] | None:
        """Return the open lock file; None if another process holds it for longer than `status` takes."""
        deadline = time.monotonic() + patience_s
        file = os.fdopen(os.open(self.root / "lock", os.O_WRONLY | os.O_CREAT, 0o600), "wb")
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.close()
                    return None
                time.sleep(0.05)
            else:
                return file

    def locked(self) -> bool:
        """Whether a supervisor is alive."""
        if not (self.root / "lock").exists():
            return False
        file = self.lock(patience_s=0)
        if file is not None:
            file.close()
        return file is None

    def config(self) -> Config | None:
        return Config.model_validate_json(self._config.read_bytes()) if self._config.exists() else None

    def save_config(self, config: Config) -> None:
        write_private(self._config, config.model_dump_json(indent=2))

    def secrets(self) -> Secrets:
        if not self._secrets.exists():
            self.save_secrets(Secrets())
        return Secrets.model_validate_json(self._secrets.read_bytes())

    def ensure_sealing_key(self) -> Secrets:
        """Make the key that a folder of an earlier release lacks. For the holder of the lock alone: it is made once."""
        values = self.secrets()
        if not values.sealing_keys:
            values = values.model_copy(update={"sealing_keys": _token()})
            self.save_secrets(values)
        return values

    def save_secrets(self, values: Secrets) -> None:
        write_private(self._secrets, values.model_dump_json(indent=2))

    def state(self) -> State | None:
        return State.model_validate_json(self._state.read_bytes()) if self._state.exists() else None

    def save_state(self, state: State) -> None:
        write_private(self._state, state.model_dump_json(indent=2))

    def forget_state(self) -> None:
        self._state.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file atomically. It is never readable by others."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)
    new.replace(path)
