"""A run from its spec, or from a checkpoint, to its exit code: data, engine, training, result.

Owns the order of the phases and the class of each failure; knows no particular engine. Torch is imported only once data
set and model files exist. Invariant: the last event of a run that failed is `error`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import grpo_core
from grpo_core import hub, strict_json
from grpo_core.checkpoints.licence import licence_in
from grpo_core.checkpoints.manifest import SavedRun, open_saved_run, unreadable
from grpo_core.checkpoints.model_card import CardFacts, model_card
from grpo_core.datasets import Row
from grpo_core.engines import choose_engine, import_engine
from grpo_core.engines.protocol import Engine, EngineContext, EngineName
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, EXIT_RANK_LOST, JobFailure
from grpo_core.evaluation.held_out import HeldOutEvaluation, SplitRows, load_split
from grpo_core.grading import Grading
from grpo_core.hardware.gpus import find_gpus, show_gpus
from grpo_core.hardware.models import ModelFiles, find_model
from grpo_core.monitoring.step_recorder import StepRecorder
from grpo_core.monitoring.trackers import require_packages
from grpo_core.ranks import ALONE, Rank
from grpo_core.reasons import EventType, FailureCode, Phase, WarningCode
from grpo_core.row_warnings import row_warnings
from grpo_core.run_dir.layout import RunFolder, write_json, write_text
from grpo_core.run_dir.records import RECORD_VERSION, EventWriter, MetricsWriter, read_jsonl
from grpo_core.signals import StoppedEarly, StopRequest
from grpo_core.spec import JobSpec
from grpo_core.strict_json import StrictJsonError
from grpo_core.training.classify_error import failure_of
from grpo_core.training.trial import conclude, without_learning

REJECTED: Final = "adapter.rejected"
"""The folder for an adapter that fails its self-test."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def run(
    spec: JobSpec,
    folder: RunFolder,
    *,
    epoch: int,
    stop: StopRequest,
    resume: Path | None = None,
    accumulation: int | None = None,
    rank: Rank = ALONE,
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run a job in its folder and return the process's exit code; raises nothing a job can cause.

    `resume` is a checkpoint of the same spec to resume from; `accumulation` is the number of parts of a step, if not
    the spec's; `rank` says which of the processes that train together this is.
    """
    folder = folder.of_rank(rank.number)
    folder.create()
    events = EventWriter(folder.events, epoch=epoch, listener=listener)
    metrics = MetricsWriter(folder.metrics, epoch=epoch)
    records = _Records(spec, folder, events, metrics, epoch, rank)
    running = without_learning(_as_rank(_split_in(spec, accumulation), rank))
    try:
        events.phase(Phase.PREPARING)
        with closing(Grading(running if rank.is_lead else _without_graders(running))) as grading:
            return _run(running, records, stop, resume, grading)
    except StoppedEarly:
        return EXIT_CHECKPOINTED
    except Exception as error:  # noqa: BLE001 - every way of failing has its event and exit code
        failure = failure_of(error, running, phase=events.current_phase)
        if failure.report.code == FailureCode.UNEXPECTED.value:
            traceback.print_exc(file=sys.stderr)
        # Who launched the ranks knows which of them is missing, and why.
        if failure.exit_code != EXIT_RANK_LOST or not rank.is_launched:
            _tell(events, failure)
        return failure.exit_code
    finally:
        for writer in (metrics, events):
            with suppress(OSError):  # on a full disk, where the lines before have got as far as they can
                writer.close()


@dataclass(frozen=True, slots=True)
class _Records:
    """What a run is asked for and where it writes."""

    request: JobSpec
    folder: RunFolder
    events: EventWriter
    metrics: MetricsWriter
    epoch: int
    rank: Rank


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What there is before torch is imported."""

    saved: SavedRun | None
    recorder: StepRecorder
    rows: SplitRows
    files: ModelFiles


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The engine with its model, and what the run's end is compared with."""

    context: EngineContext
    engine: Engine
    base: Mapping[str, int]
    """Checksums of the base model's weights."""
    start: Mapping[str, int]
    """Checksums of the adapter's weights before the first step of the job."""
    held_out: HeldOutEvaluation | None


