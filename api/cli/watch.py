"""`grpo watch`: follow a job from its first event to its end; also what `submit --wait` does after submitting.

Owns what ends the following and the exit code. Invariant: looking on never changes the job, and being interrupted
neither.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from api.cli.jobs import say_failure, waits_for
from api.cli.output import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AsJson,
    CommandError,
    connected,
    note,
    print_json,
    say,
)

EXIT_CODES = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}
PATIENCE_SECONDS = 900.0
"""How long a service may be away before looking on ends: a job outlives its restart, and so does this."""


def watch(job_id: str, /, *, json: AsJson = False) -> int:
    """Follow a job to its end, from its first event on. Exits 0 succeeded, 1 failed, 3 cancelled.

    Parameters
    ----------
    json
        Print each event as a line of JSON, and the job as the last line.
    """
    with connected() as client:
        job = client.get(job_id, patience=PATIENCE_SECONDS)
        if json:
            with _interruptible(job_id):
                job = client.wait(job_id, print_json, patience=PATIENCE_SECONDS)
            print_json(job)
        else:
            job = follow(client, job, as_json=False)
    return EXIT_CODES[job["status"]]


def follow(client: Any, job: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """Show a job until it has ended; returns it. With `as_json` it is shown where results are not."""
    from api.cli.progress import show_progress

    stream = sys.stderr if as_json else sys.stdout
    if waits := waits_for(job):
        note(f"{job['id']} waits: {waits}")
    with _interruptible(job["id"]), show_progress(job, stream) as on_event:
        job = client.wait(job["id"], on_event, patience=PATIENCE_SECONDS)
    if not as_json:
        say(f"{job['id']}: {job['status']}")
        if job["error"]:
            say_failure(job["error"])
    return job


@contextmanager
def _interruptible(job_id: str) -> Generator[None]:
    """Around looking on: an interruption ends that alone."""
    try:
        yield
    except KeyboardInterrupt:
        message = f"Job {job_id} goes on. See it with: grpo show {job_id}; end it with: grpo cancel {job_id}"
        raise CommandError(message, EXIT_INTERRUPTED) from None
