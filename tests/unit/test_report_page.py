from __future__ import annotations

import hashlib
import html.parser
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_core import report_page
from grpo_core.evaluation.paired_stats import compare, compare_values
from grpo_core.monitoring.audits import Auditor
from grpo_core.report_page.charts import Curve, describe, svg, thin, ticks
from grpo_core.report_page.run_files import RunFiles
from grpo_core.report_page.view import verdict
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import Completion, write_rollouts
from grpo_core.spec import parse_spec
from tests.unit.test_audits import SICK, completion, steps_of
from tests.unit.traces import LEARNING, STILL, spec_of, trace

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[2J\u202e]]>--></pre>{{ 7*7 }}&amp;"


class Page(html.parser.HTMLParser):
    """What a browser would make of it: tags, their attributes and the text outside styles."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def run_folder(root: Path, lines: list[dict[str, Any]], spec: Any, events: list[dict[str, Any]]) -> RunFolder:
    folder = RunFolder(root)
    folder.create()
    folder.spec.write_text(json.dumps(spec.as_dict()), encoding="utf-8")
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    numbered = [{"v": 1, "seq": n, "epoch": 1, "time": f"2026-01-02T03:04:{n % 60:02d}.000Z", "step": None, **event}
                for n, event in enumerate(events, 1)]  # fmt: skip
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in numbered), encoding="utf-8")
    return folder


def add_rollouts(folder: RunFolder, step: int, count: int = 8, text: str = "x") -> list[Completion]:
    rows = [
        completion(prompt_id=f"p{n // 4}", sample=n % 4, completion=f"{text} {n}", reward_total=n / 2, prompt=text)
        for n in range(count)
    ]
    write_rollouts(folder.rollout(step), rows, step=step, epoch=1)
    return rows


EVALUATION: dict[str, Any] = {
    "questions": 120,
    "before": {"strict_accuracy": 0.1, "strict_interval": [0.06, 0.17], "lenient_accuracy": 0.9}
    | {"lenient_interval": [0.83, 0.94], "strict_format_share": 0.15},
    "after": {"strict_accuracy": 0.9, "strict_interval": [0.83, 0.94], "lenient_accuracy": 0.9}
    | {"lenient_interval": [0.83, 0.94], "strict_format_share": 0.975},
    "paired": {
        "strict": {
            "counts": {"both": 10, "lost": 2, "gained": 98, "neither": 10},
            "difference": 0.8,
            "interval": [0.7, 0.86],
            "p_value": 1e-20,
            "verdict": "Strict accuracy rose: 10.0% before, 90.0% after.",
        },
        "lenient": {
            "counts": {"both": 98, "lost": 10, "gained": 10, "neither": 2},
            "difference": 0.0,
            "interval": [-0.07, 0.07],
            "p_value": 1.0,
            "verdict": "No significant change in lenient accuracy.",
        },
        "format": {
            "counts": {"both": 16, "lost": 2, "gained": 101, "neither": 1},
            "difference": 0.825,
            "interval": [0.74, 0.88],
            "p_value": 1e-20,
            "verdict": "The share of answers in the asked format rose: 15.0% before, 97.5% after.",
        },
    },
    "samples": [
        {"row": n, "question": f"Q{n} {HOSTILE}", "answer": "4", "before": "", "after": HOSTILE} for n in range(12)
    ],
}


def write(folder: RunFolder, **how: Any) -> tuple[str, Page]:
    path = report_page.write(folder.root, **how)
    assert path == folder.root / "report.html"
    text = path.read_text("utf-8")
    return text, Page(text)


@pytest.mark.parametrize(
    ("difference", "p_value", "headline"),
    [(0.5, 1e-9, "exact rose"), (-0.5, 1e-9, "exact fell"), (0.1, 0.4, "exact did not change clearly")],
)
def test_a_job_with_rewards_of_its_own_is_judged_by_the_one_it_names(
    tmp_path: Path, difference: float, p_value: float, headline: str
) -> None:
    spec = spec_of(8, 8, steps=40)
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    before, after = compare_values("exact", [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]), {"exact": 1.0, "unused": 0.0}
    assert before is not None
    own = {**before.as_dict(), "difference": difference, "p_value": p_value}
    evaluation = {
        **EVALUATION,
        "metric": "exact",
        "paired": {**EVALUATION["paired"], "metric": own},
        "before": {**EVALUATION["before"], "rewards": {"exact": 0.3, "unused": 0.0}},
        "after": {**EVALUATION["after"], "rewards": after},
    }
    folder.report.write_text(json.dumps({"evaluation": evaluation}))
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    text, _ = write(folder, status="succeeded")
    assert f"On unseen questions, {headline}" in text
    assert html.escape(before.verdict) in text or before.verdict in text
    assert "exact: 0.3 before, 1 after." in text
    assert "unused:" not in text
    assert "Strict accuracy rose" not in text


def test_the_curve_of_evaluations_has_its_interval_and_marks_the_best_step(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=40)
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    points = [
        {"step": step, "questions": 64, "metric": "strict_accuracy", "value": value, "interval": [value - 0.1, value]}
        for step, value in ((0, 0.2), (10, 0.7), (20, 0.5))
    ]
    stopped = {"reason": "no_better", "message": "Training ended after step 20: no better."}
    curve = {"curve": points, "best_step": 10, "stopped": stopped}
    folder.report.write_text(json.dumps({"evaluation": {**EVALUATION, **curve}}))
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    text, _ = write(folder, status="succeeded")
    assert "Training ended after step 20: no better." in text
    assert "The best of 2 evaluations was that of step 10, strict_accuracy 0.7." in text
    assert "Held-out questions: 0.2 at step 0, 0.5 at step 20; lowest 0.2, highest 0.7." in text
    assert (
        "64 questions at each point; step 0 is the base model; band: 95 % interval; dashed: the best step, 10" in text
    )


def test_a_finished_run_begins_with_its_verdict(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=40, name="night run")
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    for step in range(1, 41):
        add_rollouts(folder, step)
    folder.report.write_text(json.dumps({"evaluation": EVALUATION, "versions": {"trl": "1.15.0"}, "seconds": 4000}))
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    _, page = write(folder)
    for part in (
        *(
            "night run",
            "succeeded",
            "It learnt the format",
            "Right or wrong: The share of answers in the asked format rose: 15.0% before, 97.5% after.",
            "98 were wrong before and right after, 2 right before and wrong after",
        ),
        *("between +70.0 and +86.0 points", "1 h 7 min", "trl 1.15.0", "sampling.prompts_per_step"),
        *("adapter_model.safetensors", hashlib.sha256(b"weights").hexdigest()),
    ):
        assert part in page.text, part
    assert page.text.index("It learnt") < page.text.index("Curves")
    assert page.text.count("Q9 ") == 1
    assert "Q10 " not in page.text, "ten questions, as chosen beforehand"
    assert page.text.count("reward 3.5") >= 1
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) > 8
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert not page.open


def test_it_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=20)
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    add_rollouts(folder, 20)
    text, page = write(folder)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form", "base"} == set()
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert not any("//" in (attrs.get(name) or "") for name in ("src", "href"))
    assert "url(" not in text
    assert "@import" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=20, name="</title><script>1</script>", metadata={"<b>": "<i>"})
    warning = {"code": HOSTILE, "message": HOSTILE}
    audit = warning | {
        "audit": HOSTILE,
        "steps": [1, 2],
        "values": {HOSTILE: 1.0},
        "rollouts": {"step": 2, "x": HOSTILE},
    }
    events = [{"type": "warning", "data": warning}, {"type": "warning", "data": audit}]
    lines = [{**line, "rewards": {**line["rewards"], HOSTILE: 1.0}} for line in trace(spec, LEARNING, 1)]
    folder = run_folder(tmp_path, lines, spec, events)
    add_rollouts(folder, 2, text=HOSTILE)
    folder.report.write_text(json.dumps({"evaluation": EVALUATION, "versions": {HOSTILE: HOSTILE}}))
    text, page = write(folder)
    assert {tag for tag, _ in page.tags} & {"script", "img", "b2", "i2"} == set()
    assert text.count("<script") == 0
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7*7 }}" in text
    assert "49" not in page.text.split("{{ 7*7 }}")[0][-5:]
    for character in ("\x00", "\x1b", "\u202e"):
        assert character not in text
    assert "\\u202e" in page.text, "what turns text round is shown, not obeyed"


def compared(name: str, right: int) -> dict[str, Any]:
    """100 questions, half of them right before; as many more or fewer right after as given, no other flipped."""
    before = [n < 50 for n in range(100)]
    return compare(name, before, [n < 50 + right for n in range(100)]).as_dict()


@pytest.mark.parametrize(
    ("form", "strict", "lenient", "tone", "headline"),
    [
        (30, 30, 20, "good", "It learnt: more"),
        (0, 30, 20, "good", "It learnt: more"),
        (30, 30, 3, "good", "It learnt the format; how many answers are right did not"),
        (30, 0, 3, "good", "It learnt the format; how many answers are right did not"),
        (30, 0, 20, "good", "It learnt the format, and more answers are right by their last number"),
        (30, 30, -20, "open", "It learnt the format, and fewer"),
        (
            3,
            7,
            4,
            "good",
            "More unseen questions are answered correctly in the required format, not clearly by their last",
        ),
        (
            -20,
            7,
            4,
            "good",
            "More unseen questions are answered correctly in the required format, not clearly by their last",
        ),
        (3, 7, -20, "open", "More answers are correct in the required format, and fewer by their last number"),
        (-2, -2, 20, "open", "More answers are correct by their last number, but not in the required format"),
        (2, 2, -2, "open", "No significant change"),
        (0, 0, -20, "bad", "It got worse: fewer unseen questions are answered correctly"),
        (0, -20, 0, "bad", "It got worse: fewer unseen questions are answered correctly in the required format"),
        (20, -20, 0, "bad", "It got worse: fewer unseen questions are answered correctly in the required format"),
        (0, -20, 20, "bad", "Fewer answers are correct in the required format, and more by their last number"),
        (-20, -20, 0, "bad", "It lost the format; how many answers are right did not"),
        (-20, -20, 20, "bad", "It lost the format, and more"),
        (-20, 0, -20, "bad", "It lost the format, and fewer"),
        (-20, -20, -20, "bad", "It got worse"),
    ],
)
def test_the_form_is_told_apart_from_the_answers(
    tmp_path: Path, form: int, strict: int, lenient: int, tone: str, headline: str
) -> None:
    moved = {"format": form, "strict": strict, "lenient": lenient}
    paired = {reading: compared(f"the {reading} share", by) for reading, by in moved.items()}
    spec = spec_of(8, 8, steps=3)
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    folder.report.write_text(json.dumps({"evaluation": {**EVALUATION, "paired": paired}}))
    said = verdict(RunFiles(folder.root, status="succeeded", error=None))
    assert said["tone"] == tone
    assert said["headline"].startswith(headline)


def test_a_warning_of_a_stretch_that_is_over_is_told_as_past(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=40)
    lines = [{**one, "zero_variance_share": 1.0 if 10 <= one["step"] <= 30 else 0.1} for one in trace(spec, STILL, 1)]
    auditor = Auditor(spec)
    events = [{"type": "warning", "data": finding.as_dict()} for finding in auditor.replay(lines)]
    folder = run_folder(tmp_path, lines, spec, events)
    _, page = write(folder)
    assert "no variance · steps 10 to 30, over Between steps 10 and 30 no group had a signal" in page.text
    assert "nothing was learnt" not in page.text
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:30]), encoding="utf-8")
    _, page = write(folder)
    assert "steps 10 to 29 In each of the last 20 steps" in page.text


@pytest.mark.parametrize(
    ("status", "headline"), [("failed", "It failed (diverged)"), ("cancelled", "It was cancelled")]
)
def test_a_run_that_did_not_finish_says_why(tmp_path: Path, status: str, headline: str) -> None:
    spec = spec_of(8, 8, steps=40)
    error = {"code": "x", "class": "diverged", "message": "The loss is nan.", "hint": "Lower it.", "retryable": False}
    events = [{"type": "error", "data": error}] if status == "failed" else []
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1))[:7], spec, events)
    _, page = write(folder, status=status)
    assert headline in page.text
    assert "7 of 40 steps" in page.text
    assert ("Lower it." in page.text) is (status == "failed")


@pytest.mark.parametrize(
    ("rewards", "headline"),
    [
        ([0.1 * step for step in range(40)], "The reward rose"),
        ([-0.1 * step for step in range(40)], "The reward fell"),
        ([0.03 + 0.01 * (step % 3) + step * 1e-5 for step in range(40)], "The reward did not clearly change"),
        ([1.0] * 40, "The reward did not clearly change"),
        ([1.0, 2.0], "Too few steps to say"),
    ],
)
def test_without_held_out_questions_the_reward_is_judged_and_no_more(
    tmp_path: Path, rewards: list[float], headline: str
) -> None:
    spec = spec_of(8, 8, steps=len(rewards))
    folder = run_folder(tmp_path, [{"step": n, "reward": r} for n, r in enumerate(rewards, 1)], spec, [])
    folder.report.write_text('{"evaluation": null}')
    _, page = write(folder)
    assert headline in page.text
    assert "was not measured" in page.text


@pytest.mark.parametrize(
    ("code", "kind", "headline"),
    [
        ("hub_unreachable", "infra", "The model or the data set could not be fetched: the hub did not answer"),
        ("model_not_found", "user_config", "The model could not be fetched"),
        ("dataset_not_found", "dataset", "The data set could not be fetched"),
        ("child_died", "infra", "It failed (infra)"),
    ],
)
def test_what_could_not_be_fetched_is_the_heading(tmp_path: Path, code: str, kind: str, headline: str) -> None:
    folder = run_folder(tmp_path, [], spec_of(8, 8), [])
    error = {"class": kind, "code": code, "message": "Not here.", "hint": ""}
    assert verdict(RunFiles(folder.root, status="failed", error=error))["headline"] == headline


def test_a_worker_can_say_how_it_ended(tmp_path: Path) -> None:
    spec = spec_of(8, 8)
    folder = run_folder(tmp_path, [], spec, [])
    _, page = write(folder, status="failed", error={"class": "infra", "message": "Killed by signal 9.", "hint": ""})
    assert "It failed (infra)" in page.text
    assert "Killed by signal 9." in page.text


def test_a_run_that_left_nothing_but_its_spec_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.spec.write_text("{}")
    _, page = write(folder)
    assert "It has not finished" in page.text
    folder.spec.write_text('{"from": "a later version"}')
    write(folder)
    with pytest.raises(FileNotFoundError):
        report_page.write(tmp_path / "none")


def test_an_audit_shows_the_completions_it_points_at(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=40)
    data = {"code": "truncation", "message": "Many were cut off.", "audit": "truncation", "steps": [1, 10]}
    shown = data | {"values": {"truncated_share": 0.5}, "rollouts": {"step": 9, "prompt": "p1", "order": "-reward"}}
    gone = data | {"values": {}, "rollouts": {"step": 30}}
    folder = run_folder(tmp_path, [], spec, [{"type": "warning", "data": d} for d in (shown, gone)])
    add_rollouts(folder, 9, text="cut")
    text, _ = write(folder)
    section = text[text.index('id="audits"') : text.index('id="best"')]
    assert [section.count(f"cut {n}</pre>") for n in range(8)] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert "step=30</code>) are not in this folder" in section


def test_a_resumed_run_shows_what_the_audits_told_before(tmp_path: Path) -> None:
    """Its metrics are those of all steps, its events and rollouts its own."""
    spec = spec_of(8, 8, steps=60)
    lines = steps_of(spec, SICK["truncation"])
    folder = run_folder(tmp_path, lines, spec, [])
    add_rollouts(folder, 41)
    _, page = write(folder)
    assert "steps 1 to 10" in page.text


def service_event(kind: str, epoch: int, second: int, step: int = 0, **data: Any) -> str:
    time = f"2026-01-01T00:00:{second:02d}.000+00:00"
    return json.dumps({"seq": second, "epoch": epoch, "type": kind, "time": time, "step": step, "data": data}) + "\n"


def test_a_resumed_job_is_told_of_as_a_whole(tmp_path: Path) -> None:
    """What the runs before left is in `inputs/earlier`; what they did after their last checkpoint does not count."""
    spec = spec_of(8, 8, steps=60)
    lines = [{**line, "epoch": 1 if line["step"] <= 40 else 3} for line in steps_of(spec, SICK["truncation"])]
    told = {"code": "data_changed", "message": "The data set is another."}
    own = [{"type": "log", "data": {"code": "resumed", "step": 40}}, {"type": "warning", "data": told}]
    folder = run_folder(tmp_path, lines, spec, own)
    earlier = tmp_path / report_page.EARLIER
    (earlier / "rollouts").mkdir(parents=True)
    audit = {"code": "truncation", "audit": "truncation", "values": {}, "rollouts": {"step": 10, "finish": "length"}}
    (earlier / "events.jsonl").write_text(
        service_event("status", 0, 1, status="queued")
        + service_event("status", 1, 2, status="running")
        + service_event("warning", 1, 3, 10, **audit, steps=[1, 10], message="As it was told at first.")
        + service_event("warning", 1, 4, 44, **audit, steps=[35, 44], message="Of steps that were lost.")
        + service_event("warning", 1, 5, code="run_lost", message="The process was killed.")
        + service_event("status", 2, 6, status="running")
        + service_event("log", 2, 7, code="worker_stopped", message="The worker was asked to stop.")
        + service_event("warning", 3, 8, **told)
    )
    _, page = write(folder, status="succeeded")
    assert "are not in this folder" in page.text
    assert report_page.steps_shown(folder.root) >= {10, *range(49, 61)}
    write_rollouts(
        earlier / "rollouts" / "part-000001-000040.parquet",
        [completion(prompt_id="p0", completion="cut short", finish_reason="length")],
        step=10,
        epoch=1,
    )
    for step in (41, 60):
        add_rollouts(folder, step)
    _, page = write(folder, status="succeeded")
    assert "As it was told at first." in page.text
    assert "cut short" in page.text
    assert "Of steps that were lost." not in page.text
    assert page.text.count("data_changed: ") == 1
    runs = page.text[page.text.index("How it ended") : page.text.index("The best-paid")]
    for row in (
        "1 2026-01-01 00:00 UTC 1 to 40 The process was killed.",
        "2 2026-01-01 00:00 UTC – The worker was asked to stop.",
        "3 2026-01-01 00:00 UTC 41 to 60 succeeded",
    ):
        assert row in runs, runs
    assert "Took 24 h 0 min" in page.text or "Took 27 h 4 min" in page.text
    assert "Of step 60, each of another prompt" in page.text


def test_a_run_that_ended_before_its_checkpoint_came_shows_the_steps_before(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=60)
    folder = run_folder(tmp_path, [], spec, [])
    folder.events.unlink()
    folder.metrics.unlink()
    (tmp_path / report_page.EARLIER).mkdir(parents=True)
    lines = list(trace(spec, LEARNING, 1))[:12]
    (tmp_path / report_page.EARLIER / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = write(folder, status="cancelled")
    assert "12 of 60 steps were done" in page.text


@pytest.mark.parametrize("metrics_in", ["inputs/resume", "inputs/earlier"])
def test_a_run_that_ended_while_it_was_loading_shows_what_the_audits_told_before(
    tmp_path: Path, metrics_in: str
) -> None:
    """It has told nothing of its own, not even from where it goes on."""
    spec = spec_of(8, 8, steps=60)
    folder = run_folder(tmp_path, [], spec, [{"type": "status", "data": {"status": "running"}}])
    folder.metrics.unlink()
    earlier, metrics = tmp_path / report_page.EARLIER, tmp_path / metrics_in / "metrics.jsonl"
    (earlier / "rollouts").mkdir(parents=True)
    metrics.parent.mkdir(exist_ok=True)
    lines = steps_of(spec, SICK["truncation"])[:40]
    metrics.write_text("".join(json.dumps({**line, "epoch": 1}) + "\n" for line in lines))
    audit = {"code": "truncation", "audit": "truncation", "values": {}, "rollouts": {"step": 10, "finish": "length"}}
    told = service_event("warning", 1, 3, 10, **audit, steps=[1, 10], message="As it was told at first.")
    (earlier / "events.jsonl").write_text(told)
    assert report_page.steps_shown(folder.root) == {10, *range(33, 41)}
    row = completion(prompt_id="p0", completion="cut short", finish_reason="length")
    write_rollouts(earlier / "rollouts" / "part-000001-000040.parquet", [row], step=10, epoch=1)
    _, page = write(folder, status="cancelled")
    assert page.text.count("As it was told at first.") == 1
    assert "cut short" in page.text


def test_merged_rollouts_are_read_too(tmp_path: Path) -> None:
    from jobs.worker.rollout_compaction import merge

    spec = spec_of(8, 8, steps=5)
    folder = run_folder(tmp_path, [], spec, [])
    for step in range(1, 6):
        add_rollouts(folder, step, text=f"step{step}")
    before, _ = write(folder)
    merged = merge(folder.rollouts, 4)
    assert merged is not None
    for path in merged[1]:
        path.unlink()
    after, _ = write(folder)
    assert after == before
    assert "step5 7" in after


def test_files_that_are_merged_while_the_page_is_written_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uploader does so on its own time: at a checkpoint of the last step, just when the run has ended."""
    from jobs.worker.rollout_compaction import merge

    spec = spec_of(8, 8, steps=5)
    folder = run_folder(tmp_path, [], spec, [])
    for step in range(1, 6):
        add_rollouts(folder, step, text=f"step{step}")
    expected, _ = write(folder)
    read, left = RunFiles._rows, []

    def rows(run: RunFiles, step: int) -> list[dict[str, Any]]:
        if not left:
            left.append(merge(folder.rollouts, None))
            assert left[0] is not None
            for path in left[0][1]:
                path.unlink()
        return read(run, step)

    monkeypatch.setattr(RunFiles, "_rows", rows)
    again, _ = write(folder)
    assert left
    assert again == expected


