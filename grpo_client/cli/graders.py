"""`grpo graders run` and `validate`: a grader, or the rewards of a spec, tried on completions before any job.

Owns what these commands read and print; the service scores. Invariant: a file with a `type` is a grader, any other is a
spec.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import Parameter

from grpo_client.cli.output import (
    EXIT_FAILED,
    EXIT_REFUSED,
    AsJson,
    CommandError,
    InputFile,
    connected,
    print_json,
    say,
)
from grpo_client.cli.spec_file import read_spec
from grpo_client.cli.text import printable
from grpo_client.results import GraderRun, RowScores

MAX_ROWS = 200
SHOWN = 60
"""Characters of a completion in the table."""

Texts = Annotated[list[str] | None, Parameter(negative="")]


def run(
    file: InputFile,
    /,
    *,
    row: str = "{}",
    data: Path | None = None,
    completion: Texts = None,
    completion_column: str = "completion",
    json: AsJson = False,
) -> int:
    """Score completions. Exits 0 if every completion has a score, 1 if a grader failed or cannot run on the service.

    Parameters
    ----------
    file
        A grader as JSON, or a job spec, whose rewards score; - is standard input.
    row
        The row that the completions answer, as JSON, such as '{"answer": "72"}'.
    data
        JSON lines with up to 200 rows instead, each with its completion.
    completion
        A completion, or @FILE with one; may be repeated.
    completion_column
        The column of `data` that holds the completion.
    """
    given = read_spec(file, [])
    rows = _rows_of(data, completion_column) if data else _rows(row, completion or [])
    with connected() as client:
        if _is_grader(given) and len(rows) == 1 and data is None:
            result = client.run_grader(given, rows[0]["model_sample"], rows[0]["item"])
            print_json(result) if json else _show_run(result)
            return EXIT_FAILED if _failed(result) else 0
        spec = {"rewards": {"graders": {"grader": given}}} if _is_grader(given) else given
        scores = client.score_rows(spec, rows)
    print_json(scores) if json else _show_scores(scores, rows)
    return EXIT_FAILED if any(scored.reward_total is None for scored in scores.data) else 0


def validate(file: InputFile, /, *, json: AsJson = False) -> None:
    """Check a grader; `python` is loaded too. Exits 0 if a job can use it, 2 if not.

    Parameters
    ----------
    file
        A grader as JSON; - is standard input.
    """
    grader = read_spec(file, [])
    if not isinstance(grader, dict):
        raise CommandError(f"{file} is not a grader: a grader is a JSON object with a type.", EXIT_REFUSED)
    with connected() as client:
        found = client.validate_grader(cast("dict[str, Any]", grader))
    if json:
        print_json(found)
    else:
        say(f"{found.grader['type']}: a job can use it")


def _is_grader(given: Any) -> bool:
    return isinstance(given, dict) and "type" in given


def _rows(row: str, completions: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `--row` and `--completion`."""
    if not completions:
        raise CommandError("There is nothing to score: give --completion TEXT or --data FILE.", EXIT_REFUSED)
    item = _object(row, "--row")
    return [{"item": item, "model_sample": _text(completion)} for completion in completions]


def _rows_of(data: Path, column: str) -> list[dict[str, Any]]:
    """The rows of `--data`."""
    lines = [line for line in _read(data).splitlines() if line.strip()]
    if len(lines) > MAX_ROWS:
        raise CommandError(f"{data} has {len(lines)} rows; at most {MAX_ROWS} are scored at once.", EXIT_REFUSED)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        item = _object(line, f"{data}, row {number},")
        if not isinstance(item.get(column), str):
            remedy = "name the column with --completion-column"
            raise CommandError(f"{data}, row {number}, has no text in the column {column!r}: {remedy}.", EXIT_REFUSED)
        text = item.pop(column)
        rows.append({"item": item, "model_sample": text})
    return rows


def _text(completion: str) -> str:
    return _read(Path(completion[1:])) if completion.startswith("@") else completion


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
        raise CommandError(f"{path} cannot be read: {reason}.", EXIT_REFUSED) from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json_module.loads(text)
    except ValueError as error:
        raise CommandError(f"{where} is not JSON: {error}.", EXIT_REFUSED) from error
    if not isinstance(value, dict):
        raise CommandError(f"{where} is not a JSON object.", EXIT_REFUSED)
    return cast("dict[str, Any]", value)


def _failed(result: GraderRun) -> bool:
    flags = dict(result.metadata.errors)
    return any(flag is True for name, flag in flags.items() if name != "sample_parse_error")


def _show_run(result: GraderRun) -> None:
    say(f"reward {result.reward:g}")
    for name, score in result.sub_rewards.items():
        say(f"  {name}: {'unknown' if score is None else f'{score:g}'}")
    for message in result.metadata.messages:
        say(f"error: {message}")
    _show_prints(result.metadata.printed)


def _show_scores(scores: RowScores, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in scores.data[0].rewards if _is_of_interest(name, scores)]
    say("  ".join(["row", f"{'total':>8}", *(f"{name:>{_width(name)}}" for name in names), "completion"]))
    for number, (scored, row) in enumerate(zip(scores.data, rows, strict=True), start=1):
        cells = [f"{_number(scored.rewards[name]):>{_width(name)}}" for name in names]
        text = printable(row["model_sample"])[:SHOWN]
        say("  ".join([f"{number:>3}", f"{_number(scored.reward_total):>8}", *cells, text]).rstrip())
        for name, error in scored.errors.items():
            say(f"     {name}: {error.message}")
    for one in scores.unavailable:
        say(f"{one.message} {one.remedy}")
    for name, seconds in scores.seconds.items():
        say(f"{name}: {seconds * 1000:.1f} ms for {len(rows)} rows")
    for name, text in scores.printed.items():
        say(f"{name} printed:")
        _show_prints(text)


def _is_of_interest(name: str, scores: RowScores) -> bool:
    """Leave out rewards of the recipe that are 0 everywhere."""
    return name in scores.seconds or any(scored.rewards[name] for scored in scores.data)


def _show_prints(text: str) -> None:
    for line in text.splitlines():
        say(f"  | {line}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _width(name: str) -> int:
    return max(len(name), 8)
