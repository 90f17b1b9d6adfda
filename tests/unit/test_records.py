"""What a run writes down can be read back, whole lines only, and numbers that are no numbers end the run."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_core.errors import FailureReport, JobFailure
from grpo_core.evaluation.paired_stats import ends_of
from grpo_core.monitoring.step_recorder import MAX_SAMPLE_CHARACTERS, StepRecorder, Update
from grpo_core.rewards import REWARD_NAMES
from grpo_core.run_dir.layout import RunFolder, new_folder, step_of, write_json
from grpo_core.run_dir.records import (
    RECORD_VERSION,
    Completion,
    EventWriter,
    MetricsWriter,
    read_jsonl,
    read_rollouts,
    write_rollouts,
)
from grpo_core.spec import JobSpec, parse_spec


def completion(sample: int = 0, total: float = 0.0, text: str = "答案是12。") -> Completion:
    return Completion(
        prompt_id="7",
        row=7,
        sample=sample,
        seed=2**62,
        prompt="6+6=?",
        answer="12",
        completion=text,
        rewards=dict.fromkeys(REWARD_NAMES, 0.0) | {"correctness": total},
        reward_total=total,
        advantage=0.5,
        prompt_tokens=9,
        completion_tokens=3 + sample,
        finish_reason="stop",
        adapter_version=0,
    )


def update(
    step: int, *, loss: float = 0.1, grad_norm: float = 1.0, difference: tuple[float, float] | None = None
) -> Update:
    mean, most = difference or (None, None)
    return Update(
        logprob_diff_mean=mean,
        logprob_diff_max=most,
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=1e-3,
        kl=None,
        entropy=0.5,
        seconds=2.0,
        gpu_memory_gb=None,
    )


class Run:
    """A recorder over a folder, as `training` sets it up."""

    def __init__(self, root: Path, **spec: object) -> None:
        self.spec: JobSpec = parse_spec({"sampling": {"generations": 2}, **spec})
        self.folder = RunFolder(root)
        self.folder.create()
        self._events = EventWriter(self.folder.events, epoch=3)
        self._metrics = MetricsWriter(self.folder.metrics, epoch=3)
        self.recorder = StepRecorder(
            spec=self.spec, folder=self.folder, events=self._events, metrics=self._metrics, epoch=3
        )

    def close(self) -> None:
        self._events.close()
        self._metrics.close()

    def step(self, number: int, *totals: float) -> None:
        group = [completion(sample, total) for sample, total in enumerate(totals)]
        self.recorder.record_rollout(number, group, generation_seconds=1.0, reward_seconds=0.25)
        self.recorder.record_update(update(number))

    def events(self, type_: str) -> list[dict[str, object]]:
        return [event["data"] for event in read_jsonl(self.folder.events) if event["type"] == type_]


NewRun = Callable[..., Run]


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[NewRun]:
    runs: list[Run] = []

    def make(**spec: object) -> Run:
        runs.append(Run(tmp_path, **spec))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def test_events_are_numbered_in_file_order_from_several_threads(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "events.jsonl", epoch=2)
    threads = [threading.Thread(target=lambda: [writer.log("答案") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    events = list(read_jsonl(tmp_path / "events.jsonl"))
    assert [event["seq"] for event in events] == list(range(1, 201))
    assert {(event["v"], event["epoch"], event["type"]) for event in events} == {(RECORD_VERSION, 2, "log")}


def test_an_error_event_has_the_public_names(tmp_path: Path) -> None:
    with closing(EventWriter(tmp_path / "events.jsonl", epoch=1)) as writer:
        writer.error(FailureReport(failure_class="oom", code="out_of_memory", message="m", hint="h"), step=4)
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert event["step"] == 4
    assert event["data"] == {"code": "out_of_memory", "class": "oom", "message": "m", "hint": "h", "retryable": False}


def test_a_log_event_has_a_code_where_programs_look_for_it(tmp_path: Path) -> None:
    with closing(EventWriter(tmp_path / "events.jsonl", epoch=2)) as events:
        events.log("hello")
        events.log("goes on", code="resumed", step=25)
        assert events.last == 2
    plain, coded = read_jsonl(tmp_path / "events.jsonl")
    assert (plain["data"], plain["step"]) == ({"message": "hello"}, None)
    assert (coded["data"], coded["step"]) == ({"code": "resumed", "message": "goes on", "step": 25}, 25)


def test_metrics_of_the_steps_before_are_taken_over_as_they_were(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    run.step(1, 0.0, 1.0)
    run.step(2, 0.0, 1.0)
    with closing(MetricsWriter(tmp_path / "next.jsonl", epoch=9)) as metrics:
        metrics.take_over(read_jsonl(run.folder.metrics))
    assert (tmp_path / "next.jsonl").read_bytes() == run.folder.metrics.read_bytes()


def test_a_file_that_does_not_fit_the_disk_leaves_its_room_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "report.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"seq":1}\n{"seq":2', encoding="utf-8")
    assert [event["seq"] for event in read_jsonl(path)] == [1]
    assert list(read_jsonl(tmp_path / "absent.jsonl")) == []


def test_nan_is_never_written(tmp_path: Path) -> None:
    with closing(EventWriter(tmp_path / "events.jsonl", epoch=1)) as writer, pytest.raises(ValueError):
        writer.emit("metric", {"loss": math.nan})


def test_rollouts_keep_every_column(new_run: NewRun) -> None:
    run = new_run()
    run.step(1, 0.0, 2.0)
    (first, second) = read_rollouts(run.folder.rollout(1))
    assert (first["step"], first["epoch"], first["prompt_id"], first["row"], first["seed"]) == (1, 3, "7", 7, 2**62)
    assert (second["sample"], second["reward_correctness"], second["reward_total"]) == (1, 2.0, 2.0)
    assert list(first) == [
        *("step", "epoch", "prompt_id", "row", "sample", "seed", "prompt", "answer", "completion"),
        *(f"reward_{name}" for name in REWARD_NAMES),
        *("reward_total", "advantage", "prompt_tokens", "completion_tokens", "finish_reason", "adapter_version"),
    ]
    assert [path.name for path in run.folder.rollouts.iterdir()] == ["step-000001.parquet"]


def test_a_folder_of_rollouts_reads_in_step_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    for step in (10, 2):
        write_rollouts(folder.rollout(step), [completion()], step=step, epoch=1)
    assert [row["step"] for row in read_rollouts(tmp_path / "rollouts")] == [2, 10]


def test_metrics_join_the_rollout_and_the_update(new_run: NewRun) -> None:
    run = new_run()
    run.step(1, 0.0, 2.0)
    (line,) = read_jsonl(run.folder.metrics)
    assert (line["v"], line["epoch"], line["step"]) == (RECORD_VERSION, 3, 1)
    assert line["reward"] == 1.0
    assert line["reward_std"] == pytest.approx(math.sqrt(2))
    assert line["rewards"]["correctness"] == 1.0
    assert line["zero_variance_share"] == 0.0
    assert (line["completion_tokens_mean"], line["completion_tokens_min"], line["completion_tokens_max"]) == (3.5, 3, 4)
    assert line["seconds"] == {"generation": 1.0, "reward": 0.25, "update": 0.75, "total": 2.0}
    assert (line["kl"], line["completions_per_s"], line["gpu_memory_gb"]) == (None, 1.0, None)
    assert run.events("metric") == [{key: value for key, value in line.items() if key not in ("v", "epoch")}]


def test_a_second_pass_over_the_same_completions_costs_no_generation(new_run: NewRun) -> None:
    run = new_run()
    run.step(1, 0.0, 2.0)
    run.recorder.record_update(update(2))
    second = list(read_jsonl(run.folder.metrics))[1]
    assert (second["reward"], second["seconds"]["generation"]) == (1.0, 0.0)


def test_metric_events_follow_log_every_and_never_miss_the_last_step(new_run: NewRun) -> None:
    run = new_run(training={"steps": 5, "log_every": 2})
    for step in range(1, 6):
        run.step(step, 0.0, 1.0)
    assert [event["step"] for event in run.events("metric")] == [2, 4, 5]
    assert len(run.events("sample")) == 3
    assert len(list(read_jsonl(run.folder.metrics))) == 5


def test_a_long_sample_is_cut_in_the_event_only(new_run: NewRun) -> None:
    run = new_run()
    group = [replace(completion(sample), completion="长" * 5000) for sample in range(2)]
    run.recorder.record_rollout(1, group, generation_seconds=0, reward_seconds=0)
    run.recorder.record_update(update(1))
    (sample,) = run.events("sample")
    assert len(str(sample["completion"])) == MAX_SAMPLE_CHARACTERS
    assert len(read_rollouts(run.folder.rollout(1))[0]["completion"]) == 5000


def test_steps_without_any_variance_end_the_run_only_in_a_row(new_run: NewRun) -> None:
    run = new_run(guards={"no_signal_steps": 2})
    run.step(1, 1.0, 1.0)
    run.step(2, 0.0, 1.0)
    run.step(3, 1.0, 1.0)
    with pytest.raises(JobFailure) as failure:
        run.step(4, 1.0, 1.0)
    assert (failure.value.report.failure_class, failure.value.exit_code) == ("no_signal", 14)
    assert len(list(read_jsonl(run.folder.metrics))) == 4


def test_the_signal_guard_can_be_off(new_run: NewRun) -> None:
    run = new_run(guards={"no_signal_steps": 0})
    for step in range(1, 200):
        run.recorder.record_rollout(step, [completion(0), completion(1)], generation_seconds=0, reward_seconds=0)
        run.recorder.record_update(update(step))


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"grad_norm": math.inf}])
def test_numbers_that_are_not_finite_end_the_run(new_run: NewRun, bad: dict[str, float]) -> None:
    run = new_run()
    run.recorder.record_rollout(1, [completion(0), completion(1)], generation_seconds=0, reward_seconds=0)
    with pytest.raises(JobFailure) as failure:
        run.recorder.record_update(update(1, **bad))
    assert failure.value.exit_code == 15
    assert list(read_jsonl(run.folder.metrics)) == []


def with_updates(run: Run, updates: Sequence[Update]) -> int:
    """Record updates of the same completions; returns how many there were before one ended the run as diverged."""
    run.recorder.record_rollout(1, [completion(0), completion(1, 1.0)], generation_seconds=0, reward_seconds=0)
    for done, one in enumerate(updates):
        try:
            run.recorder.record_update(one)
        except JobFailure as failure:
            return done if failure.exit_code == 15 else -1
    return len(updates)


@pytest.mark.parametrize(
    ("usual", "later", "ended_at"),
    [
        ({"grad_norm": 0.5}, {"grad_norm": 5001.0}, 14),
        ({"grad_norm": 0.5}, {"grad_norm": 4999.0}, None),
        ({"loss": -0.02}, {"loss": -201.0}, 14),
        # Next to nothing is the usual loss of a policy that has hardly moved.
        ({"loss": 1e-9}, {"loss": 99.0}, None),
        ({"loss": 1e-9}, {"loss": 101.0}, 14),
    ],
)
def test_numbers_that_run_away_end_the_run(
    new_run: NewRun, usual: dict[str, float], later: dict[str, float], ended_at: int | None
) -> None:
    updates = [update(step, **(usual if step <= 10 else later)) for step in range(1, 21)]
    assert with_updates(new_run(), updates) == (20 if ended_at is None else ended_at)


def test_a_spike_is_no_runaway(new_run: NewRun) -> None:
    updates = [update(step, grad_norm=1e9 if step > 10 and step % 5 else 0.5) for step in range(1, 40)]
    assert with_updates(new_run(), updates) == 39


def test_the_runaway_guard_can_be_set_and_be_off(new_run: NewRun) -> None:
    updates = [update(step, grad_norm=0.5 if step <= 10 else 2.0) for step in range(1, 21)]
    assert with_updates(new_run(guards={"runaway_factor": 3}), updates) == 14
    assert with_updates(new_run(guards={"runaway_factor": 0}), updates) == 20


def test_rollouts_of_another_policy_warn_once_and_then_end_the_run(new_run: NewRun) -> None:
    run = new_run()
    steps = [(0.019, 1.0), (0.021, 1.0), (0.05, 2.0), (0.099, 3.0), (0.101, 3.0)]
    assert with_updates(run, [update(step, difference=pair) for step, pair in enumerate(steps, start=1)]) == 4
    assert [warning["code"] for warning in run.events("warning")] == ["rollouts_differ"]
    lines = list(read_jsonl(run.folder.metrics))
    assert [(line["logprob_diff_mean"], line["logprob_diff_max"]) for line in lines] == steps


def test_the_bound_between_rollouts_and_trainer_can_be_set_and_be_off(new_run: NewRun) -> None:
    one = [update(1, difference=(0.3, 1.0))]
    assert with_updates(new_run(guards={"max_logprob_diff": 0.2}), one) == 0
    assert with_updates(new_run(guards={"max_logprob_diff": 0}), one) == 1
    assert with_updates(new_run(), [update(1, difference=(math.nan, 1.0))]) == 0


def test_where_rollouts_are_the_trainers_own_there_is_no_difference(new_run: NewRun) -> None:
    run = new_run()
    run.step(1, 0.0, 1.0)
    (line,) = read_jsonl(run.folder.metrics)
    assert (line["logprob_diff_mean"], line["logprob_diff_max"]) == (None, None)


def test_a_run_that_goes_on_is_guarded_as_if_it_had_not_stopped(new_run: NewRun, tmp_path: Path) -> None:
    before = new_run(guards={"no_signal_steps": 4, "runaway_factor": 100.0})
    for step in range(1, 12):
        before.step(step, 1.0, 1.0 if step > 8 else 0.0)
    lines, state = list(read_jsonl(before.folder.metrics)), json.loads(json.dumps(before.recorder.state()))

    after = Run(tmp_path / "after", guards={"no_signal_steps": 4, "runaway_factor": 100.0})
    after.recorder.go_on(lines, state)
    assert after.recorder.latest_completions() == before.recorder.latest_completions()
    assert after.recorder.reward_summary() == before.recorder.reward_summary()
    with pytest.raises(JobFailure) as caught:  # the fourth in a row, and the first of this run
        after.step(12, 1.0, 1.0)
    assert caught.value.report.code == "no_reward_variance"
    after.close()


def test_a_runaway_is_counted_over_a_stop(new_run: NewRun, tmp_path: Path) -> None:
    before = new_run()
    for step in range(1, 14):
        before.step(step, 0.0, 1.0)
    lines = [line | ({"grad_norm": 1e6} if line["step"] > 10 else {}) for line in read_jsonl(before.folder.metrics)]
    after = Run(tmp_path / "after")
    after.recorder.go_on(lines, before.recorder.state())
    group = [completion(sample, float(sample)) for sample in range(2)]
    after.recorder.record_rollout(14, group, generation_seconds=1.0, reward_seconds=0.0)
    after.recorder.record_update(update(14, grad_norm=1e6))
    after.recorder.record_rollout(15, group, generation_seconds=1.0, reward_seconds=0.0)
    with pytest.raises(JobFailure) as caught:
        after.recorder.record_update(update(15, grad_norm=1e6))
    assert caught.value.report.code == "runaway"
    with pytest.raises(JobFailure) as not_finite:
        after.recorder.record_update(update(16, loss=math.nan))
    assert not_finite.value.report.code == "not_finite"
    after.close()


def test_a_mismatch_is_warned_of_once_over_a_stop(new_run: NewRun, tmp_path: Path) -> None:
    before = new_run(guards={"max_logprob_diff": 0.1})
    group = [completion(sample, float(sample)) for sample in range(2)]
    before.recorder.record_rollout(1, group, generation_seconds=1.0, reward_seconds=0.0)
    before.recorder.record_update(update(1, difference=(0.05, 0.1)))
    after = Run(tmp_path / "after", guards={"max_logprob_diff": 0.1})
    after.recorder.go_on(list(read_jsonl(before.folder.metrics)), before.recorder.state())
    after.recorder.record_update(update(2, difference=(0.05, 0.1)))
    assert [event["code"] for event in before.events("warning")] == ["rollouts_differ"]
    assert after.events("warning") == []
    after.close()


def test_the_last_completions_can_be_asked_for(new_run: NewRun) -> None:
    run = new_run()
    assert run.recorder.latest_completions() == ()
    run.step(1, 0.0, 1.0)
    run.step(2, 1.0, 0.0)
    assert [c.reward_total for c in run.recorder.latest_completions()] == [1.0, 0.0]


@pytest.mark.parametrize(("steps", "window"), [(0, 0), (1, 1), (9, 1), (10, 2), (49, 9), (50, 10), (1000, 10)])
def test_the_ends_of_a_run_are_a_fifth_of_it_and_no_more_than_ten_steps(steps: int, window: int) -> None:
    values = list(range(steps))
    assert ends_of(values) == (values[:window], values[steps - window :])


def test_the_reward_summary_averages_both_ends(new_run: NewRun) -> None:
    run = new_run()
    assert run.recorder.reward_summary() == {"start": None, "end": None, "steps_averaged": 0}
    for step in range(1, 11):
        run.step(step, float(step), float(step) + 2)
    assert run.recorder.reward_summary() == {"start": 2.5, "end": 10.5, "steps_averaged": 2}


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        (part / "weights").write_bytes(b"1")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "adapter") as part:
        fail(part)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "adapter") as part:
        (part / "weights").write_bytes(b"1")
        assert not (tmp_path / "adapter").exists()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["weights"]


def test_json_files_are_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"名": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "report.json", {"reward": math.nan})
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == {"名": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_steps_are_read_from_names() -> None:
    folder = RunFolder(Path("run"))
    assert step_of(folder.checkpoint(50)) == step_of(folder.rollout(50)) == 50
