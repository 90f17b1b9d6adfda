"""Jobs as a table: which settings differ, and the mean and spread of each setting's repeats.

Owns what counts as a repeat: jobs whose specs differ by `training.seed`, `name` and `metadata` only. Invariant: every
figure says from how many jobs it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from grpo_core import strict_json
from grpo_core.spec.sweep import SEED
from jobs.store.job import TERMINAL, JobRecord

_QUESTIONS: Final = frozenset(
    {f"data.{name}" for name in ("source", "dataset", "subset", "revision", "split", "max_rows", "question_column")}
    | {f"evaluation.{name}" for name in ("questions", "split", "dataset")}
)
"""Fields that decide which questions are held out."""
_NO_SETTINGS: Final = (SEED, "name", "metadata")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure of several jobs."""

    n: int
    """Number of jobs that have it."""
    mean: float
    sd: float | None
    """Standard deviation of the sample; None of one job."""
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """The repeats of one setting."""

    settings: dict[str, Any]
    """The values of the fields that differ within the group."""
    jobs: list[JobRecord]
    figures: dict[str, Spread]
    """By name; only those that at least one job has."""


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Jobs by their settings."""

    fields: list[str]
    """The fields of the spec that differ, besides the seed."""
    rows: list[GroupRow]
    cautions: list[str]
    """What to know before comparing the figures."""


def summarise(records: Sequence[JobRecord], after: Mapping[str, Mapping[str, Any] | None]) -> GroupSummary:
    """Make the table of jobs; `after` has their evaluations after training, by their ids."""
    specs = [dict(_settings(record.spec)) for record in records]
    names = dict.fromkeys(name for spec in specs for name in spec)
    differing = [name for name in names if len({strict_json.dumps(spec.get(name)) for spec in specs}) > 1]
    rows: dict[str, tuple[dict[str, Any], list[JobRecord]]] = {}
    for record, spec in zip(records, specs, strict=True):
        settings = {name: spec.get(name) for name in differing}
        rows.setdefault(strict_json.dumps(settings), (settings, []))[1].append(record)
    return GroupSummary(
        fields=differing,
        rows=[
            GroupRow(settings=settings, jobs=jobs, figures=_spreads([_figures(job, after.get(job.id)) for job in jobs]))
            for settings, jobs in rows.values()
        ],
        cautions=_cautions(differing, records),
    )


def _cautions(differing: Sequence[str], records: Sequence[JobRecord]) -> list[str]:
    asked = [name for name in differing if name in _QUESTIONS]
    cautions = [f"The held-out questions may differ ({', '.join(asked)}): do not compare accuracies."] if asked else []
    if any(name.startswith("rewards.") for name in differing):
        cautions.append("The rewards differ, so rewards are on different scales.")
    if any(name.startswith(("model.name", "model.revision", "from_checkpoint")) for name in differing):
        cautions.append("They start from different models: compare changes, not accuracies.")
    left = sum(record.status not in TERMINAL for record in records)
    return [*cautions, *([f"{left} of {len(records)} have not ended."] if left else [])]


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a spec with dots, each with its value."""
    if path in _NO_SETTINGS:
        return
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for name, inner in cast("dict[str, Any]", value).items():
        yield from _settings(inner, f"{path}.{name}" if path else name)


def _figures(record: JobRecord, after: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The figures of one job."""
    paired = (after or {}).get("paired") or {}
    strict, metric = paired.get("strict") or {}, paired.get("metric") or {}
    return {
        "reward": record.reward,
        "strict_accuracy": strict.get("after"),
        "strict_change": strict.get("difference"),
        "lenient_accuracy": (paired.get("lenient") or {}).get("after"),
        "metric": metric.get("after"),
    }


def _spreads(jobs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    values = {name: [v for job in jobs if (v := job[name]) is not None] for name in jobs[0]}
    return {
        name: Spread(
            n=len(found),
            mean=statistics.fmean(found),
            sd=statistics.stdev(found) if len(found) > 1 else None,
            least=min(found),
            most=max(found),
        )
        for name, found in values.items()
        if found
    }
