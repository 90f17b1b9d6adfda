"""Graders in a spec: OpenAI's shapes unchanged, every mistake named with its field, and old digests as they were."""

from __future__ import annotations

import ast
import contextlib
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import strict_json
from grpo_core.rewards.graders.formula import Formula, FormulaError
from grpo_core.rewards.graders.models import GRADER_TYPES
from grpo_core.rewards.graders.registry import MODULES
from grpo_core.rewards.graders.templates import MissingValueError, Template, TemplateError
from grpo_core.spec import JobSpec, Problem, SpecError, parse_spec
from tests.clock import patience

GRADERS: dict[str, dict[str, Any]] = {
    "exact": {
        "type": "string_check",
        "name": "exact",
        "input": "{{sample.output_json.answer}}",
        "reference": "{{item.answer}}",
        "operation": "eq",
    },
    "close": {
        "type": "text_similarity",
        "name": "close",
        "input": "{{sample.output_text}}",
        "reference": "{{item.solution}}",
        "evaluation_metric": "rouge_l",
        "pass_threshold": 1,
    },
    "rules": {
        "type": "python",
        "name": "rules",
        "source": "def grade(sample, item):\n    return 1.0\n",
        "image_tag": "2025-05-08",
    },
    "judge": {
        "type": "score_model",
        "name": "judge",
        "model": "judge-main",
        "input": [
            {"role": "developer", "content": "Rate from 0 to 10.", "type": "message"},
            {"role": "user", "content": [{"type": "input_text", "text": "{{sample.output_text}}"}]},
        ],
        "range": [0, 10],
        "sampling_params": {"max_completions_tokens": 64, "temperature": 0, "top_p": 1.0, "seed": 7},
    },
    "all": {
        "type": "multi",
        "name": "all",
        "graders": {
            "Label": {
                "type": "label_model",
                "name": "label",
                "model": "judge-main",
                "input": [{"role": "user", "content": "{{sample.output_text}}"}],
                "labels": ["good", "bad"],
                "passing_labels": ["good"],
            },
            "same": {
                "type": "string_check",
                "name": "same",
                "input": "{{sample.output_text}}",
                "reference": "x",
                "operation": "ilike",
            },
        },
        "calculate_output": "0.5 * Label + 0.5 * same",
        "pass_threshold": 0.5,
    },
    "tests": {
        "type": "endpoint",
        "url": "https://graders.example/run",
        "headers": {"Authorization": "secret://tests"},
        "rate_limit": 50,
    },
    "number": {"type": "math", "input": "{{sample.output_json.answer}}", "reference": "{{item.answer}}"},
    "shape": {"type": "json_schema", "schema": {"type": "object", "required": ["answer"]}},
    "pattern": {"type": "regex", "input": "{{sample.output_text}}", "pattern": "(?s)^<a>.*</a>$", "match": "full"},
    "short": {"type": "length", "unit": "words", "maximum": 20, "falloff": 10},
}
FORMAT = {"response_format": {"type": "json_object"}}


def spec_with(graders: dict[str, Any], **rewards: Any) -> JobSpec:
    return parse_spec({"rewards": {"graders": graders, **rewards}, "sampling": FORMAT})


def problems(data: dict[str, Any]) -> list[Problem]:
    with pytest.raises(SpecError) as refused:
        parse_spec(data)
    return refused.value.problems


def problem_of(grader: dict[str, Any], **sections: Any) -> Problem:
    found = problems({"rewards": {"graders": {"x": grader}}, **sections})
    assert len(found) == 1, found
    return found[0]


def test_graders_are_written_back_as_they_were_given() -> None:
    spec = spec_with(GRADERS)
    written = strict_json.loads(strict_json.dumps(spec.as_dict()))
    assert written["rewards"]["graders"] == GRADERS
    assert strict_json.canonical(written["rewards"]["graders"]) == strict_json.canonical(GRADERS)  # 1 is not 1.0
    assert parse_spec(written) == spec
    assert parse_spec(written).digest() == spec.digest()


def test_every_type_is_covered() -> None:
    types = {grader["type"] for grader in (*GRADERS.values(), *GRADERS["all"]["graders"].values())}
    assert types == set(GRADER_TYPES)
    assert set(MODULES) == types - {"multi"}


def test_a_spec_without_graders_says_nothing_of_them() -> None:
    assert set(parse_spec({}).as_dict()["rewards"]) == {"mode", "weights"}
    asked = {"rewards": {"graders": {}, "limits": {}, "formula": None, "on_error": {"max_share": 0.5}}}
    assert parse_spec(asked).digest() == parse_spec({}).digest()
    assert "response_format" not in parse_spec({}).as_dict()["sampling"]
    assert "metric" not in parse_spec({}).as_dict()["evaluation"]


