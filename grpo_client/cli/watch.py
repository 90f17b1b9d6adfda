"""`grpo watch`: follow a job from its first event to its end; also what `submit --wait` does after submitting.

Owns when watching ends, and the exit code. Invariant: neither watching nor an interrupt changes the job.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from grpo_client.cli.jobs import say_failure, waits_for
from grpo_client.cli.output import (
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
from grpo_client.results import Job, JobDetail

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient

EXIT_CODES = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}
PATIENCE_SECONDS = 900.0
"""How many seconds the service may be away before watching ends. A job survives a restart of the service, and so does
this."""


def watch(job_id: str, /, *, json: AsJson = False) -> int:
    """Follow a job from its first event to its end. Exits 0 succeeded, 1 failed, 3 cancelled.

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
    return EXIT_CODES[job.status]


def follow(client: GrpoClient, job: Job, *, as_json: bool) -> JobDetail:
    """Show a job until it has ended; returns it. With `as_json`, progress goes to standard error."""
    from grpo_client.cli.progress import show_progress

    stream = sys.stderr if as_json else sys.stdout
    if waits := waits_for(job):
        note(f"{job.id} waits: {waits}")
    with _interruptible(job.id), show_progress(job, stream) as on_event:
        ended = client.wait(job.id, on_event, patience=PATIENCE_SECONDS)
    if not as_json:
        say(f"{ended.id}: {ended.status}")
        if ended.error:
            say_failure(ended.error)
    return ended


@contextmanager
def _interruptible(job_id: str) -> Generator[None]:
    """Around watching: an interrupt ends only the watching."""
    try:
        yield
    except KeyboardInterrupt:
        message = f"Job {job_id} continues. See it with: grpo show {job_id}; end it with: grpo cancel {job_id}"
        raise CommandError(message, EXIT_INTERRUPTED) from None