def test_a_step_in_a_file_of_its_own_and_in_a_part_is_read_once(tmp_path: Path) -> None:
    from jobs.worker.rollout_compaction import merge

    spec = spec_of(8, 8, steps=5)
    folder = run_folder(tmp_path, [], spec, [])
    for step in range(1, 6):
        add_rollouts(folder, step, text=f"step{step}")
    merge(folder.rollouts, None)
    rows = RunFiles(tmp_path, status=None, error=None).completions({"step": 3}, 100)
    assert len(rows) == 8


def test_the_recipe_at_its_largest_stays_below_the_limit(tmp_path: Path) -> None:
    """250 steps of 64 long completions, an audit at every turn."""
    spec = spec_of(8, 8, metadata={f"k{n}": "好" * 512 for n in range(16)})
    lines = [line | {"seconds": {"total": 1.23456789}, "loss": random.random()} for line in trace(spec, LEARNING, 1)]
    told = {
        "code": "a",
        "message": "好" * 4000,
        "audit": "a",
        "steps": [1, 250],
        "values": {},
        "rollouts": {"step": 250},
    }
    folder = run_folder(tmp_path, lines, spec, [{"type": "warning", "data": told}] * 100)
    rows = [completion(prompt_id=f"p{n}", completion="<" * 50_000 + str(n), prompt="&" * 9000) for n in range(64)]
    write_rollouts(folder.rollout(250), rows, step=250, epoch=1)
    path = report_page.write(folder.root)
    assert path.stat().st_size < report_page.MAX_BYTES


