"""`grpo list`, `show`, `cancel`, `pause`, `resume`, `delete`, `download`: look at jobs, steer one, fetch its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from api.cli.output import (
    EXIT_REFUSED,
    AsJson,
    CommandError,
    Yes,
    check_place,
    confirm,
    connected,
    note,
    print_json,
    say,
)
from api.cli.progress import show_bytes
from api.cli.text import count

Pairs = Annotated[list[str] | None, Parameter(name="--metadata", negative="", help="Only jobs with this KEY=VALUE.")]

Only = Annotated[
    list[str] | None,
    Parameter(
        name="--only",
        negative="",
        help="Only this file or folder of the job, as adapter, or a pattern such as 'rollouts/*'; repeat it.",
    ),
]


def list_jobs(
    *,
    limit: int = 20,
    cursor: str | None = None,
    status: str | None = None,
    metadata: Pairs = None,
    json: AsJson = False,
) -> None:
    """List your jobs, newest first.

    Parameters
    ----------
    limit
        Jobs on a page, at most 100.
    cursor
        Where the page before said that the next one starts.
    status
        Only jobs in this state.
    """
    wanted = dict(_pair(text) for text in metadata or [])
    with connected() as client:
        page = client.list(limit=limit, cursor=cursor, status=status, metadata=wanted)
    if json:
        print_json(page)
        return
    if not page["data"]:
        note("No such job." if status or metadata or cursor else "No jobs yet: submit one with grpo submit.")
    for job in page["data"]:
        created = job["created_at"][:16].replace("T", " ")
        numbers = f"{_steps(job):>11}  {_reward(job):>7}"
        say(f"{job['id']}  {job['status']:<10}  {numbers}  {created}  {job['name'] or ''}".rstrip())
    if page["next_cursor"]:
        say(f"More: grpo list --cursor {page['next_cursor']}")


def show(job_id: str, /, *, json: AsJson = False) -> None:
    """Show one job: where it is, how far, and why it failed."""
    with connected() as client:
        job = client.get(job_id)
    if json:
        print_json(job)
        return
    say_job(job)


def cancel(job_id: str, /, *, json: AsJson = False) -> None:
    """Cancel a job. One that runs stops within seconds."""
    with connected() as client:
        job = client.cancel(job_id)
    _say_status(job, as_json=json)


def pause(job_id: str, /, *, json: AsJson = False) -> None:
    """Pause a job. One that runs saves a checkpoint first, and frees its GPU."""
    with connected() as client:
        job = client.pause(job_id)
    _say_status(job, as_json=json)


def resume(job_id: str, /, *, json: AsJson = False) -> None:
    """Put a paused job back into the queue, to go on from its last checkpoint."""
    with connected() as client:
        job = client.resume(job_id)
    _say_status(job, as_json=json)


def delete(job_id: str, /, *, yes: Yes = False, json: AsJson = False) -> None:
    """Delete a job that has ended: its spec, completions, metrics, checkpoints and adapter. There is no way back."""
    with connected() as client:
        if not yes:
            job = client.get(job_id)
            confirm(f"Delete {job_id} ({job['name'] or 'no name'}, {job['status']}) and all it left?")
        client.delete(job_id)
    if json:
        print_json({"job": job_id, "deleted": True})
    else:
        say(f"{job_id}: deleted")


def download(job_id: str, folder: Path, /, *, only: Only = None, json: AsJson = False) -> None:
    """Download what a job left and check every hash.

    Parameters
    ----------
    folder
        Where to write: it is made, in a folder that is there. Files that are there already and right are kept.
    """
    check_place(folder)
    with connected() as client, show_bytes(sys.stderr if json else sys.stdout, lines=not json) as on_bytes:
        try:
            files = client.download(job_id, folder, on_bytes, only=only or [])
        except OSError as error:
            raise CommandError(f"{folder} cannot be written: {error.strerror or error}.") from error
    if json:
        # The links are left out: they are keys to the files, and output ends up in logs.
        names = ("path", "key", "size", "sha256")
        print_json({"job": job_id, "folder": str(folder), "files": [{n: file[n] for n in names} for file in files]})
        return
    say(f"{count(len(files), 'file')} in {folder}; every SHA-256 is as announced.")


def say_job(job: dict[str, Any]) -> None:
    """A job in lines."""
    fields = {
        "job": job["id"],
        "name": job["name"],
        "status": job["status"] + (f" ({job['phase']})" if job["phase"] else ""),
        "waits": waits_for(job),
        "step": _steps(job),
        "saved": f"step {job['checkpoint_step']}" if job["checkpoint_step"] else None,
        "reward": _reward(job),
        "model": job["spec"]["model"]["name"],
        "data": job["spec"]["data"]["dataset"],
        "created": job["created_at"],
        "started": job["started_at"],
        "finished": job["finished_at"],
    }
    for name, value in fields.items():
        if value:
            say(f"{name:<9} {value}")
    if job["error"]:
        say_failure(job["error"])


def waits_for(job: dict[str, Any]) -> str | None:
    """What a queued job waits for, in words; None for any other, and where the service does not say."""
    waiting = job.get("waiting")
    if not waiting:
        return None
    if not waiting["workers"]:
        return f"no worker that can run it is connected (queue {waiting['queue']})"
    ahead = f"{count(waiting['ahead'], 'job')} before it, " if waiting["ahead"] else ""
    return f"{ahead}{count(waiting['workers'], 'worker')} for its queue {waiting['queue']}"


def say_failure(error: dict[str, Any]) -> None:
    """Why a job failed, and what to do."""
    say(f"{'error':<9} {error['code']} ({error['class']}): {error['message']}")
    if error["hint"]:
        say(f"{'':<9} {error['hint']}")


def _say_status(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        say(f"{job['id']}: {job['status']}")


def _steps(job: dict[str, Any]) -> str:
    return f"{job['step']}/{job['total_steps']}"


def _reward(job: dict[str, Any]) -> str:
    return "" if job["reward"] is None else f"{job['reward']:.3f}"


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise CommandError(f"--metadata {text!r} is not KEY=VALUE.", EXIT_REFUSED)
    return key, value
