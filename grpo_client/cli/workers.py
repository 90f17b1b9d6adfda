"""`grpo workers list|drain|undrain`: look at the fleet, and empty a worker before its host is stopped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from grpo_client.cli.output import EXIT_FAILED, AsJson, CommandError, connected, note, print_json, say
from grpo_client.results import Worker

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient

POLL_SECONDS = 2.0

Now = Annotated[bool, Parameter(negative="", help="Save its job and queue it again, instead of finishing it.")]
Wait = Annotated[bool, Parameter(negative="", help="Return only once the worker has no job.")]
Seconds = Annotated[float | None, Parameter(validator=validators.Number(gt=0))]


def list_workers(*, limit: int = 100, cursor: str | None = None, json: AsJson = False) -> None:
    """List the workers, by name: those connected, lost within the last hour, or drained.

    Parameters
    ----------
    limit
        Workers per page, at most 1000.
    cursor
        Where the next page starts, as printed by the previous one.
    """
    with connected() as client:
        page = client.workers(limit=limit, cursor=cursor)
    if json:
        print_json(page)
        return
    if not page.data:
        note("No worker is connected: start one with grpo worker.")
    for worker in page.data:
        say(_line(worker))
    if page.next_cursor:
        say(f"More: grpo workers list --cursor {page.next_cursor}")


def drain(name: str, /, *, now: Now = False, wait: Wait = False, timeout: Seconds = None, json: AsJson = False) -> None:
    """Let a worker take no new job. Its job finishes, or with --now saves and is queued again.

    Parameters
    ----------
    timeout
        With --wait: give up after this many seconds; the drain stays.
    """
    with connected() as client:
        worker = client.drain_worker(name, mode="checkpoint" if now else "finish")
        if wait:
            worker = _emptied(client, worker, timeout)
    if json:
        print_json(worker)
        return
    is_empty = worker.drain is not None and worker.drain.empty
    say(f"{name}: {'drained; it can be stopped' if is_empty else f'draining, {_job(worker)}'}")


def undrain(name: str, /, *, json: AsJson = False) -> None:
    """Let a drained worker take jobs again."""
    with connected() as client:
        worker = client.undrain_worker(name)
    if json:
        print_json(worker)
    else:
        say(f"{name}: takes jobs again")


def _emptied(client: GrpoClient, worker: Worker, timeout: float | None) -> Worker:
    """Wait until a worker is empty."""
    until = None if timeout is None else time.monotonic() + timeout
    while worker.drain is not None and not worker.drain.empty:
        if until is not None and time.monotonic() > until:
            raise CommandError(f"{worker.name} still has a job; the drain stays.", EXIT_FAILED)
        time.sleep(POLL_SECONDS)
        worker = client.worker(worker.name)
    return worker


def _line(worker: Worker) -> str:
    seen = f"seen {worker.last_seen_at:%Y-%m-%d %H:%M:%S}" if worker.last_seen_at else ""
    words = [f"{worker.name:<28}", f"{worker.state:<9}", f"{worker.device or '-':<28}", worker.version or "-", seen]
    return "  ".join([*words, _job(worker) if worker.job else ""]).rstrip()


def _job(worker: Worker) -> str:
    job = worker.job
    if job is None:
        return "and has no job"
    whose = f"{job.id} of {job.owner}" if job.id else "a job of another owner"
    return f"{whose}, step {job.step} of {job.total_steps}" + (f" ({job.phase})" if job.phase else "")