def _run(spec: JobSpec, records: _Records, stop: StopRequest, resume: Path | None, grading: Grading) -> int:
    """`spec` is the request as it is carried out on this machine."""
    began, events = time.perf_counter(), records.events
    prepared = _prepare(spec, records, resume, grading)
    events.phase(Phase.LOADING)
    loaded = _load(spec, records, stop, prepared, grading)
    engine, held_out = loaded.engine, loaded.held_out
    stop.finish_steps()
    events.phase(Phase.TRAINING)
    steps = engine.train(held_out)
    from grpo_core.selftest import selftest

    selftest.require_base_unchanged(loaded.base, engine.base_checksums())
    selftest.require_adapter_precision(engine.model)
    if steps < spec.training.steps and not engine.ended_early:
        engine.save_checkpoint()
        return EXIT_CHECKPOINTED
    if spec.kind != "try":
        selftest.require_update(engine.model, loaded.start)
    if not records.rank.is_lead:
        engine.part()
        return EXIT_DONE  # what follows is the lead's alone
    if spec.kind == "try":
        engine.part()
        _end_trial(records, engine, len(prepared.rows.train), time.perf_counter() - began)
        return EXIT_DONE
    # If the process is lost in what follows, no step is needed again. Other jobs may train on from here.
    engine.save_checkpoint()
    engine.save_adapter()

    events.phase(Phase.EVALUATING)
    if held_out is not None and not held_out.ask_adapter(engine, stop.event, step=steps):
        return EXIT_CHECKPOINTED
    _conclude(records, prepared, loaded, steps, began)
    return EXIT_DONE


def _prepare(spec: JobSpec, records: _Records, resume: Path | None, grading: Grading) -> _Prepared:
    """Read the checkpoint, if there is one, and the data set, and find the model's files."""
    events = records.events
    require_packages(spec)
    saved = None if resume is None else open_saved_run(resume, records.request)
    recorder = StepRecorder(
        spec=spec,
        folder=records.folder,
        events=events,
        metrics=records.metrics,
        epoch=records.epoch,
        keeps_rollouts=records.rank.is_lead,
    )
    if saved is not None:
        _take_over(saved, recorder, records.metrics)
        _remember(saved, grading)
    rows = load_split(spec, records.folder.inputs, warn=events.warning)
    for warning in row_warnings(spec, rows.train):
        events.emit(EventType.WARNING, {"code": warning.code, "message": warning.message})
    files = find_model(spec.model, events.warning)
    if files.source == "folder" and spec.model.revision is not None:
        events.warning(WarningCode.REVISION_IGNORED, f"{files.name} is a local folder, which has no revisions.")
    if "trackio" not in spec.training.report_to:  # which keeps its numbers on the hub
        hub.turn_off()
    return _Prepared(saved, recorder, rows, files)


def _load(spec: JobSpec, records: _Records, stop: StopRequest, prepared: _Prepared, grading: Grading) -> _Loaded:
    """Load the model, note how its weights begin, and ask it the held-out questions."""
    saved, rows = prepared.saved, prepared.rows
    context, engine = _make_engine(spec, records, prepared, stop, grading)
    engine.load(prepared.files, rows.train)
    _tell_how(records, spec, saved)
    from grpo_core.selftest import selftest

    selftest.require_adapter_precision(engine.model)
    base = engine.base_checksums()
    _require_known_base(base, engine, context)
    start = saved.progress["start"] if saved else selftest.adapter_checksums(engine.model)
    context.checkpoints.carry("start", lambda: start)
    return _Loaded(context, engine, base, start, _ask_base(context, engine, rows))


