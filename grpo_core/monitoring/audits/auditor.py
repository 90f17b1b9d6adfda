"""Runs the rules after each step and decides which findings to report.

Owns the hysteresis: a finding is reported when it starts, again when it has become much worse, and as a new one only
after it was gone for a while. A value that hovers around its threshold is one warning, not one per step. A reported
finding that is gone has an ending, which tells of it as past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from grpo_core.monitoring.audits.history import History
from grpo_core.monitoring.audits.rules import RULES, Query, Rule
from grpo_core.run_dir.records import Completion
from grpo_core.spec import JobSpec

WORSE: Final = 2.0
"""Factor over the last reported severity from which a finding is reported again."""
OVER: Final = 0.8
"""Severity below which a finding has ended; it may start again one window later."""
OVER_CODE: Final = "audit_over"
"""The code of the `log` event that tells of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding to report."""

    audit: str
    message: str
    steps: tuple[int, int]
    values: Mapping[str, float]
    rollouts: Query

    def as_dict(self) -> dict[str, Any]:
        """The data of a `warning` event."""
        return {
            "code": self.audit,
            "message": self.message,
            "audit": self.audit,
            "steps": list(self.steps),
            "values": {name: float(f"{value:.6g}") for name, value in self.values.items()},
            "rollouts": dict(self.rollouts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A reported finding that is over."""

    audit: str
    steps: tuple[int, int]
    """First and last step that showed it."""
    message: str

    def as_dict(self) -> dict[str, Any]:
        """The data of a `log` event."""
        return {"code": OVER_CODE, "message": self.message, "audit": self.audit, "steps": list(self.steps)}


class Auditor:
    """The audits of one run: give it every step once, in order."""

    def __init__(self, spec: JobSpec) -> None:
        thresholds = spec.audits.model_dump()
        self._history = History(spec)
        self._began: dict[str, int] = {}
        self.endings: list[Ending] = []
        """The findings that are over, in order."""
        self._rules = [
            (rule, float(thresholds[rule.name]), _Alarm(rule, self._history.window))
            for rule in RULES
            if thresholds[rule.name]
        ]

    def add(self, metrics: Mapping[str, Any], completions: Sequence[Completion] = ()) -> list[Finding]:
        """Process a step's line of `metrics.jsonl`, with its completions to point at; returns new findings."""
        self._history.add(metrics)
        found: list[Finding] = []
        for rule, threshold, alarm in self._rules:
            measure = rule.measure(self._history, threshold)
            change = alarm.take(measure.severity if measure else 0.0)
            if change == "over":
                self._end(rule)
            elif measure is not None and change is not None:
                self._began.setdefault(rule.name, measure.steps[0])
                found.append(
                    Finding(
                        audit=rule.name,
                        message=f"Still worse: {measure.message}" if change == "worse" else measure.message,
                        steps=measure.steps,
                        values=measure.values,
                        rollouts=rule.show(self._history, completions),
                    )
                )
        return found

    def _end(self, rule: Rule) -> None:
        first, last = self._began.pop(rule.name), self._history.last_step - 1
        when = f"Between steps {first} and {last}" if first < last else f"In step {last}"
        ending = Ending(audit=rule.name, steps=(min(first, last), last), message=f"{when} {rule.past}. This is over.")
        self.endings.append(ending)

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> list[Finding]:
        """Process the steps of an earlier run of the job; returns what was reported then."""
        return [finding for metrics in lines for finding in self.add(metrics)]


class _Alarm:
    """Decides whether to report a rule's finding."""

    def __init__(self, rule: Rule, window: int) -> None:
        self._patience = max(1, round(rule.patience * window))
        self._rest = window
        self._found_in = 0
        self._resting = 0
        self._told: float | None = None

    def take(self, severity: float) -> Literal["began", "worse", "over"] | None:
        """Update with the severity after another step."""
        if self._told is not None:
            return self._go_on(severity, self._told)
        self._resting = max(0, self._resting - 1)
        self._found_in = self._found_in + 1 if severity >= 1 else 0
        if self._found_in < self._patience or self._resting:
            return None
        self._told = severity
        return "began"

    def _go_on(self, severity: float, told: float) -> Literal["worse", "over"] | None:
        if severity < OVER:
            self._told, self._found_in, self._resting = None, 0, self._rest
            return "over"
        if severity >= WORSE * told:
            self._told = severity
            return "worse"
        return None
