"""The errors of `jobs`, all below `JobsError`.

Temporary refusals are defined beside their limits (`admission`, `rate_limit`, `sessions`). The API turns each error
into one problem document; the worker logs it and retries or gives up.
"""

from __future__ import annotations

from grpo_core.spec import Problem


class JobsError(Exception):
    """Base of every error raised by `jobs`."""


class NotFound(JobsError):
    """It does not exist or belongs to another owner; clients cannot distinguish the two."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"There is no {what} {name}; list yours to see their ids.")


class Conflict(JobsError):
    """The job's present state does not allow the change."""

    def __init__(self, job_id: str, status: str, action: str, remedy: str = "") -> None:
        self.status = status
        super().__init__(f"Job {job_id} is {status}, so it cannot be {action}. {remedy}".rstrip())


class InUse(JobsError):
    """An unfinished job names this data set, or this job's checkpoint, and may read it again."""

    def __init__(self, what: str, user: str, status: str) -> None:
        super().__init__(
            f"{what} is in use by job {user}, which is {status}. "
            "Delete it once that job has ended, or cancel the job first."
        )


class TooManyKeys(JobsError):
    """An owner has as many valid keys as keys may create."""

    def __init__(self, owner: str, most: int) -> None:
        super().__init__(f"{owner} has {most} valid keys, as many as an owner may have. Revoke some first.")


class Fenced(JobsError):
    """A later run of the job has started or the job has ended, so this run may change nothing."""


class Rejected(JobsError):
    """The request is well formed but cannot be accepted."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.pointer} {p.detail}. {p.remedy}" for p in problems))


class BadCursor(JobsError):
    """The cursor does not belong to this list."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(f"The cursor {detail}; send the next_cursor of the previous page, with the same filters.")


class Unavailable(JobsError):
    """A server this service depends on did not answer; the same request may succeed later."""

    def __init__(self, server: str, reason: str) -> None:
        self.server = server
        super().__init__(f"{server} did not answer ({reason}); try again shortly.")


class Damaged(JobsError):
    """An object is missing or differs from its recorded SHA-256. A retry does not help."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key} {fault}")


class Unreadable(JobsError):
    """An object that training wrote is too large to be read. A retry does not help."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key} is not read: {fault}. `grpo download` downloads the file unchanged.")


class UnreadableRecord(JobsError):
    """This release cannot read a record in Valkey."""

    def __init__(self, job_id: str, fault: str) -> None:
        self.job_id = job_id
        super().__init__(f"The record of job {job_id} cannot be read: {fault}")


class Denied(JobsError):
    """The store refuses access to an object. A retry does not help."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP {status}")


class Misconfigured(JobsError):
    """An environment variable has a value that this process cannot use. The message has the remedy."""

    def __init__(self, variable: str, value: object, fault: str, remedy: str) -> None:
        super().__init__(f"{variable} is {value}, which {fault}. {remedy}")


class UnsafeStorage(JobsError):
    """The object store ignores `If-None-Match`, without which two runs could both claim a job.

    Use AWS S3, SeaweedFS 4.42 or newer, or another store with conditional writes.
    """
