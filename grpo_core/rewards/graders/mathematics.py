"""The grader `math`: whether an answer equals the reference, as a number or as an expression.

Most answers are numbers or short expressions, which are compared here, exactly. math-verify compares all others, in
processes that can be killed, because some expressions keep it busy forever. Owns how an answer is found in a text.
Invariant: all completions of a step are graded within `limits.step_seconds`; a completion that exceeds its share of
them scores 0.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Final

from grpo_core.reasons import FailureCode
from grpo_core.rewards import fixed
from grpo_core.rewards.graders import answers
from grpo_core.rewards.graders.confined import ConfinedProcess, ConfinementError, LoadError, RowFailure
from grpo_core.rewards.graders.models import AnyGrader, Math
from grpo_core.rewards.graders.packages import FOR_MATH
from grpo_core.rewards.graders.protocol import Grade, GraderContext, GraderRow
from grpo_core.rewards.graders.python import confined_process, encode
from grpo_core.rewards.graders.registry import GraderUnavailable
from grpo_core.rewards.graders.rows import render
from grpo_core.rewards.graders.templates import Template
from grpo_core.rewards.number_parser import read_number, same_answer

STEP_SECONDS: Final = 10.0
FIRST_PASS: Final = 0.6
"""Part of the step's time in which every answer is compared once."""
LEAST_SECONDS: Final = 0.1
MAX_EXPRESSION: Final = 1000
"""Largest number of characters of an expression."""
MAX_TEXT: Final = 4000
"""Number of characters at the end of a text in which an answer is searched if none is marked."""
MAX_KNOWN: Final = 20_000
CORES_EACH: Final = 8
"""Cores of the host for each process; others are the job's, and of jobs beside it."""
MAX_PROCESSES: Final = 8
LEAST_EACH: Final = 32
"""Number of answers for which one more process is worth it."""
_BOXED: Final = "\\boxed{"
_GSM8K: Final = "####"
_VARIABLE: Final = re.compile(r"(?<![A-Za-z])(?:[xyz](?![A-Za-z]|\s*=)|[abcknt]\s*[-+*])|[-+*]\s*[abcknt](?![A-Za-z])")
"""What makes a text with one number an expression: `2x` is not 2, although `2 kg` and `x = 2` are."""


