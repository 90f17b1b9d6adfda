"""What a run writes down: events, metrics and rollouts, the same for every engine.

Owns their schemas, their version and how they are written and read. Knows nothing of torch, nor of when a step
is done (that is `step_recorder`). Invariant: a line of JSONL is whole once its newline is there, and a Parquet
file once it has its final name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

from grpo_core import strict_json
from grpo_core.errors import FailureReport

# pyarrow has no types and takes 0.2 s to import, so it is imported by name where rollouts are written or read.

RECORD_VERSION: Final = 1
EVALUATION_NAME: Final = "evaluation.parquet"
"""The answers to held-out questions, in the run folder."""

EventType = Literal["status", "metric", "sample", "checkpoint", "evaluation", "warning", "log", "error"]
Phase = Literal["preparing", "loading", "training", "evaluating", "uploading"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completion of a step, with everything that was decided about it."""

    prompt_id: str
    row: int
    sample: int
    """Its place in the group, from 0."""
    seed: int
    """What the random generator was set to before the call that drew it."""
    prompt: str
    """The question, without system prompt, worked examples and chat template."""
    answer: str
    completion: str
    rewards: Mapping[str, float]
    """Raw, before weights."""
    reward_total: float
    """Weighted sum."""
    advantage: float
    prompt_tokens: int
    """Of the whole templated prompt."""
    completion_tokens: int
    finish_reason: FinishReason
    adapter_version: int
    """Optimizer steps the adapter had seen when it drew this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Where the time of a step went."""

    generation: float
    reward: float
    update: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step: a line of `metrics.jsonl` and the data of a `metric` event."""

    step: int
    reward: float
    """Mean weighted total."""
    reward_std: float
    """Mean over groups of the standard deviation within the group."""
    rewards: Mapping[str, float]
    """Mean raw reward by name."""
    rewards_std: Mapping[str, float]
    """Standard deviation of each raw reward over the step's completions."""
    zero_variance_share: float
    """Share of groups whose completions were all paid the same, and so teach nothing."""
    completion_tokens_mean: float
    completion_tokens_min: int
    completion_tokens_max: int
    truncated_share: float
    """Share of completions cut at the token limit."""
    kl: float | None
    """None where beta is 0: nothing is compared with the base model then."""
    entropy: float | None
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    seconds: StepSeconds
    completions_per_s: float
    gpu_memory_gb: float | None
    """Peak so far; None on a CPU."""
    logprob_diff_mean: float | None = None
    """Between the log-probabilities of rollout engine and trainer, over the step's tokens; None where they are one."""
    logprob_diff_max: float | None = None
    duplicate_share: float | None = None
    """Share of completions that are the same text as another of their group."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class JsonlWriter:
    """Appends one JSON object a line and flushes each; may be used from several threads."""

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

    def __init__(self, path: Path, *, epoch: int, listener: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._lines = JsonlWriter(path)
        self._epoch = epoch
        self._listener = listener
        self._seq = 0
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
        self.emit("status", {"phase": phase})

    def warning(self, code: str, message: str) -> None:
        self.emit("warning", {"code": code, "message": message})

    def log(self, message: str, *, code: str | None = None, step: int | None = None) -> None:
        """Tell people something; programs recognise it by `code`, where it has one."""
        coded = {} if code is None else {"code": code}
        at = {} if step is None else {"step": step}
        self.emit("log", {**coded, "message": message, **at}, step=step)

    def error(self, report: FailureReport, *, step: int | None = None) -> None:
        self.emit("error", report.as_dict(), step=step)

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


def write_evaluation(folder: Path, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Write each held-out question with both of its answers, read both ways, as `evaluation.parquet`."""
    columns: dict[str, tuple[str, list[Any]]] = {
        name: (kind, [item[name] for item in before])
        for name, kind in (("row", "int64"), ("question", "string"), ("answer", "string"))
    }
    for name, kind in _ANSWER_COLUMNS.items():
        columns[f"{name}_before"] = (kind, [item[name] for item in before])
        columns[f"{name}_after"] = (kind, [item[name] for item in after])
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
    count, names = len(completions), list(completions[0].rewards)
    return {
        "step": ("int32", [step] * count),
        "epoch": ("int32", [epoch] * count),
        "prompt_id": ("string", [c.prompt_id for c in completions]),
        "row": ("int64", [c.row for c in completions]),
        "sample": ("int32", [c.sample for c in completions]),
        "seed": ("int64", [c.seed for c in completions]),
        "prompt": ("string", [c.prompt for c in completions]),
        "answer": ("string", [c.answer for c in completions]),
        "completion": ("string", [c.completion for c in completions]),
        **{f"reward_{name}": ("float64", [c.rewards[name] for c in completions]) for name in names},
        "reward_total": ("float64", [c.reward_total for c in completions]),
        "advantage": ("float64", [c.advantage for c in completions]),
        "prompt_tokens": ("int32", [c.prompt_tokens for c in completions]),
        "completion_tokens": ("int32", [c.completion_tokens for c in completions]),
        "finish_reason": ("string", [c.finish_reason for c in completions]),
        "adapter_version": ("int32", [c.adapter_version for c in completions]),
    }


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
