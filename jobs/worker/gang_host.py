"""One host of a gang, as a Ray actor there: receives the run's inputs, starts the host's ranks, and says how they end.

Owns the run folder on that host, under the settings of the environment in which Ray was started. `gang_driver` makes
these actors and calls them. Knows nothing of Ray. Invariant: the ranks end within `SILENT_SECONDS` after the driver has
fallen silent, so that a host behind a cut cable frees its cards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from grpo_core.hardware.gpus import find_gpus

SILENT_SECONDS: Final = 20.0
"""Longest time in seconds between two calls of the driver."""
STDERR_BYTES: Final = 8192
"""How much of the end of the ranks' output is reported."""
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


class GangHost:
    """The ranks of one host. Ray runs one method at a time."""

    def __init__(self) -> None:
        self._heard_at = time.monotonic()
        self._places = contextlib.ExitStack()
        self._folder = Path()
        self._start_args: dict[str, Any] = {}
        self._process: Any = None

    def place(self) -> dict[str, Any]:
        """Return what Ray has given to the gang on this host, and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        memory = min((gpu.memory_bytes for gpu in find_gpus()), default=0)
        return {"port": port, "cards": os.environ.get(_VISIBLE), "memory_bytes": memory}

    def open(self, job: str, epoch: int, owner: str, spec: Mapping[str, Any]) -> None:
        """Make the run folder. From now on the driver must call at least every `SILENT_SECONDS`."""
        from grpo_core.spec import parse_spec
        from jobs.worker import run_dirs
        from jobs.worker.worker import WorkerSettings, isolate, make_work_dir

        self._heard_at = time.monotonic()
        threading.Thread(target=self._end_when_silent, name="silence", daemon=True).start()
        settings = WorkerSettings()
        make_work_dir(settings.work_dir)
        run_dirs.remove_abandoned(settings.work_dir)
        self._folder = self._places.enter_context(run_dirs.run_folder(settings.work_dir, job, epoch))
        self._start_args = {
            "spec": parse_spec(dict(spec)),
            "owner": owner,
            "isolation": isolate(settings),
            "launcher": settings.launcher_argv(),
        }

    def write(self, name: str, content: bytes) -> None:
        """Append to the file `name` of the run folder."""
        self._heard_at = time.monotonic()
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)

    def start(self, arguments: Sequence[str]) -> None:
        """Start the launcher of this host's ranks, with the cards that Ray has given."""
        from jobs.worker.trainer_process import start_training

        self._heard_at = time.monotonic()
        self._process = start_training(
            self._folder, tuple(arguments), cards=os.environ.get(_VISIBLE), **self._start_args
        )

    def poll(self) -> dict[str, Any] | None:
        """Return how the ranks ended: exit status, reported failure and the end of their output; None while they run
        or before they start."""
        self._heard_at = time.monotonic()
        code = self._process and self._process.exit_code
        return None if code is None else {"code": code, **self._last_words()}

    def signal(self, number: int) -> None:
        """Pass SIGTERM or SIGUSR1 on to the ranks."""
        self._heard_at = time.monotonic()
        if self._process is not None:
            (self._process.terminate if number == signal.SIGTERM else self._process.dump_stacks)()

    def close(self) -> None:
        """End the ranks and remove the run folder."""
        if self._process is not None:
            self._process.kill()
        self._places.close()

    def _last_words(self) -> dict[str, Any]:
        from jobs.worker import untrusted_files
        from jobs.worker.event_forwarder import EventTail

        tail = EventTail(self._folder / "events.jsonl")
        tail.read()
        said = b""
        with (
            contextlib.suppress(OSError),
            untrusted_files.file(self._folder, self._folder / "stderr.log") as path,
            path.open("rb") as file,
        ):
            file.seek(max(0, file.seek(0, os.SEEK_END) - STDERR_BYTES))
            said = file.read(STDERR_BYTES)
        return {"error": tail.last_error, "said": said.decode(errors="replace")}

    def _end_when_silent(self) -> None:
        while time.monotonic() - self._heard_at < SILENT_SECONDS:
            time.sleep(1)
        if self._process is not None:
            self._process.kill()
        os._exit(1)
