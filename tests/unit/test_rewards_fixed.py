"""Mode `fixed`: what counts as the answer, as a number, as the format, and what chatter costs.

Every row is computed by hand from the definition; properties hold for hostile text too.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from grpo_core.rewards import fixed, score
from grpo_core.rewards.number_parser import read_number, same_answer, to_ascii

FORMAT = "<reasoning>\n3+3=6\n6+6=12\n</reasoning>\n<answer>\n12\n</answer>\n"
ONE_LINE = "<reasoning>\n6+6\n</reasoning>\n<answer>\n12\n</answer>\n"


def answering(answer: str) -> str:
    """The requested format with two lines of reasoning."""
    return FORMAT.replace("\n12\n", f"\n{answer}\n")


def wide(text: str) -> str:
    """Every printable ASCII character as its full-width form."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else "\u3000" if c == " " else c for c in text)


# (completion, gold, correctness, integer, strict, soft, xml_count)
FIXED = [
    pytest.param(FORMAT, "12", 2, 0.5, 0.5, 0.5, 0.5, id="requested format, multi-line"),
    pytest.param(ONE_LINE, "12", 2, 0.5, 0.5, 0.5, 0.5, id="requested format, one line of reasoning"),
    pytest.param(FORMAT.strip(), "12", 2, 0.5, 0.5, 0.5, 0.5, id="no final newline"),
    pytest.param(f" \n{FORMAT}\n\n", "12", 2, 0.5, 0.5, 0.5, 0.5, id="white space around"),
    pytest.param("<reasoning>x</reasoning><answer>12</answer>", "12", 2, 0.5, 0, 0.5, 0, id="all on one line"),
    pytest.param("12", "12", 0, 0, 0, 0, 0, id="bare answer: nothing, and no charge"),
    pytest.param("", "", 0, 0, 0, 0, 0, id="empty"),
    pytest.param("x" * 2000, "12", 0, 0, 0, 0, 0, id="untagged text is not charged"),
    pytest.param(ONE_LINE, "13", 0, 0.5, 0.5, 0.5, 0.5, id="perfect format, wrong answer"),
    pytest.param(answering("1,200"), "1200", 2, 0.5, 0.5, 0.5, 0.5, id="thousands comma"),
    pytest.param(answering("-5"), -5, 2, 0.5, 0.5, 0.5, 0.5, id="negative"),
    pytest.param(answering("3.5"), "3.5", 2, 0, 0.5, 0.5, 0.5, id="decimal is not whole"),
    pytest.param(answering("\uff11\uff12"), "12", 2, 0.5, 0.5, 0.5, 0.5, id="full-width"),
    pytest.param(answering("²"), "2", 0, 0, 0.5, 0.5, 0.5, id="superscript is not a number"),
    pytest.param(FORMAT + "x" * 100, "12", 2, 0.5, 0, 0.5, 0.4, id="right, then 100 characters of chatter"),
    pytest.param(FORMAT + "x" * 1000, "12", 2, 0.5, 0, 0.5, -0.5, id="chatter can outweigh the marks"),
    pytest.param(FORMAT + "  x \n", "12", 2, 0.5, 0, 0.5, 0.499, id="white space around chatter is free"),
    pytest.param("Sure:\n" + FORMAT, "12", 2, 0.5, 0, 0, 0.5, id="chatter first"),
    pytest.param(answering("12")[:-10], "12", 0, 0, 0, 0, 0.375, id="answer never closed"),
    pytest.param("12</answer>", "12", 0, 0, 0, 0, 0, id="answer never opened"),
    pytest.param("</answer>12<answer>", "12", 0, 0, 0, 0, -0.010, id="closed before opened, chatter charged"),
    pytest.param("<answer>7</answer><answer>8</answer>", "8", 2, 0.5, 0, 0, 0, id="the last answer counts"),
    pytest.param("<answer>7</answer><answer>8</answer>", "7", 0, 0.5, 0, 0, 0, id="and not the first"),
    pytest.param("<answer>7</answer><answer>", "7", 0, 0, 0, 0, -0.008, id="the last answer is not closed"),
    pytest.param("<answer>7</answer> 8 </answer>", "7", 2, 0.5, 0, 0, 0, id="up to the next close"),
    pytest.param("<answer>5 <answer>7</answer></answer>", "7", 2, 0.5, 0, 0, 0, id="nested answers: the inner one"),
    pytest.param("<answer></answer>", "", 2, 0, 0, 0, 0, id="empty answer is text"),
    pytest.param("<answer>None</answer>", None, 0, 0, 0, 0, 0, id="no gold answer equals nothing"),
    pytest.param("<reasoning></reasoning><answer></answer>", "1", 0, 0, 0, 0.5, 0, id="only tags, one line"),
    pytest.param("<reasoning>\n</reasoning>\n<answer>\n</answer>", "1", 0, 0, 0.5, 0.5, 0.5, id="only tags, own lines"),
    pytest.param(FORMAT.replace("\n<answer>", "\n\n<answer>"), "12", 2, 0.5, 0, 0.5, 0.5, id="blank line between"),
    pytest.param(FORMAT.replace("\n<answer>", "<answer>"), "12", 2, 0.5, 0, 0.5, 0.25, id="no newline between blocks"),
    pytest.param(FORMAT.replace("<answer>\n", "<answer>"), "12", 2, 0.5, 0, 0.5, 0.375, id="answer beside its tag"),
    pytest.param(FORMAT.replace("\n", "\r\n"), "12", 2, 0.5, 0, 0.5, 0.125, id="CRLF: only the last mark ends no line"),
    pytest.param(FORMAT + FORMAT, "12", 2, 0.5, 0, 0.5, 0, id="format twice"),
    pytest.param(FORMAT.replace("3+3", "<answer>"), "12", 2, 0.5, 0, 0.5, 0.5, id="a stray tag in the reasoning"),
    pytest.param("<reasoning>a</reasoning>.<answer>7</answer>", "7", 2, 0.5, 0, 0, 0, id="text between the blocks"),
    pytest.param("<reasoning>a</reasoning>b</reasoning><answer>7</answer>", "7", 2, 0.5, 0, 0, 0, id="first close"),
    pytest.param("<reasoning>a<answer>7</answer>", "7", 2, 0.5, 0, 0, 0, id="reasoning never closed"),
    pytest.param("</reasoning><answer>7</answer>", "7", 2, 0.5, 0, 0, 0, id="reasoning never opened"),
    pytest.param("<reasoning>a</reasoning>7</answer>", "7", 0, 0, 0, 0, 0, id="second block never opened"),
    pytest.param("<reasoning>a</reasoning><answer>7", "7", 0, 0, 0, 0, 0, id="second block never closed"),
    pytest.param("ok <reasoning>\n", "1", 0, 0, 0, 0, 0.125, id="the first mark needs no newline before it"),
    pytest.param("<reasoning>\n<reasoning>\n", "1", 0, 0, 0, 0, 0, id="a repeated mark earns nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer", "correct", "whole", "strict", "soft", "xml"), FIXED)
