"""`grpo rollouts`: the very completions that a job drew, and what each reward paid for them."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter, validators

from api.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say
from api.cli.text import count

Order = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
Count = Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=500))]


def rollouts(
    job_id: str,
    /,
    *,
    worst: Count = None,
    best: Count = None,
    step: int | None = None,
    prompt: str | None = None,
    finish: str | None = None,
    reward_lt: float | None = None,
    reward_gt: float | None = None,
    order: Order = None,
    limit: Count = None,
    cursor: str | None = None,
    json: AsJson = False,
) -> None:
    """Read a job's completions with their rewards, of a running job too.

    Parameters
    ----------
    worst
        So many of the worst paid.
    best
        So many of the best paid.
    step
        Only of this step.
    prompt
        Only of this prompt, by its id: one prompt across steps, or with --step one group.
    finish
        Only those that ended so: stop, or length where they were cut off.
    reward_lt
        Only those paid less in all.
    reward_gt
        Only those paid more in all.
    order
        step, reward, advantage or length; -reward is the highest first.
    limit
        Completions on a page.
    cursor
        Where the page before said that the next one starts.
    """
    wanted_order, wanted = _order(worst, best, order, limit)
    with connected() as client:
        page = client.rollouts(
            job_id,
            step=step,
            prompt=prompt,
            finish=finish,
            reward_lt=reward_lt,
            reward_gt=reward_gt,
            order=wanted_order,
            limit=wanted,
            cursor=cursor,
        )
    if json:
        print_json(page)
        return
    if not page["data"]:
        say("No completion is like that; a job that has just begun has none yet.")
        return
    for completion in page["data"]:
        _say(completion)
    if page["next_cursor"] and worst is None and best is None:
        say(f"More: the same with --cursor {page['next_cursor']}")


def _order(worst: int | None, best: int | None, order: str | None, limit: int | None) -> tuple[str, int]:
    """The order and the number to ask for."""
    if sum(given is not None for given in (worst, best, order)) > 1:
        raise CommandError("--worst, --best and --order say the same; give one of them.", EXIT_REFUSED)
    if limit is not None and (worst is not None or best is not None):
        raise CommandError("--worst and --best say how many; leave --limit out.", EXIT_REFUSED)
    if worst is not None:
        return "reward", worst
    if best is not None:
        return "-reward", best
    return order or "step", limit or 20


def _say(row: dict[str, Any]) -> None:
    rewards = "  ".join(f"{name} {_number(value)}" for name, value in row["rewards"].items())
    cut = ", cut off" if row["finish_reason"] == "length" else ""
    say(
        f"── step {row['step']}  prompt {row['prompt_id']}  sample {row['sample']}  "
        f"{count(row['completion_tokens'], 'token')}{cut}  advantage {_number(row['advantage'])}"
    )
    say(f"reward {_number(row['reward_total'])}  ({rewards})")
    say(_indented(f"asked: {row['prompt']}\nanswer: {row['answer']}", "  "))
    say(_indented(row["completion"].strip("\n") or "(nothing)", "  │ ") + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _indented(text: str, by: str) -> str:
    return "\n".join(by + line for line in text.split("\n"))
