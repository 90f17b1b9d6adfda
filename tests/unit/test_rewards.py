"""The public surface of the rewards, and mode `published`, against hand-computed tables.

The recipe's regular expressions stand here literally, as the oracle of the linear scans that replace them.
Amounts are raw: no weights.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_core.rewards import REWARD_NAMES, Completion, RewardMode, describe, get_rewards, published, score

MODES: tuple[RewardMode, ...] = ("published", "fixed")
STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")

ONE_LINE = "<reasoning>\n6+6\n</reasoning>\n<answer>\n12\n</answer>\n"
MULTI_LINE = "<reasoning>\n3+3=6\n6+6=12\n</reasoning>\n<answer>\n12\n</answer>\n"


def answering(answer: str) -> str:
    """The requested format with one line of reasoning."""
    return f"<reasoning>\n6+6\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


# Tags, near-tags, and everything that `.`, `\s`, `$` and `strip` treat in a way of their own.
fragments = st.sampled_from([
    "<reasoning>", "</reasoning>", "<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "<answer>\n",
    "\n</answer>\n", "\n</answer>", "\n", "\n\n", " ", "\t", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u3000", "x",
    "12", "-3.5", "\uff11\uff12", "²", "٣", "1_000", "元", "<", "</", "reasoning>", "\x00", "\ud800", ",", "/",
])  # fmt: skip
tagged = st.lists(st.sampled_from(["</reasoning>", "<answer>", "</answer>", "\n", " ", "\x0b", "x"]), max_size=8).map(
    "".join
)
hostile = st.lists(fragments | st.text(max_size=4), max_size=14).map("".join)


# `xml_count` charges once and always: a bare `12` loses 0.002, and 100 characters of chatter cost 0.1. A wide-spread
# variant charges twice, and only where a mark pays; it would give 2.5 and 2.8 in those rows.
AS_PUBLISHED = [
    pytest.param(MULTI_LINE, "12", 3.0, id="requested format, multi-line: neither format pays"),
    pytest.param(ONE_LINE, "12", 3.5, id="requested format, one line of reasoning"),
    pytest.param(ONE_LINE.removesuffix("\n"), "12", 3.0 - 0.050, id="no final newline: whole text charged"),
    pytest.param("<reasoning>x</reasoning><answer>12</answer>", "12", 3.0 - 0.043, id="all on one line"),
    pytest.param("12", "12", 2.5 - 0.002, id="bare answer, no tags"),
    pytest.param(answering("13"), "12", 1.5, id="perfect format, wrong answer"),
    pytest.param(MULTI_LINE.replace("\n12\n", "\n1,200\n"), "1200", 0.5, id="thousands comma, multi-line"),
    pytest.param(answering("1,200"), "1200", 1.0, id="thousands comma"),
    pytest.param(answering("-5"), "-5", 3.0, id="negative, right: no integer"),
    pytest.param(answering("3.5"), "3.5", 3.0, id="decimal, right: no integer"),
    pytest.param(answering("\uff11\uff12"), "12", 1.5, id="full-width: integer pays, correctness does not"),
    pytest.param(answering("²"), "2", 1.5, id="superscript is a digit"),
    pytest.param(MULTI_LINE + "x" * 100, "12", 3.0 - 0.1, id="right, then 100 characters of chatter"),
]


@pytest.mark.parametrize(("completion", "answer", "total"), AS_PUBLISHED)
def test_published_totals(completion: str, answer: str, total: float) -> None:
    assert score(completion, answer, "published")["total"] == pytest.approx(total, abs=1e-9)


# (completion, gold, correctness, integer, strict, soft, xml_count)
PUBLISHED = [
    pytest.param("", "12", 0, 0, 0, 0, 0.0, id="empty"),
    pytest.param("", "", 2, 0, 0, 0, 0.0, id="empty equals an empty gold answer"),
    pytest.param("None", None, 0, 0, 0, 0, -0.004, id="no gold answer equals nothing"),
    pytest.param(ONE_LINE, 12, 2, 0.5, 0.5, 0, 0.5, id="an int gold answer is compared as text"),
    pytest.param(ONE_LINE, "012", 0, 0.5, 0.5, 0, 0.5, id="no numeric reading"),
    pytest.param(ONE_LINE, " 12", 0, 0.5, 0.5, 0, 0.5, id="the gold answer is not stripped"),
    pytest.param(ONE_LINE + "\n", "12", 2, 0.5, 0.5, 0, 0.499, id="$ matches before a last newline"),
    pytest.param(ONE_LINE + "\n\n", "12", 2, 0.5, 0, 0, 0.498, id="but not before two"),
    pytest.param(ONE_LINE + "\nx", "12", 2, 0.5, 0, 0, 0.498, id="nor before more text"),
    pytest.param("\n" + ONE_LINE, "12", 2, 0.5, 0, 0, 0.5, id="match starts at the start"),
    pytest.param(ONE_LINE.replace("6+6", ""), "12", 2, 0.5, 0.5, 0, 0.5, id="empty reasoning line"),
    pytest.param(ONE_LINE.replace("6+6\n", ""), "12", 2, 0.5, 0, 0, 0.5, id="no reasoning line"),
    pytest.param(ONE_LINE.replace("\n", "\r\n"), "12", 2, 0.5, 0, 0, 0.125 - 0.057, id="CRLF"),
    pytest.param(
        "<reasoning>a</reasoning>\n\n \t<answer>7</answer>", "7", 2, 0.5, 0, 0.5, -0.046, id="white space between"
    ),
    pytest.param(
        "<reasoning>a</reasoning>b</reasoning><answer>7</answer>", "7", 2, 0.5, 0, 0.5, -0.055, id="any close"
    ),
    pytest.param("<reasoning>a</reasoning> \t<answer>7</answer>", "7", 2, 0.5, 0, 0.5, -0.044, id="a gap on the line"),
    pytest.param("<reasoning>a</reasoning>.\n<answer>7</answer>", "7", 2, 0.5, 0, 0, -0.044, id="text before gap"),
    pytest.param("<reasoning>a</reasoning>.<answer>7</answer>", "7", 2, 0.5, 0, 0, -0.043, id="text between"),
    pytest.param("<reasoning>a</reasoning><answer>7\n</answer>", "7", 2, 0.5, 0, 0, 0.125 - 0.043, id="two lines"),
    pytest.param("<reasoning>a\n</reasoning><answer>7</answer>", "7", 2, 0.5, 0, 0, -0.043, id="two-line reasoning"),
    pytest.param(" <reasoning>a</reasoning><answer>7</answer>", "7", 2, 0.5, 0, 0, -0.043, id="needs the start"),
    pytest.param("<answer>7</answer> 8", "7", 2, 0.5, 0, 0, -0.020, id="text after the close is not the answer"),
    pytest.param("<answer>7</answer><answer>8</answer>", "8", 2, 0.5, 0, 0, -0.036, id="the last answer counts"),
    pytest.param("<answer>8", "8", 2, 0.5, 0, 0, -0.009, id="an unclosed answer counts"),
    pytest.param("8</answer>", "8", 2, 0.5, 0, 0, -0.010, id="an unopened answer counts"),
    pytest.param("</answer>8", "8", 0, 0, 0, 0, -0.010, id="nothing before a lone close"),
    pytest.param("\n</answer>\n</answer>\nab", "", 2, 0, 0, 0, -0.012, id="end marks share a newline"),
    pytest.param("\n</answer>\n\n</answer>\nab", "", 2, 0, 0, 0, -0.002, id="two end marks: the last counts"),
    pytest.param("<reasoning>\n<reasoning>\n", "1", 0, 0, 0, 0, -0.024, id="a repeated mark earns nothing"),
    pytest.param("\n<answer>\n<answer>\n", "1", 0, 0, 0, 0, 0.125 - 0.019, id="marks that share a newline count once"),
    pytest.param("\u0663", "3", 0, 0.5, 0, 0, -0.001, id="a digit of another script"),
    pytest.param("1_000", "1000", 0, 0, 0, 0, -0.005, id="underscore"),
    pytest.param("\u300012\u3000", "12", 2, 0.5, 0, 0, -0.004, id="ideographic space is stripped"),
    pytest.param("x" * 2000, "1", 0, 0, 0, 0, -2.0, id="untagged text is charged whole"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer", "correct", "whole", "strict", "soft", "xml"), PUBLISHED)
def test_published_rewards(
    completion: str, answer: object, correct: float, whole: float, strict: float, soft: float, xml: float
) -> None:
    assert score(completion, answer, "published") == pytest.approx(
        {
            "correctness": correct,
            "integer": whole,
            "strict_format": strict,
            "soft_format": soft,
            "xml_count": xml,
            "total": correct + whole + strict + soft + xml,
        }
    )


@settings(max_examples=400)
@given(tagged | hostile)
@example("<reasoning></reasoning>\x0b\n<answer></answer>")
@example("<reasoning></reasoning> x</reasoning>\n<answer>\n</answer>")
def test_soft_scan_decides_as_the_published_expression(text: str) -> None:
    for prefixed in (
        text,
        "<reasoning>" + text,
        f"<reasoning></reasoning>{text}",
        f"<reasoning>{text}<answer>1</answer>",
    ):
        assert (published.soft_format(prefixed) > 0) is (SOFT.match(prefixed) is not None)


@given(hostile, hostile, hostile)
def test_strict_scan_decides_as_the_published_expression(reasoning: str, answer: str, tail: str) -> None:
    framed = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    for text in (reasoning, framed, framed + tail, tail + framed, framed + "\n", framed[:-1]):
        assert (published.strict_format(text) > 0) is (STRICT.match(text) is not None)


@given(hostile)
@example("\n</answer>\n</answer>\nab")
def test_published_extraction_and_charge_are_the_recipes_expressions(text: str) -> None:
    assert published.extract(text) == text.split("<answer>")[-1].split("</answer>")[0].strip()
    marks = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    paid = sum(0.125 for mark in marks if text.count(mark) == 1)
    assert published.xml_count(text) == paid - len(text.split("\n</answer>\n")[-1]) * 0.001


@pytest.mark.parametrize("mode", MODES)
@given(text=hostile, answer=hostile | st.integers() | st.none() | st.floats())
def test_every_reward_is_finite_and_within_its_declared_bounds(mode: RewardMode, text: str, answer: object) -> None:
    result = score(text, answer, mode)
    for info in describe(mode):
        paid = result[info.name]
        assert math.isfinite(paid)
        assert paid <= info.most
        assert info.least is None or paid >= info.least
    assert result["total"] == sum(result[name] for name in REWARD_NAMES)


@pytest.mark.parametrize("mode", MODES)
def test_declared_bounds_are_reached(mode: RewardMode) -> None:
    best = {name: max(score(text, "12", mode)[name] for text in REACHING) for name in REWARD_NAMES}
    worst = {name: min(score(text, "12", mode)[name] for text in REACHING) for name in REWARD_NAMES}
    for info in describe(mode):
        assert best[info.name] == info.most
        assert worst[info.name] < -1 if info.least is None else worst[info.name] == info.least


REACHING = (ONE_LINE, "<reasoning>6+6</reasoning><answer>12</answer>", "</answer>" + "x" * 2000)


@pytest.mark.parametrize("mode", MODES)
@given(batch=st.lists(st.tuples(hostile, hostile), max_size=4))
def test_batches_chats_and_single_texts_agree(mode: RewardMode, batch: list[tuple[str, str]]) -> None:
    texts: list[Completion] = [text for text, _ in batch]
    chats: list[Completion] = [[{"role": "assistant", "content": text}] for text, _ in batch]
    golds = [gold for _, gold in batch]
    for name, reward in get_rewards(mode).items():
        expected = [score(text, gold, mode)[name] for text, gold in batch]
        assert reward(texts, answer=golds, prompts=["?"] * len(batch)) == expected
        assert reward(completions=chats, answer=golds, trainer_state=None) == expected


@pytest.mark.parametrize("chat", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}]])
def test_a_chat_without_text_is_an_empty_completion(chat: list[dict[str, object]]) -> None:
    assert score(chat, "12", "fixed") == score("", "12", "fixed")


@pytest.mark.parametrize("mode", MODES)
def test_rewards_carry_the_names_that_metrics_show(mode: RewardMode) -> None:
    rewards = get_rewards(mode)
    assert tuple(rewards) == REWARD_NAMES == ("correctness", "integer", "strict_format", "soft_format", "xml_count")
    assert [reward.__name__ for reward in rewards.values()] == list(REWARD_NAMES)
    assert [type(paid) for reward in rewards.values() for paid in reward(["12"], answer=[12])] == [float] * 5


@pytest.mark.parametrize("mode", MODES)
def test_descriptions_name_what_is_paid_and_needed(mode: RewardMode) -> None:
    infos = describe(mode)
    assert [(info.name, info.mode, info.most, info.least) for info in infos] == [
        ("correctness", mode, 2.0, 0.0),
        ("integer", mode, 0.5, 0.0),
        ("strict_format", mode, 0.5, 0.0),
        ("soft_format", mode, 0.5, 0.0),
        ("xml_count", mode, 0.5, None),
    ]
    assert [info.columns for info in infos] == [("answer",), (), (), (), ()]
    assert all(info.description.endswith(".") for info in infos)
    assert {info.description for info in describe("fixed")}.isdisjoint(
        info.description for info in describe("published")
    )


def test_only_correctness_needs_the_answer_column() -> None:
    rewards = get_rewards("fixed")
    assert rewards["integer"]([ONE_LINE]) == [0.5]
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        _ = rewards["correctness"]([ONE_LINE])
    with pytest.raises(ValueError, match="needs the column 'answer', a list"):
        _ = rewards["correctness"]([ONE_LINE], answer="1")
    with pytest.raises(ValueError, match="2 values for 1 completions"):
        _ = rewards["correctness"]([ONE_LINE], answer=["12", "13"])


def score_something(mode: RewardMode) -> dict[str, float]:
    return score("12", "12", mode)


@pytest.mark.parametrize("use", [get_rewards, describe, score_something])
def test_an_unknown_mode_is_named(use: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="unknown reward mode 'strict': use one of published, fixed"):
        _ = use("strict")


@pytest.mark.parametrize("mode", MODES)
def test_a_gold_int_too_long_to_print_equals_nothing(mode: RewardMode) -> None:
    assert score("<answer>1</answer>", 10**5000, mode)["correctness"] == 0.0


# (prefix, repeated unit): each makes some backtracking pattern, or a scan that restarts, quadratic.
HOSTILE_SHAPES = [
    ("", "<reasoning>"),
    ("", "<answer>"),
    ("", "</answer>"),
    ("", "\n</answer>"),
    ("", "\n<answer>\n"),
    ("", "<reasoning></reasoning><answer>"),
    ("<reasoning>", "</reasoning> "),
    ("<reasoning>", "</reasoning><answer>"),
    ("<reasoning>", "</reasoning>" + "\t" * 50),
    ("<reasoning></reasoning>", " "),
    ("<reasoning></reasoning>", "\n"),
    ("<reasoning></reasoning><answer>", "\uff11\uff0c"),
    ("<answer>", "9"),
    ("<answer>", "1,"),
    ("<answer>", "\uff0c"),
    ("<answer>", "1/"),
    ("", "\x00"),
    ("", "\ud800"),
]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Least of three, of this process alone: other work on the machine does not count."""
    taken: list[float] = []
    for _ in range(3):
        start = time.process_time()
        _ = work()
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("prefix", "unit"), HOSTILE_SHAPES)
@pytest.mark.parametrize("end", ["", "</answer>", "</reasoning><answer>1</answer>"])
def test_hostile_text_of_16_kb_scores_within_10_ms(mode: RewardMode, prefix: str, unit: str, end: str) -> None:
    size = 16 * 1024 - len(end)
    text = (prefix + unit * size)[:size] + end
    assert cpu_seconds(lambda: score(text, text[len("<answer>") :], mode)) < 0.010


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_completions_of_200_characters_score_within_1_s(mode: RewardMode) -> None:
    texts: list[Completion] = [
        f"<reasoning>\n{n}:{'小明有三个苹果,' * 17}\n</reasoning>\n<answer>\n{n}元\n</answer>\n".ljust(200)
        for n in range(10_000)
    ]
    golds = list(range(10_000))
    rewards = get_rewards(mode)
    assert cpu_seconds(lambda: [reward(texts, answer=golds) for reward in rewards.values()]) < 1.0
