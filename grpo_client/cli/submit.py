"""`grpo submit`: submits a spec, or checks it, and with `--wait` follows the job to its end."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from grpo_client.cli.groups import read_grid
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, InputFile, connected, note, print_json, say
from grpo_client.cli.spec_file import read_spec
from grpo_client.cli.text import count
from grpo_client.cli.watch import EXIT_CODES, follow
from grpo_client.results import DryRun, Estimate, SpecWarning, SubmittedJob

Changes = Annotated[
    list[str] | None,
    Parameter(
        name="--set", negative="", help="Set a field, such as training.steps=20; the value is JSON, or else text."
    ),
]

Grid = Annotated[
    list[str] | None,
    Parameter(
        name="--grid", negative="", help="Values of a field to try, such as lr=1e-5,3e-5. Repeatable: all combinations."
    ),
]


def submit(
    file: InputFile,
    /,
    *,
    set: Changes = None,  # noqa: A002 - the option's name
    grid: Grid = None,
    repeat: int = 1,
    wait: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    idempotency_key: str | None = None,
    priority: str | None = None,
    json: AsJson = False,
) -> int:
    """Submit a job, or with --grid or --repeat a group of jobs.

    Exits 0 if it was accepted; with --wait: 0 succeeded, 1 failed, 2 refused, 3 cancelled.

    Parameters
    ----------
    file
        The spec as JSON; - is standard input.
    repeat
        Submit each combination this number of times; repeats differ by training.seed only.
    wait
        Follow the job to its end.
    dry_run
        Only check the spec; show every value, the size and all warnings.
    idempotency_key
        Your own key, which makes this command safe to repeat: the same key and spec are one job for 48 hours.
    priority
        low, normal or high: which of your jobs goes first.
    """
    spec = read_spec(file, set or [])
    if grid or repeat != 1:
        if wait or dry_run:
            raise CommandError("--wait and --dry-run are for one job: leave out --grid and --repeat.", EXIT_REFUSED)
        _submit_group(spec, read_grid(grid or []), repeat, idempotency_key, priority, as_json=json)
        return 0
    with connected() as client:
        if dry_run:
            _show_dry_run(client.dry_run(spec), as_json=json)
            return 0
        job = client.submit(spec, idempotency_key=idempotency_key, priority=priority)
        for warning in job.warnings:
            note(warned(warning))
        if not wait:
            _show_accepted(job, as_json=json)
            return 0
        ended = follow(client, job, as_json=json)
    if json:
        print_json(ended)
    return EXIT_CODES[ended.status]


def _submit_group(
    spec: Any,
    grid: dict[str, list[Any]],
    repeat: int,
    idempotency_key: str | None,
    priority: str | None,
    *,
    as_json: bool,
) -> None:
    with connected() as client:
        group = client.submit_group(spec, grid=grid, repeat=repeat, idempotency_key=idempotency_key, priority=priority)
    for warning in group.warnings:
        note(warned(warning))
    if as_json:
        print_json(group)
        return
    for job in group.data:
        say(f"{job.id}: {job.status}")
    say(f"{group.id}: {count(len(group.data), 'job')}. Their table: grpo compare --group {group.id}")


def _show_accepted(job: SubmittedJob, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    say(f"{job.id}: {job.status}")


def _show_dry_run(result: DryRun, *, as_json: bool) -> None:
    import json

    if as_json:
        print_json(result)
        return
    say(json.dumps(result.spec, indent=2, ensure_ascii=False))
    for warning in result.warnings:
        say(warned(warning))
    note(_size(result.estimate))
    for one in result.costs if "costs" in result.raw else ():
        note(f"Training on {one.gpu} costs about {one.cost:.2f} {result.currency} ({one.gpu_hours:.2f} GPU-hours).")
    note(f"The spec is accepted, with {count(len(result.warnings), 'warning')}; nothing was stored.")


def warned(warning: SpecWarning) -> str:
    """A warning about the spec, in one line."""
    return f"warning {warning.pointer}: {warning.message}"


def _size(estimate: Estimate) -> str:
    share = estimate.epoch_share
    epochs = "" if share is None else f", {'once' if share == 1 else f'{share:g} times'} through the data set"
    return (
        f"{count(estimate.completions, 'completion')} to {count(estimate.prompts, 'question')}{epochs}; "
        f"at most {estimate.max_completion_tokens:,} tokens are generated.{_weights(estimate)}{_cost(estimate)}"
    )


def _weights(estimate: Estimate) -> str:
    parts, held = estimate.weight_parts, estimate.weight_bytes_per_gpu
    if parts is None or held is None:
        return ""
    what = "all weights" if parts == 1 else f"one of {parts} parts of the weights"
    return f" Each GPU holds {what}, about {held / 1e9:.1f} GB."


def _cost(estimate: Estimate) -> str:
    step, whole, memory = estimate.step_seconds, estimate.training_seconds, estimate.peak_memory_bytes
    if step is None or whole is None:
        return " How long that takes is not known for this engine, model or device."
    on = f" on one {estimate.gpu}" if estimate.gpu else ""
    room = "" if memory is None else f", with a peak of about {memory / 1e9:.0f} GB"
    return f" About {step:g} s a step, {max(1, round(whole / 60))} min in all{on}{room}.{_evaluations(estimate)}"


def _evaluations(estimate: Estimate) -> str:
    seconds, share, during = estimate.evaluation_seconds, estimate.evaluation_share, estimate.evaluations
    if not seconds or share is None or during is None:
        return ""
    return (
        f" Evaluations before and after training, and {during} during it, take about {seconds:.0f} s more "
        f"({share:.1%})."
    )