def _conclude(records: _Records, prepared: _Prepared, loaded: _Loaded, steps: int, began: float) -> None:
    """Write the report and the model card, and test the saved adapter. `began` is a time of `time.perf_counter`."""
    context, engine, saved, rows = loaded.context, loaded.engine, prepared.saved, prepared.rows
    rewards = prepared.recorder.reward_summary()
    evaluation = loaded.held_out.report() if loaded.held_out else None
    report = {
        "v": RECORD_VERSION,
        "epoch": records.epoch,
        "resumed": {"epoch": saved.epoch, "step": saved.step} if saved else None,
        "spec_digest": records.request.digest(),
        "engine": engine.name,
        "steps": steps,
        "reward": rewards,
        **({"graders": context.grading.report()} if context.spec.rewards.graders else {}),
        "rows": len(rows.train),
        "versions": _versions(),
        **engine.report(),
        "evaluation": evaluation,
    }

    def write_report(selftest: dict[str, Any] | None) -> None:
        seconds = round(time.perf_counter() - began, 3)
        write_json(records.folder.report, {**report, "selftest": selftest, "seconds": seconds})

    # A job whose adapter is refused still tells what it learnt.
    write_report(None)
    facts = CardFacts(
        steps=steps,
        rewards=rewards,
        evaluation=evaluation,
        licence=licence_in(prepared.files.path),
        is_public=prepared.files.is_public,
    )
    write_text(records.folder.adapter / "README.md", model_card(context.spec, facts))
    write_report(_test_adapter(context, engine, rows.train))


def _end_trial(records: _Records, engine: Engine, rows: int, seconds: float) -> None:
    """Write down what a trial found."""
    found = conclude(records.request, list(read_jsonl(records.folder.metrics)))
    report = {
        "v": RECORD_VERSION,
        "epoch": records.epoch,
        "spec_digest": records.request.digest(),
        "engine": engine.name,
        "trial": found,
        "rows": rows,
        "versions": _versions(),
        **engine.report(),
        "seconds": round(seconds, 3),
    }
    write_json(records.folder.report, report)
    records.events.emit(EventType.LOG, {"code": "trial", "message": found["sentence"], "result": found})


def _split_in(spec: JobSpec, accumulation: int | None) -> JobSpec:
    if accumulation is None:
        return spec
    sampling = spec.sampling.model_copy(update={"gradient_accumulation": accumulation})
    return spec.model_copy(update={"sampling": sampling})


def _without_graders(spec: JobSpec) -> JobSpec:
    """What ranks behind the lead grade by: nothing, for they are given what it paid."""
    return spec.model_copy(update={"rewards": type(spec.rewards)()})


def _as_rank(spec: JobSpec, rank: Rank) -> JobSpec:
    """Trackers hear of a run once, from its lead."""
    if rank.is_lead:
        return spec
    return spec.model_copy(update={"training": spec.training.model_copy(update={"report_to": ()})})


def _take_over(saved: SavedRun, recorder: StepRecorder, metrics: MetricsWriter) -> None:
    """Let the records begin where the checkpoint's end."""
    try:
        lines = list(read_jsonl(saved.metrics))
        whole = [line["step"] for line in lines] == list(range(1, saved.step + 1))
        recorder.go_on(lines, saved.progress["recorder"])
    except (KeyError, TypeError, ValueError, StrictJsonError) as error:
        raise unreadable(f"What the run of {saved.folder.name} knew cannot be read: {error!r}.") from error
    if not whole:
        raise unreadable(f"The metrics in {saved.folder.name} are not those of the steps 1 to {saved.step}.")
    metrics.take_over(lines)