def test_fixed_rewards(
    completion: str, answer: object, correct: float, whole: float, strict: float, soft: float, xml: float
) -> None:
    assert score(completion, answer, "fixed") == pytest.approx(
        {
            "correctness": correct,
            "integer": whole,
            "strict_format": strict,
            "soft_format": soft,
            "xml_count": xml,
            "total": correct + whole + strict + soft + xml,
        }
    )


NUMBERS = [
    ("12", 12),
    ("  12\n", 12),
    ("+12", 12),
    ("-12", -12),
    ("-0", 0),
    ("007", 7),
    ("12.0", 12),
    ("12.50", Fraction(25, 2)),
    ("1,200", 1200),
    ("-1,234,567.5", Fraction(-2469135, 2)),
    ("12.", 12),
    ("12\u3002", 12),  # ideographic full stop
    ("12元", 12),
    ("共 12 个苹果", 12),
    ("$1,200", 1200),
    ("\uffe51,200", 1200),  # full-width yen
    ("Rs.500", 500),
    ("50%", 50),
    ("24 m²", 24),
    ("60 km/h", 60),
    ("\\boxed{12}", 12),
    ("**12**", 12),
    ("x = -12", -12),
    ("+-5", -5),
    ("3/4", Fraction(3, 4)),
    ("-3 / 4 杯", Fraction(-3, 4)),
    ("1,000/8", 125),
    ("0.5/2", Fraction(1, 4)),
    ("\uff11\uff0c\uff12\uff10\uff10\uff0e\uff15", Fraction(2401, 2)),
    ("\uff0d\uff15\uff0f\uff12", Fraction(-5, 2)),
    ("答案是\uff0c5元", 5),
    ("\u22125", -5),  # minus sign
    ("1\u20442", Fraction(1, 2)),  # fraction slash
    ("x" * 12 + "-5" + "y" * 12, -5),
    ("9" * 40, int("9" * 40)),
    ("0." + "0" * 37 + "1", Fraction(1, 10**38)),
    ("12\x00", 12),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_reads_as_the_number(text: str, value: int | Fraction) -> None:
    assert read_number(text) == value


NOT_NUMBERS = [
    "", " ", "-", "abc", "inf", "nan", "1e999", "1e3", "0x10", "1_000", "1 200", "1, 200", "1,23", "1,2345", "1234,567",
    "1,,200", "1.2.3", "1.200,50", "1 1/2", "1/2/3", "1//2", "1/0", "1/0.00", "6+6=12", "3:4", "10-5", "²", "5²", "5½",
    "½", "\u0663", "1\u0663", "\u06635", "③", "十二", ".5", "-.5", "$.50", "-$5", "-\uffe55", "x" * 13 + "5",
    "5" + "y" * 13, "9" * 41, "1" + "," * 39 + "1", "9" * 5000, "\x00", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=ascii)
def test_is_compared_as_text(text: str) -> None:
    assert read_number(text) is None


SAME = [
    ("2/6", "1/3"),
    ("0.5", "1/2"),
    ("4/2", "2"),
    ("1,200元", "1200.00"),
    ("12 apples", "12 个"),
    (" 十二 ", "十二"),
    ("\uff21\uff0c\uff22", "A,B"),
    ("x" * 60, " " + "x" * 60),
]
DIFFERENT = [
    ("12", "12.0000000000000000000000000000000000001"),
    ("9" * 39 + "8", "9" * 40),
    ("0.3333333333", "1/3"),
    ("5", "-5"),
    ("5", "\u22125"),
    ("5", "-$5"),
    ("5", ".5"),
    ("5", "5²"),
    ("12", "十二"),
    ("Yes", "yes"),
    ("1 2", "12"),
    ("1/0", "2/0"),
    ("9" * 41, "0" + "9" * 41),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_equal_answers(left: str, right: str) -> None:
    assert same_answer(left, right)
    assert same_answer(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_unequal_answers(left: str, right: str) -> None:
    assert not same_answer(left, right)
    assert not same_answer(right, left)


@pytest.mark.parametrize("text", ["4/2", "12.0", "-12元", "1,200", "+0"])
def test_integer_pays_for_a_whole_value(text: str) -> None:
    assert fixed.integer(f"<answer>{text}</answer>") == 0.5


@pytest.mark.parametrize("text", ["1/2", "12.5", "12 or 13", "", "twelve"])
def test_integer_pays_nothing_else(text: str) -> None:
    assert fixed.integer(f"<answer>{text}</answer>") == 0.0


answers = st.text(alphabet="0123456789+-.,/ $%eEx_元²٣½\n\x00", max_size=45) | st.text(max_size=45)


def test_every_full_width_form_is_mapped() -> None:
    printable = "".join(map(chr, range(ord(" "), ord("~") + 1)))
    assert to_ascii(wide(printable)) == printable


@given(answers)
@example("1" + ",000" * 9)
def test_an_answer_equals_itself_however_wide(answer: str) -> None:
    _ = assume("<" not in answer)
    text = f"<answer>{wide(answer)}</answer>"
    assert score(text, answer, "fixed")["correctness"] == 2.0
    assert score(text, answer, "fixed") == score(text, wide(answer), "fixed")
    assert read_number(wide(answer)) == read_number(answer)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_written_number_is_read_exactly(number: object) -> None:
    assert read_number(f"{number:f}") == Fraction(str(number))
    assert read_number(f"共{number:,f}元") == Fraction(str(number))


@given(st.text())
def test_mapping_keeps_the_length_and_leaves_ascii_alone(text: str) -> None:
    assert len(to_ascii(text)) == len(text)
    assert all(new == old for new, old in zip(to_ascii(text), text, strict=True) if old.isascii())


blank = st.text(alphabet=" \t\r\n\x0b\x1c\x85\u2028\u3000", max_size=6)
pieces = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "x", "12"]), max_size=12
).map("".join)


