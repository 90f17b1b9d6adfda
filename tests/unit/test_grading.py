"""What completions are paid: weights, formulas, members of a `multi`, and what becomes of what cannot be scored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from pydantic import TypeAdapter

from grpo_core.errors import JobFailure
from grpo_core.grading import Graded, Grading, Payment
from grpo_core.rewards.graders.confined import why_not_confined
from grpo_core.rewards.graders.mathematics import answer_in
from grpo_core.rewards.graders.models import Grader, GraderLimits
from grpo_core.rewards.graders.protocol import Grade, GraderContext, GraderRow
from grpo_core.rewards.graders.registry import make_grader
from grpo_core.rewards.graders.rows import Schema, make_sample
from grpo_core.rewards.graders.similarity import METRICS
from grpo_core.spec import JobSpec, parse_spec
from tests.clock import patience

MODELS: TypeAdapter[Any] = TypeAdapter(Grader)
needs_confinement = pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())

SAME = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.wanted}}", "operation": "eq"}
SHORT = {"type": "length", "maximum": 4}


def spec_with(graders: dict[str, Any], *, generations: int = 2, **rewards: Any) -> JobSpec:
    sampling = {"generations": generations, "prompts_per_step": 2, "response_format": {"type": "json_object"}}
    return parse_spec({"rewards": {"graders": graders, **rewards}, "sampling": sampling})


def pay(spec: JobSpec, texts: list[str], items: list[dict[str, Any]] | None = None) -> list[Payment]:
    grading = Grading(spec, {})
    given = items or [{"wanted": "a"}] * len(texts)
    try:
        return grading.pay([Graded(text=t, answer="a", item=i) for t, i in zip(texts, given, strict=True)], step=1)
    finally:
        grading.close()


def grade(model: dict[str, Any], text: str, item: dict[str, Any] | None = None, schema: Any = None) -> Grade:
    grader = make_grader(MODELS.validate_python(model), GraderContext(name="x", environment={}))
    try:
        return grader.grade([GraderRow(sample=make_sample(text, schema), item=item or {})])[0]
    finally:
        grader.close()


def test_weights_multiply_raw_scores() -> None:
    payments = pay(spec_with({"same": SAME, "short": SHORT}, weights={"same": 2.0, "short": 0.5}), ["a", "b", "a" * 9])
    assert [p.rewards["same"] for p in payments] == [1, 0, 0]
    assert [p.rewards["short"] for p in payments] == [1, 1, 0]
    assert [p.total for p in payments] == [2.5, 0.5, 0]
    assert {"correctness", "xml_count"} < set(payments[0].rewards)  # recorded, and not paid


def test_a_formula_says_what_is_paid() -> None:
    spec = spec_with({"same": SAME, "short": SHORT}, formula="2 * same * short - 0.5 * (1 - same)")
    assert [p.total for p in pay(spec, ["a", "b"])] == [2.0, -0.5]


def test_a_multi_is_its_formula_and_keeps_its_members_scores() -> None:
    multi = {"type": "multi", "graders": {"A": SAME, "B": SHORT}, "calculate_output": "A + B ^ 2"}
    payments = pay(spec_with({"both": multi}), ["a", "bbbbbb"])
    assert [p.total for p in payments] == [2.0, 0.0]
    assert payments[0].details["both"] == {"scores": {"A": 1.0, "B": 1.0}}


def test_a_group_with_an_unscored_completion_is_paid_one_value() -> None:
    spec = spec_with({"same": SAME}, on_error={"max_share": 1.0})
    payments = pay(spec, ["a", "b", "a", "b"], [{"wanted": "a"}, {}, {"wanted": "a"}, {"wanted": "a"}])
    assert [p.total for p in payments] == [1.0, 1.0, 1.0, 0.0]
    assert [p.skipped for p in payments] == [True, True, False, False]
    assert payments[1].rewards["same"] is None
    assert payments[1].errors["same"].kind == "invalid_variable_error"
    assert payments[0].rewards["same"] == 1.0  # what is known stays


def test_zero_counts_an_unscored_completion_as_0() -> None:
    spec = spec_with({"same": SAME}, on_error={"policy": "zero", "max_share": 1.0})
    payments = pay(spec, ["a", "b"], [{"wanted": "a"}, {}])
    assert [(p.total, p.skipped) for p in payments] == [(1.0, False), (0.0, False)]
    assert payments[1].rewards["same"] is None


def test_a_grader_that_is_not_paid_for_skips_nothing() -> None:
    spec = spec_with({"same": SAME, "short": SHORT}, weights={"same": 0}, on_error={"max_share": 1.0})
    payments = pay(spec, ["a", "bbbbbb"], [{}, {}])
    assert [(p.total, p.skipped) for p in payments] == [(1.0, False), (0.0, False)]


def test_a_formula_without_a_value_skips_the_group() -> None:
    payments = pay(spec_with({"same": SAME}, formula="1 / same", on_error={"max_share": 1.0}), ["a", "b", "a", "a"])
    assert [(p.total, p.skipped) for p in payments] == [(1.0, True), (1.0, True), (1.0, False), (1.0, False)]
    assert payments[1].errors["total"].kind == "formula_parse_error"


def test_a_completions_own_fault_is_worth_0_and_skips_nothing() -> None:
    model = {**SAME, "input": "{{sample.output_json.answer}}"}
    payments = pay(spec_with({"same": model}), ['{"answer": "a"}', "no JSON"])
    assert [(p.total, p.skipped) for p in payments] == [(1.0, False), (0.0, False)]
    assert payments[1].errors["same"].of_completion


def test_too_many_failures_end_the_job() -> None:
    spec = spec_with({"same": SAME}, on_error={"max_share": 0.2, "window_steps": 10})
    grading = Grading(spec, {})
    bad = [Graded(text="a", answer="", item={})] * 4
    grading.pay(bad)
    grading.pay(bad)
    with pytest.raises(JobFailure, match="invalid_variable_error") as failed:
        grading.pay(bad)
    assert (failed.value.report.code, failed.value.exit_code) == ("graders_failed", 12)


def test_one_bad_step_among_many_does_not_end_it() -> None:
    grading = Grading(spec_with({"same": SAME}, on_error={"max_share": 0.2, "window_steps": 10}), {})
    good, bad = [Graded(text="a", answer="", item={"wanted": "a"})] * 4, [Graded(text="a", answer="", item={})] * 4
    for step in range(100):
        grading.pay(bad if step % 10 < 2 else good)


# Graders one by one


@pytest.mark.parametrize(
    ("operation", "given", "reference", "score"),
    [
        ("eq", "a", "a", 1),
        ("eq", "a ", "a", 0),
        ("ne", "a", "b", 1),
        ("like", "xay", "a", 1),
        ("like", "xAy", "a", 0),
        ("ilike", "xAy", "a", 1),
        ("ilike", "STRASSE", "straße", 1),
    ],
)
def test_string_check(operation: str, given: str, reference: str, score: float) -> None:
    model = {"type": "string_check", "input": given, "reference": reference, "operation": operation}
    assert grade(model, "").score == score


@pytest.mark.parametrize(
    ("model", "text", "score"),
    [
        ({"minimum": 2, "maximum": 4}, "abc", 1),
        ({"minimum": 2, "maximum": 4}, "abcde", 0),
        ({"maximum": 4, "falloff": 3}, "abcde", 0.75),
        ({"minimum": 4, "falloff": 3}, "a", 0.25),
        ({"minimum": 4, "falloff": 3}, "", 0),
        ({"unit": "words", "maximum": 2}, "one  two", 1),
        ({"unit": "lines", "minimum": 2}, "one\ntwo", 1),
    ],
)
def test_length(model: dict[str, Any], text: str, score: float) -> None:
    assert grade({"type": "length", **model}, text).score == score


def test_regex_is_linear_in_hostile_texts() -> None:
    began = time.perf_counter()
    assert grade({"type": "regex", "pattern": "^(a|aa)+$"}, "a" * 100_000 + "b").score == 0
    assert time.perf_counter() - began < patience(2)
    assert grade({"type": "regex", "pattern": "(?s)<a>.*</a>", "match": "full"}, "<a>\n</a>").score == 1
    assert grade({"type": "regex", "pattern": "b"}, "abc").score == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [('{"a": 1}', 1), (' {"a": 1}\n', 1), ('{"a": "1"}', 0), ("[" * 5000, 0), ("", 0), ("NaN", 0), ('{"a": 1} x', 0)],
)
def test_json_schema(text: str, score: float) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert grade({"type": "json_schema", "schema": schema}, text).score == score


def test_a_schema_that_refers_elsewhere_is_refused_and_fetches_nothing() -> None:
    spec = spec_with({"s": {"type": "json_schema", "schema": {"$ref": "http://127.0.0.1:9/schema"}}})
    with pytest.raises(JobFailure) as refused:
        Grading(spec, {})
    assert refused.value.report.code == "bad_schema"


def test_a_response_format_is_checked_and_not_enforced() -> None:
    schema = Schema({"type": "object", "required": ["a"]})
    assert make_sample('{"a": 1}', schema)["output_json"] == {"a": 1}
    assert make_sample('{"b": 1}', schema)["output_json"] is None
    assert "output_json" not in make_sample('{"a": 1}', None)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_is_1_for_the_same_and_less_for_others(metric: str) -> None:
    compare = METRICS[metric]
    for text in ("the cat sat on the mat today", "今天天气很好我们去公园玩"):
        assert compare(text, text) == pytest.approx(1.0)
        assert 0.0 <= compare(text, "entirely different words stand here 不同") < 0.5
    began = time.perf_counter()
    assert 0.0 <= compare("ab " * 30_000, "ba " * 30_000) <= 1.0
    assert time.perf_counter() - began < patience(5)


def test_chinese_answers_that_differ_are_not_alike_for_their_digits() -> None:
    assert METRICS["rouge_1"]("他有72个苹果", "共走了72公里") < 0.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 72 </answer>", "72"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("work\n#### 72\n", "72"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("<answer>\\boxed{3}</answer>", "3"),
        ("\\boxed{1", None),
        ("72", None),
    ],
)
def test_the_answer_in_a_text(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


MATH = {"type": "math", "input": "{{sample.output_text}}", "reference": "{{item.gold}}"}


@pytest.fixture(scope="module")
def math_grader() -> Iterator[Any]:
    with closing(make_math_grader(step_seconds=4.0, row_seconds=2.0)) as grader:
        yield grader


@pytest.fixture(scope="module")
def patient_math_grader() -> Iterator[Any]:
    """For expressions that it reads: how long that takes is not what is tested."""
    with closing(make_math_grader(step_seconds=patience(20.0), row_seconds=patience(4.0))) as grader:
        yield grader


def make_math_grader(**limits: float) -> Any:
    context = GraderContext(name="m", limits=GraderLimits.model_validate(limits), environment={})
    return make_grader(MODELS.validate_python(MATH), context)


def math_rows(*pairs: tuple[str, str]) -> list[GraderRow]:
    return [GraderRow(sample=make_sample(text, None), item={"gold": gold}) for text, gold in pairs]


@needs_confinement
def test_math_reads_what_models_write(patient_math_grader: Any) -> None:
    right = [
        ("答案是72", "72"), ("<answer>72个</answer>", "72"), ("<answer>1,200元</answer>", "1200"), ("５", "5"),
        ("<answer>3/4</answer>", "0.75"), ("\\boxed{\\frac{3}{4}}", "0.75"), ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        ("#### 72", "so it is\n#### 72"), ("<answer>x+1</answer>", "1+x"), ("\\boxed{x = 2}", "2"),
        ("<answer>60 km/h</answer>", "60"), ("\\boxed{2\\sin x\\cos x}", "\\sin(2x)"),
        ("\\boxed{\\frac{1}{3}}", "0.333333"), ("\\boxed{y=1+\\sin x}", "y=\\sin x+1"),
    ]  # fmt: skip
    wrong = [
        ("71", "72"), ("<answer>2\\pi</answer>", "2"), ("", "72"), ("so 3, then 5", "72"), ("\\boxed{", "1"),
        ("<answer>x+1</answer>", "1"), ("<answer>2x</answer>", "2"), ("\\boxed{\\sqrt{x^2}}", "x"),
        ("\\boxed{\\sin x}", "\\cos x"), ("\\boxed{y=\\sin x}", "y=\\sin x+1"), ("\\boxed{\\log x}", "\\log|x|"),
    ]  # fmt: skip
    assert [(p, g.score) for p, g in zip(right, patient_math_grader.grade(math_rows(*right)), strict=True)] == [
        (pair, 1.0) for pair in right
    ]
    assert [g.score for g in patient_math_grader.grade(math_rows(*wrong))] == [0.0] * len(wrong)


HOSTILE = ["9^{9^{9^9}}", "10^{10^{10}}", "100000000!", "\\sum_{k=1}^{10000000} k", "2^{2^{40}}", "(" * 900 + "1"]


@needs_confinement
def test_no_completion_holds_a_step_longer_than_its_limit(math_grader: Any) -> None:
    rows = math_rows(*((f"<answer>{text}</answer>", "5") for text in HOSTILE * 4), ("<answer>5</answer>", "5"))
    began = time.perf_counter()
    grades = math_grader.grade(rows)
    assert time.perf_counter() - began < patience(4.0 + 2.0)
    assert grades[-1].score == 1.0
    assert not any(g.score for g in grades[:-1])


@needs_confinement
def test_expressions_are_read_alike_by_both_stages_of_the_parser(patient_math_grader: Any) -> None:
    """Intervals, sets and tuples are what the fast stage cannot read."""
    pairs = [
        ("\\boxed{[1, 2)}", "[1,2)"),
        ("\\boxed{\\left(3,\\frac{8}{2}\\right)}", "(3,4)"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("\\boxed{x(x+1)}", "x^2+x"),
        ("\\boxed{(-\\infty,3]\\cup[5,\\infty)}", "(-\\infty,3]\\cup[5,\\infty)"),
    ]
    grades = patient_math_grader.grade(math_rows(*pairs, *((given, "7") for given, _ in pairs)))
    assert [grade.score for grade in grades] == [1.0] * 5 + [0.0] * 5


@needs_confinement
def test_the_same_answer_is_verified_once(math_grader: Any) -> None:
    hostile = [("\\boxed{9^{9^{9^9}}}", "7")] * 64
    began = time.perf_counter()
    grades = math_grader.grade(math_rows(*hostile))
    assert all(grade.error for grade in grades)
    assert time.perf_counter() - began < patience(12.0)  # 64 of them would use up all of the step's time
