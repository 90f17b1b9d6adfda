"""Which questions are held out, how they are asked before and after, how answers are read, and what is reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.datasets import DatasetError, Question, Row
from grpo_core.evaluation import held_out
from grpo_core.evaluation.generate import Answer, is_right_leniently, last_number
from grpo_core.evaluation.held_out import HeldOutEvaluation, fitting, load_split
from grpo_core.grading import Grading
from grpo_core.report_page.run_files import RunFiles
from grpo_core.report_page.view import verdict
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EventWriter, read_jsonl, read_rollouts
from grpo_core.spec import JobSpec, parse_spec

RIGHT = "<reasoning>\n1+1={0}\n</reasoning>\n<answer>\n{0}\n</answer>"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7-5=2", 2),
        ("答案是-3。", -3),
        ("5-3", 3),
        ("(5)-3", 3),
        ("共1,200元", 1200),
        ("12.50", Fraction(25, 2)),
        ("一半是1/2", Fraction(1, 2)),
        ("１２个", 12),
        ("3 then 4.", 4),
        ("no number", None),
        ("5/0", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("答案是12。", "12", True),
        ("<answer>\n12\n</answer>", "12.0", True),
        ("12 或 13", "12", False),
        ("<answer>\nred\n</answer>", "red", True),
        ("red", "red", False),
    ],
)
def test_lenient_reading(text: str, answer: str, right: bool) -> None:
    assert is_right_leniently(text, answer) is right


# Which rows are held out


def rows_file(folder: Path, questions: Sequence[str], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"question": question, "answer": str(place)}) for place, question in enumerate(questions))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def spec_of(path: Path | str, questions: int, **sections: Any) -> JobSpec:
    data = {"source": "file", "dataset": str(path)} | sections.pop("data", {})
    return parse_spec({"data": data, "evaluation": {"questions": questions}, **sections})


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def warn(warnings: list[str]) -> Callable[[str, str], None]:
    return lambda code, _message: warnings.append(code)


def test_the_last_rows_of_a_file_are_held_out(tmp_path: Path, warn: Any, warnings: list[str]) -> None:
    path = rows_file(tmp_path, [f"q{n}" for n in range(10)])
    split = load_split(spec_of(path, 3), tmp_path, warn)
    assert [row.row for row in split.train] == [0, 1, 2, 3, 4, 5, 6]
    assert [row.row for row in split.held_out] == [7, 8, 9]
    assert [row.row for row in load_split(spec_of(path, 2, data={"max_rows": 6}), tmp_path, warn).held_out] == [4, 5]
    assert load_split(spec_of(path, 0), tmp_path, warn).held_out == []
    assert warnings == []


def test_a_held_out_question_is_not_trained_on_in_any_other_row(tmp_path: Path, warn: Any, warnings: list[str]) -> None:
    path = rows_file(tmp_path, ["same", "a", "b", "same", "c", "same"])
    split = load_split(spec_of(path, 2), tmp_path, warn)
    assert [row.question for row in split.held_out] == ["c", "same"]
    assert [row.question for row in split.train] == ["a", "b"]
    assert warnings == ["held_out_repeats"]


@pytest.mark.parametrize(
    ("questions", "held", "code"),
    [(["a", "b", "c", "d", "e"], 3, "too_many_held_out"), (["same"] * 4, 2, "no_rows_left")],
)
def test_too_little_is_left_to_train_on(tmp_path: Path, warn: Any, questions: list[str], held: int, code: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load_split(spec_of(rows_file(tmp_path, questions), held), tmp_path, warn)
    assert caught.value.code == code
    assert caught.value.problems[0].pointer == "/evaluation/questions"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub data set with two splits, as a local folder."""
    rows_file(tmp_path, ["a", "b", "c", "x"], "me/set/train.jsonl")
    rows_file(tmp_path, ["x", "y", "z"], "me/set/test.jsonl")
    monkeypatch.setenv("GRPO_DATASET_DIR", str(tmp_path))
    return "me/set"


HUB = {"source": "hub", "question_column": "question", "answer_column": "answer"}


def test_a_hub_data_set_gives_the_first_rows_of_another_split(
    hub: str, tmp_path: Path, warn: Any, warnings: list[str]
) -> None:
    split = load_split(spec_of(hub, 2, data=HUB), tmp_path, warn)
    assert [row.question for row in split.held_out] == ["x", "y"]
    assert [row.question for row in split.train] == ["a", "b", "c"]
    assert warnings == ["held_out_repeats"]
    assert len(load_split(spec_of(hub, 50, data=HUB), tmp_path, warn).held_out) == 3
    assert "fewer_questions" in warnings