@given(blank, pieces | st.just(FORMAT) | st.just(ONE_LINE), blank)
def test_white_space_around_changes_nothing(before: str, text: str, after: str) -> None:
    assert fixed.strict_format(before + text + after) == fixed.strict_format(text)
    assert fixed.soft_format(before + text + after) == fixed.soft_format(text)


tag_lines = st.sampled_from(
    ["<reasoning>", "x", "</reasoning>", "<answer>", "12", "</answer>", "", "<answer> ", "x<answer>"]
)
nearly_strict = st.tuples(st.integers(0, 11), tag_lines).map(
    lambda edit: "\n".join([*FORMAT.split("\n")[: edit[0]], edit[1], *FORMAT.split("\n")[edit[0] :]])
)


@given(pieces | nearly_strict | st.just(FORMAT))
def test_strict_means_the_four_tags_on_lines_of_their_own(text: str) -> None:
    lines = text.strip().split("\n")
    tags = [line for line in lines if "<" in line]
    framed = tags == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    ends = lines[0] == "<reasoning>" and lines[-1] == "</answer>"
    adjacent = ("</reasoning>", "<answer>") in pairwise(lines)
    assert (fixed.strict_format(text) > 0) is (framed and ends and adjacent)


@given(st.lists(st.sampled_from(["a", "\n", "1", "<answer>"]), max_size=6).map("".join), st.text(max_size=20))
def test_what_pays_strict_pays_soft_and_all_marks(reasoning: str, answer: str) -> None:
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    _ = assume(fixed.strict_format(text) > 0)
    assert fixed.soft_format(text) == 0.5
    assert fixed.xml_count(text) == 0.5
