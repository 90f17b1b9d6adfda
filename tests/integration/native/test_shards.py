"""Two processes that share the base out, over gloo: they write the bytes of two that each hold all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.children import Run
from tests.integration.native.test_loop import rollouts_of, steps_of
from tests.integration.rank_runs import SPEC, adapter_of, assert_same_training, become, end
from tests.lazy import lazy

ADDRESS = "GRPO_RANKS_ADDRESS"
torch = lazy("torch")

FULL = SPEC | {
    "model": SPEC["model"] | {"sharding": "full"},
    "resources": SPEC["resources"] | {"hosts": 2},
    "evaluation": SPEC["evaluation"] | {"every": 2},
}
OTHERWISE = {
    "loss": {"type": "bnpo", "beta": 0.0, "iterations": 2},
    "sampling": SPEC["sampling"] | {"gradient_accumulation": 2},
    "lora": SPEC["lora"] | {"gradient_checkpointing": "standard"},
    "evaluation": {"questions": 0},
}
"""By tokens of each part, in two parts, and with more passes."""

Forks = Callable[..., ForkServerProcess]


def become_rank(environment: dict[str, str], shared: bool, tokens: int) -> None:
    from grpo_core.engines.native import engine

    become(environment)
    engine.CPU_TOKENS = tokens  # pyright: ignore[reportAttributeAccessIssue]
    if not shared:
        vars(engine)["NativeEngine"]._is_sharded = lambda *_: False


def run_ranks(
    forks: Forks,
    root: Path,
    spec: dict[str, Any] = FULL,
    *,
    count: int = 2,
    shared: bool = True,
    tokens: int = 8192,
    epoch: int = 1,
) -> Run:
    """Run two processes with one spec, that share the base out or not; `tokens` are those of a pass."""
    address = (root.parent / f"{root.name}.meeting").as_uri()
    ranks = [
        forks(
            root,
            spec,
            fault=partial(
                become_rank, {"RANK": str(number), "WORLD_SIZE": str(count), ADDRESS: address}, shared, tokens
            ),
            log=f"rank-{number}.log",
            epoch=epoch,
        )
        for number in range(count)
    ]
    codes = end(ranks)
    assert codes == [0] * count, [(root / f"rank-{number}.log").read_text("utf-8")[-3000:] for number in range(count)]
    return Run(root, 0)


def assert_same_bytes(one: Run, other: Run, *, after: int = 0) -> None:
    assert rollouts_of(one, after=after) == rollouts_of(other, after=after)
    assert steps_of(one)[after:] == steps_of(other)[after:]
    tensors = adapter_of(other)
    assert adapter_of(one).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_of(one).items())


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.folder.report.read_text("utf-8"))


@pytest.fixture(scope="module")
def shared(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_ranks(forks, tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_ranks(forks, tmp_path_factory.mktemp("whole") / "run", shared=False)


def test_ranks_that_share_the_base_write_what_ranks_write_that_do_not(shared: Run, whole: Run) -> None:
    """With the KL term, evaluations, the checksum of the base and the self-test."""
    assert_same_bytes(shared, whole)
    assert any(row["advantage"] for row in rollouts_of(shared))
    one, other = report_of(shared), report_of(whole)
    assert (one["sharding"], other.get("sharding")) == ("full", None)
    for part in ("before", "after", "samples"):
        assert _timeless(one["evaluation"][part]) == _timeless(other["evaluation"][part])
    assert _timeless(one["selftest"]) == _timeless(other["selftest"])
    assert one["selftest"]["peft"]["mean"] < 1e-5
    assert "full" in next(
        event["data"]["message"] for event in shared.events if event["data"].get("code") == "sharding"
    )


def _timeless(found: Any) -> Any:
    return {name: value for name, value in found.items() if "seconds" not in name} if isinstance(found, dict) else found


@pytest.mark.parametrize(("count", "shares"), [(2, True), (2, False), (1, True)], ids=["shared", "whole", "one rank"])
def test_a_checkpoint_resumes_however_the_base_is_held(
    forks: Forks, shared: Run, whole: Run, tmp_path: Path, count: int, shares: bool
) -> None:
    root = tmp_path / "again"
    wrote = whole if shares and count == 2 else shared
    shutil.copytree(wrote.folder.checkpoint(3), root / "inputs" / "resume")
    again = run_ranks(forks, root, count=count, shared=shares, epoch=2)
    assert not [event for event in again.of_type("warning") if event["data"]["code"] == "base_differs"]
    if count == 1:
        assert_same_training(again, shared, after=3)
    else:
        assert_same_bytes(again, shared, after=3)


def test_ranks_that_make_unequal_numbers_of_passes_stay_in_step(forks: Forks, tmp_path: Path) -> None:
    """Three groups for two ranks, a pass for each completion; two parts a step, layers computed again."""
    one = run_ranks(forks, tmp_path / "one", FULL | OTHERWISE, tokens=60)
    other = run_ranks(forks, tmp_path / "other", FULL | OTHERWISE, tokens=60, shared=False)
    assert_same_bytes(one, other)


def test_a_trial_ends_on_both_ranks(forks: Forks, tmp_path: Path) -> None:
    trial = {name: value for name, value in FULL.items() if name not in ("evaluation", "training")}
    run = run_ranks(forks, tmp_path / "run", trial | {"kind": "try", "trial": {"rows": 6}})
    assert report_of(run)["trial"]["completions"] == 24
