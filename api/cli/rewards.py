"""`grpo rewards list|score`: the reward functions and their scores, without a running service."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, InputFile, print_json, say
from grpo_core import strict_json
from grpo_core.rewards import RewardMode, describe
from grpo_core.rewards import score as score_completion


def list_rewards(*, mode: RewardMode = "fixed", json: AsJson = False) -> None:
    """List the reward functions.

    Parameters
    ----------
    mode
        `published` is bit-identical to the recipe; `fixed` corrects its faults.
    """
    rewards = describe(mode)
    if json:
        fields = ("name", "mode", "most", "least", "description")
        data = [{**{name: getattr(info, name) for name in fields}, "columns": list(info.columns)} for info in rewards]
        print_json({"object": "list", "data": data})
        return
    for info in rewards:
        say(f"{info.name:<14} up to {info.most:g}  {info.description}")


def score(file: InputFile, /, *, mode: RewardMode = "fixed", json: AsJson = True) -> None:  # noqa: ARG001 - taken for uniformity
    """Score completions: a JSON object with the five rewards and their total for each line.

    Parameters
    ----------
    file
        JSONL with {"completion", "answer"} per line; - is standard input.
    mode
        `published` is bit-identical to the recipe; `fixed` corrects its faults.
    json
        Changes nothing: the output is always JSON.
    """
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    completion, answer = _read(line, number)
                    sys.stdout.write(strict_json.dumps(score_completion(completion, answer, mode)) + "\n")
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror or error}.", EXIT_REFUSED) from error
    finally:
        sys.stdout.flush()


def _read(line: bytes, number: int) -> tuple[Any, Any]:
    try:
        row = strict_json.loads(line)
    except strict_json.StrictJsonError as error:
        raise _bad_line(number, str(error)) from error
    if not isinstance(row, dict):
        raise _bad_line(number, 'This is not an object; give {"completion": "...", "answer": "..."}.')
    for name in ("completion", "answer"):
        if name not in row:
            raise _bad_line(number, f'There is no {name}; give {{"completion": "...", "answer": "..."}}.')
    if not isinstance(row["completion"], str) and not _is_chat(row["completion"]):
        raise _bad_line(number, "The completion is neither text nor a list of chat messages.")
    if isinstance(row["answer"], dict | list):
        raise _bad_line(number, "The answer is neither text nor a number.")
    return row["completion"], row["answer"]


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _bad_line(number: int, message: str) -> CommandError:
    document = {"code": "bad_line", "line": number, "detail": f"Line {number}: {message}"}
    return CommandError(f"Line {number}: {message}", EXIT_REFUSED, document)
