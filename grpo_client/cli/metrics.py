"""`grpo metrics`: a job's training metrics step by step, for people, for programs and for a spreadsheet."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say
from grpo_client.cli.text import number_at
from grpo_client.words import METRICS

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
            # With the system's line ends, like all text on standard output.
            sys.stdout.write(client.metrics_csv(job_id, after_step=after_step).replace("\r\n", "\n"))
            sys.stdout.flush()
            return
        steps = client.metrics(job_id, after_step=after_step)
    if json:
        print_json(steps)
        return
    if not steps:
        say("No step has been logged yet.")
        return
    heads = [f"{name:>{max(7, len(name))}}" for name, _ in METRICS.values()]
    say("  ".join([f"{'step':>6}", *heads]))
    for step in (each.raw for each in steps):  # of a run that an older worker trained, some may be missing
        cells = (_cell(number_at(step, path), form) for path, (_, form) in METRICS.items())
        say(
            "  ".join(
                [f"{step['step']:>6}", *(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))]
            )
        )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
