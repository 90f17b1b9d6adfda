"""Which columns of a row the graders of a job name, so that what a row lacks can be said before a score is read.

Owns how a `python` grader's source is read for its columns; templates name theirs themselves. Invariant: a column that
is reported is named in the grader. One that only running the code would show is not found.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping

from grpo_core.rewards.graders.models import AnyGrader, Python, members_of
from grpo_core.rewards.graders.templates import Template

_FUNCTION = "grade"


def missing_columns(graders: Mapping[str, AnyGrader], columns: Collection[str]) -> dict[str, list[str]]:
    """The columns that each grader names and that are not among these; a member of a `multi` is `name.member`."""
    found = {
        member: [name for name in columns_of(leaf) if name not in columns]
        for name, grader in graders.items()
        for member, leaf in members_of(name, grader).items()
    }
    return {name: missing for name, missing in found.items() if missing}


def columns_of(grader: AnyGrader) -> list[str]:
    """The columns that a grader names, in the order in which it does."""
    if isinstance(grader, Python):
        return list(dict.fromkeys(_columns_in(grader.source)))
    paths = (path for _, text in grader.templates for path in Template(text).paths)
    return list(dict.fromkeys(str(path.parts[0]) for path in paths if path.root == "item" and path.parts))


def _columns_in(source: str) -> Iterator[str]:
    """The names in `item["name"]` and `item.get("name")`; with a default, a column need not be there."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef) or function.name != _FUNCTION or len(function.args.args) < 2:
            continue
        item = function.args.args[1].arg
        nodes = [node for node in ast.walk(function) if isinstance(node, ast.expr)]
        for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
            name = _column(node, item)
            if name is not None:
                yield name


def _column(node: ast.expr, item: str) -> str | None:
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(column)), ctx=ast.Load()):
            return column if name == item else None
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[ast.Constant(value=str(column))], keywords=[]
        ):
            return column if name == item else None
        case _:
            return None
