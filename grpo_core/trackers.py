"""Trackers of other people (`training.report_to`): TRL's own callbacks, given our metrics and kept from doing harm.

Owns which package a tracker needs, what it is told and what becomes of its errors; what it does with a number is
transformers' and its own. Torch-free until `attach` is called. Invariant: no tracker can fail a job that has begun to
train, and every metric of ours that a tracker is told is in the run folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from grpo_core.errors import JobFailure
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_core.records import EventWriter, StepMetrics

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

FOLDER: Final = "tensorboard"
"""Where TensorBoard's event files go, in the run folder."""
PROJECT: Final = "grpo-jobs"
OURS: Final = "grpo_jobs/"
"""What our metrics begin with, beside TRL's own of about the same."""


def require_packages(spec: JobSpec) -> None:
    """Raises a `user_config` failure if the package of a tracker is not installed here."""
    for name in spec.training.report_to:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise JobFailure(
                "user_config",
                "tracker_not_installed",
                f"training.report_to names {name}, and this worker has no package {PACKAGES[name][0]}.",
                hint=f"Have it installed on the worker (pip install {PACKAGES[name][0]}), or take {name} out of "
                "training.report_to: the metrics are in the job's own files anyway.",
            )


def attach(
    trainer: Any, spec: JobSpec, *, folder: Path, events: EventWriter, latest: Callable[[], StepMetrics | None]
) -> None:
    """Add the job's trackers to a transformers trainer, behind the callback that records its steps.

    `latest` gives the metrics of the step that is being logged.
    """
    if not spec.training.report_to:
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    # Theirs would be the run folder's path, and the name of another company's product.
    trainer.args.run_name = run_name(spec)
    trainer.args.project = PROJECT
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / FOLDER)
    for name in spec.training.report_to:
        try:
            [callback_type] = get_reporting_integration_callbacks([name])
            callback = callback_type()
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
        """Tell the tracker of a step, in TRL's words and in ours."""
        # The summary at the end of training is no step.
        metrics = self._latest() if "grad_norm" in (logs or {}) else None
        ours = flatten(metrics.as_dict(), OURS) if metrics is not None else {}
        self.__getattr__("on_log")(*arguments, logs={**(logs or {}), **ours}, **options)
        # TensorBoard's writer would keep the last two minutes to itself if the run ended here.
        flush = getattr(getattr(self._callback, "tb_writer", None), "flush", None)
        if flush is not None:
            flush()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under one name each, as `grpo_jobs/rewards/correctness`; what is no number is left out."""
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
        "tracker_failed",
        f"The tracker {name} failed ({type(error).__name__}: {reason}) and gets nothing more of this run; the job "
        "goes on, and its own files have everything.",
    )