def test_weights_of_the_five_are_0_beside_graders_unless_they_are_named() -> None:
    weights = spec_with({"short": GRADERS["short"]}, weights={"integer": 0.5}).rewards.weights.by_name
    assert weights == {
        "correctness": 0,
        "integer": 0.5,
        "strict_format": 0,
        "soft_format": 0,
        "xml_count": 0,
        "short": 1,
    }
    assert not any(spec_with({"short": GRADERS["short"]}, formula="2 * short").rewards.weights.by_name.values())
    assert all(parse_spec({}).rewards.weights.by_name.values())


def test_a_formula_may_use_the_five_alone() -> None:
    spec = parse_spec({"rewards": {"formula": "correctness * strict_format"}})
    assert parse_spec(spec.as_dict()) == spec
    assert spec.digest() != parse_spec({}).digest()


@pytest.mark.parametrize(
    ("grader", "pointer", "code", "said"),
    [
        ({**GRADERS["exact"], "operation": "neq"}, "/operation", "bad_value", "Did you mean ne?"),
        ({**GRADERS["exact"], "input": "{{itm.a}}"}, "/input", "bad_template", "{{item.COLUMN}}"),
        ({**GRADERS["exact"], "input": "{{sample.text}}"}, "/input", "bad_template", "{{sample.output_text}}"),
        ({**GRADERS["exact"], "refrence": "a"}, "/refrence", "unknown_field", "Did you mean reference?"),
        ({**GRADERS["close"], "evaluation_metric": "meteor"}, "/evaluation_metric", "unsupported_metric", "rouge_l"),
        ({**GRADERS["rules"], "source": "x = 1"}, "/source", "bad_source", "def grade(sample, item)"),
        ({**GRADERS["rules"], "source": "def grade(a): pass"}, "/source", "bad_source", "def grade(sample, item)"),
        ({**GRADERS["rules"], "source": "def grade(a, b) pass"}, "/source", "bad_source", "Correct it"),
        ({**GRADERS["rules"], "source": "x=" + "(" * 5000}, "/source", "bad_source", ""),
        ({**GRADERS["judge"], "range": [1, 1]}, "", "bad_value", ""),
        ({**GRADERS["all"]["graders"]["Label"], "passing_labels": ["best"]}, "", "bad_value", ""),
        (GRADERS["all"]["graders"]["Label"], "/type", "label_model_alone", "multi"),
        ({**GRADERS["all"], "calculate_output": "Label + nope"}, "/calculate_output", "bad_formula", "same"),
        ({**GRADERS["all"], "graders": {"a": GRADERS["all"]}}, "/graders/a", "bad_value", ""),
        (
            {**GRADERS["tests"], "headers": {"Authorization": "Bearer x"}},
            "/headers/Authorization",
            "bad_value",
            "secret",
        ),
        ({**GRADERS["tests"], "url": "file:///etc/passwd"}, "/url", "bad_value", "https://"),
        ({**GRADERS["pattern"], "pattern": r"(a)\1"}, "/pattern", "bad_pattern", "look-around"),
        ({**GRADERS["short"], "maximum": None}, "", "bad_value", ""),
        ({"type": "string_chek"}, "", "bad_value", "string_check"),
        ({"name": "x"}, "", "missing_field", "string_check"),
    ],
)
def test_a_mistake_is_named_with_its_field(grader: dict[str, Any], pointer: str, code: str, said: str) -> None:
    problem = problem_of(grader, sampling=FORMAT)
    assert (problem.pointer, problem.code) == (f"/rewards/graders/x{pointer}", code)
    assert said in problem.remedy
    assert problem.detail
    assert problem.remedy


def test_output_json_needs_a_response_format() -> None:
    problem = problem_of(GRADERS["exact"])
    assert (problem.pointer, problem.code) == ("/rewards/graders/x/input", "no_response_format")
    assert "sampling.response_format" in problem.remedy


@pytest.mark.parametrize(
    ("rewards", "pointer"),
    [
        ({"graders": {"total": GRADERS["short"]}}, "/rewards/graders/total"),
        ({"graders": {"correctness": GRADERS["short"]}}, "/rewards/graders/correctness"),
        ({"graders": {"Short": GRADERS["short"]}}, "/rewards/graders/Short"),
        ({"graders": {"short": GRADERS["short"]}, "weights": {"shrt": 1}}, "/rewards/weights/shrt"),
        ({"graders": {"short": GRADERS["short"]}, "limits": {"shrt": {}}}, "/rewards/limits/shrt"),
        ({"graders": {"short": GRADERS["short"]}, "formula": "shrt"}, "/rewards/formula"),
        ({"graders": {"short": GRADERS["short"]}, "formula": "short", "weights": {"short": 2}}, "/rewards/weights"),
        ({"graders": {"short": GRADERS["short"]}, "weights": {"short": 0}}, "/rewards/weights"),
        ({"graders": {"short": GRADERS["short"]}, "on_error": {"policy": "ignore"}}, "/rewards/on_error/policy"),
    ],
)
def test_names_and_formulas_are_checked_against_each_other(rewards: dict[str, Any], pointer: str) -> None:
    assert [problem.pointer for problem in problems({"rewards": rewards})] == [pointer]


