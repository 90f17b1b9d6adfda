"""Two processes that train together, on a CPU over gloo: what they write is what one writes, and a torn run goes on.

Most are forked as ranks at once, with the libraries loaded; the last one goes through the launcher.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from grpo_core.ranks import ADDRESS, SILENT_SECONDS
from tests.clock import patience
from tests.integration.children import MODELS, Run, assert_whole, is_running, prepare, spec_with, wait_for
from tests.integration.native.test_loop import rollouts_of, steps_of
from tests.lazy import lazy

torch = lazy("torch")
load_file = lazy("safetensors.torch", "load_file")
deal, runs_of = lazy("grpo_core.engines.team", "deal runs_of")


STEPS = 4
SPEC = spec_with(
    data={"max_rows": 16},
    evaluation={"questions": 4, "max_completion_tokens": 20},
    optimizer={"warmup_ratio": 0.0},
    loss={"type": "grpo", "beta": 0.04},
    sampling={"gradient_accumulation": 1, "max_completion_tokens": 24},
    training={"steps": STEPS, "checkpoint_every": 1, "save_steps": 1},
) | {"engine": "native"}
ROUNDING = {"loss": 1e-5, "grad_norm": 1e-4, "kl": 1e-5, "entropy": 1e-4}

Forks = Callable[..., ForkServerProcess]


def become(environment: dict[str, str], fault: Callable[[], None] | None = None) -> None:
    os.environ.update(environment)
    if fault is not None:
        fault()


def start(
    forks: Forks,
    root: Path,
    count: int,
    spec: dict[str, object] = SPEC,
    *,
    fault: Callable[[], None] | None = None,
    **options: object,
) -> list[ForkServerProcess]:
    address = (root.parent / f"{root.name}.meeting").as_uri()
    return [
        forks(
            root,
            spec,
            fault=partial(become, {"RANK": str(number), "WORLD_SIZE": str(count), ADDRESS: address}, fault),
            log=f"rank-{number}.log",
            **options,
        )
        for number in range(count)
    ]


def end(ranks: list[ForkServerProcess]) -> list[int | None]:
    for rank in ranks:
        rank.join(180)
    return [rank.exitcode for rank in ranks]


def adapter_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder.adapter / "adapter_model.safetensors")


def assert_same_training(one: Run, other: Run, *, after: int = 0) -> None:
    """Every row equal, and every number but for the order in which it was added up."""
    assert rollouts_of(one, after=after) == rollouts_of(other, after=after)
    for left, right in zip(steps_of(one)[after:], steps_of(other)[after:], strict=True):
        for name, bound in ROUNDING.items():
            assert left[name] == pytest.approx(right[name], abs=bound, rel=bound)
        differing = {name for name in left if left[name] != right[name]}
        assert differing <= {*ROUNDING, "logprob_diff_mean", "logprob_diff_max"}
    for name, tensor in adapter_of(one).items():
        torch.testing.assert_close(tensor, adapter_of(other)[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def alone(finish: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finish(tmp_path_factory.mktemp("alone") / "run", SPEC, epoch=1)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    return run


@pytest.fixture(scope="module")
def together(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("together") / "run"
    assert end(start(forks, root, 2, epoch=1)) == [0, 0], (root / "rank-1.log").read_text("utf-8")
    return Run(root, 0)


def test_two_ranks_write_what_one_writes(alone: Run, together: Run) -> None:
    assert_same_training(together, alone)
    assert any(row["advantage"] for row in rollouts_of(together))
    assert [event["type"] for event in together.events] == [event["type"] for event in alone.events]
    theirs = together.folder.of_rank(1)
    assert not list(theirs.rollouts.glob("*"))
    assert not list(theirs.checkpoints.glob("*"))


@pytest.mark.parametrize("count", [1, 2])
def test_it_goes_on_from_the_checkpoint_of_two_ranks(
    forks: Forks, finish: Callable[..., Run], together: Run, tmp_path: Path, count: int
) -> None:
    root = tmp_path / "again"
    shutil.copytree(together.folder.checkpoint(3), root / "inputs" / "resume")
    codes = end(start(forks, root, count, epoch=2)) if count > 1 else [finish(root, SPEC, epoch=2).exit_code]
    assert codes == [0] * count
    again = Run(root, 0)
    assert_same_training(again, together, after=3)
    if count == 2:
        assert all(torch.equal(tensor, adapter_of(together)[name]) for name, tensor in adapter_of(again).items())


def test_losses_that_count_otherwise_are_the_same_too(forks: Forks, finish: Callable[..., Run], tmp_path: Path) -> None:
    """By tokens of each part, in two parts, and with more passes; three groups are shared by two ranks."""
    changed = {
        "loss": {"type": "bnpo", "beta": 0.0, "iterations": 2},
        "sampling": SPEC["sampling"] | {"gradient_accumulation": 2},
        "evaluation": {"questions": 0},
    }
    one = finish(tmp_path / "one", SPEC | changed)
    assert one.exit_code == 0
    assert end(start(forks, tmp_path / "two", 2, SPEC | changed)) == [0, 0]
    two = Run(tmp_path / "two", 0)
    for left, right in zip(steps_of(one), steps_of(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert rollouts_of(one)[:24] == rollouts_of(two)[:24]


def test_an_evaluation_that_ends_training_ends_it_on_both_ranks(
    forks: Forks, finish: Callable[..., Run], tmp_path: Path
) -> None:
    """The ranks share the questions; each grades by another reward, and only the first one's decides."""
    changed = SPEC | {
        "evaluation": SPEC["evaluation"] | {"every": 1, "metric": "short", "stop_when": {"no_better_for": 1}},
        "rewards": {
            "graders": {"short": {"type": "length", "maximum": 1000}},
            "weights": {"short": 0.0, "correctness": 1.0, "strict_format": 1.0},
        },
    }
    one = finish(tmp_path / "one", changed, epoch=1)
    assert one.exit_code == 0, (one.folder.root / "stderr.log").read_text("utf-8")
    assert end(start(forks, tmp_path / "two", 2, changed, epoch=1)) == [0, 0]
    two = Run(tmp_path / "two", 0)
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


LONGER = SPEC | {"training": SPEC["training"] | {"steps": 400}}


Launched = tuple[Run, subprocess.Popen[bytes], list[int]]


@contextmanager
def launch(tmp_path: Path, spec: dict[str, object]) -> Generator[Launched]:
    """A run by the command, in a process group as a worker makes it, after its second step; and its ranks' pids."""
    root = tmp_path / "run"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_core", *prepare(root, spec, "--ranks", "2", epoch=1)],
            stdout=log,
            stderr=log,
            env={**os.environ, "GRPO_MODEL_DIR": str(MODELS), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        wait_for(lambda: (root / "checkpoints" / "step-000002").exists(), process, seconds=240)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(ranks) == 2
        yield Run(root, 0), process, [int(pid) for pid in ranks]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
    run, process, ranks = launched
    os.kill(ranks[1], hurt)
    assert process.wait(patience(seconds)) == 17
    assert (run.error["code"], run.error["retryable"]) == ("rank_lost", True)
    assert message in run.error["message"]
    assert not any(is_running(pid) for pid in ranks)


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
