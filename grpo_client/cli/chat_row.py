"""A row of a job's data set as the prompt of `grpo chat`, and what the job would pay for an answer to it.

Owns the turns that are sent and the lines about scores; `chat` talks to the model. Invariant: the model reads what it
reads in training, and the graders are given every column of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from grpo_client.cli.output import EXIT_REFUSED, CommandError

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient
    from grpo_client.results import JobRow, JobRowList, RowScores

Part = Literal["train", "held_out"]
_OTHER: dict[Part, Part] = {"train": "held_out", "held_out": "train"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRow:
    """A row, and the spec of the job that asks it."""

    row: JobRow
    part: Part
    spec: Mapping[str, Any]

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """Its turns, with another system message if one is given."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.row.messages]
        if system is not None:
            first = next(place for place, turn in enumerate(turns) if turn["role"] != "system")
            turns = [{"role": "system", "content": system}, *turns[first:]]
        if turns[0]["role"] == "system":
            return turns
        # To a conversation without a system message the service adds the worked examples itself.
        return turns[2 * len(self.spec["data"].get("examples", ())) :]

    def score(self, client: GrpoClient, text: str) -> RowScores:
        """What the job's rewards pay for this answer."""
        form = self.spec["sampling"].get("response_format")
        spec = {
            "data": self.spec["data"],
            "rewards": self.spec["rewards"],
            **({"sampling": {"response_format": form}} if form else {}),
        }
        return client.score_rows(spec, [{"item": self.row.raw["values"], "model_sample": text}])

    @staticmethod
    def lines(found: RowScores) -> Iterator[str]:
        """The scores in words."""
        (score,) = found.raw["data"]
        rewards = "  ".join(f"{name} {_number(value)}" for name, value in score["rewards"].items())
        yield f"reward {_number(score['reward_total'])}  ({rewards})"
        away = {one["grader"] for one in found.raw["unavailable"]}
        yield from (f"{name}: {one['message']}" for name, one in score["errors"].items() if name not in away)
        yield from (f"{one['grader']}: {one['message']} {one['remedy']}" for one in found.raw["unavailable"])


def find_row(client: GrpoClient, job: str, number: int, part: Part) -> ChosenRow:
    """The row of this number. Raises `CommandError`, which says where it is or why it cannot be read."""
    if number < 0:
        raise CommandError("--row counts from 0.", EXIT_REFUSED)
    page = client.job_rows(job, part=part, first=number, limit=1)
    if page.unavailable:
        message = f"The rows of {job} cannot be read here: {page.unavailable.detail}. {page.unavailable.remedy}"
        raise CommandError(message, EXIT_REFUSED)
    if not page.data or page.data[0].row != number:
        raise CommandError(_nowhere(client, job, number, part, page), EXIT_REFUSED)
    (row,) = page.data
    if row.problem:
        detail = f"Row {number} cannot be a prompt: it {row.problem.detail}. {row.problem.remedy}"
        raise CommandError(detail, EXIT_REFUSED)
    return ChosenRow(row=row, part=part, spec=client.get(job).spec)


def _nowhere(client: GrpoClient, job: str, number: int, part: Part, page: JobRowList) -> str:
    other = client.job_rows(job, part=_OTHER[part], first=number, limit=1)
    if other.data and other.data[0].row == number:
        return (
            f"Row {number} is held out of training: add --held-out."
            if part == "train"
            else f"Row {number} is one that the job trains on: leave out --held-out."
        )
    words = "to train on" if part == "train" else "held out"
    if not page.rows:
        return f"There is no row {number} {words} here." + (" The job has none." if page.rows == 0 else "")
    return f"There is no row {number} {words}: they are {page.first_row} to {page.first_row + page.rows - 1}."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
