"""Which columns graders name, and which of them a row lacks."""

from __future__ import annotations

import pytest

from grpo_core.rewards.graders.columns import missing_columns
from grpo_core.rewards.graders.models import Python
from grpo_core.spec import parse_spec

NEAR = """
def helper(row):
    return row["not seen"]

def grade(sample, row):
    if row.get("optional", 1) and "word" in row:
        row["written"] = 1
    return float(abs(float(sample["output_text"]) - row["target"]) <= row.get("tolerance")) + len(sample["choices"])
"""


@pytest.mark.parametrize(
    ("grader", "columns"),
    [
        pytest.param({"type": "python", "source": NEAR}, ["target", "tolerance"], id="python"),
        pytest.param({"type": "python", "source": "def grade(sample, item): return 1.0"}, [], id="python, no column"),
        pytest.param({"type": "python", "source": "def grade(*both): return both[1]['x']"}, [], id="python, no name"),
        pytest.param(
            {
                "type": "string_check",
                "input": "{{sample.output_text}}",
                "reference": "{{item['a b'][0]}} {{item.unit}}",
                "operation": "eq",
            },
            ["a b", "unit"],
            id="templates",
        ),
    ],
)
def test_columns_are_found_in_templates_and_in_code(grader: dict[str, object], columns: list[str]) -> None:
    graders = parse_spec({"rewards": {"graders": {"near": grader}}}).rewards.graders
    assert missing_columns(graders, ()) == ({"near": columns} if columns else {})
    assert missing_columns(graders, columns) == {}


def test_what_is_no_python_names_no_column() -> None:
    broken = Python.model_construct(type="python", source="def grade(sample, item) return item['x']")
    assert missing_columns({"near": broken}, ()) == {}


def test_a_member_of_a_multi_is_named() -> None:
    one = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.x}}", "operation": "eq"}
    two = {"type": "python", "source": "def grade(sample, item): return item['y']"}
    multi = {"type": "multi", "graders": {"one": one, "two": two}, "calculate_output": "one + two"}
    graders = parse_spec({"rewards": {"graders": {"both": multi}}}).rewards.graders
    assert missing_columns(graders, ["x"]) == {"both.two": ["y"]}