def test_a_hub_data_set_without_that_split(hub: str, tmp_path: Path, warn: Any) -> None:
    spec = parse_spec({"data": HUB | {"dataset": hub}, "evaluation": {"questions": 1, "split": "validation"}})
    with pytest.raises(DatasetError) as caught:
        load_split(spec, tmp_path, warn)
    assert (caught.value.code, caught.value.problems[0].pointer) == ("no_such_split", "/evaluation/split")


def test_the_training_split_of_a_hub_data_set_gives_its_last_rows(hub: str, tmp_path: Path, warn: Any) -> None:
    spec = parse_spec({"data": HUB | {"dataset": hub}, "evaluation": {"questions": 1, "split": "train"}})
    split = load_split(spec, tmp_path, warn)
    assert [row.question for row in split.held_out] == ["x"]
    assert [row.question for row in split.train] == ["a", "b", "c"]


# Asking twice


class FakeTokenizer:
    """A token is a character of the question."""

    def apply_chat_template(self, conversation: Any, **_: Any) -> list[str]:
        return [turns[-1]["content"] for turns in conversation]

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * len(one) for one in text]}


class FakeEngine:
    """Answers from a list for the base and one for the adapter; notes what it was asked."""

    tokenizer = FakeTokenizer()

    def __init__(self, base: Sequence[str], adapter: Sequence[str]) -> None:
        self._said = {False: base, True: adapter}
        self.asked: list[tuple[list[Question], bool, int]] = []
        self.given = 0
        self.closed = 0

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        self.asked.append((list(questions), adapter, max_new_tokens))
        try:
            for text in self._said[adapter]:
                self.given += 1
                yield Answer(text, len(text), "stop")
        finally:
            self.closed += 1


QUESTIONS = [Row(100 + n, f"q{n:02d}", str(n)) for n in range(20)]
BASE = [f"答案是{n}。" if n < 15 else "?" for n in range(20)]
ADAPTER = [RIGHT.format(n) if n < 16 else "?" for n in range(20)]


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventWriter]:
    writer = EventWriter(tmp_path / "events.jsonl", epoch=1)
    yield writer
    writer.close()


def evaluation_of(folder: Path, events: EventWriter, rows: Sequence[Row] = QUESTIONS) -> HeldOutEvaluation:
    spec = spec_of("x.jsonl", 20, sampling={"max_prompt_tokens": 3})
    grading = Grading(spec)  # without graders it holds nothing open
    return HeldOutEvaluation(spec=spec, rows=rows, folder=RunFolder(folder), events=events, grading=grading)


def test_the_base_is_not_asked_twice_by_a_run_that_goes_on(tmp_path: Path, events: EventWriter) -> None:
    before, engine = evaluation_of(tmp_path, events), FakeEngine(BASE, ADAPTER)
    before.ask_base(engine)
    state = json.loads(json.dumps(before.state()))
    after = evaluation_of(tmp_path, events)
    after.ask_base(engine, state)
    assert len(engine.asked) == 1
    assert after.ask_adapter(engine, threading.Event())
    assert before.ask_adapter(engine, threading.Event())
    for stage in ("before", "paired", "samples"):
        assert after.report()[stage] == before.report()[stage]


def test_answers_to_other_questions_are_of_no_use(tmp_path: Path, events: EventWriter) -> None:
    before, engine = evaluation_of(tmp_path, events), FakeEngine(BASE, ADAPTER)
    before.ask_base(engine)
    after = evaluation_of(tmp_path, events, [*QUESTIONS[:-1], Row(119, "q19", "another answer")])
    after.ask_base(engine, before.state())
    assert len(engine.asked) == 2


def test_both_models_are_asked_the_same_and_compared(tmp_path: Path, events: EventWriter) -> None:
    engine, evaluation = FakeEngine(BASE, ADAPTER), evaluation_of(tmp_path, events)
    evaluation.ask_base(engine)
    assert evaluation.ask_adapter(engine, threading.Event())
    assert engine.asked == [(QUESTIONS, False, 512), (QUESTIONS, True, 512)]
    assert engine.closed == 2

    report = evaluation.report()
    assert (report["questions"], report["dropped"], report["held_out"]) == (20, 0, "last rows")
    assert (report["before"]["strict_accuracy"], report["after"]["strict_accuracy"]) == (0.0, 0.8)
    assert (report["before"]["lenient_accuracy"], report["after"]["lenient_accuracy"]) == (0.75, 0.8)
    assert report["before"]["strict_interval"] == pytest.approx((0.0, 0.1611), abs=1e-4)
    strict, lenient = report["paired"]["strict"], report["paired"]["lenient"]
    assert strict["counts"] == {"both": 0, "lost": 0, "gained": 16, "neither": 4}
    assert strict["p_value"] == 2 / 2**16
    assert lenient["counts"] == {"both": 15, "lost": 0, "gained": 1, "neither": 4}
    assert lenient["verdict"].startswith("No significant change in lenient accuracy")
    form = report["paired"]["format"]
    assert form["counts"] == {"both": 0, "lost": 0, "gained": 16, "neither": 4}
    assert form["verdict"].startswith("The share of answers in the required format rose: 0.0% before, 80.0% after (")
    assert form["after"] == report["after"]["strict_format_share"]
    assert [sample["row"] for sample in report["samples"]] == list(range(100, 120, 2))
    assert report["samples"][0] == {
        "row": 100,
        "question": "q00",
        "answer": "0",
        "before": "答案是0。",
        "after": RIGHT.format(0),
    }
    json.dumps(report, allow_nan=False)


