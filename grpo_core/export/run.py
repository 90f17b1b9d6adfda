"""Exports an adapter: from base and adapter to a folder of files that were checked.

Owns the order of the steps, the names of the files and what is said of them. Invariant: the folder exists only once the
files in it have answered as the adapter does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel

from grpo_core.checkpoints.licence import licence_in
from grpo_core.checkpoints.model_card import CardFacts, model_card
from grpo_core.engines.native.architecture import read_architecture
from grpo_core.engines.trl import find_hardware, load_tokenizer
from grpo_core.errors import JobFailure
from grpo_core.export.comparison import QUESTIONS, Asked, Comparison, ask_adapter, release, require_same
from grpo_core.export.gguf_check import load_gguf, require_tokenizer
from grpo_core.export.gguf_file import GgufType, write_gguf
from grpo_core.export.gguf_tokenizer import read_tokenizer
from grpo_core.export.merged import MergedWeights
from grpo_core.export.model_folder import copy_licence, write_model_folder
from grpo_core.export.progress import Progress
from grpo_core.hardware.models import Hardware, ModelFiles, Precision
from grpo_core.reasons import FailureCode
from grpo_core.run_dir.layout import new_folder, write_json, write_text
from grpo_core.selftest.peft_reference import load_base
from grpo_core.spec import JobSpec
from grpo_core.spec.sections import ExportSection

RECORD_NAME: Final = "export.json"
"""What was exported and how the check went, for people and other programs."""
KEPT_WELL: Final = 0.9
"""If rounding leaves less than this share of the adapter's change, the owner is warned."""
FP32_PARAMETERS: Final = 3_000_000_000
"""On a CPU, larger models compute in bfloat16: in 32 bits this many take 12 GB."""
Q8_BYTES: Final = 34 / 32
"""For each weight in Q8_0: a block of 32 has a scale of two bytes."""
ROOM_BESIDE: Final = 100_000_000
"""For the tokenizer, the card and what the run writes meanwhile."""
NAMES: Final[Mapping[torch.dtype, str]] = {torch.float16: "f16", torch.bfloat16: "bf16"}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The adapter to export and what is known of its job."""

    adapter: Path
    """The folder with PEFT's two files."""
    spec: JobSpec
    """The spec that trained it."""
    facts: CardFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export found out."""

    format: str
    type: str
    """Of the weights."""
    kept: float | None
    """Share of the adapter's change that is left after rounding; None where it is not measured."""
    comparison: Comparison
    seconds: float

    @property
    def warning(self) -> str | None:
        """What the owner should know of a correct export, or None."""
        if self.kept is None or self.kept >= KEPT_WELL:
            return None
        return (
            f"Rounding to {self.type} leaves {self.kept:.0%} of what the adapter changes, because its updates are "
            "small against the distance between two numbers of this type. Use the adapter on its base, or GGUF in f16."
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        kept = None if self.kept is None else round(self.kept, 4)
        figures = self.comparison.as_dict()
        return {"format": self.format, "type": self.type, "kept": kept, **figures, "seconds": self.seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Files that are still to be checked."""

    type: str
    file: str
    """The name of a GGUF file, or nothing."""
    load: Callable[[Precision], Any]
    """Loads the model from the files."""


def export(
    asked: ExportSection, source: Source, files: ModelFiles, out: Path, progress: Progress | None = None
) -> Exported:
    """Write the export into the new folder `out`, and check it. Raises `JobFailure`."""
    began, progress = time.perf_counter(), progress or Progress()
    tokenizer = load_tokenizer(files)
    weights = MergedWeights(files.path, source.adapter, progress.wrote)
    precision = _precision(files, find_hardware(source.spec))
    size = _size(asked, files)
    _require_room(out.parent, size)
    with new_folder(out) as part:
        write = _write_gguf if asked.format == "gguf" else _write_merged
        progress.writing(f"Writing about {size / 1e9:.1f} GB", files.parameters)
        written = write(asked, source, files, weights, tokenizer, part)
        comparison = _compare(source, files, tokenizer, precision, written, progress)
        exported = Exported(
            format=asked.format,
            type=written.type,
            kept=weights.kept.share if written.type in DTYPES else None,
            comparison=comparison,
            seconds=round(time.perf_counter() - began, 3),
        )
        facts = replace(
            source.facts,
            form="gguf" if asked.format == "gguf" else "merged",
            file=written.file,
            licence=licence_in(files.path),
            is_public=files.is_public,
            comparison=comparison.as_dict(),
        )
        write_text(part / "README.md", model_card(source.spec, facts))
        write_json(part / RECORD_NAME, {"v": 1, **exported.as_dict()})
    return exported


def _size(asked: ExportSection, files: ModelFiles) -> int:
    """Bytes of the weights, nearly."""
    return int(files.parameters * (Q8_BYTES if asked.type == "q8_0" else 2.0))


def _require_room(folder: Path, size: int) -> None:
    """Before minutes of work, not after."""
    free = shutil.disk_usage(folder).free
    if free < size + ROOM_BESIDE:
        raise JobFailure(
            FailureCode.DISK_FULL,
            f"The export takes {size / 1e9:.1f} GB, and the worker's scratch disk has {free / 1e9:.1f} GB left.",
            hint="Free room on the disk that holds the run folder, or give the worker a larger one.",
        )


def _precision(files: ModelFiles, hardware: Hardware) -> Precision:
    """How both models are held in memory while they answer."""
    if hardware.gpus:
        return Precision("16bit", "16bit", "bfloat16" if hardware.bf16 else "float16", "as it is exported")
    if files.parameters > FP32_PARAMETERS:
        return Precision("auto", "fp32", "bfloat16", "in 32 bits it might not fit into memory")
    return Precision("auto", "fp32", "float32", "a CPU computes in 32-bit")


def _write_merged(
    asked: ExportSection, _source: Source, files: ModelFiles, weights: MergedWeights, _tokenizer: Any, out: Path
) -> _Written:
    dtype = weights.stored_dtype() if asked.type == "auto" else DTYPES[asked.type]
    write_model_folder(weights, files.path, out, dtype=dtype)
    return _Written(type=NAMES[dtype], file="", load=lambda precision: load_base(out, precision))


def _write_gguf(
    asked: ExportSection, source: Source, files: ModelFiles, weights: MergedWeights, tokenizer: Any, out: Path
) -> _Written:
    kind: GgufType = "f16" if asked.type == "auto" else asked.type
    architecture = read_architecture(files.path)
    form = read_tokenizer(tokenizer, architecture.vocabulary)
    file = out / f"model-{kind}.gguf"
    licence = licence_in(files.path)
    about = {
        "name": source.spec.name or "GRPO model",
        "base": files.name,
        "license": licence.name if licence else "",
    }
    write_gguf(weights, architecture, form, file, kind=kind, about={k: v for k, v in about.items() if v})
    require_tokenizer(file, form)
    copy_licence(files.path, out)
    write_text(out / "Modelfile", _modelfile(file.name, source.spec))
    return _Written(type=kind, file=file.name, load=lambda precision: load_gguf(file, architecture, precision))


def _modelfile(file: str, spec: JobSpec) -> str:
    """What Ollama creates a model from; it takes the chat template from the file.

    Without the parameter Ollama would discourage repetitions, which neither the trainer nor the evaluations did.
    """
    system = spec.data.system_prompt
    said = f'SYSTEM """{system}"""\n' if system and '"""' not in system else ""
    return f"FROM ./{file}\nPARAMETER repeat_penalty 1.0\n{said}"


def _compare(
    source: Source, files: ModelFiles, tokenizer: Any, precision: Precision, written: _Written, progress: Progress
) -> Comparison:
    progress.stage(f"Written; asking the adapter on its base {len(QUESTIONS)} questions")
    asked = _ask_adapter(source, files, tokenizer, precision)
    release()
    progress.stage("Reading the export back, to ask it the same")
    model = written.load(precision)
    progress.stage("Asking the export")
    return require_same(asked, model, tokenizer, source.spec.data, precision, written.type)


def _ask_adapter(source: Source, files: ModelFiles, tokenizer: Any, precision: Precision) -> Asked:
    """In a separate function, so that the model is gone when it returns."""
    model = PeftModel.from_pretrained(load_base(files.path, precision), source.adapter)
    return ask_adapter(model, tokenizer, source.spec.data, precision)
