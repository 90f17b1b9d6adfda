"""`grpo list`, `show`, `cancel`, `pause`, `resume`, `delete`, `download`: look at jobs, control one, download its
files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

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

COLUMNS = ("id", "name", "status", "step", "total_steps", "reward", "created_at")
"""Fields of a job that a line of the list shows."""

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
    search: str | None = None,
    kind: str | None = None,
    priority: str | None = None,
    owner: str | None = None,
    sort: str | None = None,
    fields: str | None = None,
    json: AsJson = False,
) -> None:
    """List your jobs, newest first unless you sort them.

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
    search
        Only jobs with this text in id, name, model or metadata.
    kind
        Only jobs of this kind: training, try, serving or export.
    priority
        Only jobs with this priority: low, normal or high.
    owner
        For operators: this owner's jobs; * stands for all owners.
    sort
        By created, updated, name, status, priority, owner or reward; with a minus from the largest: --sort=-reward.
    fields
        With --json: only these fields of each job, such as id,spec.model.name.
    """
    chosen = (fields.split(",") if fields else ()) if json else COLUMNS
    filters = {"search": search, "kind": kind, "priority": priority, "owner": owner}
    wanted = dict(_pair(text) for text in metadata or [])
    with connected() as client:
        page = client.list(
            limit=limit,
            cursor=cursor,
            status=status,
            metadata=wanted,
            group=group,
            sort=sort,
            fields=chosen,
            **filters,
        )
    if json:
        print_json(page)
        return
    if not page.data:
        note(
            "No such job."
            if status or metadata or group or cursor or any(filters.values())
            else "No jobs yet: submit one with grpo submit."
        )
    for job in page.data:
        created = f"{job.created_at:%Y-%m-%d %H:%M}"
        numbers = f"{_steps(job):>11}  {_reward(job):>7}"
        say(f"{job.id}  {job.status:<10}  {numbers}  {created}  {job.name or ''}".rstrip())
    if page.next_cursor:
        say(f"More: grpo list{f' --sort={sort}' if sort else ''} --cursor {page.next_cursor}")


def show(job_id: str, /, *, json: AsJson = False) -> None:
    """Show one job: its status, its progress, and why it failed."""
    with connected() as client:
        job = client.get(job_id)
    if json:
        print_json(job)
        return
    say_job(job)


def cancel(*job_ids: str, group: str | None = None, json: AsJson = False) -> int:
    """Cancel jobs, or every job of a group that has not ended. A running one stops within seconds.

    Parameters
    ----------
    job_ids
        The jobs.
    group
        The group whose jobs to cancel.
    """
    if bool(job_ids) == (group is not None):
        raise CommandError("Name jobs, or --group and a group.", EXIT_REFUSED)
    if group is None:
        return _act("cancel", job_ids, as_json=json)
    with connected() as client:
        cancelled = client.cancel_group(group)
    if json:
        print_json(cancelled)
        return 0
    for job in cancelled.data:
        _say_status(job, as_json=False)
    return 0


def pause(*job_ids: str, json: AsJson = False) -> int:
    """Pause jobs. A running one saves a checkpoint first, and then frees its GPU."""
    return _act("pause", job_ids, as_json=json)


def resume(*job_ids: str, json: AsJson = False) -> int:
    """Queue paused jobs again; each resumes from its last checkpoint."""
    return _act("resume", job_ids, as_json=json)


def priority(job_id: str, level: str, /, *, json: AsJson = False) -> None:
    """Change the priority of a job that is queued or paused: low, normal or high."""
    with connected() as client:
        job = client.set_priority(job_id, level)
    if json:
        print_json(job)
    else:
        say(f"{job.id}: {job.status}, priority {job.priority}")


def delete(*job_ids: str, yes: Yes = False, json: AsJson = False) -> int:
    """Delete jobs that have ended: spec, completions, metrics, checkpoints and adapter. This cannot be undone."""
    if len(job_ids) > 1:
        if not yes:
            confirm(f"Delete {count(len(job_ids), 'job')} and all they left?")
        return _act("delete", job_ids, as_json=json)
    job_id = _only(job_ids)
    with connected() as client:
        if not yes:
            job = client.get(job_id)
            confirm(f"Delete {job_id} ({job.name or 'no name'}, {job.status}) and all it left?")
        client.delete(job_id)
    if json:
        print_json({"job": job_id, "deleted": True})
    else:
        say(f"{job_id}: deleted")
    return 0


def _only(job_ids: tuple[str, ...]) -> str:
    if not job_ids:
        raise CommandError("Name a job.", EXIT_REFUSED)
    return job_ids[0]


def _act(action: Literal["cancel", "pause", "resume", "delete"], job_ids: tuple[str, ...], *, as_json: bool) -> int:
    """Do it with one job, or with several in requests of 100, each with its own result."""
    if len(job_ids) <= 1:
        with connected() as client:
            calls = {"cancel": client.cancel, "pause": client.pause, "resume": client.resume}
            _say_status(calls[action](_only(job_ids)), as_json=as_json)
        return 0
    with connected() as client:
        parts = [client.act(action, job_ids[start : start + 100]) for start in range(0, len(job_ids), 100)]
    found = [result for part in parts for result in part.data]
    if as_json:
        print_json({"object": "list", "data": [result.raw for result in found]})
    for result in () if as_json else found:
        if result.done:
            say(f"{result.id}: {result.status or 'deleted'}")
        else:
            note(f"{result.id}: {result.detail}")
    return 0 if all(result.done for result in found) else EXIT_REFUSED


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
        "exports": _exports(job),
        "step": _steps(job) if job.total_steps else None,
        "saved": f"step {job.checkpoint_step}" if job.checkpoint_step else None,
        "best": f"step {job.best_step} (its checkpoint is kept)" if job.best_step else None,
        "stopped": job.stopped,
        "reward": _reward(job),
        "group": job.raw.get("group"),
        "model": job.spec["model"]["name"],
        "data": job.spec["data"]["dataset"] if job.total_steps else None,
        "created": job["created_at"],
        "started": job["started_at"],
        "finished": job["finished_at"],
        "GPUs": _use(job),
    }
    for name, value in fields.items():
        if value:
            say(f"{name:<9} {value}")
    if job.error:
        say_failure(job.error)
    if job.result is not None:
        say_trial(job.result, job.id)


def _exports(job: JobDetail) -> str | None:
    """What an export job makes, and how to fetch it once it is made."""
    if job.spec.get("kind") != "export":
        return None
    asked = job.spec["export"]
    step = f" at step {asked['step']}" if asked.get("step") else ""
    form = asked["format"] if asked["type"] == "auto" else f"{asked['format']} in {asked['type']}"
    fetch = f"; fetch it with: grpo download {job.id} FOLDER --only export" if job.status == "succeeded" else ""
    return f"{asked['job']}{step} as {form}{fetch}"


def _use(job: JobDetail) -> str | None:
    """GPU-hours so far and, where there are prices, their cost."""
    use = job.use
    if use is None or not use.gpu_hours:
        return None
    cost = "" if use.cost is None else f", {use.cost:.2f} {use.currency}"
    return f"{use.gpu_hours:.2f} hours{cost}"


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
