"""The grader `text_similarity`: how similar two texts are, from 0 to 1, in any language.

Defines each metric, because OpenAI only names them: `fuzzy_match` is the normalised edit similarity, `rouge_*` the F1
of n-grams or of the longest common subsequence, `gleu` the smaller of precision and recall of 1- to 4-grams. A word is
a run of letters and digits; each Chinese, Japanese or Korean character is a word. Invariant: the time is bounded,
because only the first `MAX_CHARACTERS` and `MAX_WORDS` of a text are compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import sacrebleu
from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from grpo_core.rewards.graders.models import AnyGrader, TextSimilarity
from grpo_core.rewards.graders.protocol import Grader, GraderContext
from grpo_core.rewards.graders.text import TextGrader

MAX_CHARACTERS: Final = 20_000
MAX_WORDS: Final = 2_000
GLEU_LONGEST: Final = 4

_EAST_ASIAN: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD: Final = re.compile(rf"[{_EAST_ASIAN}]|[^\W_{_EAST_ASIAN}]+")
_HAS_EAST_ASIAN: Final = re.compile(rf"[{_EAST_ASIAN}]")


def make(model: AnyGrader, context: GraderContext) -> Grader:  # noqa: ARG001 - every module's `make` is alike
    """Return the grader."""
    assert isinstance(model, TextSimilarity), "the registry's table"
    metric = METRICS[model.evaluation_metric]

    def score(text: str, reference: str) -> float:
        return metric(text[:MAX_CHARACTERS], reference[:MAX_CHARACTERS])

    return TextGrader([model.input, model.reference], score)


def fuzzy_match(text: str, reference: str) -> float:
    return fuzz.ratio(text, reference) / 100


def bleu(text: str, reference: str) -> float:
    tokenize = "zh" if _HAS_EAST_ASIAN.search(reference) else "13a"
    return min(1.0, sacrebleu.sentence_bleu(text, [reference], tokenize=tokenize).score / 100)


def gleu(text: str, reference: str) -> float:
    given, wanted = _words(text), _words(reference)
    ours = sum((_ngrams(given, n) for n in range(1, GLEU_LONGEST + 1)), Counter[tuple[str, ...]]())
    theirs = sum((_ngrams(wanted, n) for n in range(1, GLEU_LONGEST + 1)), Counter[tuple[str, ...]]())
    most = max(ours.total(), theirs.total())
    return (ours & theirs).total() / most if most else 1.0


def rouge_n(n: int) -> Callable[[str, str], float]:
    """Return the function ROUGE-N."""

    def rouge(text: str, reference: str) -> float:
        ours, theirs = _ngrams(_words(text), n), _ngrams(_words(reference), n)
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return rouge


def rouge_l(text: str, reference: str) -> float:
    ours, theirs = _words(text), _words(reference)
    return _f1(LCSseq.similarity(ours, theirs), len(ours), len(theirs))


METRICS: Final[dict[str, Callable[[str, str], float]]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "rouge_l": rouge_l,
    **{f"rouge_{n}": rouge_n(n) for n in range(1, 6)},
}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())[:MAX_WORDS]


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _f1(common: float, ours: int, theirs: int) -> float:
    """Return 2PR / (P + R), from counts; 1.0 for two texts without words."""
    return 2 * common / (ours + theirs) if ours + theirs else 1.0