def test_the_command_writes_it(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=5)
    folder = run_folder(tmp_path / "run", list(trace(spec, LEARNING, 1)), spec, [])
    command = [sys.executable, "-m", "grpo_core", "report"]
    done = subprocess.run([*command, str(folder.root)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder.root / 'report.html'}\n"
    shutil.rmtree(folder.root)
    refused = subprocess.run([*command, str(folder.root)], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (10, 1)
    assert "no spec.json" in refused.stderr


# Charts.


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (-0.3, 3.9, [-1, 0, 1, 2, 3, 4]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0, 1e-12, [0, 2.5e-13, 5e-13, 7.5e-13, 1e-12]),
    ],
)
def test_ticks_are_round_and_hold_everything(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 3 <= len(found) <= 7
    if len(found) == len(expected):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 7e6, 1e12])
def test_ticks_of_any_size(scale: float) -> None:
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.999, 1.0), (3.0, 3.0)):
        found = ticks(low * scale, high * scale)
        assert found[0] <= low * scale + scale * 1e-6
        assert found[-1] >= high * scale - scale * 1e-6
        assert len(found) <= 8


def test_a_long_curve_is_thinned_by_averages() -> None:
    points = thin(list(range(10_000)), [float(step) for step in range(10_000)])
    assert len(points) == 240
    assert all(abs(x - y) < 1e-6 for x, y in points)
    assert thin([1, 2, 3], [1.0, None, 3.0]) == [(1, 1.0), (3, 3.0)]


