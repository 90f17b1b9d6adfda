"""The records of a run: events, metrics and rollouts, the same for every engine.

Owns their schemas and version, and how they are written and read. Knows neither torch nor when a step is done
(`step_recorder`). Invariant: a line of JSONL is complete when its newline is written, and a Parquet file when it has
its final name.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

from grpo_core import strict_json
from grpo_core.errors import FailureReport
from grpo_core.reasons import EventType, FinishReason, Phase, WarningCode
from grpo_core.run_dir.metrics import StepMetrics
from grpo_core.shown import Shown, plain_type, shown_fields

# pyarrow has no types and takes 0.2 s to import, so it is imported by name where rollouts are written or read.

RECORD_VERSION: Final = 1
STOPPED_EARLY: Final = "stopped_early"
"""The code of the log event that says why an evaluation ended training."""
EVALUATION_NAME: Final = "evaluation.parquet"
"""The answers to held-out questions, in the run folder."""


INT64: Final = "int64"
"""Marks whole numbers that need more than the 32 bits of a column."""


@dataclass(frozen=True, kw_only=True)
class RolloutPlace:
    """Where a completion belongs."""

    step: Annotated[int, Shown(least=1)]
    epoch: Annotated[int, Shown("The run that generated it", least=1)]


@dataclass(frozen=True, kw_only=True)
class RolloutColumns:
    """What is stored and shown of a completion: each field is a column, and each of `rewards`."""

    prompt_id: Annotated[str, Shown("The same for every use of the prompt: send it as `prompt`")]
    row: Annotated[int, Shown("Row of the data set"), INT64]
    sample: Annotated[int, Shown("Position in the group of its prompt, from 0", least=0)]
    seed: Annotated[int, Shown("Seed of the random generator for the call that generated it"), INT64]
    prompt: Annotated[str, Shown("The question, without system prompt, worked examples and chat template")]
    answer: Annotated[str, Shown()]
    completion: Annotated[str, Shown()]
    rewards: Annotated[Mapping[str, float | None], Shown("Raw, before weights; null: not finite, or a grader failed")]
    reward_total: Annotated[
        float | None, Shown("Weighted sum or the formula's value; where a grader failed, its group's share")
    ]
    advantage: Annotated[float | None, Shown()]
    prompt_tokens: Annotated[int, Shown("Of the whole templated prompt")]
    completion_tokens: Annotated[int, Shown("With the end-of-sequence token")]
    finish_reason: Annotated[str, Shown(FinishReason.described())]
    adapter_version: Annotated[int, Shown("Optimizer steps of the adapter that generated it")]


@dataclass(frozen=True, kw_only=True)
class Rollout(RolloutColumns, RolloutPlace):
    """One completion with its rewards and advantage."""


@dataclass(frozen=True, kw_only=True)
class Completion(RolloutColumns):
    """One completion of the step that is under way, with everything that was decided about it."""

    reward_total: float
    advantage: float
    finish_reason: FinishReason
    skipped: bool = False
    """Whether its whole group got the same reward, because a grader failed."""
    grader_errors: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    """By grader, what kept it from scoring this; also where that is the completion's own fault and scores 0."""
    grader_details: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    """By grader, what it says besides its score."""


class JsonlWriter:
    """Appends one JSON object per line and flushes each; thread-safe."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, object]) -> None:
        line = strict_json.dumps(record) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()


class EventWriter:
    """Writes a run's events: numbered from 1 in the order they happen, each in the file before `emit` returns."""

    def __init__(
        self,
        path: Path,
        *,
        epoch: int,
        listener: Callable[[dict[str, Any]], None] | None = None,
        after: int = 0,
    ) -> None:
        """`after` is the number of the last event that is in the file already."""
        self._lines = JsonlWriter(path)
        self._epoch = epoch
        self._listener = listener
        self._seq = after
        self.current_phase: Phase | None = None
        self._lock = threading.Lock()

    def emit(self, type_: EventType, data: Mapping[str, object], *, step: int | None = None) -> None:
        with self._lock:  # held over the write, so that no later number reaches the file first
            self._seq += 1
            event = {
                "v": RECORD_VERSION,
                "seq": self._seq,
                "epoch": self._epoch,
                "type": type_,
                "time": _now(),
                "step": step,
                "data": data,
            }
            self._lines.write(event)
            if self._listener is not None:
                self._listener(event)

    @property
    def last(self) -> int:
        """The number of the last event; 0 before the first."""
        return self._seq

    def phase(self, phase: Phase) -> None:
        self.current_phase = phase
        self.emit(EventType.STATUS, {"phase": phase})

    def warning(self, code: WarningCode, message: str) -> None:
        self.emit(EventType.WARNING, {"code": code, "message": message})

    def log(self, message: str, *, code: str | None = None, step: int | None = None) -> None:
        """Tell people something; programs recognise it by `code`, where it has one."""
        coded = {} if code is None else {"code": code}
        at = {} if step is None else {"step": step}
        self.emit(EventType.LOG, {**coded, "message": message, **at}, step=step)

    def error(self, report: FailureReport, *, step: int | None = None) -> None:
        self.emit(EventType.ERROR, report.as_dict(), step=step)

    def close(self) -> None:
        self._lines.close()


