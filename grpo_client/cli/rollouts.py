"""`grpo rollouts`: the completions of a job, with their rewards."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter, validators

from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say
from grpo_client.cli.text import count
from grpo_client.results import Rollout

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
    """Read a job's completions with their rewards, also while it runs.

    Parameters
    ----------
    worst
        This number of completions with the lowest reward.
    best
        This number of completions with the highest reward.
    step
        Only of this step.
    prompt
        Only of this prompt, by its id: one prompt across steps, or with --step one group.
    finish
        Only completions that ended like this: stop, or length if they were cut off.
    reward_lt
        Only completions with a lower total reward.
    reward_gt
        Only completions with a higher total reward.
    order
        step, reward, advantage or length; -reward is descending.
    limit
        Completions per page.
    cursor
        Where the next page starts, as printed by the previous one.
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
    if not page.data:
        say("No completion matches. A job that has just started has none yet.")
        return
    for completion in page.data:
        _say(completion)
    if page.next_cursor and worst is None and best is None:
        say(f"More: the same with --cursor {page.next_cursor}")


def _order(worst: int | None, best: int | None, order: str | None, limit: int | None) -> tuple[str, int]:
    """The order and the number of completions to request."""
    if sum(given is not None for given in (worst, best, order)) > 1:
        raise CommandError("--worst, --best and --order say the same; give one of them.", EXIT_REFUSED)
    if limit is not None and (worst is not None or best is not None):
        raise CommandError("--worst and --best set the number; leave --limit out.", EXIT_REFUSED)
    if worst is not None:
        return "reward", worst
    if best is not None:
        return "-reward", best
    return order or "step", limit or 20


def _say(row: Rollout) -> None:
    rewards = "  ".join(f"{name} {_number(value)}" for name, value in row.rewards.items())
    cut = ", cut off" if row.finish_reason == "length" else ""
    say(
        f"── step {row.step}  prompt {row.prompt_id}  sample {row.sample}  "
        f"{count(row.completion_tokens, 'token')}{cut}  advantage {_number(row.advantage)}"
    )
    say(f"reward {_number(row.reward_total)}  ({rewards})")
    say(_indented(f"asked: {row.prompt}\nanswer: {row.answer}", "  "))
    say(_indented(row.completion.strip("\n") or "(nothing)", "  │ ") + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _indented(text: str, by: str) -> str:
    return "\n".join(by + line for line in text.split("\n"))
