"""`grpo usage`: GPU-hours, storage and jobs with their limits; and who used which GPUs, as lines or CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, note, print_json, say

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient
    from grpo_client.results import GpuHours, GpuHoursList, OwnerUsageList, UsageReport

PAGE = 1000
Period = Literal["day", "week", "total"]
Csv = Annotated[bool, Parameter(name="--csv", negative="", help="Print the report as CSV.")]
Everyone = Annotated[
    bool, Parameter(name="--everyone", negative="", help="For operators: the limits of all owners, and what is left.")
]


def usage(
    *,
    since: str | None = None,
    until: str | None = None,
    by: Period | None = None,
    owner: str | None = None,
    everyone: Everyone = False,
    csv: Csv = False,
    json: AsJson = False,
) -> None:
    """Show your GPU-hours, storage and jobs, and their limits; or with a time or an owner, who used which GPUs.

    Parameters
    ----------
    since
        Report GPU-hours from this day on (UTC), such as 2026-11-01; by default the last 30 days.
    until
        The last day of the report, included; by default today.
    by
        A row of the report for each day, each week, or the total.
    owner
        For operators: report this owner's GPU-hours; '*': those of all owners.
    """
    is_report = csv or any(value is not None for value in (since, until, by, owner))
    if everyone and is_report:
        raise CommandError("--everyone shows limits; for GPU-hours of all owners use --owner '*'.", EXIT_REFUSED)
    with connected() as client:
        if csv:
            sys.stdout.write(client.gpu_hours_csv(since=since, until=until, by=by or "total", owner=owner))
        elif is_report:
            _report(client, since, until, by or "total", owner, json=json)
        elif everyone:
            _say_owners(client, json=json)
        else:
            _say_own(client.usage(), json=json)


def _report(
    client: GrpoClient, since: str | None, until: str | None, by: Period, owner: str | None, *, json: bool
) -> None:
    page = client.gpu_hours(since=since, until=until, by=by, owner=owner, limit=PAGE)
    rows = list(page.data)
    last = page
    while last.next_cursor:
        last = client.gpu_hours(since=since, until=until, by=by, owner=owner, limit=PAGE, cursor=last.next_cursor)
        rows += last.data
    if json:
        print_json({**page, "data": rows, "has_more": False, "next_cursor": None})
        return
    if not rows:
        note(f"No GPU was used from {page.since} to {page.until}.")
        return
    _say_rows(page, rows)


def _say_rows(page: GpuHoursList, rows: Iterable[GpuHours]) -> None:
    cost = f"{f'cost ({page.currency})':>14}" if page.currency else ""
    say(f"{'from':<12}{'owner':<20}{'GPU':<28}{'GPU-hours':>11}{'jobs':>7}{cost}")
    for row in rows:
        spent = "" if not page.currency else f"{'-' if row.cost is None else format(row.cost, '.2f'):>14}"
        say(f"{row.start:<12}{row.owner:<20}{row.gpu or 'not known':<28}{row.gpu_hours:>11.2f}{row.jobs:>7}{spent}")


def _say_owners(client: GrpoClient, *, json: bool) -> None:
    page = client.owners_usage(limit=100)
    found: list[UsageReport] = list(page.data)
    last: OwnerUsageList = page
    while last.next_cursor:
        last = client.owners_usage(limit=100, cursor=last.next_cursor)
        found += last.data
    if json:
        print_json({**page, "data": found, "has_more": False, "next_cursor": None})
        return
    say(f"{'owner':<20}{'GPU-hours':>12}{'left':>12}{'GB stored':>12}{'left':>12}{'unfinished':>12}{'left':>12}")
    for each in found:
        gpu, stored, jobs = each.gpu_hours, each.stored_bytes, each.unfinished_jobs
        cells = (_number(gpu.used, 1), _number(gpu.left, 1), _number(stored.used, 1e9), _number(stored.left, 1e9))
        say(f"{each.owner:<20}" + "".join(f"{c:>12}" for c in (*cells, _number(jobs.used, 1), _number(jobs.left, 1))))


def _say_own(found: UsageReport, *, json: bool) -> None:
    if json:
        print_json(found)
        return
    gpu, stored, jobs = found.gpu_hours, found.stored_bytes, found.unfinished_jobs
    until = f"; more from {gpu.frees_at:%Y-%m-%d %H:%M} UTC" if gpu.frees_at else ""
    say(f"GPU-hours        {_of(gpu.used, gpu.limit, 1)} in {gpu.window_days} days{until}")
    counted = f"; counted {stored.measured_at:%Y-%m-%d %H:%M} UTC" if stored.measured_at else "; not counted yet"
    say(f"Storage (GB)     {_of(stored.used, stored.limit, 1e9)}{counted}")
    say(f"Unfinished jobs  {_of(jobs.used, jobs.limit, 1)}")


def _of(used: float, limit: float | None, unit: float) -> str:
    text = _number(used, unit)
    return f"{text} of {limit / unit:g}" if limit is not None else text


def _number(value: float | None, unit: float) -> str:
    """In units, without zeros at the end; no limit is a dash."""
    return "-" if value is None else f"{value / unit:.2f}".rstrip("0").rstrip(".")