def test_every_answer_is_recorded_and_told(tmp_path: Path, events: EventWriter) -> None:
    engine, evaluation = FakeEngine(BASE, ADAPTER), evaluation_of(tmp_path, events)
    evaluation.ask_base(engine)
    evaluation.ask_adapter(engine, threading.Event())
    records = read_rollouts(tmp_path / "evaluation.parquet")
    assert [record["row"] for record in records] == list(range(100, 120))
    assert records[15] == {
        "row": 115,
        "question": "q15",
        "answer": "15",
        "completion_before": "?",
        "completion_after": RIGHT.format(15),
        "strict_before": False,
        "strict_after": True,
        "lenient_before": False,
        "lenient_after": True,
        "strict_format_before": False,
        "strict_format_after": True,
        "reward_before": 0.0,
        "reward_after": 4.0,
        "completion_tokens_before": 1,
        "completion_tokens_after": len(RIGHT.format(15)),
        "finish_reason_before": "stop",
        "finish_reason_after": "stop",
    }
    told = list(read_jsonl(tmp_path / "events.jsonl"))
    results = [event["data"] for event in told if event["type"] == "evaluation"]
    assert [result["stage"] for result in results] == ["before", "after"]
    assert results[1]["paired"]["strict"]["difference"] == 0.8
    assert [event["data"]["message"][:20] for event in told if event["type"] == "log"] == [
        "Strict accuracy rose",
        "No significant chang",
        "The share of answers",
    ]


def test_questions_that_are_too_long_are_dropped_and_counted(tmp_path: Path, events: EventWriter) -> None:
    rows = [Row(0, "long one", "1"), *QUESTIONS]
    engine, evaluation = FakeEngine(BASE, ADAPTER), evaluation_of(tmp_path, events, rows)
    evaluation.ask_base(engine)
    assert "long one" not in engine.asked[0][0]
    with pytest.raises(DatasetError) as caught:
        fitting(rows[:1], spec_of("x.jsonl", 1, sampling={"max_prompt_tokens": 3}), FakeTokenizer())
    assert caught.value.code == "all_prompts_too_long"
    evaluation.ask_adapter(engine, threading.Event())
    assert (evaluation.report()["questions"], evaluation.report()["dropped"]) == (20, 1)


@pytest.mark.parametrize(("seconds", "asked"), [(1000.0, 10), (50.0, 20)])
def test_a_request_to_stop_waits_only_for_a_short_rest(
    tmp_path: Path, events: EventWriter, monkeypatch: pytest.MonkeyPatch, seconds: float, asked: int
) -> None:
    """The base took `seconds`, and the request comes when half of the questions are answered."""
    engine, evaluation, stop = FakeEngine(BASE, ADAPTER), evaluation_of(tmp_path, events), threading.Event()
    clock = iter([0.0, *[0.0] * 20, seconds])
    monkeypatch.setattr(held_out, "time", SimpleNamespace(perf_counter=lambda: next(clock, seconds)))
    evaluation.ask_base(engine)
    engine.given = 0
    monkeypatch.setattr(stop, "is_set", lambda: engine.given >= 10)
    assert evaluation.ask_adapter(engine, stop) is (asked == 20)
    assert engine.given == asked
    assert engine.closed == 2
    assert (tmp_path / "evaluation.parquet").exists() is (asked == 20)


# What a job is called


WRONG = RIGHT.format("no")
PLAIN = [f"答案是{n}。" for n in range(20)]
"""Right by the last number, not in the format."""
FORMED = [RIGHT.format(n) for n in range(20)]
HALF = [text if n < 10 else "?" for n, text in enumerate(FORMED)]


class StartedEngine(FakeEngine):
    """Its adapter has answered once before it is trained."""

    def __init__(self, base: Sequence[str], start: Sequence[str], adapter: Sequence[str]) -> None:
        super().__init__(base, adapter)
        self._adapters = iter((start, adapter))

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        if adapter:
            self._said[True] = next(self._adapters)
        return super().answer(questions, adapter=adapter, max_new_tokens=max_new_tokens)


