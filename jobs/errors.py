"""The errors of `jobs`: each is a `JobsError` and says itself when it is raised.

Refusals for now, of who asks too often or for too much, are beside the limits they tell of (`admission`, `ratelimit`,
`sessions`). The API turns each error into one problem document; the worker logs and retries or gives up.
"""

from __future__ import annotations

from grpo_core.spec import Problem


class JobsError(Exception):
    """Base of every error raised by `jobs`."""


class NotFound(JobsError):
    """There is no such thing, or it belongs to another owner: the two look the same on purpose."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"There is no {what} {name}; list yours to see what there is.")


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


class Fenced(JobsError):
    """Another epoch of this job has begun, or it has ended: this one may change nothing."""


class Rejected(JobsError):
    """The request is well formed, yet cannot be accepted."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.pointer} {p.detail}. {p.remedy}" for p in problems))


class BadCursor(JobsError):
    """A cursor that leads nowhere in the list it was given for."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(f"The cursor {detail}; give the next_cursor of the page before, with the same filters.")


class Unavailable(JobsError):
    """A server this service depends on did not answer; the same request may succeed later."""

    def __init__(self, server: str, reason: str) -> None:
        self.server = server
        super().__init__(f"{server} did not answer ({reason}); try again shortly.")


class Damaged(JobsError):
    """An object is gone, or does not have the bytes that were recorded for it; asking again gives the same."""

    def __init__(self, key: str, fault: str) -> None:
        super().__init__(f"{key} {fault}")


class Denied(JobsError):
    """The store answered, and gives this object to us neither now nor later."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP {status}")


class Misconfigured(JobsError):
    """A variable of the environment names what this process cannot use; names it and the remedy."""

    def __init__(self, variable: str, value: object, fault: str, remedy: str) -> None:
        super().__init__(f"{variable} is {value}, which {fault}. {remedy}")


class UnsafeStorage(JobsError):
    """The object store ignores `If-None-Match`, without which two runs could both claim a job.

    Use AWS S3, SeaweedFS 4.42 or newer, or another store with conditional writes.
    """
