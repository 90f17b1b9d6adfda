"""A run that is killed and goes on in another process ends as if nothing had happened, to the byte.

The children are real and so is SIGKILL; no service is needed. The data set is small, so that a run goes through it
more than once, in another order each time.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from grpo_core.run_dir.records import read_rollouts
from tests.clock import patience
from tests.integration.children import Run, assert_whole, spawn, spec_with, wait_for

pytestmark = [pytest.mark.timeout(300)]

STEPS, KILLED_AFTER = 6, 3
WEIGHTS = "adapter_model.safetensors"
NOT_REPEATED = {"epoch", "seconds", "completions_per_s"}
"""What a step's metrics say of the process that did it, and not of the step."""

# Twelve rows to train on, three a step: the data set is through after the fourth.
SHORT = {
    "data": {"max_rows": 16},
    "evaluation": {"questions": 4, "max_completion_tokens": 40},
    "optimizer": {"warmup_ratio": 0.0},
}
SPEC = spec_with(**SHORT, training={"steps": STEPS, "checkpoint_every": 1, "save_steps": 1})

Fork = Callable[..., ForkServerProcess]
Finish = Callable[..., Run]


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in NOT_REPEATED} for line in run.metrics]


def rollouts_of(run: Run, *, after: int = 0) -> list[dict[str, Any]]:
    rows = read_rollouts(run.folder.rollouts)
    return [{name: value for name, value in row.items() if name != "epoch"} for row in rows if row["step"] > after]


def adapter_of(run: Run) -> bytes:
    return (run.folder.adapter / WEIGHTS).read_bytes()


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.folder.report.read_text("utf-8"))


def evaluation_of(run: Run) -> dict[str, Any]:
    """The report's, without how long it took."""
    found = report_of(run)["evaluation"]
    for timed in (found["before"], found["after"], *found["curve"]):
        del timed["seconds"]
    return found


def logged(run: Run, code: str) -> list[dict[str, Any]]:
    return [event["data"] for event in run.of_type("log") if event["data"].get("code") == code]


def give(checkpoint: Path, root: Path) -> Path:
    """Put a checkpoint where a worker puts it; returns the new run's folder."""
    shutil.copytree(checkpoint, root / "inputs" / "resume")
    return root


def assert_same_end(run: Run, straight: Run, *, after: int) -> None:
    assert run.exit_code == straight.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert steps_of(run) == steps_of(straight)
    assert rollouts_of(run) == rollouts_of(straight, after=after)
    assert adapter_of(run) == adapter_of(straight)
    assert report_of(run)["reward"] == report_of(straight)["reward"]


