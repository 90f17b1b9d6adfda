"""Experiment trackers (`training.report_to`): TRL's own callbacks, which receive our metrics.

Owns which package a tracker needs, what it receives and how its errors are handled. Torch-free until `attach` is
called. Invariant: no tracker can fail a job that has started training, and every metric that a tracker receives is in
the run folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from grpo_core.compat.transformers import flush, tracker_callback
from grpo_core.egress import Host
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode, WarningCode
from grpo_core.run_dir.metrics import described
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_core.run_dir.metrics import StepMetrics
    from grpo_core.run_dir.records import EventWriter

PACKAGES: Final = {
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Any one of them serves the tracker."""

ENVIRONMENT: Final = {
    "mlflow": ("MLFLOW_",),
    "tensorboard": ("TENSORBOARD_",),
    "trackio": ("TRACKIO_",),
    "wandb": ("WANDB_",),
}
"""How the variables begin that a tracker reads: a run is given those of the trackers it names."""

HOSTS: Final = {"mlflow": (), "tensorboard": (), "trackio": ("*.hf.space",), "wandb": ("*.wandb.ai",)}
"""Where a tracker sends to by itself, beside the addresses in its variables."""

FOLDER: Final = "tensorboard"
"""Where TensorBoard's event files go, in the run folder."""
PROJECT: Final = "grpo-jobs"
OURS: Final = "grpo_jobs/"
"""Prefix of our metrics' own names, which dashboards of earlier releases use. TRL's names are reported too."""


def require_packages(spec: JobSpec) -> None:
    """Raises a `user_config` failure if the package of a tracker is not installed here."""
    for name in spec.training.report_to:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise JobFailure(
                FailureCode.TRACKER_NOT_INSTALLED,
                f"training.report_to names {name}, and this worker has no package {PACKAGES[name][0]}.",
                hint=f"Have it installed on the worker (pip install {PACKAGES[name][0]}), or take {name} out of "
                "training.report_to: the metrics are in the job's own files anyway.",
            )


def hosts(spec: JobSpec, environment: Mapping[str, str]) -> list[Host]:
    """The hosts that the job's trackers connect to: their own, and those that the operator has set for them."""
    found: list[Host] = []
    for name in spec.training.report_to:
        found += map(Host.parse, HOSTS[name])
        values = (value for key, value in environment.items() if key.startswith(ENVIRONMENT[name]) and "://" in value)
        found += filter(None, map(Host.of_url, values))
    return found


def attach(
    trainer: Any, spec: JobSpec, *, folder: Path, events: EventWriter, latest: Callable[[], StepMetrics | None]
) -> None:
    """Add the job's trackers to a transformers trainer, behind the callback that records its steps.

    `latest` gives the metrics of the step that is being logged.
    """
    if not spec.training.report_to:
        return
    # Theirs would be the run folder's path, and the name of another company's product.
    trainer.args.run_name = run_name(spec)
    trainer.args.project = PROJECT
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / FOLDER)
    for name in spec.training.report_to:
        try:
            callback = tracker_callback(name)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the job goes on
            warn(events, name, error)
            continue
        trainer.add_callback(ShieldedTracker(name, callback, events, latest))


def run_name(spec: JobSpec) -> str:
    """What a tracker calls the run."""
    return spec.name or f"grpo-{spec.digest()[:12]}"


class ShieldedTracker:
    """A transformers callback in front of a tracker's: adds our metrics, and ends at the tracker's first error.

    transformers calls `on_...` methods by name; whichever it is, it is passed on.
    """

    def __init__(self, name: str, callback: Any, events: EventWriter, latest: Callable[[], StepMetrics | None]) -> None:
        self._name, self._callback, self._events, self._latest = name, callback, events, latest
        self._failed = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def pass_on(*arguments: Any, **options: Any) -> None:
            if self._failed:
                return
            try:
                getattr(self._callback, name)(*arguments, **options)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the job goes on
                self._failed = True
                warn(self._events, self._name, error)

        return pass_on

    def on_log(self, *arguments: Any, logs: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Report a step under TRL's names and under ours."""
        # The summary at the end of training is no step.
        metrics = self._latest() if "grad_norm" in (logs or {}) else None
        ours = as_trl(metrics.as_dict()) | flatten(metrics.as_dict(), OURS) if metrics is not None else {}
        self.__getattr__("on_log")(*arguments, logs={**ours, **(logs or {})}, **options)
        flush(self._callback)


def as_trl(values: Mapping[str, Any]) -> dict[str, float]:
    """A step's metrics under the names that TRL gives them, as `rewards/correctness/mean`."""
    found: dict[str, Any] = {}
    for name, one in described().items():
        if one.metric.trl:
            by_key = values.get(name, {}) if one.is_by_name else {"": values.get(name)}
            found |= {one.metric.trl.format(key): value for key, value in by_key.items()}
    return {name: value for name, value in found.items() if value is not None}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under one name each, as `grpo_jobs/rewards/correctness`; values that are not numbers are
    skipped."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat[f"{prefix}{name}"] = value
    return flat


def warn(events: EventWriter, name: str, error: Exception) -> None:
    """Say that a tracker gave up."""
    reason = next(iter(str(error).splitlines()), "")[:300]
    events.warning(
        WarningCode.TRACKER_FAILED,
        f"The tracker {name} failed ({type(error).__name__}: {reason}) and gets nothing more of this run; the job "
        "goes on, and its own files have everything.",
    )
