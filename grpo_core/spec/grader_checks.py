"""Checks of a grader that do not need to run it.

Owns the checks that need more than one field of it, or a library; those of a single field are its model's. Nothing of
a grader is executed: Python is parsed. Invariant: every problem's pointer is below the grader.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace

from grpo_core.rewards.graders.formula import Formula, FormulaError
from grpo_core.rewards.graders.models import NOT_OFFERED, AnyGrader, Multi, Python, Regex, TextSimilarity
from grpo_core.rewards.graders.templates import Template, TemplateError
from grpo_core.spec.problems import Problem
from grpo_core.strict_json import pointer_of

_ENTRY = "grade"
_PARAMETERS = 2


def problems_of(grader: AnyGrader, *, has_format: bool) -> Iterator[Problem]:
    """Every problem; `has_format` is whether the job has a response format."""
    if isinstance(grader, Multi):
        yield from _of_members(grader, has_format=has_format)
        return
    for pointer, text in grader.templates:
        yield from _bad_template(pointer, text, has_format=has_format)
    if isinstance(grader, Python):
        yield from _bad_source(grader.source)
    if isinstance(grader, Regex):
        yield from _bad_pattern(grader.pattern)
    if isinstance(grader, TextSimilarity) and grader.evaluation_metric in NOT_OFFERED:
        yield Problem(
            pointer="/evaluation_metric",
            code="unsupported_metric",
            detail=f"is {grader.evaluation_metric}, which {NOT_OFFERED[grader.evaluation_metric]}",
            remedy="Use fuzzy_match, bleu, gleu, rouge_1 to rouge_5 or rouge_l.",
        )


def _of_members(grader: Multi, *, has_format: bool) -> Iterator[Problem]:
    for name, member in grader.graders.items():
        for problem in problems_of(member, has_format=has_format):
            yield replace(problem, pointer=pointer_of(("graders", name)) + problem.pointer)
    yield from bad_formula("/calculate_output", grader.calculate_output, grader.graders)


def bad_formula(pointer: str, text: str, names: Collection[str]) -> Iterator[Problem]:
    """What is wrong with a formula over these names."""
    try:
        Formula(text, names)
    except FormulaError as error:
        yield Problem(
            pointer=pointer,
            code="bad_formula",
            detail=f"cannot be read: {error}",
            remedy=f"Use numbers, + - * / ^ ( ), min max abs floor ceil exp sqrt log, and {', '.join(names)}.",
        )


def _bad_template(pointer: str, text: str, *, has_format: bool) -> Iterator[Problem]:
    try:
        paths = Template(text).paths
    except TemplateError as error:
        yield Problem(
            pointer=pointer,
            code="bad_template",
            detail=f"holds {error}",
            remedy="Write {{item.COLUMN}} for a column of the data, or {{sample.output_text}} for the completion.",
        )
        return
    if not has_format and any(path.root == "sample" and path.parts[:1] == ("output_json",) for path in paths):
        yield Problem(
            pointer=pointer,
            code="no_response_format",
            detail="reads sample.output_json, and the job has no response format",
            remedy='Set sampling.response_format, such as {"type": "json_object"}, or read sample.output_text.',
        )


def _bad_source(source: str) -> Iterator[Problem]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python will refuse one day
            tree = ast.parse(source, "<grader>")
    except SyntaxError as error:
        where = f"line {error.lineno}: " if error.lineno else ""
        yield _source_problem(f"is not Python ({where}{error.msg})", "Correct it there.")
        return
    except (ValueError, MemoryError, RecursionError):
        yield _source_problem("cannot be parsed: it is nested too deep", "Write it in smaller statements.")
        return
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if _ENTRY not in _names_at_top(tree):
        yield _source_problem("defines no grade", "Define def grade(sample, item), which returns a number.")
    elif _ENTRY in functions and not _takes_two(functions[_ENTRY].args):
        yield _source_problem("has a grade that does not take two values", "Write it as def grade(sample, item).")


def _names_at_top(tree: ast.Module) -> set[str]:
    """Every name that the module may bind, wherever in its statements: a `grade` may stand below an `if`."""
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _takes_two(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    required = positional - len(arguments.defaults)
    needs_keyword = any(default is None for default in arguments.kw_defaults)
    return required <= _PARAMETERS and (positional >= _PARAMETERS or arguments.vararg is not None) and not needs_keyword


def _bad_pattern(pattern: str) -> Iterator[Problem]:
    try:
        import re2
    except ImportError:  # a laptop without the extra: the service says it
        return
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        yield Problem(
            pointer="/pattern",
            code="bad_pattern",
            detail=f"is not a pattern of RE2's: {_text(error)}",
            remedy="RE2 has no look-around and no references to groups; docs/graders.md links its syntax.",
        )


def _text(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return (said.decode(errors="replace") if isinstance(said, bytes) else str(said))[:200]


def _source_problem(detail: str, remedy: str) -> Problem:
    return Problem(pointer="/source", code="bad_source", detail=detail, remedy=remedy)
