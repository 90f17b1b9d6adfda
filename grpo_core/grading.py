"""The rewards of completions: the recipe's five, those of a job's graders, and the total that training learns from.

Owns how scores become a total (weights or a formula), and what happens to completions that a grader fails to score.
Invariant: nothing is learnt from a failed grader. With `skip_group` every completion of that prompt gets the same
reward, so that its advantages are 0 with every scaling; the scores that are known are still recorded.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureClass, FailureCode
from grpo_core.rewards import Scorer, scorers
from grpo_core.rewards.graders.formula import Formula, FormulaError
from grpo_core.rewards.graders.models import AnyGrader, GraderLimits, Multi, members_of
from grpo_core.rewards.graders.protocol import (
    AbsentGrader,
    Grade,
    GradeError,
    Grader,
    GraderContext,
    GraderRow,
    Remembers,
)
from grpo_core.rewards.graders.registry import GraderUnavailable, make_grader
from grpo_core.spec import JobSpec

TOTAL: Final = "total"
"""Name of a completion's total reward among the names of rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A completion to grade, with its row of the data set."""

    text: str
    answer: str
    item: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompt_id: str = ""
    number: int = 0
    """Position in its group, from 0."""


@dataclass(slots=True, kw_only=True)
class Payment:
    """The reward of one completion, with the scores and errors behind it."""

    rewards: dict[str, float | None]
    """Rewards before weights; None if a grader failed."""
    total: float
    errors: dict[str, GradeError] = field(default_factory=dict[str, GradeError])
    """Errors by grader; a member of a `multi` is `name.member`."""
    details: dict[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    skipped: bool = False
    """Whether it got its group's common reward, because a grader failed."""


class Grading:
    """All rewards of a job, for as long as it runs; to be closed."""

    def __init__(
        self,
        spec: JobSpec,
        environment: Mapping[str, str] | None = None,
        *,
        make: Callable[[AnyGrader, GraderContext], Grader] = make_grader,
        lenient: bool = False,
    ) -> None:
        """Starts the graders. Raises `JobFailure` if one cannot run here; with `lenient` that one scores nothing."""
        self._make, self._lenient = make, lenient
        self.unavailable: dict[str, GraderUnavailable] = {}
        """Graders that cannot run here, and why."""
        self.seconds: dict[str, float] = {}
        """How long each grader took for the last completions."""
        self._rewards = spec.rewards
        self._five = scorers(spec.rewards.mode, spec.rewards.tags.as_tags)
        self._generations = spec.sampling.generations
        self._formula = None if spec.rewards.formula is None else Formula(spec.rewards.formula, spec.rewards.names)
        self._weights = spec.rewards.weights.by_name
        self._failures: deque[tuple[int, int]] = deque(maxlen=spec.rewards.on_error.window_steps)
        self._reasons: Counter[str] = Counter()
        self._response = _response_schema(spec)
        self._graders: dict[str, Grader] = {}
        self._multis: dict[str, tuple[Formula, list[str]]] = {}
        self._open = ExitStack()
        try:
            for name, model in spec.rewards.graders.items():
                self._add(name, model, os.environ if environment is None else environment, spec.training.seed)
        except BaseException:
            self._open.close()
            raise
        waiting = sum(grader.waits for grader in self._graders.values())
        self._threads = ThreadPoolExecutor(waiting, "grader") if waiting else None
        if self._threads is not None:
            self._open.callback(self._threads.shutdown)

    @property
    def names(self) -> tuple[str, ...]:
        """Every reward, in the order of records."""
        return self._rewards.names

    def report(self) -> dict[str, Any]:
        """Return the type of each grader and, if it has a process, how that is confined."""
        types = {
            name: leaf.type
            for key, model in self._rewards.graders.items()
            for name, leaf in members_of(key, model).items()
        }
        found = {name: getattr(grader, "isolation", None) for name, grader in self._graders.items()}
        return {name: {"type": types[name], **({"process": dict(how)} if how else {})} for name, how in found.items()}

    @property
    def printed(self) -> dict[str, str]:
        """Return the start of what `python` graders printed while they graded the last completions."""
        found = {name: getattr(grader, "printed", "") for name, grader in self._graders.items()}
        return {name: text for name, text in found.items() if text}

    def close(self) -> None:
        """End every process and connection."""
        self._open.close()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know, as JSON: recent failures, and what graders remember."""
        remembered = {name: grader.state() for name, grader in self._graders.items() if isinstance(grader, Remembers)}
        return {"failures": [list(counts) for counts in self._failures], "graders": remembered}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier run of the same spec stopped. Raises `ValueError`, `TypeError` or `KeyError`."""
        self._failures.extend((int(failed), int(total)) for failed, total in state["failures"])
        for name, remembered in state["graders"].items():
            grader = self._graders.get(name)
            if isinstance(grader, Remembers):
                grader.restore(remembered)

    def pay(self, completions: Sequence[Graded], *, step: int = 0) -> list[Payment]:
        """Grade a step's completions, which are ordered by group.

        Raises `JobFailure` once too many could not be scored.
        """
        payments = self.grade(completions, step=step)
        self._settle(payments)
        self._require_few_failures(payments)
        return payments

    def grade(self, completions: Sequence[Graded], *, step: int = 0) -> list[Payment]:
        """Grade completions without regard to groups. The total of one that `is_unscored` has no meaning."""
        grades = self._run(completions, step)
        return [self._payment(completion, number, grades) for number, completion in enumerate(completions)]

    def _add(self, name: str, model: AnyGrader, environment: Mapping[str, str], seed: int) -> None:
        limits = self._rewards.limits.get(name, GraderLimits())
        members = members_of(name, model)
        for member, leaf in members.items():
            context = GraderContext(name=member, limits=limits, environment=environment, seed=seed)
            try:
                grader = self._make(leaf, context)
            except GraderUnavailable as error:
                if not self._lenient:
                    raise JobFailure(
                        error.code, str(error), hint=error.remedy, failure_class=FailureClass.REWARD
                    ) from error
                self.unavailable[member] = error
                grader = AbsentGrader(error.kind, str(error))
            self._graders[member] = grader
            self._open.callback(grader.close)
        if isinstance(model, Multi):
            self._multis[name] = (Formula(model.calculate_output, model.graders), list(model.graders))

    def _run(self, completions: Sequence[Graded], step: int) -> dict[str, list[Grade]]:
        if not self._graders:
            return {}
        rows = [self._row(completion, step) for completion in completions]
        waiting = {
            name: self._threads.submit(self._timed, name, rows)
            for name, grader in self._graders.items()
            if grader.waits and self._threads is not None
        }
        grades = {name: self._timed(name, rows) for name, grader in self._graders.items() if not grader.waits}
        return {**grades, **{name: future.result() for name, future in waiting.items()}}

    def _timed(self, name: str, rows: Sequence[GraderRow]) -> list[Grade]:
        began = time.perf_counter()
        grades = self._graders[name].grade(rows)
        self.seconds[name] = time.perf_counter() - began
        return grades

    def _row(self, completion: Graded, step: int) -> GraderRow:
        from grpo_core.rewards.graders.rows import make_sample

        return GraderRow(
            sample=make_sample(completion.text, self._response),
            item=completion.item,
            prompt_id=completion.prompt_id,
            number=completion.number,
            step=step,
        )

    def _payment(self, completion: Graded, number: int, grades: Mapping[str, list[Grade]]) -> Payment:
        five = {name: scorer(completion.text, completion.answer) for name, scorer in self._five.items()}
        payment = Payment(rewards={**five}, total=0.0)
        own = {name: of_rows[number] for name, of_rows in grades.items()}
        for name, grade in own.items():
            if grade.error is not None:
                payment.errors[name] = grade.error
            if grade.details:
                payment.details[name] = grade.details
        for name in self._rewards.graders:
            payment.rewards[name] = self._multi(name, own, payment) if name in self._multis else own[name].score
        payment.total = self._total(payment)
        return payment

    def _multi(self, name: str, grades: Mapping[str, Grade], payment: Payment) -> float | None:
        formula, members = self._multis[name]
        scores = {member: grades[f"{name}.{member}"].score for member in members}
        payment.details[name] = {"scores": scores}
        known = {member: score for member, score in scores.items() if score is not None}
        if len(known) < len(scores):
            if self._rewards.on_error.policy != "zero":
                return None
            known = {member: score or 0.0 for member, score in scores.items()}
        return _value(formula, known, name, payment)

    def _total(self, payment: Payment) -> float:
        """Return the total of the known scores. If a grader failed, `rewards.on_error` decides what happens next."""
        known = {name: 0.0 if score is None else score for name, score in payment.rewards.items()}
        if self._formula is None:
            return sum(self._weights[name] * score for name, score in known.items())
        value = _value(self._formula, known, TOTAL, payment)
        return 0.0 if value is None else value

    def is_unscored(self, payment: Payment) -> bool:
        """Whether its total is unknown because a grader failed."""
        if self._rewards.on_error.policy == "zero" and TOTAL not in payment.errors:
            return False
        return any(not error.of_completion for error in payment.errors.values() if self._counts(error, payment))

    def _counts(self, error: GradeError, payment: Payment) -> bool:
        """Whether the failed grader contributes to the total."""
        if self._formula is not None:
            return True
        failed = {name.partition(".")[0] for name, found in payment.errors.items() if found is error}
        return any(self._weights.get(name) for name in failed)

    def _settle(self, payments: list[Payment]) -> None:
        """Give all completions of a group with an unscored one the same reward: the mean of the scored ones."""
        groups = [payments[at : at + self._generations] for at in range(0, len(payments), self._generations)]
        scored = [p.total for p in payments if not self.is_unscored(p)]
        for group in groups:
            good = [payment.total for payment in group if not self.is_unscored(payment)]
            if len(good) == len(group):
                continue
            constant = _exactly_averaged(statistics.fmean(good or scored or [0.0]))
            for payment in group:
                payment.total, payment.skipped = constant, True

    def _require_few_failures(self, payments: Sequence[Payment]) -> None:
        failed = [p for p in payments if any(not error.of_completion for error in p.errors.values())]
        for payment in failed:
            name, error = next((n, e) for n, e in payment.errors.items() if not e.of_completion)
            self._reasons[f"{name}: {error.kind}: {error.message}"] += 1
        self._failures.append((len(failed), len(payments)))
        on_error = self._rewards.on_error
        # Steps to come count as good, so that one bad step at the start is not judged as a whole window.
        steps = max(on_error.window_steps, len(self._failures))
        share = sum(bad for bad, _ in self._failures) / (steps * max(total for _, total in self._failures))
        if failed and share > on_error.max_share:
            reason, count = self._reasons.most_common(1)[0]
            raise JobFailure(
                FailureCode.GRADERS_FAILED,
                f"{sum(bad for bad, _ in self._failures)} completions of the last {len(self._failures)} steps could "
                f"not be scored, more than rewards.on_error.max_share allows. The most frequent reason, {count} times: "
                f"{reason}",
                hint="Correct the grader or its inputs. To train in spite of it, raise rewards.on_error.max_share.",
            )


def _exactly_averaged(value: float) -> float:
    """Round the value to 12 binary digits, so that the mean of a group of equal values in 32 bits is exactly the value.

    Otherwise rounding errors alone would give them advantages.
    """
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 4096) / 4096, exponent)


def _value(formula: Formula, scores: Mapping[str, float], name: str, payment: Payment) -> float | None:
    try:
        return formula(scores)
    except FormulaError as error:
        payment.errors[name] = GradeError(kind="formula_parse_error", message=str(error))
        return None


def _response_schema(spec: JobSpec) -> Any:
    response = spec.sampling.response_format
    if response is None:
        return None
    from grpo_core.rewards.graders.rows import Schema, SchemaError

    try:
        return Schema(response.json_schema.json_schema if response.json_schema else {"type": "object"})
    except SchemaError as error:
        raise JobFailure(
            FailureCode.BAD_SCHEMA, f"sampling.response_format {error}.", hint="Correct its schema."
        ) from error


__all__ = ["TOTAL", "Graded", "Grading", "Payment", "Scorer"]