def _remember(saved: SavedRun, grading: Grading) -> None:
    """Let graders go on where the checkpoint's stopped; checkpoints of earlier releases say nothing of them."""
    try:
        if "grading" in saved.progress:
            grading.restore(saved.progress["grading"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(f"What the graders of {saved.folder.name} knew cannot be read: {error!r}.") from error


def _make_engine(
    spec: JobSpec, records: _Records, prepared: _Prepared, stop: StopRequest, grading: Grading
) -> tuple[EngineContext, Engine]:
    make_engine = _import_engine(spec, records, prepared.saved, prepared.files)
    from grpo_core.checkpoints.writer import CheckpointWriter

    folder, events, epoch = records.folder, records.events, records.epoch
    checkpoints = CheckpointWriter(
        spec=spec, folder=folder, events=events, epoch=epoch, spec_digest=records.request.digest()
    )
    checkpoints.carry("recorder", prepared.recorder.state)
    if spec.rewards.graders:
        checkpoints.carry("grading", grading.state)
    checkpoints.carry("events", lambda: {"epoch": epoch, "seq": events.last})
    context = EngineContext(
        spec=spec,
        folder=folder,
        events=events,
        recorder=prepared.recorder,
        checkpoints=checkpoints,
        grading=grading,
        stop=stop.event,
        saved=prepared.saved,
        rank=records.rank,
    )
    engine = make_engine(context)
    checkpoints.carry("engine", lambda: engine.name)
    return context, engine


def _tell_how(records: _Records, spec: JobSpec, saved: SavedRun | None) -> None:
    """Say what sets this run apart from the first one of its job."""
    if saved is not None:
        message = f"Goes on after step {saved.step}, from the checkpoint of run {saved.epoch}"
        records.events.log(message, code="resumed", step=saved.step)
    parts, asked = spec.sampling.gradient_accumulation, records.request.sampling.gradient_accumulation
    if parts != asked:
        records.events.log(
            f"Trains on each step's {spec.completions_per_step} completions in {parts} parts of {spec.micro_batch} "
            f"instead of {asked}: it needs less memory, and the step is the same",
            code="micro_batch",
        )


def _require_known_base(base: Mapping[str, int], engine: Engine, context: EngineContext) -> None:
    """Warn if the base model is not what it was when the checkpoint was made."""
    weights = hashlib.sha256(strict_json.canonical(base).encode()).hexdigest()
    now = f"{engine.precision.weights} ({engine.precision.dtype})"
    context.checkpoints.carry("base", lambda: {"sha256": weights, "precision": now})
    before = context.saved.progress.get("base") if context.saved else None
    if before is not None and before["sha256"] != weights:
        was = before["precision"]
        context.events.warning(
            WarningCode.BASE_DIFFERS,
            f"The base model's weights are not those that the checkpoint was made with: {was} then, {now} now. "
            "Name a revision in model.revision, and a precision in model.precision, to have them the same everywhere.",
        )


def _import_engine(
    spec: JobSpec, records: _Records, saved: SavedRun | None, files: ModelFiles
) -> Callable[[EngineContext], Engine]:
    """The job's engine; torch, and all that takes seconds to import, comes with it."""
    rank, gpus = records.rank, find_gpus()
    # Before any library looks: they spread over every GPU they see.
    show_gpus(min(1, spec.resources.gpus), first=rank.local)
    wrote = _writer_of(saved, spec)
    choice = choose_engine(spec, gpus, rank.count, model=files.path, parameters=files.parameters, wrote=wrote)
    if choice.reason:
        records.events.log(f"engine: {choice.name} ({choice.reason})", code="engine")
    return import_engine(choice.name)


def _writer_of(saved: SavedRun | None, spec: JobSpec) -> EngineName | None:
    """The engine that wrote a checkpoint. Version 0.1 did not record it: its were trl on a CPU and unsloth on a GPU."""
    if saved is None:
        return None
    wrote = saved.progress.get("engine", "trl" if spec.resources.gpus == 0 else "unsloth")
    return next((name for name in get_args(EngineName) if name == wrote), None)


def _ask_base(context: EngineContext, engine: Engine, rows: SplitRows) -> HeldOutEvaluation | None:
    """Put the held-out questions, if there are any, to the base model, or take the answers it gave before."""
    if not rows.held_out:
        return None
    held_out = HeldOutEvaluation(
        spec=context.spec,
        rows=rows.held_out,
        folder=context.folder,
        events=context.events,
        grading=context.grading,
        where=rows.where,
        context_length=getattr(engine.model.config, "max_position_embeddings", None),
    )
    held_out.ask_base(
        engine,
        context.saved.progress.get("held_out") if context.saved else None,
        from_checkpoint=context.saved is None and context.folder.start_checkpoint.is_dir(),
    )
    context.checkpoints.carry("held_out", held_out.state)
    context.checkpoints.keep(lambda: held_out.curve.best_step)
    return held_out


def _test_adapter(context: EngineContext, engine: Engine, rows: Sequence[Row]) -> dict[str, Any]:
    """The self-test of the saved adapter; the engine has let go of its model afterwards."""
    from grpo_core.selftest.selftest import run_selftest

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
    context.events.emit(EventType.EVALUATION, {"stage": "selftest", **found})
    return found


def _tell(events: EventWriter, failure: JobFailure) -> None:
    """Write the error event; what cannot be written to a full disk is at least said."""
    try:
        events.error(failure.report)
    except OSError as error:
        sys.stderr.write(f"{failure.report.message}\n{failure.report.hint}\nThe error event is lost: {error}\n")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "grpo_core": grpo_core.__version__,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
