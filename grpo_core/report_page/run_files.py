"""Reads a run folder for its report, as far as files exist: a run that failed early has few.

Owns which files are read and how much of them; knows nothing of HTML. If the job resumed from a checkpoint,
`inputs/earlier` has the files of earlier runs, so that the report covers the whole job. Invariant: what is held in
memory does not grow with the number of completions, only with the number of steps.
"""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from grpo_core.datasets.parquet import read_bounded
from grpo_core.monitoring.audits import Auditor, Ending
from grpo_core.retry import AT_ONCE, retry
from grpo_core.run_dir.layout import RunFolder, sha256_of
from grpo_core.spec import JobSpec, SpecError, parse_spec

SHOWN: Final = 5
"""Number of best and of worst completions to show."""
MAX_STEPS_SCANNED: Final = 2_000
"""Number of steps, spread evenly, in which to look for the best and worst completions."""
MAX_FINDINGS: Final = 24

MAX_ROWS: Final = 10_000_000
MAX_GROUP_BYTES: Final = 256 * 1024**2
"""Of a rollout file that is decoded, which training wrote."""
MAX_JSON_BYTES: Final = 256 * 1024**2

MAX_RUNS: Final = 50

EARLIER: Final = Path("inputs") / "earlier"
"""In a run folder: `rollouts/*.parquet` of runs before this one, and `events.jsonl`, the job's so far as its service
numbers them. `metrics.jsonl` only where the run itself has none and no checkpoint that holds them."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step's rows are."""

    file: Path
    group: int


