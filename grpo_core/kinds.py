"""Runs a job of a kind without training steps: serving or export.

Owns what these runs have in common: the run folder, events, phases, and what an error becomes. Invariant: as for
training, the exit code and the last event say how it ended, and nothing that a job can cause is raised.

**How to add a kind.** A runner is a function of a `KindRun` (`run_dir.kind_run`) that returns an exit code: 0 if
done, and 75 (`EXIT_CHECKPOINTED`) when `stop` was set and a later run must do the rest. It finds the base model with
`hardware.models.find_model(run.spec.model, run.events.warning)`, and the adapters with
`adapters.read_index(run.folder.adapters)`: the worker has put them there with checked SHA-256 (`main`, and `step-N` for
each step that the spec names). Whatever a runner writes into `run.folder.export` is uploaded when the run has ended and
listed in the job's manifest as `export/...`, with its SHA-256. Errors are `JobFailure`s. Name the runner in `_runner`;
the fields are those of the kind's section in `spec.sections`, and the worker's side is `jobs.worker.prepare`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from grpo_core.errors import EXIT_CHECKPOINTED, JobFailure
from grpo_core.reasons import FailureCode, Phase
from grpo_core.run_dir.kind_run import KindRun
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EventWriter
from grpo_core.signals import StoppedEarly, StopRequest
from grpo_core.spec import JobSpec
from grpo_core.training.classify_error import failure_of

Runner = Callable[[KindRun], int]


def run(spec: JobSpec, folder: RunFolder, *, epoch: int, stop: StopRequest) -> int:
    """Run a job of such a kind in its folder and return the process's exit code."""
    folder.root.mkdir(parents=True, exist_ok=True)
    events = EventWriter(folder.events, epoch=epoch)
    try:
        events.phase(Phase.PREPARING)
        return _runner(spec)(KindRun(spec, folder, events, epoch, stop))
    except StoppedEarly:
        return EXIT_CHECKPOINTED
    except Exception as error:  # noqa: BLE001 - every way of failing has its event and exit code
        failure = failure_of(error, spec, phase=events.current_phase)
        if failure.report.code == FailureCode.UNEXPECTED.value:
            traceback.print_exc(file=sys.stderr)
        with suppress(OSError):
            events.error(failure.report)
        return failure.exit_code
    finally:
        with suppress(OSError):
            events.close()


def _runner(spec: JobSpec) -> Runner:
    """The kind's runner, imported here, because it brings torch with it."""
    if spec.kind == "serving":
        from grpo_core.serving.run import run as serve

        return serve
    if spec.kind == "export":
        from grpo_core.export.runner import run_export

        return run_export
    raise JobFailure(
        FailureCode.ENGINE_NOT_AVAILABLE,
        f"This release cannot run a job of kind {spec.kind}.",
        hint="Upgrade the worker.",
    )