class MetricsWriter:
    """Writes `metrics.jsonl`: every optimizer step, whatever `log_every` says about events."""

    def __init__(self, path: Path, *, epoch: int) -> None:
        self._lines = JsonlWriter(path)
        self._epoch = epoch

    def write(self, metrics: StepMetrics) -> None:
        self._lines.write({"v": RECORD_VERSION, "epoch": self._epoch, **metrics.as_dict()})

    def take_over(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Write the lines of the steps before the one that this run begins with, as they were."""
        for line in lines:
            self._lines.write(line)

    def close(self) -> None:
        self._lines.close()


def write_rollouts(path: Path, completions: Sequence[Completion], *, step: int, epoch: int) -> None:
    """Write a step's completions (one at least) as one Parquet file."""
    _write_parquet(path, _rollout_columns(completions, step=step, epoch=epoch))


def write_evaluation(folder: Path, stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write each held-out question with its answer of each stage, read both ways, as `evaluation.parquet`."""
    asked = next(iter(stages.values()))
    columns: dict[str, tuple[str, list[Any]]] = {
        name: (kind, [item[name] for item in asked])
        for name, kind in (("row", "int64"), ("question", "string"), ("answer", "string"))
    }
    for name, kind in _ANSWER_COLUMNS.items():
        columns |= {f"{name}_{stage}": (kind, [item[name] for item in items]) for stage, items in stages.items()}
    for name in asked[0].get("rewards", ()):
        columns |= {
            f"reward_{name}_{stage}": ("float64", [item["rewards"][name] for item in items])
            for stage, items in stages.items()
        }
    if "total" in asked[0]:
        columns |= {
            f"reward_total_{stage}": ("float64", [item["total"] for item in items]) for stage, items in stages.items()
        }
    _write_parquet(folder / EVALUATION_NAME, columns)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The rows of a rollout file, or of all in a folder in step order."""
    read_table = import_module("pyarrow.parquet").read_table
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return [row for file in files for row in read_table(file).to_pylist()]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; a last line without its newline is still being written and is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield strict_json.loads(line)


def last_error(path: Path) -> dict[str, Any] | None:
    """The failure that a run's events end with, as `FailureReport.as_dict` has it; None where they end otherwise."""
    last = deque(read_jsonl(path), maxlen=1)
    return last[0]["data"] if last and last[0]["type"] == EventType.ERROR else None


def append_error(path: Path, report: Mapping[str, object], *, epoch: int) -> None:
    """Write the failure of a run whose own process cannot any more; what it was writing when it died is removed."""
    last = max((event["seq"] for event in read_jsonl(path)), default=0)
    if path.exists():
        written = path.read_bytes()
        os.truncate(path, written.rfind(b"\n") + 1)
    events = EventWriter(path, epoch=epoch, after=last)
    events.emit(EventType.ERROR, report)
    events.close()


_ANSWER_COLUMNS = {
    "completion": "string",
    "strict": "bool_",
    "lenient": "bool_",
    "strict_format": "bool_",
    "reward": "float64",
    "completion_tokens": "int32",
    "finish_reason": "string",
}


def _rollout_columns(completions: Sequence[Completion], *, step: int, epoch: int) -> dict[str, tuple[str, list[Any]]]:
    place = RolloutPlace(step=step, epoch=epoch)
    columns: dict[str, tuple[str, list[Any]]] = {}
    for name, kind in COLUMN_TYPES.items():
        if name == "rewards":
            of_rewards = {one: [c.rewards[one] for c in completions] for one in completions[0].rewards}
            columns |= {f"reward_{one}": (kind, values) for one, values in of_rewards.items()}
        else:
            columns[name] = (kind, [getattr(place if hasattr(place, name) else c, name) for c in completions])
    if any(c.grader_errors or c.grader_details or c.skipped for c in completions):
        columns["skipped"] = ("bool_", [c.skipped for c in completions])
        columns["grader_errors"] = ("string", [_json_or_none(c.grader_errors) for c in completions])
        columns["grader_details"] = ("string", [_json_or_none(c.grader_details) for c in completions])
    return columns


_ARROW: Final[Mapping[Any, str]] = {str: "string", int: "int32", float: "float64", Mapping: "float64"}
COLUMN_TYPES: Final[Mapping[str, str]] = {
    name: next(iter(column.marks), None) or _ARROW[plain_type(column.type)]
    for name, column in shown_fields(Rollout).items()
}
"""The Arrow type of each column; of `rewards`, that of each reward's."""


def _json_or_none(value: Mapping[str, object]) -> str | None:
    return strict_json.dumps(value) if value else None


def _write_parquet(path: Path, columns: Mapping[str, tuple[str, list[Any]]]) -> None:
    """Columns by name, each with its type and values."""
    pyarrow = import_module("pyarrow")
    arrays = {name: pyarrow.array(values, getattr(pyarrow, kind)()) for name, (kind, values) in columns.items()}
    table = pyarrow.table(arrays).replace_schema_metadata({"record_version": str(RECORD_VERSION)})
    part = path.with_name(f".{path.name}.part")
    try:
        import_module("pyarrow.parquet").write_table(table, part, compression="zstd")
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
