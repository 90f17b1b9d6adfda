"""`grpo try`: draws and scores completions before any training, and says whether training would learn anything.

Owns the trial's spec and what is printed of its result; it runs as a job (`grpo_client.cli.watch` follows it).
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from cyclopts import Parameter

from grpo_client.cli.jobs import say_trial
from grpo_client.cli.output import AsJson, InputFile, connected, note, print_json, say
from grpo_client.cli.spec_file import read_spec
from grpo_client.cli.submit import Changes, warned
from grpo_client.cli.watch import EXIT_CODES, follow


def run_trial(
    file: InputFile,
    /,
    *,
    rows: int = 20,
    set: Changes = None,  # noqa: A002 - the option's name
    no_wait: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> int:
    """Try a job before training: a worker draws completions from the base model and scores them.

    Exits 0 succeeded, 1 failed, 2 refused, 3 cancelled.

    Parameters
    ----------
    file
        The spec as JSON; - is standard input.
    rows
        Number of questions; each gets sampling.generations completions.
    no_wait
        Only submit the trial; `grpo show` has its result once it has ended.
    """
    spec = read_spec(file, set or [])
    if isinstance(spec, dict):
        spec = {**cast("dict[str, Any]", spec), "kind": "try", "trial": {"rows": rows}}
    with connected() as client:
        job = client.submit(spec)
        for warning in job.warnings:
            note(warned(warning))
        if no_wait:
            print_json(job) if json else say(f"{job.id}: {job.status}")
            return 0
        ended = follow(client, job, as_json=json)
    if json:
        print_json(ended)
    elif ended.result is not None:
        say_trial(ended.result, ended.id)
    return EXIT_CODES[ended.status]
