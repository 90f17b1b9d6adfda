"""`grpo list`, `show`, `cancel`, `pause`, `resume`, `delete`, `download`: look at jobs, control one, download its
files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from grpo_client.cli.output import (
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
from grpo_client.cli.progress import show_bytes
from grpo_client.cli.text import count
from grpo_client.results import Job, JobDetail, JobError, Trial
from grpo_client.words import FETCH_FAILURES, WAIT_REASONS

Pairs = Annotated[list[str] | None, Parameter(name="--metadata", negative="", help="Only jobs with this KEY=VALUE.")]

Best = Annotated[
    bool,
    Parameter(
        name="--best",
        negative="",
        help="Only the adapter of the step whose evaluation was best, from its checkpoint: checkpoints/step-N.",
    ),
]

Only = Annotated[
    list[str] | None,
    Parameter(
        name="--only",
        negative="",
        help="Only this file or folder of the job, such as adapter, or a pattern such as 'rollouts/*'. Repeatable.",
    ),
]


def list_jobs(
    *,
    limit: int = 20,
    cursor: str | None = None,
    status: str | None = None,
    metadata: Pairs = None,
    group: str | None = None,
    json: AsJson = False,
) -> None:
    """List your jobs, newest first.

    Parameters
    ----------
    limit
        Jobs per page, at most 100.
    cursor
        Where the next page starts, as printed by the previous one.
    status
        Only jobs with this status.
    group
        Only jobs of this group.
    """
    wanted = dict(_pair(text) for text in metadata or [])
    with connected() as client:
        page = client.list(limit=limit, cursor=cursor, status=status, metadata=wanted, group=group)
    if json:
        print_json(page)
        return
    if not page.data:
        note("No such job." if status or metadata or group or cursor else "No jobs yet: submit one with grpo submit.")
    for job in page.data:
        created = f"{job.created_at:%Y-%m-%d %H:%M}"
        numbers = f"{_steps(job):>11}  {_reward(job):>7}"
        say(f"{job.id}  {job.status:<10}  {numbers}  {created}  {job.name or ''}".rstrip())
    if page.next_cursor:
        say(f"More: grpo list --cursor {page.next_cursor}")


def show(job_id: str, /, *, json: AsJson = False) -> None:
    """Show one job: its status, its progress, and why it failed."""
    with connected() as client:
        job = client.get(job_id)
    if json:
        print_json(job)
        return
    say_job(job)


def cancel(job_id: str | None = None, /, *, group: str | None = None, json: AsJson = False) -> None:
    """Cancel a job, or every job of a group that has not ended. A running one stops within seconds.

    Parameters
    ----------
    group
        The group whose jobs to cancel.
    """
    if (job_id is None) == (group is None):
        raise CommandError("Name a job, or --group and a group.", EXIT_REFUSED)
    with connected() as client:
        if job_id is not None:
            _say_status(client.cancel(job_id), as_json=json)
        elif group is not None:
            cancelled = client.cancel_group(group)
            if json:
                print_json(cancelled)
                return
            for job in cancelled.data:
                _say_status(job, as_json=False)


def pause(job_id: str, /, *, json: AsJson = False) -> None:
    """Pause a job. A running one saves a checkpoint first, and then frees its GPU."""
    with connected() as client:
        job = client.pause(job_id)
    _say_status(job, as_json=json)


def resume(job_id: str, /, *, json: AsJson = False) -> None:
    """Queue a paused job again; it resumes from its last checkpoint."""
    with connected() as client:
        job = client.resume(job_id)
    _say_status(job, as_json=json)


def delete(job_id: str, /, *, yes: Yes = False, json: AsJson = False) -> None:
    """Delete a job that has ended: its spec, completions, metrics, checkpoints and adapter. This cannot be undone."""
    with connected() as client:
        if not yes:
            job = client.get(job_id)
            confirm(f"Delete {job_id} ({job.name or 'no name'}, {job.status}) and all it left?")
        client.delete(job_id)
    if json:
        print_json({"job": job_id, "deleted": True})
    else:
        say(f"{job_id}: deleted")


def download(job_id: str, folder: Path, /, *, only: Only = None, best: Best = False, json: AsJson = False) -> None:
    """Download a job's files and check every hash.

    Parameters
    ----------
    folder
        Where to write. It is created; its parent must exist. Files that already exist with the right content are kept.
    """
    check_place(folder)
    with connected() as client, show_bytes(sys.stderr if json else sys.stdout, lines=not json) as on_bytes:
        try:
            wanted = [*(only or []), *([_best_folder(client.get(job_id))] if best else [])]
            files = client.download(job_id, folder, on_bytes, only=wanted)
        except OSError as error:
            raise CommandError(f"{folder} cannot be written: {error.strerror or error}.") from error
    if json:
        # Without the links, which give access to the files: output ends up in logs.
        names = ("path", "key", "size", "sha256")
        print_json({"job": job_id, "folder": str(folder), "files": [{n: file[n] for n in names} for file in files]})
        return
    say(f"{count(len(files), 'file')} in {folder}; every SHA-256 is as announced.")


def _best_folder(job: Job) -> str:
    """The checkpoint of the best step."""
    if not job.best_step:
        raise CommandError(f"Job {job.id} has no best step: the adapter has not been evaluated (evaluation.questions).")
    return f"checkpoints/step-{job.best_step:06d}/adapter_*"


def say_job(job: JobDetail) -> None:
    """The lines that describe a job."""
    fields = {
        "job": job.id,
        "name": job.name,
        "status": job.status + (f" ({job.phase})" if job.phase else ""),
        "waits": waits_for(job),
        "step": _steps(job),
        "saved": f"step {job.checkpoint_step}" if job.checkpoint_step else None,
        "best": f"step {job.best_step} (its checkpoint is kept)" if job.best_step else None,
        "stopped": job.stopped,
        "reward": _reward(job),
        "group": job.raw.get("group"),
        "model": job.spec["model"]["name"],
        "data": job.spec["data"]["dataset"],
        "created": job["created_at"],
        "started": job["started_at"],
        "finished": job["finished_at"],
    }
    for name, value in fields.items():
        if value:
            say(f"{name:<9} {value}")
    if job.error:
        say_failure(job.error)
    if job.result is not None:
        say_trial(job.result, job.id)


def waits_for(job: Job) -> str | None:
    """What a queued job waits for; None for any other job, or if the service does not say."""
    waiting = job.waiting if isinstance(job, JobDetail) else None
    if not waiting:
        return None
    if (reason := waiting.raw.get("reason")) == "newer_worker":
        needs, reads = waiting.spec_format, waiting.workers_spec_format
        return f"{WAIT_REASONS[reason]} (it has format {needs}, they read up to {reads})"
    if reason in ("hosts", "few_hosts"):
        cards = f" with {count(waiting.gpus, 'card')} each" if waiting.gpus else ""
        return f"{WAIT_REASONS[reason]} ({count(waiting.hosts, 'host')}{cards}; it has {waiting.hosts_found} such)"
    if not waiting.workers:
        return f"{WAIT_REASONS.get(str(reason), WAIT_REASONS['no_worker'])} (queue {waiting.queue})"
    ahead = f"{count(waiting.ahead, 'job')} before it, " if waiting.ahead else ""
    return f"{ahead}{count(waiting.workers, 'worker')} for its queue {waiting.queue}"


def say_trial(trial: Trial, job_id: str) -> None:
    """Say what a trial found."""
    say(trial.sentence)
    shares = {
        "groups with a signal": trial.signal_share,
        "in the required format": trial.format_share,
        "cut off": trial.truncated_share,
        "repeated in their group": trial.duplicate_share,
        "not scored": trial.unscored_share,
    }
    for name, share in shares.items():
        if share is not None:
            say(f"  {name:<24} {share:.0%}")
    say(f"  {'tokens per completion':<24} {trial.completion_tokens_mean:.0f}, at most {trial.completion_tokens_max}")
    say(f"  {'seconds per step':<24} {trial.step_seconds:.2g}")
    for name, mean in {**trial.rewards, "total": trial.reward_mean}.items():
        say(f"  {f'mean {name}':<24} {mean:.3g}")
    say(f"Read the {trial.completions} completions: grpo rollouts {job_id}")


def say_failure(error: JobError) -> None:
    """Why a job failed, and what to do."""
    heading = FETCH_FAILURES.get(error.code)
    say(f"{'error':<9} {f'{heading}. ' if heading else ''}{error.code} ({error.class_}): {error.message}")
    if error.hint:
        say(f"{'':<9} {error.hint}")


def _say_status(job: Job, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        say(f"{job.id}: {job.status}")


def _steps(job: Job) -> str:
    return f"{job.step}/{job.total_steps}"


def _reward(job: Job) -> str:
    return "" if job.reward is None else f"{job.reward:.3f}"


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise CommandError(f"--metadata {text!r} is not KEY=VALUE.", EXIT_REFUSED)
    return key, value
