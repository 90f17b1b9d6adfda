"""The service's checks of a spec: the data sets and checkpoints it names exist, belong to its owner, and fit.

Owns the look-up of data sets and checkpoints; `grpo_core.spec` has the rules of the spec itself. Invariant: the answer
for another owner's data set or job is the same as for one that does not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from grpo_core.datasets import Needs, RowReader
from grpo_core.estimates import too_large
from grpo_core.rewards.graders.operator import unregistered
from grpo_core.spec import JobSpec, Problem
from jobs.errors import NotFound, Rejected
from jobs.store import event_log
from jobs.store.bucket import ObjectStore
from jobs.store.checkpoints import list_checkpoints
from jobs.store.datasets import DatasetRecord, DatasetStore
from jobs.store.job import JobRecord

_SAME_ADAPTER = (("model", "name"), ("lora", "rank"), ("lora", "alpha"), ("lora", "target_modules"))

_NO_FILE = Problem(
    pointer="/data/source",
    code="read_by_worker",
    detail="only the worker reads rows of this source, when it trains",
    remedy="Upload the file with POST /datasets to see its rows.",
)


class ReferenceChecks:
    """Looks up the data sets and checkpoints that specs name."""

    def __init__(
        self, find: Callable[[str, str], JobRecord | None], store: ObjectStore, datasets: DatasetStore
    ) -> None:
        """`find` returns an owner's job by its id."""
        self._find = find
        self._store = store
        self._datasets = datasets

    def check(self, spec: JobSpec, owner: str) -> DatasetRecord | None:
        """Raise `Rejected` with every name that cannot be used. Returns the upload, if the spec names one.

        The job whose adapters are served or exported has been checked by `source_jobs`.
        """
        if not spec.has_steps:
            return None
        problems: list[Problem] = []
        upload: DatasetRecord | None = None
        if (problem := too_large(spec)) is not None:
            problems.append(problem)
        if spec.data.source == "file":
            problems.append(
                Problem(
                    pointer="/data/source",
                    code="local_file",
                    detail="the service reads no local files",
                    remedy="Upload the file with POST /datasets and use source upload.",
                )
            )
        apart = spec.evaluation.dataset
        if spec.data.source == "upload":
            upload = self._find_upload(spec.data.dataset, owner)
            problems += self._unusable(spec, upload) if upload else [_no_dataset("/data/dataset")]
            if apart is not None:
                questions = self._find_upload(apart, owner)
                problems += self._lacking(spec, questions) if questions else [_no_dataset("/evaluation/dataset")]
        if spec.data.source == "s3":
            problems += self._datasets.sources.check(spec.data.dataset)
            if apart is not None:
                found = self._datasets.sources.check(apart)
                problems += [replace(problem, pointer="/evaluation/dataset") for problem in found]
        for pointer, detail, remedy in unregistered(spec.rewards.graders, os.environ):
            problems.append(Problem(pointer=pointer, code="not_registered", detail=detail, remedy=remedy))
        if spec.from_checkpoint is not None:
            problems += self._check_checkpoint(spec, spec.from_checkpoint.job, spec.from_checkpoint.step, owner)
        if problems:
            raise Rejected(*problems)
        return upload

    def file_of(self, spec: JobSpec, owner: str) -> DatasetRecord | None:
        """Return the upload that a spec names; None for an S3 object. Raises `Rejected` for any other source."""
        if spec.data.source not in ("upload", "s3"):
            raise Rejected(_NO_FILE)
        if spec.data.source == "s3":
            return None
        upload = self._find_upload(spec.data.dataset, owner)
        if upload is None:
            raise Rejected(_no_dataset("/data/dataset"))
        return upload

    def rows_of(self, spec: JobSpec, owner: str) -> int | None:
        """Return the number of rows of the upload that a spec names; None for any other source."""
        upload = self._find_upload(spec.data.dataset, owner) if spec.data.source == "upload" else None
        return None if upload is None else upload.rows

    def _find_upload(self, dataset_id: str, owner: str) -> DatasetRecord | None:
        try:
            return self._datasets.get(dataset_id, owner)
        except NotFound:
            return None

    def _unusable(self, spec: JobSpec, dataset: DatasetRecord) -> list[Problem]:
        """Return why an existing upload cannot be used with this spec."""
        return _too_few_rows(spec, dataset.rows) + self._lacking(spec, dataset)

    def _lacking(self, spec: JobSpec, dataset: DatasetRecord) -> list[Problem]:
        """Return the columns that a job needs and that not every row has."""
        columns = RowReader(spec.data, Needs.of(spec)).columns
        shape = self._datasets.shape(dataset)
        question = spec.data.question_column
        problems: list[Problem] = []
        for column, pointer in columns.required.items():
            if spec.data.format == "messages" and column == question:
                there, what = shape.chats, "with a chat that ends with the user's turn"
            elif column in columns.nested:
                there, what = shape.fields, ""
            else:
                there, what = dataset.columns, ""
            if column not in there:
                problems.append(_no_column(column, pointer, there, what, is_chat=column in shape.chats))
        return problems

    def _check_checkpoint(self, spec: JobSpec, job_id: str, step: int, owner: str) -> list[Problem]:
        """Return why a job cannot start from a checkpoint. It can once its manifest exists, which is written last."""
        record = self._find(job_id, owner)
        if record is None:
            return [_no_checkpoint("job", "does not exist", "Use the id of one of your jobs.")]
        if event_log.find_checkpoint(self._store, record.id, step) is None:
            steps = ", ".join(str(found.step) for found in list_checkpoints(self._store, record.id))
            remedy = f"Use one of {steps}." if steps else "That job has no checkpoint yet; wait for its first."
            return [_no_checkpoint("step", "was not kept", remedy)]
        return _other_adapter(spec.as_dict(), record.spec)


def _no_dataset(pointer: str) -> Problem:
    remedy = "Upload it first with POST /datasets and use the id that returns."
    return Problem(pointer=pointer, code="no_such_dataset", detail="does not exist", remedy=remedy)


def _no_column(column: str, pointer: str, there: Sequence[str], what: str, *, is_chat: bool) -> Problem:
    detail = f"the data set has no column {column!r} {what or 'in every row'}"
    if is_chat:
        remedy = 'It holds chats: set data.format to "messages".'
    elif there:
        remedy = f"Use one of {', '.join(there)}."
    else:
        remedy = "No column of the data set does; use another data set, or another data.format."
    return Problem(pointer=pointer, code="no_such_column", detail=detail, remedy=remedy)


def _other_adapter(spec: dict[str, Any], started_from: dict[str, Any]) -> list[Problem]:
    """Return the settings of base model and adapter that differ from the first job's, whose weights would not fit."""
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
    """Return why a data set has too few rows for a step or the held-out questions; the spec's rules check
    `data.max_rows`."""
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
