"""Who used what: GPU-hours of owners by day or week and by kind of GPU, with jobs and cost.

Adds up the parts of runs (`jobs.usage.gpu_time`). Invariant: the rows of a report add up to the same GPU-hours, however
they are grouped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from jobs.usage.gpu_time import GpuTime, Part
from jobs.usage.prices import Prices

Period = Literal["day", "week", "total"]
MAX_DAYS = 366
"""Days in one report."""


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """What one owner used of one kind of GPU in one period."""

    start: date
    """The first day of the period: of a week its Monday, of the whole report its first day."""
    owner: str
    gpu: str
    """Name of the GPUs; empty: not known."""
    gpu_hours: float
    jobs: int
    """Number of jobs with a run in the period."""
    cost: float | None
    """None: the GPU has no price."""


def usage_rows(
    gpu_time: GpuTime, prices: Prices, owners: Collection[str], first: date, last: date, period: Period
) -> list[UsageRow]:
    """Return the rows of a report from one day to another, both included, by period, owner and GPU."""
    groups: dict[tuple[date, str, str], list[Part]] = {}
    for part in gpu_time.parts(owners, first, last):
        start = {"day": part.day, "week": part.day - timedelta(days=part.day.weekday()), "total": first}[period]
        groups.setdefault((start, part.owner, part.gpu), []).append(part)
    return [_row(start, owner, gpu, parts, prices) for (start, owner, gpu), parts in sorted(groups.items())]


def _row(start: date, owner: str, gpu: str, parts: list[Part], prices: Prices) -> UsageRow:
    hours = sum(part.gpu_seconds for part in parts) / 3600
    return UsageRow(
        start=start,
        owner=owner,
        gpu=gpu,
        gpu_hours=hours,
        jobs=len({part.job for part in parts} - {""}),
        cost=prices.cost({gpu: hours}),
    )
