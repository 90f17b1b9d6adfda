"""The source that the process of a `math` grader runs: it compares two expressions with math-verify.

It parses text that a model wrote, which may take forever or need any amount of memory; `mathematics` limits both.
"""

import logging
from functools import lru_cache
from importlib import import_module
from typing import Any

_math_verify: Any = import_module("math_verify")  # the package has no types

logging.disable(logging.CRITICAL)
_parser: Any = import_module("latex2sympy2_extended.gen.antlr4_13_2.PSParser").PSParser
_modes: Any = import_module("antlr4.atn.PredictionMode").PredictionMode
_read_in_full = _parser.math


def _read_in_two_stages(parser: Any) -> Any:
    """Parse with ANTLR's fast prediction, and only what that cannot read with the full one: three times as fast.

    Where the fast one succeeds, it reads what the full one would (ANTLR's own documentation of `PredictionMode.SLL`).
    `_interp` is a private name, read in antlr4-python3-runtime 4.13.2.
    """
    parser._interp.predictionMode = _modes.SLL  # noqa: SLF001
    try:
        return _read_in_full(parser)
    except Exception:  # noqa: BLE001 - latex2sympy2's listener raises plain exceptions
        parser.reset()
        parser._interp.predictionMode = _modes.LL  # noqa: SLF001
        return _read_in_full(parser)


_parser.math = _read_in_two_stages


@lru_cache(maxsize=4096)
def _gold(text: str) -> Any:
    return _math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    """1.0 if the sample's `answer`, or the last answer in its `text`, equals the item's `gold`."""
    answer = sample["answer"]
    given = _math_verify.parse(f"\\boxed{{{answer}}}" if answer is not None else sample["text"], parsing_timeout=None)
    return float(bool(given) and _math_verify.verify(_gold(item["gold"]), given, timeout_seconds=None))


# Warm up: math-verify imports and builds parts of itself when they are first used.
grade({"answer": "\\frac{1}{2}", "text": ""}, {"gold": "0.5"})
grade({"answer": None, "text": "It is $\\sqrt{2}$, or \\boxed{2^{0.5}}"}, {"gold": "\\sqrt{2}"})
