"""How an answer is read leniently: the last number, wherever it stands."""

from __future__ import annotations

from fractions import Fraction

import pytest

from grpo_core.evaluation import is_right_leniently, last_number


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
