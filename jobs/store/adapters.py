"""Finds the adapters of a job in the bucket: its best or last one, and those of its checkpoints.

Owns which objects make up an adapter; `list_checkpoints` knows the checkpoints. Invariant: every file is named with the
SHA-256 that a manifest of the job has for it, and only the two files of PEFT's format are named, not the others in a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from jobs.store.bucket import ObjectStore
from jobs.store.checkpoints import Checkpoint, CheckpointFile, list_checkpoints
from jobs.store.write_once import WriteOnceStore

WEIGHTS: Final = "adapter_model.safetensors"
FILES: Final = ("adapter_config.json", WEIGHTS)
_FINAL: Final = "adapter/"


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One adapter in the bucket."""

    step: int | None
    """The checkpoint's step; None for the adapter at the end of training."""
    files: tuple[CheckpointFile, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)


class AdapterFinder:
    """The adapters of one job, as they were when it was first asked."""

    def __init__(self, store: ObjectStore, job_id: str, best_step: int | None, manifest: str | None) -> None:
        """`manifest` is the key of the job's manifest; None while it has none."""
        self._store, self._job_id = store, job_id
        self._best_step, self._manifest = best_step, manifest

    def steps(self) -> list[int]:
        """Return the steps of checkpoints that have an adapter, in order."""
        return sorted(self._by_step)

    def at(self, step: int) -> StoredAdapter | None:
        """Return the adapter of a checkpoint; None if it was not kept."""
        return self._by_step.get(step)

    def main(self) -> StoredAdapter | None:
        """Return the best adapter by the job's evaluations, else the last one; None before the first checkpoint.

        Without evaluations, an ended job's is the one at the end of training.
        """
        if self._best_step is not None and self._best_step in self._by_step:
            return self._by_step[self._best_step]
        if self._final is not None:
            return self._final
        return self._by_step[max(self._by_step)] if self._by_step else None

    @cached_property
    def _by_step(self) -> dict[int, StoredAdapter]:
        found = list_checkpoints(self._store, self._job_id)
        adapters = {checkpoint.step: _of_checkpoint(checkpoint) for checkpoint in found}
        return {step: adapter for step, adapter in adapters.items() if adapter is not None}

    @cached_property
    def _final(self) -> StoredAdapter | None:
        manifest = WriteOnceStore(self._store).manifest(self._manifest) if self._manifest else None
        if manifest is None:
            return None
        return _of_files(
            None,
            (
                CheckpointFile(path=entry.name, key=entry.key, size=entry.size, sha256=entry.sha256)
                for entry in manifest.objects
                if entry.path == _FINAL + entry.name
            ),
        )


def _of_checkpoint(checkpoint: Checkpoint) -> StoredAdapter | None:
    return _of_files(checkpoint.step, checkpoint.files)


def _of_files(step: int | None, files: Iterable[CheckpointFile]) -> StoredAdapter | None:
    """Return the adapter among these files; None if one of its files is missing."""
    kept = {file.path: file for file in files if file.path in FILES}
    return StoredAdapter(step=step, files=tuple(kept[name] for name in FILES)) if len(kept) == len(FILES) else None