def test_a_bad_grader_does_not_make_its_weight_wrong() -> None:
    data = {"graders": {"x": {"type": "length"}}, "weights": {"x": 2}, "limits": {"x": {}}}
    assert [p.pointer for p in problems({"rewards": data, "evaluation": {"metric": "x"}})] == ["/rewards/graders/x"]


def test_the_metric_is_a_reward() -> None:
    assert problems({"evaluation": {"metric": "corectness"}})[0].remedy == "Did you mean correctness?"
    assert parse_spec({"evaluation": {"metric": "total"}}).evaluation.metric == "total"


# Templates


ITEM = {"answer": 12, "ref": {"list": [1, {"x": "是"}]}, "a column": "b", "evil": "{{item.answer}}", "none": None}
SAMPLE = {"output_text": "said {{item.answer}}", "output_json": None, "output_tools": []}


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("plain", "plain"),
        ("{{item.answer}}", "12"),
        ("a {{ item.ref.list[1].x }} b", "a 是 b"),
        ("{{item.ref}}", '{"list": [1, {"x": "是"}]}'),
        ("{{item['a column']}}", "b"),
        ("{{item.evil}}", "{{item.answer}}"),
        ("{{sample.output_text}}", "said {{item.answer}}"),
        ("{{item.none}}", "null"),
        ("{{item.answer", "{{item.answer"),
        ("}} {", "}} {"),
    ],
)
def test_templates_are_rendered_in_one_pass(text: str, rendered: str) -> None:
    assert Template(text).render(ITEM, SAMPLE) == rendered


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("{{item.nope}}", "item"),
        ("{{item.ref.list[9]}}", "item"),
        ("{{item.ref[0]}}", "item"),
        ("{{item.answer.x}}", "item"),
        ("{{item.evil[0]}}", "item"),
        ("{{sample.output_json.answer}}", "sample"),
    ],
)
def test_what_is_not_there_says_whose_it_is(text: str, root: str) -> None:
    with pytest.raises(MissingValueError) as missing:
        Template(text).render(ITEM, SAMPLE)
    assert missing.value.root == root


@pytest.mark.parametrize(
    "text",
    ["{{env.HOME}}", "{{}}", "{{item.}}", "{{item..a}}", "{{item.a b}}", "{{item['a}}", "{{itemized}}",
     "{{item.a[-1]}}", "{{sample.secret}}", "{{item.{{item.a}}}}", "{{ item" + ".a" * 100 + "}}"],
)  # fmt: skip
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(TemplateError):
        Template(text)


@given(st.text())
def test_a_template_of_any_text_ends_well(text: str) -> None:
    try:
        template = Template(text)
    except TemplateError:
        return
    if not template.paths:
        assert template.render({}, {}) == text


def test_reading_a_template_is_linear() -> None:
    began = time.perf_counter()
    for hostile in ("{{" * 16_000, "{{item." + "a" * 32_000, "{{" + " " * 32_000 + "}}"):
        with contextlib.suppress(TemplateError):
            Template(hostile)
    assert time.perf_counter() - began < patience(1.0)


# Formulas


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 2.0),
        ("a + b * 3", 17.0),
        ("(a + b) * 3", 21.0),
        ("-a ^ 2", -4.0),
        ("2 ^ 3 ^ 2", 512.0),
        ("a - b - 1", -4.0),
        ("2 ^ -1", 0.5),
        ("min(a, b, 1) + max(b)", 6.0),
        ("sqrt(4) + abs(-3) + floor(1.9) + ceil(0.1) + exp(0) + log(1)", 8.0),
        ("1e2 + .5 + 1.", 101.5),
    ],
)
def test_formulas(text: str, value: float) -> None:
    assert Formula(text, {"a", "b"})({"a": 2.0, "b": 5.0}) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "a +", "a b", "c", "__import__('os')", "a.b", "a ** 2", "a[0]", "(" * 100 + "a", "-" * 1000 + "a",
     "2" + "^2" * 900, "abs(a, b)", "min()", "a " * 1500, "lambda: 1", "a if b else a"],
)  # fmt: skip
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text, {"a", "b"})


@pytest.mark.parametrize(
    "text", ["1 / (a - a)", "9^9^9^9", "log(0)", "(0 - 1) ^ 0.5", "exp(1000)", "1e308 * 10", "sqrt(-1)"]
)
def test_what_has_no_value_says_so(text: str) -> None:
    with pytest.raises(FormulaError):
        Formula(text, {"a"})({"a": 2.0})


@given(
    st.recursive(
        st.sampled_from(["a", "b", "2", "0.5"]), lambda e: st.builds("({} {} {})".format, e, st.sampled_from("+-*/"), e)
    )
)
def test_formulas_agree_with_python(text: str) -> None:
    try:
        expected = eval(compile(ast.parse(text, mode="eval"), "", "eval"), {"a": 2.0, "b": 5.0})
    except ZeroDivisionError:
        expected = None
    try:
        found = Formula(text, {"a", "b"})({"a": 2.0, "b": 5.0})
    except FormulaError:
        found = None
        if len(text) > 200:
            return
    assert found == expected
