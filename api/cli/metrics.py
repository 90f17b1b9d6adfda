"""`grpo metrics`: a job's training metrics step by step, for people, for programs and for a spreadsheet."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from cyclopts import Parameter

from api.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say

AsCsv = Annotated[
    bool, Parameter(name="--csv", negative="", help="Print CSV with a header, and nothing else, on standard output.")
]


def metrics(job_id: str, /, *, after_step: int = 0, csv: AsCsv = False, json: AsJson = False) -> None:
    """Print the metrics of a job's logged steps, so far or to its end.

    Parameters
    ----------
    after_step
        Only later steps.
    """
    if csv and json:
        raise CommandError("Give --csv or --json, not both.", EXIT_REFUSED)
    with connected() as client:
        if csv:
            # With this system's line ends, as every text on standard output.
            sys.stdout.write(client.metrics_csv(job_id, after_step=after_step).replace("\r\n", "\n"))
            sys.stdout.flush()
            return
        steps = client.metrics(job_id, after_step=after_step)
    if json:
        print_json(steps)
        return
    if not steps:
        say("No step has been logged so far.")
        return
    say(f"{'step':>6}  {'reward':>7}  {'spread':>7}  {'tokens':>7}  {'cut':>5}  {'kl':>8}  {'entropy':>7}  {'s':>6}")
    for step in steps:
        seconds = step.get("seconds", {}).get("total")
        say(
            f"{step['step']:>6}  {_number(step.get('reward'))}  {_number(step.get('reward_std'))}  "
            f"{_number(step.get('completion_tokens_mean'), 7, 1)}  {_number(step.get('truncated_share'), 5, 2)}  "
            f"{_number(step.get('kl'), 8, 5)}  {_number(step.get('entropy'))}  {_number(seconds, 6, 1)}"
        )


def _number(value: Any, width: int = 7, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
