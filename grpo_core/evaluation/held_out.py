"""Evaluation inside a job: held-out questions, answered before, during and after training, and the comparisons.

Owns which rows are held out, when a request to stop ends the evaluation, the records and the report's `evaluation`; the
engine answers the questions, `generate` reads the answers, and `curve` knows when to ask and which step is best. A job
that starts from a checkpoint is compared with that checkpoint and with the base model. Invariant: no held-out row, and
none with the same question, is trained on.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from grpo_core.datasets import EVALUATION_UPLOAD_NAME, DatasetError, Needs, Question, Row, load_rows
from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.row_reader import item_of
from grpo_core.datasets.templates import ChatTokenizer, encode
from grpo_core.evaluation.curve import Curve, Point, spread
from grpo_core.evaluation.generate import Answer, EvaluationItem, Sampling, read, summarise
from grpo_core.evaluation.paired_stats import compare, compare_values, wilson_interval
from grpo_core.grading import TOTAL, Graded, Grading
from grpo_core.hub import Warn
from grpo_core.reasons import EventType, FailureCode, Phase, WarningCode
from grpo_core.run_dir.layout import RunFolder, write_text
from grpo_core.run_dir.records import STOPPED_EARLY, EventWriter, write_evaluation
from grpo_core.schedule import LEAST_AUTOMATIC, automatic_questions, fixed_interval, sample_size
from grpo_core.spec import JobSpec, Problem
from grpo_core.strict_json import dumps

SAMPLES: Final = 10
"""Questions that the report shows with both answers, spread evenly: chosen before anything is answered."""
FINISH_SECONDS: Final = 30.0
"""When a run receives a request to stop, it finishes its evaluation if at most this number of seconds is left."""
PROGRESS_SECONDS: Final = 15.0
"""Time between two log events that say how far it is."""

LAST_ROWS: Final = "last rows"

METRIC: Final = "metric"
"""The comparison of the job's own metric, among the report's others."""

Stage = Literal["before", "start", "during", "after"]
"""The base model; the adapter that training starts from, if the job names a checkpoint; the adapter in training; the
trained adapter."""


class Answerer(Protocol):
    """What the evaluation needs of an engine; what each does is said at `engines.protocol.Engine`."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The base model's, with its chat template."""
        ...

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        """Answer each question greedily, in order; by the model in training, or by its base."""
        ...


@dataclass(frozen=True, slots=True)
class SplitRows:
    """A job's data set."""

    train: list[Row]
    held_out: list[Row]
    where: str = ""
    """Where the held-out rows are from, in words."""


def load_split(spec: JobSpec, inputs: Path, warn: Warn) -> SplitRows:
    """Read the rows to train on and those to hold out; raises `DatasetError`."""
    rows, wanted = load_rows(spec.data, inputs, warn=warn, needs=Needs.of(spec)), spec.evaluation.questions
    if not wanted:
        return SplitRows(rows, [])
    where = _held_out(spec)
    if spec.evaluation.automatic:
        held_out, rows, where = _load_automatic(spec, rows, inputs, warn)
        if not held_out:
            return SplitRows(rows, [])
    elif not spec.held_out_rows:
        held_out = _load_apart(spec, inputs, warn)
        if len(held_out) < wanted:
            warn(WarningCode.FEWER_QUESTIONS, f"{len(held_out)} questions are held out; {wanted} were asked for.")
    elif 2 * wanted > len(rows):
        detail = f"{wanted} questions would be held out of {len(rows)} rows, more than half of them"
        raise _bad_data(FailureCode.TOO_MANY_HELD_OUT, detail, f"Use at most {len(rows) // 2}, or more rows.")
    else:
        rows, held_out = rows[:-wanted], rows[-wanted:]
    return SplitRows(_without_repeats(rows, held_out, warn), held_out, where)


