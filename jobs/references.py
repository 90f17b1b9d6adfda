"""What only the service can check of a spec: that what it names exists and is its owner's.

Owns the look-ups of data sets and checkpoints; the spec's own rules are in `grpo_core.spec`. Invariant: another
owner's data set or job is answered as one that does not exist.
"""

from __future__ import annotations

import json
from typing import Any

from grpo_core.spec import JobSpec, Problem
from jobs import journal
from jobs.checkpoints import list_checkpoints
from jobs.datasets import DatasetRecord, DatasetStore
from jobs.errors import NotFound, Rejected
from jobs.ledger import Ledger
from jobs.storage import ObjectStore

_SAME_ADAPTER = (("model", "name"), ("lora", "rank"), ("lora", "alpha"), ("lora", "target_modules"))


class References:
    """Looks up what specs name."""

    def __init__(self, ledger: Ledger, store: ObjectStore, datasets: DatasetStore) -> None:
        self._ledger = ledger
        self._store = store
        self._datasets = datasets

    def check(self, spec: JobSpec, owner: str) -> DatasetRecord | None:
        """Raise `Rejected` with every name that cannot be used; returns the upload, where one is named."""
        problems: list[Problem] = []
        upload: DatasetRecord | None = None
        if spec.data.source == "file":
            problems.append(
                Problem(
                    pointer="/data/source",
                    code="local_file",
                    detail="the service reads no local files",
                    remedy="Upload the file with POST /datasets and use source upload.",
                )
            )
        if spec.data.source == "upload":
            upload = self._find_upload(spec.data.dataset, owner)
            problems += _unusable(spec, upload) if upload else [_no_dataset()]
        if spec.data.source == "s3":
            problems += self._datasets.sources.check(spec.data.dataset)
        if spec.from_checkpoint is not None:
            problems += self._check_checkpoint(spec, spec.from_checkpoint.job, spec.from_checkpoint.step, owner)
        if problems:
            raise Rejected(*problems)
        return upload

    def _find_upload(self, dataset_id: str, owner: str) -> DatasetRecord | None:
        try:
            return self._datasets.get(dataset_id, owner)
        except NotFound:
            return None

    def _check_checkpoint(self, spec: JobSpec, job_id: str, step: int, owner: str) -> list[Problem]:
        """A checkpoint can be started from once its manifest, which is written last, is there."""
        record = self._ledger.get(job_id)
        if record is None or record.owner != owner:
            return [_no_checkpoint("job", "does not exist", "Use the id of one of your jobs.")]
        if journal.find_checkpoint(self._store, record.id, step) is None:
            steps = ", ".join(str(found.step) for found in list_checkpoints(self._store, record.id))
            remedy = f"Use one of {steps}." if steps else "That job has no checkpoint yet; wait for its first."
            return [_no_checkpoint("step", "was not kept", remedy)]
        return _other_adapter(spec.as_dict(), record.spec)


def _no_dataset() -> Problem:
    remedy = "Upload it first with POST /datasets and use the id that returns."
    return Problem(pointer="/data/dataset", code="no_such_dataset", detail="does not exist", remedy=remedy)


def _unusable(spec: JobSpec, dataset: DatasetRecord) -> list[Problem]:
    """Why an upload that there is cannot be trained on as the spec asks."""
    columns = {"question_column": spec.data.question_column, "answer_column": spec.data.answer_column}
    return _too_few_rows(spec, dataset.rows) + [
        Problem(
            pointer=f"/data/{field}",
            code="no_such_column",
            detail=f"the data set has no column {column!r} in every row",
            remedy=f"Use one of {', '.join(dataset.columns)}.",
        )
        for field, column in columns.items()
        if column not in dataset.columns
    ]


def _other_adapter(spec: dict[str, Any], started_from: dict[str, Any]) -> list[Problem]:
    """Settings of base and adapter that differ from the first job's: its weights would not fit."""
    return [
        Problem(
            pointer=f"/{section}/{name}",
            code="other_adapter",
            detail=f"is {spec[section][name]!r}, and the job of from_checkpoint has {was!r}",
            remedy=f"Use {json.dumps(was)}, as that job did.",
        )
        for section, name in _SAME_ADAPTER
        if _unordered(was := started_from[section][name]) != _unordered(spec[section][name])
    ]


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _no_checkpoint(field: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=f"/from_checkpoint/{field}", code="no_such_checkpoint", detail=detail, remedy=remedy)


def _too_few_rows(spec: JobSpec, rows: int) -> list[Problem]:
    """Whether a data set can fill a step, and hold out what is asked for: the spec's own rules know `data.max_rows`."""
    held_out, prompts = spec.held_out_rows, spec.sampling.prompts_per_step
    if spec.data.max_rows is not None and spec.data.max_rows <= rows:
        return []
    if 2 * held_out > rows:
        detail = f"{held_out} questions would be held out of the data set's {rows} rows, more than half of them"
        remedy = f"Use at most {rows // 2}, or upload more rows."
        return [Problem(pointer="/evaluation/questions", code="too_many_held_out", detail=detail, remedy=remedy)]
    if rows - held_out < prompts:
        detail = f"is {prompts}, and the data set has {rows - held_out} rows to train on"
        remedy = f"Use at most {rows - held_out}, or upload more rows."
        return [Problem(pointer="/sampling/prompts_per_step", code="too_few_rows", detail=detail, remedy=remedy)]
    return []
