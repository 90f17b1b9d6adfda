"""The run folder: where a training process finds its inputs and writes its results.

Owns its layout, how files are written, and their hashes; their content is in `records` and `checkpoints.manifest`.
Invariant: a file or folder with its final name is complete, because it is written under another name and renamed; logs
alone (`events.jsonl`, `metrics.jsonl`, the process's output) grow in place, line by line.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grpo_core import strict_json


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run; creates nothing by itself."""

    root: Path
    shared: Path | None = None
    """Where spec and inputs are, if elsewhere."""

    @property
    def spec(self) -> Path:
        return (self.shared or self.root) / "spec.json"

    @property
    def inputs(self) -> Path:
        return (self.shared or self.root) / "inputs"

    @property
    def ranks(self) -> Path:
        """What concerns the run's processes alone, and is no result."""
        return self.root / ".ranks"

    def of_rank(self, number: int) -> RunFolder:
        """Where one of the processes that train together writes: the first one here, the others out of its way."""
        return RunFolder(self.ranks / str(number), self.root) if number else self

    @property
    def start_checkpoint(self) -> Path:
        """The adapter to start from, where the job names one."""
        return self.inputs / "checkpoint"

    @property
    def resume(self) -> Path:
        """The checkpoint to resume from, if an earlier run of the job wrote one."""
        return self.inputs / "resume"

    @property
    def adapters(self) -> Path:
        """The adapters to serve or to export, each in a folder by its name, and `adapters.json`."""
        return self.inputs / "adapters"

    @property
    def source(self) -> Path:
        """For an export: `spec.json` and `report.json` of the job that trained the adapter."""
        return self.inputs / "source"

    @property
    def export(self) -> Path:
        """What an export writes."""
        return self.root / "export"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One line for each evaluation before, during and after training."""
        return self.root / "evaluations.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    def rollout(self, step: int) -> Path:
        return self.rollouts / f"step-{step:06d}.parquet"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def create(self) -> None:
        """Make the folders a run writes into."""
        for folder in (self.root, self.rollouts, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def is_used(self) -> bool:
        """Whether a run has begun here: its records are append-only, so a second one would be mixed into them."""
        return self.events.exists() or self.metrics.exists() or self.adapter.exists()


def step_of(path: Path) -> int:
    """The step in a name such as `step-000050` or `step-000123.parquet`."""
    return int(path.name.removeprefix("step-").removesuffix(".parquet"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all, also across a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk its room is what the report of the failure needs
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex, as manifests have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """As `write_bytes`, as one line of strict JSON."""
    write_text(path, strict_json.dumps(value) + "\n")


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """Where to write a file, which takes the name `path` once it is whole and is removed if writing it fails."""
    part = _part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to fill, which takes the name `path` once it is whole and is removed if filling it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():
            # Libraries write some files readable only by their owner; the process that uploads them may
            # be another user.
            file.chmod(0o644)
            sync(file)
        sync(part)
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
