"""The engine `trl` in two processes that train together, on a CPU over gloo: what they write is what one writes, and a
torn run goes on.

What the launcher does is tested in `test_ranks`, and what both engines share in `native/test_ranks` too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_core.ranks import SILENT_SECONDS
from tests.integration.children import Run, assert_whole, wait_for
from tests.integration.native.test_loop import rollouts_of, steps_of
from tests.integration.rank_runs import SPEC as NATIVE
from tests.integration.rank_runs import (
    Finish,
    Forks,
    Launched,
    adapter_of,
    assert_first_rank_writes,
    assert_loss_ends,
    assert_resumes,
    assert_same_training,
    end,
    launch,
    start,
    train_alone,
    train_together,
)
from tests.lazy import lazy

torch = lazy("torch")

SPEC: dict[str, Any] = NATIVE | {"engine": "trl"}


@pytest.fixture(scope="module")
def alone(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_alone(finish, tmp_path_factory.mktemp("alone") / "run", SPEC, epoch=1)


@pytest.fixture(scope="module")
def together(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_together(forks, tmp_path_factory.mktemp("together") / "run", SPEC, epoch=1)


def test_two_ranks_write_what_one_writes(alone: Run, together: Run) -> None:
    assert_first_rank_writes(together, alone)
    rows = rollouts_of(together)
    assert len({row["seed"] for row in rows}) == len(rows)
    reports = [json.loads(run.folder.report.read_text("utf-8")) for run in (together, alone)]
    assert [(report["engine"], report["ranks"]) for report in reports] == [("trl", 2), ("trl", 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_it_goes_on_from_the_checkpoint_of_two_ranks(
    forks: Forks, finish: Finish, together: Run, tmp_path: Path, count: int
) -> None:
    assert_resumes(forks, finish, together, tmp_path / "again", SPEC, count)


def test_two_ranks_go_on_from_the_checkpoint_of_one(forks: Forks, alone: Run, tmp_path: Path) -> None:
    root = tmp_path / "again"
    shutil.copytree(alone.folder.checkpoint(3), root / "inputs" / "resume")
    assert_same_training(train_together(forks, root, SPEC, epoch=2), alone, after=3)


@pytest.mark.parametrize("kind", ["bnpo", pytest.param("dapo", marks=pytest.mark.long)])
def test_losses_that_count_otherwise_are_the_same_too(forks: Forks, finish: Finish, tmp_path: Path, kind: str) -> None:
    """By tokens, in parts, with more passes, filters and a penalty; rows are shared unevenly."""
    changed = SPEC | {
        "loss": {"type": kind, "beta": 0.04, "iterations": 2},
        "sampling": SPEC["sampling"]
        | {"gradient_accumulation": 4, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "temperature": 0.9},
        "evaluation": {"questions": 0},
    }
    one = train_alone(finish, tmp_path / "one", changed)
    two = train_together(forks, tmp_path / "two", changed)
    for left, right in zip(steps_of(one), steps_of(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert rollouts_of(one) == rollouts_of(two)


LONGER: dict[str, Any] = SPEC | {"training": SPEC["training"] | {"steps": 400}}


@pytest.mark.long
def test_a_pause_saves_and_what_follows_is_as_without_it(forks: Forks, tmp_path: Path) -> None:
    """One rank is asked to stop; both stop after the same step, and go on to the bytes of a run that never stopped."""
    root = tmp_path / "run"
    ranks = start(forks, root, 2, LONGER)
    wait_for(lambda: (root / "checkpoints" / "step-000002").exists(), ranks[0])
    os.kill(ranks[1].pid or 0, signal.SIGTERM)
    assert end(ranks) == [75, 75]
    steps = len(Run(root, 75).metrics)
    assert_whole(root / "checkpoints" / f"step-{steps:06d}")
    assert len(Run(root / ".ranks" / "1", 75).metrics) == steps
    whole = LONGER | {"training": SPEC["training"] | {"steps": steps + 2}}
    straight, again = tmp_path / "straight", tmp_path / "again"
    assert end(start(forks, straight, 2, whole)) == [0, 0]
    assert rollouts_of(Run(straight, 0))[: steps * 12] == rollouts_of(Run(root, 75))
    shutil.copytree(straight / "checkpoints" / f"step-{steps:06d}", again / "inputs" / "resume")
    assert end(start(forks, again, 2, whole)) == [0, 0]
    adapters = [adapter_of(Run(folder, 0)) for folder in (straight, again)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    with launch(tmp_path, LONGER) as run:
        yield run


@pytest.mark.long
@pytest.mark.parametrize(
    ("hurt", "seconds", "message"),
    [
        (signal.SIGKILL, 10, "Rank 1 of 2 was killed by signal 9"),
        # The other one waits for it in an exchange.
        (signal.SIGSTOP, SILENT_SECONDS + 10, "Rank 1 of 2 sent no heartbeat"),
    ],
    ids=["killed", "hung"],
)
def test_a_lost_rank_ends_the_run(launched: Launched, hurt: int, seconds: float, message: str) -> None:
    assert_loss_ends(launched, hurt, seconds, message)
