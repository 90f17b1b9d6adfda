"""Rollouts as a worker leaves them in the bucket, made by hand for the tests and the benchmark of reading them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

from grpo_core.run_dir.records import Completion, write_rollouts
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.write_once import ManifestEntry
from jobs.worker import rollout_compaction

WEIGHTS = {"correctness": 2.0, "integer": 0.5, "strict_format": 0.5, "soft_format": 0.5, "xml_count": 0.5}
_WORDS = ["".join(random.Random(n).choices("etaoinshrdlucmfw", k=2 + n % 8)) for n in range(3000)]


def completions(step: int, *, prompts: int, group: int, words: int = 150, of: int = 400) -> list[Completion]:
    """A step's completions: groups of equal prompts, drawn from `of`, with made-up texts of so many words."""
    draw = random.Random(f"step {step}")
    made: list[Completion] = []
    for row in draw.sample(range(of), prompts):
        for sample in range(group):
            rewards = {name: draw.choice([0.0, weight]) for name, weight in WEIGHTS.items()}
            made.append(
                Completion(
                    prompt_id=f"{row:08x}",
                    row=row,
                    sample=sample,
                    seed=step * 1000 + row,
                    prompt=" ".join(random.Random(row).choices(_WORDS, k=30)),
                    answer=str(row),
                    completion=f"<reasoning>\n{' '.join(draw.choices(_WORDS, k=words))}\n</reasoning>\n"
                    f"<answer>\n{draw.randrange(999)}\n</answer>\n",
                    rewards=rewards,
                    reward_total=sum(rewards.values()),
                    advantage=round(draw.gauss(0, 1), 3),
                    prompt_tokens=100,
                    completion_tokens=draw.randrange(100, 200),
                    finish_reason=draw.choice(["stop", "stop", "length"]),
                    adapter_version=step - 1,
                )
            )
    return made


def broken(completion: Completion, reward: float = math.nan) -> Completion:
    """The same, with a reward function that paid no finite number."""
    rewards = {**completion.rewards, "xml_count": reward}
    return replace(completion, rewards=rewards, reward_total=reward, advantage=math.nan)


class RunOfRollouts:
    """What one epoch of a job has put into the bucket; `folder` is the run's own."""

    def __init__(self, store: ObjectStore, job_id: str, epoch: int, folder: Path) -> None:
        self._store, self._epoch = store, epoch
        self._prefix = object_keys.run(job_id, epoch)
        self._folder = folder / "rollouts"
        self._folder.mkdir(parents=True)
        self.sent: dict[str, ManifestEntry] = {}

    def step(self, step: int, drawn: list[Completion]) -> None:
        """A step is done: its file goes up."""
        path = self._folder / f"step-{step:06d}.parquet"
        write_rollouts(path, drawn, step=step, epoch=self._epoch)
        self._send(path)

    def merge(self, up_to: int | None = None) -> None:
        """A checkpoint is done: the steps so far become a part, and their files go."""
        merged = rollout_compaction.merge(self._folder, up_to)
        assert merged is not None, "there is nothing to merge"
        part, replaced = merged
        self._send(part)
        for path in replaced:
            entry = self.sent.pop(f"rollouts/{path.name}")
            self._store.delete(entry.key)
            path.unlink()

    def _send(self, path: Path) -> None:
        name = f"rollouts/{path.name}"
        sha256, size = self._store.upload(path, self._prefix + name)
        self.sent[name] = ManifestEntry(path=name, key=self._prefix + name, sha256=sha256, size=size)
