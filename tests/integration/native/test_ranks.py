"""Two processes that train together, on a CPU over gloo: what they write is what one writes, and a torn run goes on.

The last ones go through the launcher. `test_trl_ranks` has the engine `trl`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_core.ranks import SILENT_SECONDS
from tests.clock import patience
from tests.integration.children import Run, assert_whole, is_running, wait_for
from tests.integration.native.test_loop import rollouts_of, steps_of
from tests.integration.rank_runs import (
    SPEC,
    Finish,
    Forks,
    Launched,
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

deal, runs_of = lazy("grpo_core.engines.team", "deal runs_of")

LONGER = SPEC | {"training": SPEC["training"] | {"steps": 400}}


@pytest.fixture(scope="module")
def alone(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_alone(finish, tmp_path_factory.mktemp("alone") / "run", SPEC, epoch=1)


@pytest.fixture(scope="module")
def together(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_together(forks, tmp_path_factory.mktemp("together") / "run", SPEC, epoch=1)


def test_two_ranks_write_what_one_writes(alone: Run, together: Run) -> None:
    assert_first_rank_writes(together, alone)


@pytest.mark.parametrize("count", [1, 2])
def test_it_goes_on_from_the_checkpoint_of_two_ranks(
    forks: Forks, finish: Finish, together: Run, tmp_path: Path, count: int
) -> None:
    assert_resumes(forks, finish, together, tmp_path / "again", SPEC, count)


def test_losses_that_count_otherwise_are_the_same_too(forks: Forks, finish: Finish, tmp_path: Path) -> None:
    """By tokens of each part, in two parts, and with more passes; three groups are shared by two ranks."""
    changed = {
        "loss": {"type": "bnpo", "beta": 0.0, "iterations": 2},
        "sampling": SPEC["sampling"] | {"gradient_accumulation": 2},
        "evaluation": {"questions": 0},
    }
    one = train_alone(finish, tmp_path / "one", SPEC | changed)
    two = train_together(forks, tmp_path / "two", SPEC | changed)
    for left, right in zip(steps_of(one), steps_of(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert rollouts_of(one)[:24] == rollouts_of(two)[:24]


def test_an_evaluation_that_ends_training_ends_it_on_both_ranks(forks: Forks, finish: Finish, tmp_path: Path) -> None:
    """The ranks share the questions; each grades by another reward, and only the first one's decides."""
    changed = SPEC | {
        "evaluation": SPEC["evaluation"] | {"every": 1, "metric": "short", "stop_when": {"no_better_for": 1}},
        "rewards": {
            "graders": {"short": {"type": "length", "maximum": 1000}},
            "weights": {"short": 0.0, "correctness": 1.0, "strict_format": 1.0},
        },
    }
    one = train_alone(finish, tmp_path / "one", changed, epoch=1)
    two = train_together(forks, tmp_path / "two", changed, epoch=1)
    for run in (one, two):
        assert [line["step"] for line in run.metrics] == [1, 2]
        found = json.loads(run.folder.report.read_text("utf-8"))["evaluation"]
        assert (found["stopped"]["reason"], found["best_step"]) == ("no_better", 1)
        assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert_same_training(two, one)
    assert [event["type"] for event in two.events] == [event["type"] for event in one.events]


def test_one_rank_that_is_asked_to_stop_stops_both_after_the_same_step(forks: Forks, tmp_path: Path) -> None:
    root = tmp_path / "run"
    longer = SPEC | {"training": SPEC["training"] | {"steps": 400}}
    ranks = start(forks, root, 2, longer)
    wait_for(lambda: (root / "checkpoints" / "step-000002").exists(), ranks[0])
    os.kill(ranks[1].pid or 0, signal.SIGTERM)
    assert end(ranks) == [75, 75]
    steps = len(Run(root, 75).metrics)
    assert (root / "checkpoints" / f"step-{steps:06d}").exists()
    assert len(Run(root / ".ranks" / "1", 75).metrics) == steps


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    with launch(tmp_path, LONGER) as run:
        yield run


@pytest.mark.parametrize(
    ("hurt", "seconds", "message"),
    [
        (signal.SIGKILL, 10, "Rank 1 of 2 was killed by signal 9"),
        # The other one waits for it in a collective.
        pytest.param(signal.SIGSTOP, SILENT_SECONDS + 10, "Rank 1 of 2 sent no heartbeat", marks=pytest.mark.long),
    ],
    ids=["killed", "hung"],
)
def test_a_lost_rank_ends_the_run(launched: Launched, hurt: int, seconds: float, message: str) -> None:
    assert_loss_ends(launched, hurt, seconds, message)


@pytest.mark.long
def test_a_pause_ends_all_ranks_with_a_checkpoint_of_the_last_step(launched: Launched) -> None:
    run, process, ranks = launched
    process.terminate()
    assert process.wait(patience(30)) == 75
    assert_whole(run.folder.checkpoint(len(run.metrics)))
    assert run.of_type("error") == []
    assert not any(is_running(pid) for pid in ranks)


def test_a_cancel_leaves_no_rank(launched: Launched) -> None:
    """The launcher alone is killed, as by whoever misses the others: they die with it."""
    _, process, ranks = launched
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(pid) for pid in ranks), seconds=10)


def test_shares_are_about_equal_and_groups_whole() -> None:
    sizes = [900, 100, 100, 400, 300, 200]
    dealt = deal(sizes, 2)
    assert sorted(dealt[0] + dealt[1]) == list(range(6))
    assert abs(sum(sizes[at] for at in dealt[0]) - sum(sizes[at] for at in dealt[1])) <= 200
    assert deal([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert deal([7], 3) == [[0], [], []]
    assert runs_of("aabbb", 2) == [range(2), range(2, 5)]
    assert runs_of("aabbb", 3) == [range(row, row + 1) for row in range(5)]