def test_a_chart_says_what_it_shows() -> None:
    curve = Curve(title='A "<b>" & more', steps=[1, 2, 3], values=[1.0, None, 0.25], band=[(0, 2), None, (0, 1)])
    assert describe(curve) == 'A "<b>" & more: 1 at step 1, 0.25 at step 3; lowest 0.25, highest 1.'
    drawing = svg(curve)
    assert "<b>" not in drawing
    assert "polyline" in drawing
    now_and_then = Curve(title="A", steps=[1, 2, 3], values=[None, 0.5, None], other=[2.0, None, 4.0])
    assert describe(now_and_then) == "A: 0.5 at step 2, 0.5 at step 2; lowest 0.5, highest 0.5."
    assert 'class="other"' in svg(now_and_then)
    assert svg(Curve(title="", steps=[1], values=[None])) == ""
    assert "circle" in svg(Curve(title="", steps=[1], values=[2.0]))


def test_the_estimate_stands_beside_what_was_measured(tmp_path: Path) -> None:
    lines = [
        line | {"seconds": {"total": 9.0 if n < 4 else 2.5}, "gpu_memory_gb": 50.0 + n}
        for n, line in enumerate(list(trace(parse_spec({}), LEARNING, 1))[:7], 1)
    ]
    page = report_page.write(run_folder(tmp_path / "gpu", lines, parse_spec({}), []).root).read_text("utf-8")
    assert "2.5 s (estimate for one H100 80 GB: 1.5)" in page
    assert "57.0 GB (estimate for one H100 80 GB: 25.3)" in page
    folder = run_folder(tmp_path / "h200", lines, parse_spec({}), [])
    folder.report.write_text(json.dumps({"device": "NVIDIA H200"}))
    assert "2.5 s (estimate for one H200 141 GB: " in report_page.write(folder.root).read_text("utf-8")
    cpu = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
    page = report_page.write(run_folder(tmp_path / "cpu", lines[:2], cpu, []).root).read_text("utf-8")
    assert "9 s" in page
    assert "estimate for" not in page


def test_a_trial_begins_with_its_answer(tmp_path: Path) -> None:
    spec = spec_of(8, 8, steps=3)
    folder = run_folder(tmp_path, list(trace(spec, LEARNING, 1)), spec, [])
    folder.report.write_text(json.dumps({"trial": {"will_learn": "no", "sentence": "No: <b>nothing</b> differs."}}))
    said = verdict(RunFiles(folder.root, status="succeeded", error=None))
    assert (said["tone"], said["headline"]) == ("bad", "A trial: training would learn nothing")
    text, _ = write(folder, status="succeeded")
    assert "&lt;b&gt;nothing" in text
    assert "evaluation.questions is 0" not in text
