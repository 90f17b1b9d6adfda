"""When a run counts as stalled."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.worker.stall_detector import StallDetector, StallLimits

LIMITS = StallLimits(factor=10, floor_seconds=20, quiet_seconds=100)


class Run:
    """A run folder and a clock that a test moves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.watch = StallDetector(folder, LIMITS, clock=lambda: self.now)

    def step(self, seconds: float) -> None:
        self.wait(seconds)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        self.watch.look("training")

    def wait(self, seconds: float, phase: str = "training") -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.watch.look(phase)

    def say(self, name: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write("a line\n")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_step_may_take_many_times_the_median(run: Run) -> None:
    for _ in range(5):
        run.step(3)
    run.wait(29.5)
    assert run.watch.stalled() is None
    run.wait(1)
    assert "No step" in (run.watch.stalled() or "")


def test_short_steps_have_the_floor_and_output_is_no_progress(run: Run) -> None:
    for _ in range(5):
        run.step(0.5)
    run.wait(19)
    assert run.watch.stalled() is None
    run.say("stderr.log")
    run.wait(2)
    assert run.watch.stalled()


def test_loading_and_evaluating_have_long_and_every_sign_of_life_counts(run: Run) -> None:
    run.wait(99, "loading")
    run.say("stderr.log")
    run.wait(99, "loading")
    assert run.watch.stalled() is None
    for _ in range(3):
        run.step(0.5)
    run.wait(60, "evaluating")
    run.say("events.jsonl")
    run.wait(99, "evaluating")
    assert run.watch.stalled() is None
    run.wait(3, "evaluating")
    assert "wrote nothing for" in (run.watch.stalled() or "")


def test_the_first_step_has_as_long_as_loading(run: Run) -> None:
    run.wait(99)
    assert run.watch.stalled() is None
    run.step(0.5)
    run.wait(90)
    assert run.watch.stalled() is None, "how long a step takes is not known yet"
    run.step(0.5)
    run.wait(99)
    assert run.watch.stalled() is None, "the only known one took 90 s"


def test_time_asleep_does_not_count(run: Run) -> None:
    for _ in range(5):
        run.step(1)
    run.now += 3600
    run.watch.look("training")
    assert run.watch.stalled() is None