class RunFiles:
    """The files of a run, read on demand."""

    def __init__(self, folder: Path, *, status: str | None, error: Mapping[str, Any] | None) -> None:
        self._folder = RunFolder(folder)
        self._earlier = folder / EARLIER
        self.spec: Json = json.loads(self._folder.spec.read_bytes())
        self.metrics: list[Json] = [line for line in _lines_of(self._metrics_file()) if "step" in line]
        self.events: list[Json] = [e for e in _lines_of(self._folder.events) if e["type"] not in ("metric", "sample")]
        self.job_events: list[Json] = list(_lines_of(self._earlier / "events.jsonl"))
        """Of every run of the job, some of this one's among them; none where this is the first."""
        self.report = _json_of(self._folder.report)
        self.error = error or next((e["data"] for e in reversed(self.events) if e["type"] == "error"), None)
        self.status = status or self._status()
        self._places: dict[int, list[Place]] | None = None

    @property
    def parsed(self) -> JobSpec | None:
        """The spec as a model; None if this version cannot read it."""
        try:
            return parse_spec(self.spec)
        except SpecError:
            return None

    @property
    def findings(self) -> list[Json]:
        """The warnings of the audits, in order; for steps before this run they are computed again. Not the warnings
        about steps that were lost and trained again, because the later run issued its own.
        """
        told = [event["data"] for event in self.events if _is_audit(event)]
        spec = self.parsed
        began = self._began
        if spec is None or began is None:
            return told[:MAX_FINDINGS]
        # As it was reported then, if known: it points at a prompt, which metrics alone cannot.
        words = {_audited(event["data"]): event["data"] for event in self.job_events if _is_audit(event)}
        again = [finding.as_dict() for finding in Auditor(spec).replay(m for m in self.metrics if m["step"] < began)]
        return [*(words.get(_audited(data), data) for data in again), *told][:MAX_FINDINGS]

    @property
    def endings(self) -> list[Ending]:
        """The findings of audits that were over before the last step."""
        spec = self.parsed
        if spec is None:
            return []
        auditor = Auditor(spec)
        auditor.replay(self.metrics)
        return auditor.endings

    @property
    def warnings(self) -> list[Json]:
        """Every other warning of the job, in order, without repetitions by later runs."""
        events = sorted([*self.job_events, *self.events], key=_moment)
        others = [e["data"] for e in events if e["type"] == "warning" and "audit" not in e["data"]]
        return list({(data.get("code"), data.get("message")): data for data in others}.values())[:100]

    @property
    def times(self) -> list[str]:
        """Time of each event of the job, ISO 8601."""
        return [event["time"] for event in sorted([*self.job_events, *self.events], key=_moment)]

    @property
    def runs(self) -> list[Json]:
        """The runs of the job in order: `epoch`, `began`, `steps` that are left of it (first, last), `end` or None."""
        events = sorted([*self.job_events, *self.events], key=_moment)
        found: list[Json] = []
        for epoch in sorted({event["epoch"] for event in events if event.get("epoch")})[-MAX_RUNS:]:
            own = [event for event in events if event["epoch"] == epoch]
            steps = [line["step"] for line in self.metrics if line.get("epoch") == epoch]
            ends = [end for event in own if (end := _end_of_run(event))]
            found.append(
                {
                    "epoch": epoch,
                    "began": own[0]["time"],
                    "steps": (steps[0], steps[-1]) if steps else None,
                    "end": ends[-1] if ends else None,
                }
            )
        return found

    @property
    def rollout_steps(self) -> list[int]:
        """Steps whose completions exist."""
        return sorted(self._find_places())

    @property
    def last_steps(self) -> list[int]:
        """The last fifth of the steps, in which the best and worst are searched, as far as they exist."""
        here = self.rollout_steps
        last = set(_last_fifth({*here, *(line["step"] for line in self.metrics)}))
        return [step for step in here if step in last] or _last_fifth(here)

    @property
    def steps_shown(self) -> set[int]:
        """The steps whose completions the page shows, of any run."""
        pointed = {int(step) for data in self.findings if (step := (data.get("rollouts") or {}).get("step"))}
        return {*pointed, *_last_fifth(line["step"] for line in self.metrics)}

    def completions(self, query: Mapping[str, Any], limit: int) -> list[Json]:
        """The first completions that a rollouts query of one step finds."""
        rows = self._rows(int(query.get("step", 0)))
        for name, column in (("prompt", "prompt_id"), ("finish", "finish_reason")):
            if name in query:
                rows = [row for row in rows if row[column] == query[name]]
        order = str(query.get("order", ""))
        column = {"reward": "reward_total", "advantage": "advantage", "length": "completion_tokens"}.get(
            order.lstrip("-")
        )
        if column is not None:
            rows.sort(key=lambda row: row[column], reverse=order.startswith("-"))
        return rows[:limit]

    def extremes(self) -> tuple[list[Json], list[Json]]:
        """The completions with the highest and lowest rewards of the last fifth of the steps, each of a different
        prompt."""
        last = self.last_steps
        step_size = max(1, len(last) // MAX_STEPS_SCANNED)
        best: list[tuple[float, int, int]] = []
        worst: list[tuple[float, int, int]] = []
        for step in last[::step_size]:
            ranked = sorted((total, step, place) for place, total in enumerate(self._totals(step)))
            worst = heapq.nsmallest(10 * SHOWN, [*worst, *ranked[: 4 * SHOWN]])
            best = heapq.nlargest(10 * SHOWN, [*best, *ranked[-4 * SHOWN :]])
        return self._distinct(best), self._distinct(worst)

    @property
    def adapter_files(self) -> list[Json]:
        """Name, size and SHA-256 of each file of the result."""
        return [
            {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(self._folder.adapter.glob("*"))[:50]
            if path.is_file()
        ]

    @property
    def _began(self) -> int | None:
        """The first step of this run; None if there is none and none before it. A run that ended before it reported
        where it resumed, for example while loading, comes after all metrics.
        """
        for event in self.events:
            if event["type"] == "log" and event["data"].get("code") == "resumed":
                return int(event["data"]["step"]) + 1
        own = self._places_in(self._folder.rollouts)
        if own:
            return min(own)
        return max((line["step"] for line in self.metrics), default=0) + 1 if self._earlier.exists() else None

    def _metrics_file(self) -> Path:
        """A run that ended before it wrote metrics still has those of earlier steps."""
        places = (self._folder.metrics, self._folder.resume / "metrics.jsonl", self._earlier / "metrics.jsonl")
        return next((path for path in places if path.exists()), self._folder.metrics)

    def _status(self) -> str:
        if self.error is not None:
            return "failed"
        return "succeeded" if self.report else "not finished"

    def _distinct(self, ranked: Sequence[tuple[float, int, int]]) -> list[Json]:
        """Rows of these places, no prompt and no text twice."""
        chosen: list[Json] = []
        for _, step, place in ranked:
            row = self._rows(step)[place]
            if all(row["prompt_id"] != c["prompt_id"] and row["completion"] != c["completion"] for c in chosen):
                chosen.append(row)
            if len(chosen) == SHOWN:
                break
        return chosen

    def _rows(self, step: int) -> list[Json]:
        return [row for table in self._tables(step, None) for row in table.to_pylist()]

    def _totals(self, step: int) -> list[float]:
        tables = self._tables(step, ["step", "reward_total"])
        return [total for table in tables for total in table["reward_total"].to_pylist()]

    def _tables(self, step: int, columns: list[str] | None) -> Iterator[Any]:
        """The step's rows, a table for each place they are in."""
        equal = import_module("pyarrow.compute").equal
        for place in self._find_places().get(step, []):
            table = read_bounded(
                place.file, rows=MAX_ROWS, group_bytes=MAX_GROUP_BYTES, group=place.group, columns=columns
            )
            yield table.filter(equal(table["step"], step))

    def _find_places(self) -> dict[int, list[Place]]:
        """The row groups with a step's rows. Rows of this run replace those of earlier runs."""
        if self._places is None:
            self._places = {**self._places_in(self._earlier / "rollouts"), **self._places_in(self._folder.rollouts)}
        return self._places

    @staticmethod
    def _places_in(folder: Path) -> dict[int, list[Place]]:
        """Found by the statistics in the files' ends. A worker may join files of steps into parts meanwhile."""
        with contextlib.suppress(FileNotFoundError):  # a file is in a part since it was listed
            return retry(lambda: _scan(folder), FileNotFoundError, [AT_ONCE] * 4)
        return {}


def _last_fifth(steps: Iterable[int]) -> list[int]:
    known = sorted(set(steps))
    return known[-max(1, len(known) // 5) :]


def _is_audit(event: Json) -> bool:
    return event["type"] == "warning" and "audit" in event["data"]


def _end_of_run(event: Json) -> str | None:
    """Why a run ended before the job did, if this event says so."""
    data = event["data"]
    if data.get("code") in ("run_lost", "micro_batch_lowered", "worker_stopped"):
        return str(data.get("message"))
    return "It was paused." if event["type"] == "status" and data.get("status") == "paused" else None


def _audited(finding: Json) -> tuple[str, Any]:
    """Identifies a finding: a rule reports at most once per step."""
    return finding["audit"], tuple(finding.get("steps") or ())


def _moment(event: Json) -> datetime:
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00"))


def _scan(folder: Path) -> dict[int, list[Place]]:
    places: dict[int, list[Place]] = {}
    for file in sorted(folder.glob("*.parquet")):  # parts come first, and replace the files of their steps
        found: dict[int, list[Place]] = {}
        for group, steps in _steps_of(file):
            for step in steps:
                found.setdefault(step, []).append(Place(file, group))
        places = {**found, **places}
    return places


def _steps_of(file: Path) -> Iterator[tuple[int, range]]:
    """Each row group of a rollout file, with the steps in it."""
    metadata = import_module("pyarrow.parquet").read_metadata(file)
    names = [metadata.schema.column(index).name for index in range(metadata.num_columns)]
    column = names.index("step")
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is not None and statistics.has_min_max:
            yield group, range(statistics.min, statistics.max + 1)


def _json_of(path: Path) -> Json:
    _require_small(path)
    return json.loads(path.read_bytes()) if path.exists() else {}


def _lines_of(path: Path) -> Iterator[Json]:
    """The whole lines of a JSONL file. Whatever a model wrote may be in them: more than strict JSON takes."""
    if not path.exists():
        return
    _require_small(path)
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _require_small(path: Path) -> None:
    if path.exists() and path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
