"""Evaluation inside a job: questions that are never trained on, asked before and after, and what came of it.

Owns which rows are held out, when a request to stop ends the asking, the records and the report's `evaluation`; how
questions are answered is the engine's, how answers are read is `evaluation`'s. Invariant: no row that is asked, and
none with the same question, is left among the rows to train on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_core.comparison import compare, wilson_interval
from grpo_core.datasets import DatasetError, Row, load_rows
from grpo_core.evaluation import EvaluationItem, Sampling, read, summarise
from grpo_core.prompts import ChatTokenizer, messages_for
from grpo_core.records import EventWriter, write_evaluation
from grpo_core.runfolder import RunFolder
from grpo_core.spec import JobSpec, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_core.engines import Engine

SAMPLES: Final = 10
"""Questions that the report shows with both answers, spread evenly: chosen before anything is answered."""
FINISH_SECONDS: Final = 30.0
"""A run that is asked to stop finishes its evaluation if no more than this is left of it."""
PROGRESS_SECONDS: Final = 15.0
"""Time between two log events that say how far it is."""

Stage = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class SplitRows:
    """A job's data set."""

    train: list[Row]
    held_out: list[Row]


def load_split(spec: JobSpec, inputs: Path, warn: Callable[[str, str], None]) -> SplitRows:
    """Read the rows to train on and those to hold out; raises `DatasetError`."""
    rows, wanted = load_rows(spec.data, inputs, warn=warn), spec.evaluation.questions
    if not wanted:
        return SplitRows(rows, [])
    if not spec.held_out_rows:
        held_out = _load_other_split(spec, inputs, warn)
        if len(held_out) < wanted:
            warn("fewer_questions", f"{len(held_out)} questions are held out; {wanted} were asked for.")
    elif 2 * wanted > len(rows):
        detail = f"{wanted} questions would be held out of {len(rows)} rows, more than half of them"
        raise _bad_data("too_many_held_out", detail, f"Use at most {len(rows) // 2}, or more rows.")
    else:
        rows, held_out = rows[:-wanted], rows[-wanted:]
    return SplitRows(_without_repeats(rows, held_out, warn), held_out)


def fitting(rows: Sequence[Row], spec: JobSpec, tokenizer: ChatTokenizer) -> list[Row]:
    """The rows whose templated prompt is within `sampling.max_prompt_tokens`, as in training."""
    conversations = [messages_for(row.question, spec.data) for row in rows]
    encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True)
    limit = spec.sampling.max_prompt_tokens
    kept = [row for row, ids in zip(rows, encoded["input_ids"], strict=True) if len(ids) <= limit]
    if not kept:
        detail = f"all {len(rows)} held-out prompts are longer than sampling.max_prompt_tokens, {limit}"
        raise _bad_data("all_prompts_too_long", detail, "Raise sampling.max_prompt_tokens, or use other questions.")
    return kept


