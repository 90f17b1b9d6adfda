"""What a run needs before its child starts: the spec, the data set, the checkpoint to start from or to go on from.

Owns what lies in `spec.json` and `inputs/`. Invariant: nothing here makes a folder after the run's own was removed, so
that a download that was given up leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from grpo_core import strict_json
from grpo_core.datasets import UPLOAD_NAME
from grpo_core.spec import JobSpec
from jobs import journal
from jobs.datasets import DatasetStore
from jobs.errors import NotFound
from jobs.patience import Order, Patience
from jobs.record import JobRecord
from jobs.resumption import Start, find_start
from jobs.storage import ObjectStore

HEEDED: Collection[Order] = ("cancel", "pause", "stop")
"""Nothing is lost by stopping now."""


class Preparation:
    """Fills the folder of one run. Raises `NotFound`, `Damaged`, `DatasetError`, and as `Patience` does."""

    def __init__(self, store: ObjectStore, datasets: DatasetStore, patience: Patience, folder: Path) -> None:
        self._store = store
        self._datasets = datasets
        self._patience = patience
        self._folder = folder
        self._inputs = folder / "inputs"

    def prepare(self, record: JobRecord, spec: JobSpec, epoch: int) -> Start:
        """Write the spec, fetch what it names, and find where the run begins."""
        self._inputs.mkdir(exist_ok=True)
        (self._folder / "spec.json").write_text(strict_json.dumps(spec.as_dict()), encoding="utf-8")
        if spec.data.source in ("upload", "s3"):
            target = self._inputs / UPLOAD_NAME
            self._patience(lambda: self._datasets.fetch(spec.data, record.owner, target), HEEDED)
        accumulation = record.accumulation or None
        start = self._patience(lambda: find_start(self._store, record.id, epoch, self._inputs, accumulation), HEEDED)
        if spec.from_checkpoint is not None and start.base.resumed is None:
            self._fetch_checkpoint(spec.from_checkpoint.job, spec.from_checkpoint.step)
        return start

    def _fetch_checkpoint(self, job_id: str, step: int) -> None:
        """The adapter that the job was told to start from, of this or another job."""
        store, target = self._store, self._inputs / "checkpoint"
        target.mkdir(exist_ok=True)
        prefix = self._patience(lambda: journal.find_checkpoint(store, job_id, step), HEEDED)
        if prefix is None:
            raise NotFound("checkpoint", f"{step} of {job_id}")
        manifest = self._patience(lambda: store.get_json(f"{prefix}manifest.json"), HEEDED) or {"files": []}
        for entry in manifest["files"]:
            name, sha256 = Path(entry["path"]).name, entry["sha256"]
            self._patience(lambda n=name, s=sha256: store.download(prefix + n, target / n, s), HEEDED)