class MathGrader:
    """One `math` grader, with its processes: on a host of many GPUs a step has thousands of completions."""

    waits = True

    def __init__(self, model: Math, context: GraderContext) -> None:
        self._templates = [Template(model.input), Template(model.reference)]
        self._limits = context.limits
        self._known: dict[bytes, Grade] = {}
        """Grades of answers that were verified before, oldest first; those that could not be verified are left out."""
        source = Path(__file__).with_name("equal_expressions.py").read_text(encoding="utf-8")
        limits = context.limits.model_copy(update={"fresh_process": False})
        self._processes = [
            confined_process(context, source, limits=limits, packages=FOR_MATH, ours=True)
            for _ in range(min(MAX_PROCESSES, max(1, len(os.sched_getaffinity(0)) // CORES_EACH)))
        ]
        # A process dies with the thread that started it, so these threads live as long as the grader.
        self._threads = ThreadPoolExecutor(len(self._processes), "math")
        try:
            self._processes[0].start()  # the others when a step needs them
        except (ConfinementError, LoadError) as error:
            raise GraderUnavailable(
                FailureCode.GRADER_NOT_AVAILABLE,
                f"The grader {context.name} of type math cannot run on this worker: {error}.",
                "Ask the worker's operator to install the graders extra.",
            ) from error

    @property
    def isolation(self) -> Mapping[str, object]:
        """How its first process is confined, as all are."""
        return self._processes[0].isolation

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        end = time.monotonic() + (self._limits.step_seconds or STEP_SECONDS)
        grades: list[Grade | None] = []
        open_rows: list[int] = []
        lines: list[bytes] = []
        for number, row in enumerate(rows):
            texts = render(self._templates, row)
            grade = texts if isinstance(texts, Grade) else _at_once(*texts)
            if grade is None and not isinstance(texts, Grade):
                open_rows.append(number)
                lines.append(_line(*texts))
            grades.append(grade)
        for number, grade in zip(open_rows, self._verify(lines, end), strict=True):
            grades[number] = grade
        return [grade for grade in grades if grade is not None]

    def close(self) -> None:
        for process in self._processes:
            process.close()
        self._threads.shutdown()

    def _verify(self, lines: Sequence[bytes], end: float) -> list[Grade]:
        """A grade for each line. Completions of a group often give the same answer, which is verified once."""
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        found = dict(zip(new, self._by_expression(new, end), strict=True))
        grades = [found[line] if line in found else self._known[line] for line in lines]
        self._known |= {line: grade for line, grade in found.items() if grade.error is None}
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return grades

    def _by_expression(self, lines: Sequence[bytes], end: float) -> list[Grade]:
        if not lines:
            return []
        results = self._run(lines, FIRST_PASS * (end - time.monotonic()))
        slow = [number for number, result in enumerate(results) if _type(result) in ("Timeout", "Late")]
        slow.sort(key=lambda number: _type(results[number]) != "Late")
        if slow:  # answers that were not reached or exceeded their share may use the time that is left
            again = self._run([lines[number] for number in slow], end - time.monotonic())
            for number, result in zip(slow, again, strict=True):
                results[number] = result
        return [_grade(result) for result in results]

    def _run(self, lines: Sequence[bytes], seconds: float) -> list[float | RowFailure]:
        """Return a result for each line, of which each process gets as many as the others."""
        seconds = max(seconds, LEAST_SECONDS)
        count = min(len(self._processes), max(1, len(lines) // LEAST_EACH))
        shares = [lines[first::count] for first in range(count)]
        if count == 1:
            return self._run_in(self._processes[0], lines, seconds)
        results: list[float | RowFailure] = [0.0] * len(lines)
        for first, found in enumerate(self._threads.map(self._run_in, self._processes, shares, repeat(seconds))):
            results[first::count] = found
        return results

    def _run_in(self, process: ConfinedProcess, lines: Sequence[bytes], seconds: float) -> list[float | RowFailure]:
        try:
            return process.run(lines, row_seconds=self._limits.row_seconds, seconds=seconds, fair=True).results
        except (ConfinementError, LoadError) as error:
            return [RowFailure("Start", str(error))] * len(lines)


def make(model: AnyGrader, context: GraderContext) -> MathGrader:
    """Return the grader. Raises `GraderUnavailable` if its process cannot be started."""
    assert isinstance(model, Math), "the registry's table"
    return MathGrader(model, context)


def answer_in(text: str) -> str | None:
    """Return the answer in `<answer>`, in `\\boxed{}` or after `####`; None if the text has none of them."""
    inside = fixed.extract(text)
    if inside is not None:
        text = inside
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    _, marked, after = text.rpartition(_GSM8K)
    if marked:
        return after.strip().partition("\n")[0].strip()
    return inside.strip() if inside is not None else None


def _boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}` whose brackets are balanced."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for at in range(start, min(len(text), start + 2 * MAX_EXPRESSION)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
    return None


def _at_once(text: str, reference: str) -> Grade | None:
    """Return the grade if numbers or equal texts decide it; None if an expression must be parsed."""
    gold = answer_in(reference) or reference.strip()
    answer = answer_in(text)
    if answer is None:
        answer = text.strip()
        if len(answer) > MAX_EXPRESSION:
            return None
    if not answer or len(answer) > MAX_EXPRESSION or len(gold) > MAX_EXPRESSION:
        return Grade(score=0.0)
    if answer == gold:
        return Grade(score=1.0)
    if not _is_expression(answer) and not _is_expression(gold):
        if same_answer(answer, gold):
            return Grade(score=1.0)
        if read_number(answer) is not None and read_number(gold) is not None:
            return Grade(score=0.0)
    same = answers.same_answer(answer, gold)
    return None if same is None else Grade(score=float(same))


def _is_expression(text: str) -> bool:
    """Whether a text with one number may have another value, as `2\\pi`, `2x` and `5\\%` do."""
    return any(sign in text for sign in "\\^%_√π") or _VARIABLE.search(text) is not None


def _line(text: str, reference: str) -> bytes:
    answer = answer_in(text)
    if answer is None and len(text.strip()) <= MAX_EXPRESSION and "\n" not in text.strip():
        answer = text.strip()
    gold = answer_in(reference) or reference.strip()
    sample = {"answer": answer, "text": "" if answer is not None else text[-MAX_TEXT:]}
    return encode({"sample": sample, "item": {"gold": gold}, "seed": 0})


def _type(result: float | RowFailure) -> str | None:
    return result.type if isinstance(result, RowFailure) else None


def _grade(result: float | RowFailure) -> Grade:
    if not isinstance(result, RowFailure):
        return Grade(score=result)
    if result.type in ("Start", "Late"):
        return Grade.failed("other_error", result.message)
    return Grade.worthless("sample_parse_error", f"the answer cannot be verified: {result.type}: {result.message}")
