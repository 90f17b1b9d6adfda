"""The source that the process of a `math` grader runs: it compares two expressions with math-verify.

It parses text that a model wrote, which may take forever or need any amount of memory; `mathematics` limits both.
"""

import logging
from functools import lru_cache
from importlib import import_module
from math import isfinite
from typing import Any

import sympy

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

_verifier: Any = import_module("math_verify.grader")
_simplify_and_compare, _solve_and_compare = _verifier.sympy_symbolic_eq, _verifier.sympy_solve_and_compare
_POINTS = (0.7390851332, 1.8954942670)
"""Variables get values from these to this plus 1."""
_DIFFERS = 1e-6
_SLOW = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)


def _differ(left: Any, right: Any) -> bool:
    """Whether two expressions have other values where their variables have the same: then no algebra makes them equal.

    Where they seem equal, or have no value, the answer is False.
    """
    try:
        if left.has(*_SLOW) or right.has(*_SLOW):
            return False
        names = sorted(left.free_symbols | right.free_symbols, key=str)
        for point in _POINTS:
            values = {name: point + number / (len(names) + 1) for number, name in enumerate(names)}
            one, other = (complex(side.evalf(15, subs=values)) for side in (left, right))
            if not abs(one - other) <= _DIFFERS * max(1.0, abs(one), abs(other)):
                return isfinite(abs(one)) and isfinite(abs(other))
    except Exception:  # noqa: BLE001 - sympy raises plain exceptions of many kinds
        return False
    return False


def _equal_if_simplified(left: Any, right: Any) -> bool:
    return not _differ(left, right) and _simplify_and_compare(left, right)


def _equal_if_solved(gold: Any, given: Any, *rounding: Any) -> bool:
    """`y = f(x)` and `y = g(x)` were compared before by their right sides."""
    is_same_letter = gold.lhs == given.lhs and gold.lhs.is_Symbol
    if is_same_letter and not any(side.has(gold.lhs) for side in (gold.rhs, given.rhs)):
        return False
    return _solve_and_compare(gold, given, *rounding)


_verifier.sympy_symbolic_eq, _verifier.sympy_solve_and_compare = _equal_if_simplified, _equal_if_solved


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
