"""A run from its spec to its exit code: data, engine, training, result.

Owns the order of the phases and what each way of failing is called; knows nothing of a particular engine. Torch is
imported only once data set and model files are there. Invariant: the last event of a run that failed is `error`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import grpo_core
from grpo_core.datasets import DatasetError, DatasetUnreachableError, load_rows
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, JobFailure
from grpo_core.lifetime import StoppedEarly, StopRequest
from grpo_core.models import find_model
from grpo_core.records import RECORD_VERSION, EventWriter, MetricsWriter
from grpo_core.runfolder import RunFolder, write_json
from grpo_core.spec import JobSpec
from grpo_core.step_recorder import StepRecorder, diverged

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def run(
    spec: JobSpec,
    folder: RunFolder,
    *,
    epoch: int,
    stop: StopRequest,
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run a job in its folder and return the process's exit code; raises nothing a job can cause."""
    folder.create()
    events = EventWriter(folder.events, epoch=epoch, listener=listener)
    metrics = MetricsWriter(folder.metrics, epoch=epoch)
    try:
        return _run(spec, folder, events, metrics, epoch, stop)
    except StoppedEarly:
        return EXIT_CHECKPOINTED
    except Exception as error:  # noqa: BLE001 - every way of failing has its event and exit code
        failure = failure_of(error)
        if failure.report.code == "unexpected":
            traceback.print_exc(file=sys.stderr)
        events.error(failure.report)
        return failure.exit_code
    finally:
        metrics.close()
        events.close()


def _run(
    spec: JobSpec, folder: RunFolder, events: EventWriter, metrics: MetricsWriter, epoch: int, stop: StopRequest
) -> int:
    began = time.perf_counter()
    events.phase("preparing")
    rows = load_rows(spec.data, folder.inputs, warn=events.warning)
    files = find_model(spec.model)
    if files.source == "folder" and spec.model.revision is not None:
        events.warning("revision_ignored", f"{files.name} is a local folder, which has no revisions.")

    events.phase("loading")
    # Torch, and all that takes seconds to import, begins here.
    import torch

    from grpo_core.checkpoints import CheckpointWriter
    from grpo_core.engines import RunContext, choose_engine, open_engine

    context = RunContext(
        spec=spec,
        folder=folder,
        events=events,
        recorder=StepRecorder(spec=spec, folder=folder, events=events, metrics=metrics, epoch=epoch),
        checkpoints=CheckpointWriter(spec=spec, folder=folder, events=events, epoch=epoch),
        stop=stop.event,
    )
    engine = open_engine(choose_engine(spec, torch.cuda.device_count()), context)
    engine.load(files, rows)

    stop.finish_steps()
    events.phase("training")
    steps = engine.train()
    if steps < spec.training.steps:
        engine.save_checkpoint()
        return EXIT_CHECKPOINTED
    engine.save_adapter()
    report = {
        "v": RECORD_VERSION,
        "epoch": epoch,
        "spec_digest": spec.digest(),
        "engine": engine.name,
        "steps": steps,
        "reward": context.recorder.reward_summary(),
        "rows": len(rows),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": _versions(),
        **engine.report(),
    }
    write_json(folder.report, report)
    return EXIT_DONE


def failure_of(error: Exception) -> JobFailure:
    """What a run that raised `error` tells its owner."""
    if isinstance(error, JobFailure):
        return error
    if isinstance(error, DatasetError):
        return JobFailure(
            # A hub that does not answer is nobody's mistake: another try may find it.
            "infra" if isinstance(error, DatasetUnreachableError) else "dataset",
            error.code,
            "; ".join(f"{p.pointer or '/data'} {p.detail}" for p in error.problems),
            hint=" ".join(dict.fromkeys(p.remedy for p in error.problems)),
        )
    if _is_out_of_memory(error):
        return JobFailure(
            "oom",
            "out_of_memory",
            f"The run needed more memory than there is: {_first_line(error)}",
            hint="Raise sampling.gradient_accumulation (smaller parts of the same step), or lower "
            "sampling.max_completion_tokens or sampling.prompts_per_step.",
        )
    if isinstance(error, RuntimeError) and "probability tensor contains" in str(error):
        return diverged("The model's probabilities are no longer numbers: nothing can be sampled from it.")
    return JobFailure(
        "internal",
        "unexpected",
        f"{type(error).__name__}: {_first_line(error)}",
        hint="The traceback is in the run's stderr.log; please report it.",
    )


def _is_out_of_memory(error: Exception) -> bool:
    # By name and text: torch is not imported here, and a CPU's allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:500]


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "grpo_core": grpo_core.__version__,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
