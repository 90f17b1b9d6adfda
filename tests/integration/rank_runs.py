"""Runs of two ranks on a CPU over gloo, and what the tests of both engines check of them.

Most are forked as ranks at once, with the libraries loaded; `launch` goes through the launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from grpo_core.ranks import ADDRESS
from tests.clock import patience
from tests.integration.children import MODELS, Run, is_running, prepare, spec_with, wait_for
from tests.integration.native.test_loop import rollouts_of, steps_of
from tests.lazy import lazy

torch = lazy("torch")
load_file = lazy("safetensors.torch", "load_file")

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
Finish = Callable[..., Run]
Spec = dict[str, object]


def become(environment: dict[str, str], fault: Callable[[], None] | None = None) -> None:
    os.environ.update(environment)
    if fault is not None:
        fault()


def start(
    forks: Forks,
    root: Path,
    count: int,
    spec: Spec = SPEC,
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


def train_alone(finish: Finish, root: Path, spec: Spec, **options: object) -> Run:
    run = finish(root, spec, **options)
    assert run.exit_code == 0, (root / "stderr.log").read_text("utf-8")
    return run


def train_together(forks: Forks, root: Path, spec: Spec, **options: object) -> Run:
    assert end(start(forks, root, 2, spec, **options)) == [0, 0], (root / "rank-1.log").read_text("utf-8")
    return Run(root, 0)


def assert_first_rank_writes(together: Run, alone: Run) -> None:
    """Two ranks leave what one leaves, and the second one no completions and no checkpoints."""
    assert_same_training(together, alone)
    assert any(row["advantage"] for row in rollouts_of(together))
    assert [event["type"] for event in together.events] == [event["type"] for event in alone.events]
    theirs = together.folder.of_rank(1)
    assert not list(theirs.rollouts.glob("*"))
    assert not list(theirs.checkpoints.glob("*"))


def assert_resumes(forks: Forks, finish: Finish, together: Run, root: Path, spec: Spec, count: int) -> None:
    """A number of ranks goes on from a checkpoint of two as these did, two of them to the same bytes."""
    shutil.copytree(together.folder.checkpoint(3), root / "inputs" / "resume")
    again = train_alone(finish, root, spec, epoch=2) if count == 1 else train_together(forks, root, spec, epoch=2)
    assert_same_training(again, together, after=3)
    if count == 2:
        assert all(torch.equal(tensor, adapter_of(together)[name]) for name, tensor in adapter_of(again).items())


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


def assert_loss_ends(launched: Launched, hurt: int, seconds: float, message: str) -> None:
    """A run whose second rank gets this signal ends, with all its ranks, and says why."""
    run, process, ranks = launched
    os.kill(ranks[1], hurt)
    assert process.wait(patience(seconds)) == 17
    assert (run.error["code"], run.error["retryable"]) == ("rank_lost", True)
    assert message in run.error["message"]
    assert not any(is_running(pid) for pid in ranks)