class HeldOutEvaluation:
    """The evaluation of one run: `ask_base` before training, `ask_adapter` after it, then `report`."""

    def __init__(self, *, spec: JobSpec, rows: Sequence[Row], folder: RunFolder, events: EventWriter) -> None:
        self._spec, self._folder, self._events = spec, folder, events
        self._given = len(rows)
        self._rows = list(rows)
        self._items: dict[Stage, list[EvaluationItem]] = {}
        self._seconds: dict[Stage, float] = {}

    def ask_base(self, engine: Engine, earlier: Mapping[str, Any] | None = None) -> None:
        """Put the questions to the base model, unless `earlier`, another run's `state`, holds its answers to them."""
        self._rows = fitting(self._rows, self._spec, engine.tokenizer)
        if earlier and self._take_over(earlier):
            self._events.log(f"The base model's {len(self._rows)} answers are those of the earlier run")
            return
        self._events.phase("evaluating")
        self._ask(engine, "before", threading.Event())
        self._events.emit("evaluation", {"stage": "before", **self._summary("before")})

    def state(self) -> dict[str, Any]:
        """The base model's answers, as JSON."""
        return {"seconds": self._seconds["before"], "items": [item.as_dict() for item in self._items["before"]]}

    def ask_adapter(self, engine: Engine, stop: threading.Event) -> bool:
        """Put them to the trained model and write the records; False if `stop` was set and too much was left."""
        if not self._ask(engine, "after", stop):
            return False
        before, after = self._items["before"], self._items["after"]
        write_evaluation(self._folder.root, [item.as_dict() for item in before], [item.as_dict() for item in after])
        paired = self._paired()
        self._events.emit("evaluation", {"stage": "after", **self._summary("after"), "paired": paired})
        for comparison in paired.values():
            self._events.log(comparison["verdict"])
        return True

    def report(self) -> dict[str, Any]:
        """The report's `evaluation`."""
        return {
            "questions": len(self._rows),
            "dropped": self._given - len(self._rows),
            "held_out": "last rows" if self._spec.held_out_rows else f"split {self._spec.evaluation.split}",
            "max_completion_tokens": self._spec.evaluation.max_completion_tokens,
            "before": self._summary("before"),
            "after": self._summary("after"),
            "paired": self._paired(),
            "samples": self._samples(),
        }

    def _take_over(self, earlier: Mapping[str, Any]) -> bool:
        """Whether the answers were to these very questions, and are kept."""
        items = [EvaluationItem(**item) for item in earlier["items"]]
        if [Row(item.row, item.question, item.answer) for item in items] != self._rows:
            return False
        self._items["before"], self._seconds["before"] = items, earlier["seconds"]
        return True

    def _ask(self, engine: Engine, stage: Stage, stop: threading.Event) -> bool:
        began = told = time.perf_counter()
        items: list[EvaluationItem] = []
        questions = [row.question for row in self._rows]
        limit = self._spec.evaluation.max_completion_tokens
        with closing(engine.answer(questions, adapter=stage == "after", max_new_tokens=limit)) as answers:
            for row in self._rows:
                if stop.is_set() and self._seconds_left(len(items)) > FINISH_SECONDS:
                    return False
                items.append(read(row, next(answers)))
                if (now := time.perf_counter()) - told > PROGRESS_SECONDS:
                    told = now
                    self._events.log(f"Evaluation, {stage} training: {len(items)} of {len(self._rows)} answered")
        self._items[stage] = items
        self._seconds[stage] = time.perf_counter() - began
        return True

    def _seconds_left(self, answered: int) -> float:
        """What the rest took of the base model."""
        return self._seconds["before"] * (1 - answered / len(self._rows))

    def _summary(self, stage: Stage) -> dict[str, Any]:
        items = self._items[stage]
        return {
            **summarise(items, Sampling()).as_dict(),
            "strict_interval": wilson_interval(sum(item.strict for item in items), len(items)),
            "lenient_interval": wilson_interval(sum(item.lenient for item in items), len(items)),
            "seconds": round(self._seconds[stage], 3),
        }

    def _paired(self) -> dict[str, dict[str, Any]]:
        before, after = self._items["before"], self._items["after"]
        return {
            "strict": compare("strict accuracy", [i.strict for i in before], [i.strict for i in after]).as_dict(),
            "lenient": compare("lenient accuracy", [i.lenient for i in before], [i.lenient for i in after]).as_dict(),
            "format": compare(
                "the share of answers in the asked format",
                [i.strict_format for i in before],
                [i.strict_format for i in after],
            ).as_dict(),
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


def _load_other_split(spec: JobSpec, inputs: Path, warn: Callable[[str, str], None]) -> list[Row]:
    other = {"split": spec.evaluation.split, "max_rows": spec.evaluation.questions}
    try:
        return load_rows(spec.data.model_copy(update=other), inputs, warn=warn)
    except DatasetError as error:
        error.problems = [
            replace(problem, pointer="/evaluation/split") if problem.pointer == "/data/split" else problem
            for problem in error.problems
        ]
        raise


def _without_repeats(rows: list[Row], held_out: list[Row], warn: Callable[[str, str], None]) -> list[Row]:
    asked = {row.question for row in held_out}
    left = [row for row in rows if row.question not in asked]
    if len(left) < len(rows):
        warn("held_out_repeats", f"{len(rows) - len(left)} rows repeat a held-out question and are not trained on.")
    if not left:
        detail = "every row to train on repeats a held-out question"
        raise _bad_data("no_rows_left", detail, "Hold out fewer questions, or name another split.")
    return left


def _bad_data(code: str, detail: str, remedy: str) -> DatasetError:
    return DatasetError([Problem(pointer="/evaluation/questions", code=code, detail=detail, remedy=remedy)])