@pytest.fixture(scope="module")
def straight_on(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """All steps in one process, on an engine; every checkpoint stays."""

    @functools.cache
    def straight_on(engine: str) -> Run:
        run = finish(tmp_path_factory.mktemp("straight") / "run", SPEC | {"engine": engine}, epoch=1)
        assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
        return run

    return straight_on


@pytest.fixture
def straight(straight_on: Callable[[str], Run]) -> Run:
    return straight_on("auto")


def kill(forks: Fork, root: Path, spec: dict[str, Any]) -> Run:
    """Killed in the step after a checkpoint; with the same spec it would have gone on."""
    process = forks(root, spec, epoch=1)
    wait_for(lambda: (root / "checkpoints" / f"step-{KILLED_AFTER:06d}").exists(), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return Run(root, process.exitcode or 0)


@pytest.mark.parametrize("engine", ["auto", pytest.param("trl", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    straight_on: Callable[[str], Run], forks: Fork, tmp_path: Path, engine: str
) -> None:
    spec = SPEC | {"engine": engine}
    straight, killed = straight_on(engine), kill(forks, tmp_path / "killed", spec)
    assert killed.exit_code == -signal.SIGKILL
    assert not killed.folder.adapter.exists()
    last = max(killed.folder.checkpoints.glob("step-*"))
    step = assert_whole(last)["step"]
    assert KILLED_AFTER <= step < STEPS
    assert any(row["advantage"] for row in rollouts_of(straight, after=step))  # there is something left to learn

    root = give(last, tmp_path / "run")
    # The real command, which shares nothing with the processes before.
    run = Run(root, spawn(root, spec, epoch=2).wait())
    assert run.exit_code == 0, root.with_name("run.log").read_text("utf-8")
    assert_same_end(run, straight, after=step)
    assert evaluation_of(run) == evaluation_of(straight)

    assert {row["epoch"] for row in read_rollouts(run.folder.rollouts)} == {2}
    assert [line["epoch"] for line in run.metrics] == [1] * step + [2] * (STEPS - step)
    assert [data["step"] for data in logged(run, "resumed")] == [step]
    assert report_of(run)["resumed"] == {"epoch": 1, "step": step}
    assert [event["data"]["step"] for event in run.of_type("checkpoint")] == list(range(step + 1, STEPS + 1))
    # The base model's answers are those it gave the first time.
    assert [event["data"]["stage"] for event in run.of_type("evaluation")] == ["after", "selftest"]
    assert [event["seq"] for event in run.events] == list(range(1, len(run.events) + 1))


@pytest.mark.parametrize("step", [2, 4, 5])
def test_it_goes_on_from_the_middle_and_the_end_of_a_pass_through_the_data(
    straight: Run, finish: Finish, tmp_path: Path, step: int
) -> None:
    run = finish(tmp_path / "run", SPEC, "--resume", str(straight.folder.checkpoint(step)))
    assert_same_end(run, straight, after=step)


def test_it_goes_on_between_two_passes_over_the_same_completions(finish: Finish, tmp_path: Path) -> None:
    """The completions, and the masks of dropout, must be those of the process before. Dropout is `trl`'s alone."""
    spec = spec_with(
        data={"max_rows": 6},
        loss={"iterations": 2},
        lora={"dropout": 0.2},
        optimizer={"warmup_ratio": 0.0},
        training={"steps": 6, "checkpoint_every": 1, "save_steps": 1},
    )
    straight = finish(tmp_path / "straight", spec, epoch=1)
    for step in (3, 4):
        run = finish(give(straight.folder.checkpoint(step), tmp_path / f"from-{step}"), spec)
        assert_same_end(run, straight, after=step)
        assert report_of(run)["engine"] == "trl"
        reasons = [data["message"] for one in (straight, run) for data in logged(one, "engine")]
        assert reasons == ["engine: trl (The native engine has no dropout.)", "engine: trl (it wrote the checkpoint)"]


def test_a_run_that_started_from_another_jobs_adapter_goes_on_from_its_own(
    straight: Run, finish: Finish, tmp_path: Path
) -> None:
    spec = spec_with(optimizer={"warmup_ratio": 0.0}, training={"steps": 3})
    for name in ("whole", "again"):
        shutil.copytree(straight.folder.checkpoint(STEPS), tmp_path / name / "inputs" / "checkpoint")
    whole = finish(tmp_path / "whole", spec, epoch=1)
    again = finish(give(whole.folder.checkpoint(2), tmp_path / "again"), spec)
    assert_same_end(again, whole, after=2)


def test_smaller_parts_are_the_same_step(straight_on: Callable[[str], Run], finish: Finish, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    step, straight, spec = STEPS - 1, straight_on("trl"), SPEC | {"engine": "trl"}
    run = finish(give(straight.folder.checkpoint(step), tmp_path / "run"), spec, "--gradient-accumulation", "6")
    assert run.exit_code == 0
    assert rollouts_of(run) == rollouts_of(straight, after=step)
    (told,) = logged(run, "micro_batch")
    assert "6 parts of 2 instead of 2" in told["message"]
    report = report_of(run)
    assert report["settings"]["gradient_accumulation_steps"] == 6
    assert report["settings"]["per_device_train_batch_size"] == 2
    assert report["spec_digest"] == report_of(straight)["spec_digest"]
    # One step of Adam from the same state: sums in another order, and no more.
    found, expected = (load_file(r.folder.adapter / WEIGHTS) for r in (run, straight))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 2e-5
    assert run.metrics[-1]["grad_norm"] == pytest.approx(straight.metrics[-1]["grad_norm"], rel=1e-4)


def test_a_split_that_is_none_is_refused(finish: Finish, tmp_path: Path) -> None:
    run = finish(tmp_path / "run", SPEC, "--gradient-accumulation", "5")
    assert run.exit_code == 10
    said = (tmp_path / "run" / "stderr.log").read_text("utf-8")
    assert said == "--gradient-accumulation 5: a step has 12 completions; use one of 1, 2, 3, 4, 6, 12.\n"
    assert not run.folder.events.exists()


def test_with_all_steps_done_only_the_rest_is_done(straight: Run, finish: Finish, tmp_path: Path) -> None:
    run = finish(give(straight.folder.checkpoint(STEPS), tmp_path / "run"), SPEC)
    assert_same_end(run, straight, after=STEPS)
    assert evaluation_of(run) == evaluation_of(straight)
    assert run.of_type("metric") == run.of_type("checkpoint") == []
    assert run.of_type("evaluation")[-1]["data"]["stage"] == "selftest"


def stop_while_the_adapter_answers() -> None:
    """A request to stop that comes late, with much left to do."""
    from grpo_core.evaluation import held_out

    ask_adapter = held_out.HeldOutEvaluation.ask_adapter

    def ask_and_be_stopped(self: Any, *given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # whoever asks twice is in a hurry, and gets the same
        return ask_adapter(self, *given, **named)

    held_out.FINISH_SECONDS = -1.0
    held_out.HeldOutEvaluation.ask_adapter = ask_and_be_stopped


def test_term_in_a_long_evaluation_loses_no_step(straight: Run, finish: Finish, tmp_path: Path) -> None:
    spec = spec_with(**SHORT, training={"steps": STEPS, "checkpoint_every": 100, "save_steps": 100})
    stopped = finish(tmp_path / "stopped", spec, epoch=1, fault=stop_while_the_adapter_answers)
    assert stopped.exit_code == 75
    assert assert_whole(stopped.folder.checkpoint(STEPS))["step"] == STEPS
    assert not stopped.folder.report.exists()
    assert not (stopped.folder.root / "evaluation.parquet").exists()

    run = finish(give(stopped.folder.checkpoint(STEPS), tmp_path / "run"), spec)
    assert run.exit_code == 0
    assert list(run.folder.rollouts.iterdir()) == []
    assert adapter_of(run) == adapter_of(straight)
    assert evaluation_of(run) == evaluation_of(straight)


def test_checkpoints_by_time_resume_as_those_by_steps_do(straight: Run, finish: Finish, tmp_path: Path) -> None:
    """Each step is longer than the time between two checkpoints, and none is due by its number."""
    training = {"steps": STEPS, "checkpoint_every": STEPS, "save_steps": STEPS, "checkpoint_minutes": 1e-6}
    spec = spec_with(**SHORT, training=training)
    whole = finish(tmp_path / "whole", spec, epoch=1)
    assert [event["data"]["step"] for event in whole.of_type("checkpoint")] == list(range(1, STEPS + 1))
    assert_same_end(whole, straight, after=0)
    run = finish(give(whole.folder.checkpoint(STEPS - 1), tmp_path / "run"), spec)
    assert_same_end(run, straight, after=STEPS - 1)


def test_a_damaged_checkpoint_is_refused(straight: Run, finish: Finish, tmp_path: Path) -> None:
    root = give(straight.folder.checkpoint(2), tmp_path / "run")
    state = root / "inputs" / "resume" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    run = finish(root, SPEC)
    assert (run.exit_code, run.error["class"], run.error["code"]) == (16, "infra", "checkpoint_unreadable")
    assert "state.safetensors" in run.error["message"]
    assert [event["data"]["phase"] for event in run.of_type("status")] == ["preparing"]


def test_a_checkpoint_of_another_spec_is_refused(straight: Run, finish: Finish, tmp_path: Path) -> None:
    spec = spec_with(**SHORT, training={"steps": STEPS, "checkpoint_every": 1, "save_steps": 1, "seed": 1})
    run = finish(give(straight.folder.checkpoint(2), tmp_path / "run"), spec)
    assert (run.exit_code, run.error["class"], run.error["code"]) == (10, "user_config", "checkpoint_unreadable")


def test_other_rows_than_before_are_a_warning(straight: Run, finish: Finish, tmp_path: Path) -> None:
    """As when a data set on the hub has changed in the night."""
    rows = Path(SPEC["data"]["dataset"]).read_text("utf-8").splitlines()[:16]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    spec = SPEC | {"data": SPEC["data"] | {"dataset": str(data)}}
    before = finish(tmp_path / "before", spec, epoch=1)
    data.write_text("\n".join(reversed(rows)) + "\n", encoding="utf-8")
    run = finish(give(before.folder.checkpoint(4), tmp_path / "run"), spec)
    assert run.exit_code == 0
    assert [event["data"]["code"] for event in run.of_type("warning")] == ["format_not_asked", "data_changed"]
    # Nor are the held-out questions the same, so the base model is asked again.
    assert [event["data"]["stage"] for event in run.of_type("evaluation")] == ["before", "after", "selftest"]


def test_usr1_shows_every_stack_and_changes_nothing(forks: Fork, tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = forks(root, spec_with(training={"steps": 5000, "checkpoint_every": 5000, "save_steps": 5000}))
    run = Run(root, 0)
    wait_for(lambda: len(run.metrics) >= 1, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGUSR1)
    # Of every thread: the watch on the parent, and the training itself.
    said = (root / "stderr.log").read_text
    wait_for(lambda: "processes.py" in said("utf-8") and "in train" in said("utf-8"), process)
    done = len(run.metrics)
    wait_for(lambda: len(run.metrics) > done, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(patience(30))
    assert process.exitcode == 75


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few steps and for no checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(small_disk: Path, finish: Finish) -> None:
    run = finish(small_disk / "run", spec_with(training={"steps": 4, "checkpoint_every": 2}))
    assert (run.exit_code, run.error["class"], run.error["code"]) == (16, "infra", "disk_full")
    assert run.error["retryable"]
    assert "Free room" in run.error["hint"]
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert list(run.folder.checkpoints.iterdir()) == []