def judged(folder: Path, evaluation: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """The verdict of the report page of a job with this evaluation in its `report.json`."""
    folder.joinpath("spec.json").write_text(json.dumps({"training": {"steps": 5}, **spec}))
    folder.joinpath("report.json").write_text(json.dumps({"evaluation": evaluation}))
    return verdict(RunFiles(folder, status="succeeded", error=None))


@pytest.mark.parametrize(
    ("base", "adapter", "tone", "headline"),
    [
        (HALF, HALF, "open", "No significant change"),
        (PLAIN, FORMED, "good", "It learnt the format; how many answers are right did not clearly change"),
        (["?"] * 20, FORMED, "good", "It learnt: more unseen questions are answered correctly, in the required format"),
        (FORMED, HALF, "bad", "It got worse: fewer unseen questions are answered correctly, in the required format"),
        (FORMED, [WRONG] * 20, "bad", "It got worse: fewer unseen questions are answered correctly, in the required"),
    ],
    ids=["learns nothing", "learns the form only", "learns", "gets worse", "keeps the form and gets worse"],
)
def test_a_job_is_called_what_it_is(
    tmp_path: Path, events: EventWriter, base: list[str], adapter: list[str], tone: str, headline: str
) -> None:
    engine, evaluation = FakeEngine(base, adapter), evaluation_of(tmp_path, events)
    evaluation.ask_base(engine)
    evaluation.ask_adapter(engine, threading.Event())
    said = judged(tmp_path, evaluation.report())
    assert (said["tone"], said["headline"][: len(headline)]) == (tone, headline)


@pytest.mark.parametrize(
    ("base", "start", "adapter", "tone", "since_start", "since_base"),
    [
        (["?"] * 20, FORMED, FORMED, "open", "no significant change", "it learnt: more"),
        (["?"] * 20, FORMED, HALF, "bad", "it got worse: fewer", "it learnt: more"),
        (PLAIN, PLAIN, FORMED, "good", "it learnt the format; how many", "it learnt the format; how many"),
        (FORMED, ["?"] * 20, FORMED, "good", "it learnt: more", "no significant change"),
    ],
    ids=["learns nothing more", "gets worse", "learns the form only", "repairs its checkpoint"],
)
def test_a_job_from_a_checkpoint_is_compared_with_it_and_with_the_base(
    tmp_path: Path,
    events: EventWriter,
    base: list[str],
    start: list[str],
    adapter: list[str],
    tone: str,
    since_start: str,
    since_base: str,
) -> None:
    engine, first = StartedEngine(base, start, adapter), evaluation_of(tmp_path, events)
    first.ask_base(engine, from_checkpoint=True)
    resumed = evaluation_of(tmp_path, events)
    resumed.ask_base(engine, json.loads(json.dumps(first.state())))
    assert [is_adapter for _, is_adapter, _ in engine.asked] == [False, True]
    assert resumed.ask_adapter(engine, threading.Event())
    report = resumed.report()
    assert report["paired_start"]["strict"]["before"] == report["start"]["strict_accuracy"]
    assert report["paired"]["strict"]["before"] == report["before"]["strict_accuracy"]

    said = judged(tmp_path, report, from_checkpoint={"job": "job-7", "step": 25})
    assert said["tone"] == tone
    assert said["headline"].startswith(f"Compared with its checkpoint: {since_start}")
    text = " ".join(said["sentences"])
    assert "It started from step 25 of job-7." in text
    assert f"Compared with the base model: {since_base}" in text
    assert "% at the checkpoint, " in text
    assert "% for the base model, " in text
    assert [bar["stage"] for bar in said["bars"]] == ["before", "start", "after"] * 2

    told = [event["data"] for event in read_jsonl(tmp_path / "events.jsonl") if event["type"] == "evaluation"]
    assert [data["stage"] for data in told] == ["before", "start", "after"]
    assert told[-1]["paired_start"]["strict"]["verdict"] == report["paired_start"]["strict"]["verdict"]
    row = read_rollouts(tmp_path / "evaluation.parquet")[0]
    assert [row[f"completion_{stage}"] for stage in ("before", "start", "after")] == [base[0], start[0], adapter[0]]


def test_a_checkpoint_of_an_earlier_release_knows_only_the_base(tmp_path: Path, events: EventWriter) -> None:
    engine, first = StartedEngine(BASE, ADAPTER, ADAPTER), evaluation_of(tmp_path, events)
    first.ask_base(engine, from_checkpoint=True)
    state = first.state()
    state.pop("start")
    resumed = evaluation_of(tmp_path, events)
    resumed.ask_base(engine, state)
    assert resumed.ask_adapter(engine, threading.Event())
    assert resumed.report().keys().isdisjoint({"start", "paired_start"})
