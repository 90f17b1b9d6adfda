"""The errors of the Python client.

ClientError
├── NotConfiguredError  no address or no key was given
├── UnreachableError    nobody answered, or the answer broke off
├── ProblemError        the service refused: status, code, detail, and errors with field and remedy
└── DownloadError       a file that is not what the service said, or not safe to write
"""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """Base of every error the client raises."""


class NotConfiguredError(ClientError):
    """The client does not know where the service is or who it speaks for."""


class UnreachableError(ClientError):
    """The service could not be reached; what it did is not known."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        """The connection failed, or a proxy said so: as against an answer from something else."""
        super().__init__(message)


class DownloadError(ClientError):
    """A file was refused: it differs from what was announced, or its name is not safe to write."""


class ProblemError(ClientError):
    """The service answered with a problem document (RFC 9457)."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document
        self.code = str(document.get("code", ""))
        self.detail = str(document.get("detail") or document.get("title") or f"The service answered {status}.")
        self.errors: list[dict[str, Any]] = document.get("errors") or []
        self.request_id: str | None = document.get("request_id")
        summary = self.detail.partition("; `errors`")[0] + ":" if self.errors else self.detail
        super().__init__("\n".join([summary, *(f"  {describe(error)}" for error in self.errors)]))


def describe(error: dict[str, Any]) -> str:
    """One of a problem's errors in a line: the field, what is wrong, the remedy."""
    where = error.get("pointer") or error.get("parameter") or "/"
    detail = str(error.get("detail", "")).removeprefix(f"{where}: ")
    return f"{where}: {detail}. {error.get('remedy', '')}".rstrip()
