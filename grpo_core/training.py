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
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpo_core
from grpo_core.datasets import DatasetError, DatasetUnreachableError, Row
from grpo_core.engines import Engine, RunContext, choose_engine, import_engine
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, JobFailure
from grpo_core.held_out import HeldOutEvaluation, load_split
from grpo_core.lifetime import StoppedEarly, StopRequest
from grpo_core.models import count_gpus, find_model, show_gpus
from grpo_core.records import RECORD_VERSION, EventWriter, MetricsWriter
from grpo_core.runfolder import RunFolder, write_json
from grpo_core.spec import JobSpec
from grpo_core.step_recorder import StepRecorder, diverged

REJECTED: Final = "adapter.rejected"
"""Where an adapter goes that fails its self-test."""

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
    rows = load_split(spec, folder.inputs, warn=events.warning)
    files = find_model(spec.model)
    if files.source == "folder" and spec.model.revision is not None:
        events.warning("revision_ignored", f"{files.name} is a local folder, which has no revisions.")

    events.phase("loading")
    make_engine = _import_engine(spec)
    from grpo_core import selftest
    from grpo_core.checkpoints import CheckpointWriter

    recorder = StepRecorder(spec=spec, folder=folder, events=events, metrics=metrics, epoch=epoch)
    checkpoints = CheckpointWriter(spec=spec, folder=folder, events=events, epoch=epoch)
    context = RunContext(
        spec=spec, folder=folder, events=events, recorder=recorder, checkpoints=checkpoints, stop=stop.event
    )
    engine = make_engine(context)
    engine.load(files, rows.train)
    selftest.require_adapter_precision(engine.model)
    base = selftest.base_checksums(engine.model)
    held_out = _ask_base(context, engine, rows.held_out)

    stop.finish_steps()
    events.phase("training")
    steps = engine.train()
    selftest.require_base_unchanged(base, engine.model)
    selftest.require_adapter_precision(engine.model)
    if steps < spec.training.steps:
        engine.save_checkpoint()
        return EXIT_CHECKPOINTED
    selftest.require_update(engine.model)
    engine.save_adapter()

    events.phase("evaluating")
    if held_out is not None and not held_out.ask_adapter(engine, stop.event):
        engine.save_checkpoint()
        return EXIT_CHECKPOINTED
    report = {
        "v": RECORD_VERSION,
        "epoch": epoch,
        "spec_digest": spec.digest(),
        "engine": engine.name,
        "steps": steps,
        "reward": recorder.reward_summary(),
        "rows": len(rows.train),
        "versions": _versions(),
        **engine.report(),
        "evaluation": held_out.report() if held_out else None,
    }
    report["selftest"] = _test_adapter(context, engine, rows.train)
    write_json(folder.report, {**report, "seconds": round(time.perf_counter() - began, 3)})
    return EXIT_DONE


def _import_engine(spec: JobSpec) -> Callable[[RunContext], Engine]:
    """The job's engine; torch, and all that takes seconds to import, comes with it."""
    name = choose_engine(spec, count_gpus())
    # Before any library looks: they spread over every GPU they see.
    show_gpus(spec.resources.gpus)
    return import_engine(name)


def _ask_base(context: RunContext, engine: Engine, rows: Sequence[Row]) -> HeldOutEvaluation | None:
    """Put the held-out questions, if there are any, to the base model."""
    if not rows:
        return None
    context.events.phase("evaluating")
    held_out = HeldOutEvaluation(spec=context.spec, rows=rows, folder=context.folder, events=context.events)
    held_out.ask_base(engine)
    return held_out


def _test_adapter(context: RunContext, engine: Engine, rows: Sequence[Row]) -> dict[str, Any]:
    """The self-test of the saved adapter; the engine has let go of its model afterwards."""
    from grpo_core.selftest import run_selftest

    texts = [(c.prompt, c.completion) for c in context.recorder.latest_completions()]
    # For a run whose last completions are all empty, or which only had its evaluation left to do.
    texts.append((rows[0].question, rows[0].answer))
    adapter = context.folder.adapter
    try:
        found = run_selftest(engine, texts, context.spec.data, adapter)
    except Exception:
        # What failed its test must not be taken for a result.
        adapter.rename(adapter.with_name(REJECTED))
        raise
    context.events.emit("evaluation", {"stage": "selftest", **found})
    return found


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
