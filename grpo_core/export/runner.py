"""Runs a job of kind `export`: from its run folder to `export/`, its events and its report.

Owns what the worker put beside the adapter about the job that trained it (`inputs/source/`) and what the job says of
itself; the export is `run`'s. Invariant: without those files, as in a folder filled by hand, the card says less and
nothing else changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_core import hub, strict_json
from grpo_core.adapters import LocalAdapter, read_index
from grpo_core.checkpoints.model_card import CardFacts
from grpo_core.errors import EXIT_DONE, JobFailure
from grpo_core.export.progress import CODE, Progress
from grpo_core.export.run import Exported, Source, export
from grpo_core.hardware.models import find_model
from grpo_core.reasons import EventType, FailureCode, Phase, WarningCode
from grpo_core.run_dir.kind_run import KindRun
from grpo_core.run_dir.layout import write_json
from grpo_core.run_dir.records import RECORD_VERSION
from grpo_core.spec import JobSpec, SpecError, parse_spec


def run_export(run: KindRun) -> int:
    """Export the adapter and say how the check went."""
    adapter = _adapter(run)
    files = find_model(run.spec.model, run.events.warning)
    hub.turn_off()
    run.events.phase(Phase.EXPORTING)
    source = _source(run.folder.source, run.spec, adapter)
    progress = Progress(lambda message: run.events.log(message, code=CODE))
    exported = export(run.spec.export, source, files, run.folder.export, progress)
    _tell(run, exported)
    return EXIT_DONE


def _adapter(run: KindRun) -> LocalAdapter:
    found = read_index(run.folder.adapters)
    if not found:
        raise JobFailure(
            FailureCode.ADAPTER_UNREADABLE,
            "There is no adapter among the run's inputs.",
            hint="Submit the job again; its worker prepares them.",
        )
    return found[0]


def _source(folder: Path, spec: JobSpec, adapter: LocalAdapter) -> Source:
    report = _read(folder / "report.json")
    facts = CardFacts(
        steps=adapter.step or report.get("steps"), rewards=report.get("reward"), evaluation=report.get("evaluation")
    )
    return Source(adapter=adapter.folder, spec=_trained(folder / "spec.json", spec), facts=facts)


def _trained(file: Path, spec: JobSpec) -> JobSpec:
    """The spec of the job that trained the adapter; the export's own has its model, prompts and adapter settings."""
    try:
        return parse_spec(_read(file)) if file.is_file() else spec
    except SpecError:  # of a newer release
        return spec


def _read(file: Path) -> dict[str, Any]:
    try:
        return strict_json.loads(file.read_bytes())
    except (FileNotFoundError, strict_json.StrictJsonError):
        return {}


def _tell(run: KindRun, exported: Exported) -> None:
    if exported.warning:
        run.events.warning(WarningCode.LITTLE_KEPT, exported.warning)
    found = exported.comparison
    message = (
        f"Exported as {exported.format} in {exported.type}: {found.same_answers} of {found.questions} answers are the "
        f"adapter's, log-probabilities are {found.mean:.2g} apart on average ({found.bound:.2g} is accepted)"
    )
    run.events.emit(EventType.LOG, {"code": "export", "message": message, "result": exported.as_dict()})
    report = {"v": RECORD_VERSION, "epoch": run.epoch, "spec_digest": run.spec.digest(), "export": exported.as_dict()}
    write_json(run.folder.report, report)
