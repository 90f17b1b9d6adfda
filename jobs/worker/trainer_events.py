"""Validates the event lines of a training process before they are stored in Valkey.

The process runs untrusted code, so a line may be anything. Owns the format of events; `event_forwarder` handles invalid
lines. Invariant: every returned event can be stored, and read by every reader.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from datetime import datetime
from typing import Any, cast

from grpo_core import strict_json
from grpo_core.reasons import EventType, FailureClass, Phase
from grpo_core.run_dir.metrics import StepMetrics, described
from grpo_core.run_dir.records import STOPPED_EARLY
from jobs.store.job_store import JobEvent

MAX_STEP = 10**12
MESSAGE_LENGTH = 500
"""Largest length of a message that becomes part of the job."""
TEXT_LENGTH = 64
"""Largest length of a code, such as an error's."""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)
_BY_NAME = frozenset(one.path[0] for one in described().values() if one.is_by_name or len(one.path) > 1)
"""Metrics that are objects of numbers; all others are numbers."""
_METRICS = frozenset(field.name for field in dataclasses.fields(StepMetrics))


def parse(line: bytes) -> JobEvent:
    """Parse a line as an event. Raises `ValueError`."""
    try:
        body = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _require(isinstance(body, dict), "it is not an object")
    kind, data, step, time = (body.get(name) for name in ("type", "data", "step", "time"))
    _require(kind in list(EventType), "its type is not known")
    _require(isinstance(data, dict), "its data is not an object")
    _require(step is None or (type(step) is int and 0 <= step <= MAX_STEP), "its step is not a whole number")
    _require(isinstance(time, str) and _TIME.fullmatch(time) is not None, "its time is not RFC 3339")
    datetime.fromisoformat(time)
    _check_depth(data, strict_json.MAX_DEPTH)
    strict_json.dumps(data).encode()  # NaN, and halves of surrogate pairs
    if kind in _CHECKS:
        _CHECKS[kind](data)
    return JobEvent(type=EventType(kind), data=data, step=step or 0, time=time)


def _check_status(data: dict[str, Any]) -> None:
    """Allow only a phase, because the service sets the status."""
    _require(set(data) == {"phase"} and data["phase"] in list(Phase), "its phase is not known")


def _check_metric(data: dict[str, Any]) -> None:
    for name in _METRICS & data.keys():
        value = data[name]
        if name in _BY_NAME:
            _require(isinstance(value, dict) and all(map(_is_number, value.values())), f"{name} are not numbers")
        else:
            _require(_is_number(value), f"{name} is not a number")


def _check_error(data: dict[str, Any]) -> None:
    _require(data.get("class") in list(FailureClass), "its class is not known")
    code = data.get("code")
    _require(isinstance(code, str) and len(code) <= TEXT_LENGTH, "its code is no short text")
    _require(isinstance(data.get("message"), str) and isinstance(data.get("hint", ""), str), "its message is no text")
    _require(isinstance(data.get("retryable", False), bool), "its retryable is neither true nor false")


def _check_evaluation(data: dict[str, Any]) -> None:
    best = data.get("best_step")
    _require(best is None or (type(best) is int and 0 < best <= MAX_STEP), "its best_step is not a step")


def _check_log(data: dict[str, Any]) -> None:
    if data.get("code") == STOPPED_EARLY:
        message = data.get("message")
        _require(isinstance(message, str) and len(message) <= MESSAGE_LENGTH, "its message is no short text")


_CHECKS = {
    EventType.STATUS: _check_status,
    EventType.METRIC: _check_metric,
    EventType.EVALUATION: _check_evaluation,
    EventType.LOG: _check_log,
    EventType.ERROR: _check_error,
}


def _is_number(value: object) -> bool:
    if value is None:
        return True
    try:
        return type(value) in (int, float) and math.isfinite(cast("float", value))
    except OverflowError:  # of an integer that no float holds
        return False


def _check_depth(value: object, left: int) -> None:
    children: list[object] = []
    if isinstance(value, dict):
        children = list(cast("dict[str, object]", value).values())
    elif isinstance(value, list):
        children = cast("list[object]", value)
    _require(left > 0 or not children, "it is nested too deep")
    for child in children:
        _check_depth(child, left - 1)


def _require(condition: object, fault: str) -> None:
    if not condition:
        raise ValueError(fault)
