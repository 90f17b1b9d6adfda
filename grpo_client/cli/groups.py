"""Groups and comparisons of any number of jobs as a table, and what a sweep's options mean.

Owns how `--grid` is read and how a row is printed. The service decides which jobs are repeats, and computes mean and
spread. Invariant: a figure is printed with the number of jobs it is of, unless that is all jobs of its row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grpo_client.cli.output import EXIT_REFUSED, CommandError, say
from grpo_client.cli.text import printable
from grpo_client.results import Comparison, Group, GroupRow, Spread

FIGURES = {
    "reward": ("last reward", ".3f"),
    "strict_accuracy": ("strict after", ".1%"),
    "strict_change": ("change from base", "+.1%"),
    "lenient_accuracy": ("lenient after", ".1%"),
    "metric": ("metric after", ".3g"),
}
"""The figures of a row: what they are called, and how they are written."""
_LONGEST = 32


def read_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """The grid in options such as `lr=1e-5,3e-5`; a value is JSON, or else text."""
    grid: dict[str, list[Any]] = {}
    for option in options:
        name, mark, values = option.partition("=")
        if not mark or not name or not values or name in grid:
            raise CommandError(f"--grid {option!r} is not FIELD=VALUE,VALUE, each field once.", EXIT_REFUSED)
        grid[name] = _values(values)
    return grid


def _values(text: str) -> list[Any]:
    if text.startswith("["):  # values with commas in them
        try:
            found = json.loads(text)
        except ValueError as error:
            raise CommandError(f"--grid: {text!r} is not a JSON list: {error}.", EXIT_REFUSED) from error
        return found
    return [_value(part) for part in text.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def say_table(table: Group | Comparison) -> None:
    """Print the rows of a table, then the jobs of each."""
    names = [name for name in FIGURES if any(name in row.figures for row in table.rows)]
    head = [*table.fields, "jobs", *(FIGURES[name][0] for name in names)]
    lines = [head, *(_cells(row, table.fields, names) for row in table.rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    say("mean ± standard deviation over the jobs of a row, which differ by the seed only; (n) where not all have it.")
    for caution in table.cautions:
        say(f"Careful: {caution}")
    say("")
    for number, row in enumerate(table.rows, start=1):
        for job in row.jobs:
            seed = job.spec["training"]["seed"]
            say(f"row {number}  {job.id}  {job.status:<10}  {job.step}/{job.total_steps}  seed {seed}")


def _cells(row: GroupRow, fields: Sequence[str], names: Sequence[str]) -> list[str]:
    settings = [_setting(row.settings.get(field)) for field in fields]
    figures = [_figure(row.figures.get(name), FIGURES[name][1], len(row.jobs)) for name in names]
    return [*settings, str(len(row.jobs)), *figures]


def _setting(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _figure(spread: Spread | None, form: str, jobs: int) -> str:
    if spread is None:
        return "-"
    about = "" if spread.sd is None else f" ± {spread.sd:{form.lstrip('+')}}"
    return f"{spread.mean:{form}}{about}" + ("" if spread.n == jobs else f" ({spread.n})")