def fitting(rows: Sequence[Row], spec: JobSpec, tokenizer: ChatTokenizer) -> list[Row]:
    """The rows whose templated prompt is within `sampling.max_prompt_tokens`, as in training."""
    conversations = [messages_for(row, spec.data) for row in rows]
    limit = spec.sampling.max_prompt_tokens
    kept = [row for row, ids in zip(rows, encode(tokenizer, conversations), strict=True) if len(ids) <= limit]
    if not kept:
        detail = f"all {len(rows)} held-out prompts are longer than sampling.max_prompt_tokens, {limit}"
        raise _bad_data(
            FailureCode.ALL_PROMPTS_TOO_LONG, detail, "Raise sampling.max_prompt_tokens, or use other questions."
        )
    return kept


class HeldOutEvaluation:
    """The evaluation of one run: `ask_base` before training, `ask_during` while it lasts, `ask_adapter` after it, then
    `report`."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        rows: Sequence[Row],
        folder: RunFolder,
        events: EventWriter,
        grading: Grading,
        where: str = "",
        context_length: int | None = None,
    ) -> None:
        """`where` says where the rows are from, and `context_length` is the model's, which limits the answers."""
        self._where = where
        self._spec, self._folder, self._events, self._grading = spec, folder, events, grading
        self._limit = spec.evaluation.max_completion_tokens
        room = self._limit if context_length is None else context_length - spec.sampling.max_prompt_tokens
        if room < self._limit:
            self._limit = max(1, room)
            events.log(f"Answers are cut off at {self._limit} tokens: the model reads {context_length} with the prompt")
        self.curve = Curve(spec)
        self._sample: list[int] = []
        """Places of the questions for evaluations during training."""
        self._metric = spec.evaluation.metric or (TOTAL if spec.rewards.is_own else None)
        """The reward whose mean is the verdict; None: the accuracy of answers."""
        self._given = len(rows)
        self._rows = list(rows)
        self._items: dict[Stage, list[EvaluationItem]] = {}
        self._seconds: dict[Stage, float] = {}

    def ask_base(
        self, engine: Answerer, earlier: Mapping[str, Any] | None = None, *, from_checkpoint: bool = False
    ) -> None:
        """Put the questions to the base model, and `from_checkpoint` to the adapter that training starts from.

        Not if `earlier`, another run's `state`, holds the answers to them.
        """
        self._rows = fitting(self._rows, self._spec, engine.tokenizer)
        self._sample = spread(sample_size(self._spec, len(self._rows)), len(self._rows))
        if earlier and self._take_over(earlier):
            self._events.log(f"The base model's {len(self._rows)} answers are those of the earlier run")
            self._add_base()
            return
        self._events.phase(Phase.EVALUATING)
        stages: tuple[Stage, ...] = ("before", "start") if from_checkpoint else ("before",)
        for stage in stages:
            self._ask(engine, stage, threading.Event())
            curve = {"curve": _shown(self._add_base())} if stage == "before" else {}
            self._events.emit(EventType.EVALUATION, {"stage": stage, **self._summary(stage), **curve})

    def state(self) -> dict[str, Any]:
        """The answers before training, as JSON: the base model's and, of a job from a checkpoint, its `start`; and the
        curve."""
        start = {"start": self._answers("start")} if "start" in self._items else {}
        return {**self._answers("before"), **start, "curve": self.curve.state()}

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to evaluate after this step, which took `seconds`."""
        was, due = self.curve.every, self.curve.is_due(step, seconds, ends=self._seconds_of_ends)
        if was is None and self.curve.every is not None:
            self._say_schedule()
        return due

    def is_missed(self, step: int) -> bool:
        """Whether a run that resumes after this step must evaluate it, because the earlier run was stopped first."""
        return self.curve.is_point(step) and not self.curve.has(step) and fixed_interval(self._spec) is not None

    def ask_during(self, engine: Answerer, step: int, stop: threading.Event) -> bool:
        """Evaluate the adapter after a step of training; False if `stop` was set and too much was left."""
        self._events.phase(Phase.EVALUATING)
        if not self._ask(engine, "during", stop):
            return False
        point = self._add(step, "during", self._items["during"])
        data = {"stage": "during", **self._summary("during"), "curve": _shown(point)}
        del self._items["during"]  # the records have those of the other stages
        self._events.emit(EventType.EVALUATION, {**data, "best_step": self.curve.best_step}, step=step)
        if self.curve.stopped is not None:
            self._events.log(self.curve.sentence(), code=STOPPED_EARLY, step=step)
        self._events.phase(Phase.TRAINING)
        return True

    def ask_adapter(self, engine: Answerer, stop: threading.Event, *, step: int | None = None) -> bool:
        """Put them to the trained model and write the records; False if `stop` was set and too much was left.

        `step` is the last one, if not that of the spec.
        """
        if not self._ask(engine, "after", stop):
            return False
        write_evaluation(
            self._folder.root, {stage: [item.as_dict() for item in items] for stage, items in self._items.items()}
        )
        comparisons, after = self._comparisons(), self._items["after"]
        step = self._spec.training.steps if step is None else step
        point = self._add(step, "after", [after[place] for place in self._sample])
        data = {"stage": "after", **self._summary("after"), "curve": _shown(point), **comparisons}
        self._events.emit(EventType.EVALUATION, {**data, "best_step": self.curve.best_step})
        for paired in comparisons.values():
            for name, comparison in paired.items():
                if self._metric is None or name == METRIC:
                    self._events.log(comparison["verdict"])
        return True

    def report(self) -> dict[str, Any]:
        """The report's `evaluation`."""
        return {
            "questions": len(self._rows),
            "dropped": self._given - len(self._rows),
            "held_out": self._where or _held_out(self._spec),
            "max_completion_tokens": self._limit,
            **({} if self._metric is None else {"metric": self._metric}),
            **{stage: self._summary(stage) for stage in self._items},
            **self._comparisons(),
            "samples": self._samples(),
            "curve": [point.as_dict() for point in self.curve.points],
            "best_step": self.curve.best_step,
            "stopped": self._stopped(),
        }

    @property
    def stopped(self) -> bool:
        """Whether training has ended before its last step."""
        return self.curve.stopped is not None

    @property
    def _seconds_of_ends(self) -> float:
        """What the answers before and after training take together."""
        return 2 * self._seconds["before"] + self._seconds.get("start", 0.0)

    def _stopped(self) -> dict[str, Any] | None:
        """Why training ended early, for the report."""
        if self.curve.stopped is None:
            return None
        return {"reason": self.curve.stopped, "message": self.curve.sentence()}

    def _say_schedule(self) -> None:
        every, share = self.curve.every, self.curve.cost_share(self._seconds_of_ends)
        if every and share is not None:
            self._events.log(
                f"Evaluates {len(self._sample)} questions every {every} steps; all evaluations take about {share:.1%} "
                "of the time of training",
                code="evaluation_schedule",
            )
        else:
            self._events.log(
                "No evaluation during training, because it would take more than 5 % of its time; set evaluation.every "
                "to have it",
                code="evaluation_schedule",
            )

    def _add_base(self) -> Point:
        """Begin the curve with the base model's answers."""
        return self._add(0, "before", [self._items["before"][place] for place in self._sample])

    def _add(self, step: int, stage: Stage, items: Sequence[EvaluationItem]) -> Point:
        """Add an evaluation to the curve, and write the curve."""
        seconds = self._seconds[stage] * len(items) / len(self._items[stage])
        point = Point.of(step, items, self._metric, seconds)
        self.curve.add(point)
        lines = self.curve.lines()
        write_text(self._folder.evaluations, "".join(f"{dumps(line)}\n" for line in lines))
        return point

    def _take_over(self, earlier: Mapping[str, Any]) -> bool:
        """Whether the answers were to these very questions, and are kept."""
        items = [EvaluationItem(**item) for item in earlier["items"]]
        asked = [(row.row, row.question, row.answer) for row in self._rows]
        if [(item.row, item.question, item.answer) for item in items] != asked:
            return False
        self._items["before"], self._seconds["before"] = items, earlier["seconds"]
        # A checkpoint of an earlier release has neither.
        if start := earlier.get("start"):
            self._items["start"] = [EvaluationItem(**item) for item in start["items"]]
            self._seconds["start"] = start["seconds"]
        if "curve" in earlier:
            self.curve.take_over(earlier["curve"])
        return True

    def _answers(self, stage: Stage) -> dict[str, Any]:
        return {"seconds": self._seconds[stage], "items": [item.as_dict() for item in self._items[stage]]}

    def _ask(self, engine: Answerer, stage: Stage, stop: threading.Event) -> bool:
        began = told = time.perf_counter()
        items: list[EvaluationItem] = []
        rows = [self._rows[place] for place in self._sample] if stage == "during" else self._rows
        with closing(engine.answer(rows, adapter=stage != "before", max_new_tokens=self._limit)) as answers:
            for row in rows:
                if stop.is_set() and self._seconds_left(len(rows) - len(items)) > FINISH_SECONDS:
                    return False
                items.append(read(row, next(answers), tags=self._spec.rewards.tags.as_tags))
                if (now := time.perf_counter()) - told > PROGRESS_SECONDS:
                    told = now
                    when = "of the checkpoint" if stage == "start" else f"{stage} training"
                    self._events.log(f"Evaluation, {when}: {len(items)} of {len(rows)} answered")
        self._items[stage] = self._paid(items, rows) if self._metric is not None else items
        self._seconds[stage] = time.perf_counter() - began
        return True

    def _paid(self, items: list[EvaluationItem], rows: Sequence[Row]) -> list[EvaluationItem]:
        """The answers with what the job would pay for each."""
        graded = [
            Graded(text=item.completion, answer=item.answer, item=item_of(row), prompt_id=str(row.row))
            for item, row in zip(items, rows, strict=True)
        ]
        payments = self._grading.grade(graded)
        return [
            replace(item, rewards=payment.rewards, total=None if self._grading.is_unscored(payment) else payment.total)
            for item, payment in zip(items, payments, strict=True)
        ]

    def _seconds_left(self, questions: int) -> float:
        """What this number of questions took of the base model."""
        return self._seconds["before"] * questions / len(self._rows)

    def _summary(self, stage: Stage) -> dict[str, Any]:
        items = self._items[stage]
        return {
            **summarise(items, Sampling()).as_dict(),
            "strict_interval": wilson_interval(sum(item.strict for item in items), len(items)),
            "lenient_interval": wilson_interval(sum(item.lenient for item in items), len(items)),
            "seconds": round(self._seconds[stage], 3),
            **_means(items),
        }

    def _comparisons(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`paired` with the base model and, of a job from a checkpoint, `paired_start` with that checkpoint."""
        if "start" not in self._items:
            return {"paired": self._paired("before", "before")}
        return {
            "paired_start": self._paired("start", "at the checkpoint"),
            "paired": self._paired("before", "for the base model"),
        }

    def _paired(self, stage: Stage, when: str) -> dict[str, dict[str, Any]]:
        """Compare the answers of a stage with those after training."""
        before, after = self._items[stage], self._items["after"]
        metric = self._metric
        own = (
            None
            if metric is None
            else compare_values(
                metric, [i.value_of(metric) for i in before], [i.value_of(metric) for i in after], when=when
            )
        )
        readings: dict[str, tuple[str, Callable[[EvaluationItem], bool]]] = {
            "strict": ("strict accuracy", lambda item: item.strict),
            "lenient": ("lenient accuracy", lambda item: item.lenient),
            "format": ("the share of answers in the required format", lambda item: item.strict_format),
        }
        return {
            **({METRIC: own.as_dict()} if own else {}),
            **{
                reading: compare(name, [is_so(i) for i in before], [is_so(i) for i in after], when=when).as_dict()
                for reading, (name, is_so) in readings.items()
            },
        }

    def _samples(self) -> list[dict[str, Any]]:
        pairs = list(zip(self._items["before"], self._items["after"], strict=True))
        shown = min(SAMPLES, len(pairs))
        return [
            {
                "row": before.row,
                "question": before.question,
                "answer": before.answer,
                "before": before.completion,
                "after": after.completion,
            }
            for before, after in (pairs[place * len(pairs) // shown] for place in range(shown))
        ]


def _shown(point: Point) -> dict[str, Any]:
    """A point of the curve in an event, by which readers draw it."""
    names = ("step", "questions", "metric", "value", "interval", "strict_accuracy", "strict_interval")
    return {name: getattr(point, name) for name in (*names, "lenient_accuracy", "lenient_interval")}


def _means(items: Sequence[EvaluationItem]) -> dict[str, Any]:
    """The mean of each reward and of the total, if a job has graders."""
    if items[0].rewards is None:
        return {}
    by_name = {name: [v for i in items if (v := (i.rewards or {}).get(name)) is not None] for name in items[0].rewards}
    totals = [item.total for item in items if item.total is not None]
    return {
        "rewards": {name: statistics.fmean(values) for name, values in by_name.items() if values},
        "total": statistics.fmean(totals) if totals else None,
    }


def _load_automatic(spec: JobSpec, rows: list[Row], inputs: Path, warn: Warn) -> tuple[list[Row], list[Row], str]:
    """The rows to hold out, those to train on, and where the first are from, if a job leaves it open: another split,
    else the last rows."""
    if not spec.held_out_rows:
        with suppress(DatasetError):
            held_out = _load_apart(spec, inputs, warn)
            if len(held_out) >= LEAST_AUTOMATIC:
                return held_out, rows, _held_out(spec)
    count = automatic_questions(len(rows), spec.evaluation.questions)
    return (rows[-count:], rows[:-count], LAST_ROWS) if count else ([], rows, "")


def _load_apart(spec: JobSpec, inputs: Path, warn: Warn) -> list[Row]:
    """The questions that do not come from the rows to train on."""
    other: dict[str, Any] = {"split": spec.evaluation.split, "max_rows": spec.evaluation.questions}
    if spec.evaluation.dataset is not None:
        other |= {"dataset": spec.evaluation.dataset, "subset": None, "revision": None}
    data = spec.data.model_copy(update=other)
    try:
        return load_rows(data, inputs, warn=warn, needs=Needs.of(spec), name=EVALUATION_UPLOAD_NAME)
    except DatasetError as error:
        error.problems = [replace(problem, pointer=_of_evaluation(problem.pointer)) for problem in error.problems]
        raise


def _of_evaluation(pointer: str) -> str:
    """The field in which to fix a problem with the questions' data set."""
    return pointer.replace("/data/", "/evaluation/", 1) if pointer in ("/data/split", "/data/dataset") else pointer


def _held_out(spec: JobSpec) -> str:
    """Where the questions come from, in words."""
    if spec.evaluation.dataset is not None:
        return f"data set {spec.evaluation.dataset}" if spec.data.source != "file" else "a file"
    return LAST_ROWS if spec.held_out_rows else f"split {spec.evaluation.split}"


def _without_repeats(rows: list[Row], held_out: list[Row], warn: Warn) -> list[Row]:
    asked = {row.question for row in held_out}
    left = [row for row in rows if row.question not in asked]
    if len(left) < len(rows):
        warn(
            WarningCode.HELD_OUT_REPEATS,
            f"{len(rows) - len(left)} rows repeat a held-out question and are not trained on.",
        )
    if not left:
        detail = "every row to train on repeats a held-out question"
        raise _bad_data(FailureCode.NO_ROWS_LEFT, detail, "Hold out fewer questions, or name another split.")
    return left


def _bad_data(code: FailureCode, detail: str, remedy: str) -> DatasetError:
    return DatasetError([Problem(pointer="/evaluation/questions", code=code, detail=detail, remedy=remedy)])
