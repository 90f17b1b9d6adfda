"""The errors of the client. Each message says what to do about it.

ClientError
├── NotConfiguredError  no address or no key was given
├── UnreachableError    the service did not answer, or the answer broke off
├── ProblemError        the service refused: status, code, detail, and errors with field and remedy
├── WaitTimeoutError    the job had not ended when the time given to `wait` or `stream` was over
├── DownloadError       a file that differs from what the service announced, or is not safe to write
└── PushError           a model hub that refused an upload, or could not be reached
"""

from __future__ import annotations

from typing import Any

from grpo_client.results import FieldProblem


class ClientError(Exception):
    """Base of every error the client raises."""


class NotConfiguredError(ClientError):
    """The address of the service or the API key is missing."""


class UnreachableError(ClientError):
    """The service could not be reached; whether it received the request is not known."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        """Whether the connection failed or a proxy said so; False where something else answered."""
        super().__init__(message)


class WaitTimeoutError(ClientError, TimeoutError):
    """The job had not ended in time. The job itself continues."""


class DownloadError(ClientError):
    """A file was refused: it differs from what was announced, or its name is not safe to write."""


class PushError(ClientError):
    """A model hub refused an upload, or could not be reached."""


class ProblemError(ClientError):
    """The service answered with a problem document (RFC 9457)."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document
        self.code = str(document.get("code", ""))
        self.detail = str(document.get("detail") or document.get("title") or f"The service answered {status}.")
        self.errors = [FieldProblem(error) for error in document.get("errors") or []]
        self.request_id: str | None = document.get("request_id")
        summary = self.detail.partition("; `errors`")[0] + ":" if self.errors else self.detail
        super().__init__("\n".join([summary, *(f"  {describe(error)}" for error in self.errors)]))


def describe(error: FieldProblem) -> str:
    """One of a problem's errors in a line: the field, what is wrong, the remedy."""
    raw = error.raw
    where = raw.get("pointer") or raw.get("parameter") or "/"
    detail = str(raw.get("detail", "")).removeprefix(f"{where}: ")
    return f"{where}: {detail}. {raw.get('remedy', '')}".rstrip()
