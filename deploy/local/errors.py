"""Every error of the local stack; each message says what to do about it."""

from __future__ import annotations


class StackError(Exception):
    """A command of the local stack failed."""


class PortInUseError(StackError):
    """A port that the stack needs belongs to another process."""

    def __init__(self, port: int, wanted_by: str, option: str) -> None:
        super().__init__(
            f"port {port} on 127.0.0.1, wanted by {wanted_by}, is already in use: "
            f"stop what listens there, or choose another with {option}"
        )
        self.port = port


class AlreadyRunningError(StackError):
    """A supervisor already holds this data folder."""


class StartError(StackError):
    """A process of the stack did not start; the message ends with the end of its log."""
