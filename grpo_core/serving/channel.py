"""The socket between a serving process and its worker: one JSON message a line, in both directions.

Owns the process's end. Invariant: a message that is too long or no JSON ends the session, because what follows it
cannot be trusted.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from grpo_core import strict_json
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode
from grpo_core.serving.wire import SOCKET_VARIABLE, messages


class Channel:
    """The serving process's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    @classmethod
    def inherited(cls) -> Channel:
        """The one that the worker made. Raises a `user_config` failure if there is none."""
        number = os.environ.pop(SOCKET_VARIABLE, "")
        if not number.isdecimal():
            raise JobFailure(
                FailureCode.ENGINE_NOT_AVAILABLE,
                "A job of kind serving answers through its worker, and this process has none.",
                hint="Submit it to a service: grpo serve JOB.",
            )
        os.set_inheritable(int(number), False)
        return cls(socket.socket(fileno=int(number)))

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; once the worker has gone, none arrives."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(f"{strict_json.dumps(message)}\n".encode())

    def orders(self, seconds: float) -> list[dict[str, Any] | None]:
        """Wait up to `seconds` for messages and return all; None among them means that the worker has gone."""
        found: list[dict[str, Any] | None] = []
        with suppress(queue.Empty):
            found.append(self._orders.get(timeout=seconds) if seconds > 0 else self._orders.get_nowait())
            while True:
                found.append(self._orders.get_nowait())
        return found

    def _read(self) -> None:
        with suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            for order in messages(lines):
                self._orders.put(order)
        self._orders.put(None)
