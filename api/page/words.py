"""The page's words that are not its own: what statuses, reasons and metrics are called, and which charts there are.

Owns only the keys. Invariant: such a word is written where the value is, and in no catalogue of the page.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from grpo_core.monitoring.audits import Audit
from grpo_core.reasons import EventType, FailureClass, FetchFailure, FinishReason, Phase, Reason, WarningCode
from grpo_core.run_dir.metrics import charts, short_names
from jobs.read.fleet import WorkerState
from jobs.read.queue_position import WaitReason
from jobs.store.job import JobStatus, Priority

Language = Literal["en", "zh"]

REASONS: Final[dict[str, type[Reason]]] = {
    "class": FailureClass,
    "event": EventType,
    "fetch": FetchFailure,
    "finish": FinishReason,
    "phase": Phase,
    "priority": Priority,
    "status": JobStatus,
    "wait": WaitReason,
    "warning": WarningCode,
    "worker": WorkerState,
}
"""By the first part of their keys, such as `status.queued`."""


def words(language: Language) -> dict[str, str]:
    """The words of one language by key."""
    place = 1 if language == "zh" else 0
    found = {
        f"{group}.{one.value}": (one.english, one.chinese)[place]
        for group, reasons in REASONS.items()
        for one in reasons
    }
    found |= {f"warning.{one.value}": (one.english, one.chinese)[place] for one in Audit}
    found |= {f"metric.{name}.short": (short.english, short.chinese)[place] for name, short in short_names().items()}
    for one, chart, _ in charts():
        found[f"metric.{one.name}"] = (chart.english, chart.chinese)[place]
        found[f"metric.{one.name}.hint"] = (one.metric.meaning, chart.chinese_meaning)[place]
    return found


def page_charts() -> list[dict[str, Any]]:
    """What the page draws of a job's metrics, in order."""
    return [
        {
            "name": one.name,
            "unit": one.metric.unit,
            "by_name": one.is_by_name,
            "lines": [line.name for line in lines],
            "band": chart.band,
        }
        for one, chart, lines in charts()
    ]
