"""`grpo submit`: reads a spec, changes it as told, submits it, and with `--wait` follows it to its end."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from api.cli.output import (
    EXIT_REFUSED,
    AsJson,
    CommandError,
    InputFile,
    connected,
    note,
    print_json,
    say,
)
from api.cli.text import count
from api.cli.watch import EXIT_CODES, follow

Changes = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Set a field, as training.steps=20; the value is JSON, else text."),
]

TEXTS = {("name", 1), ("metadata", 2)}
"""Fields whose values are texts, by their first name and how many names lead to them."""


def submit(
    file: InputFile,
    /,
    *,
    set: Changes = None,  # noqa: A002 - the option's name
    wait: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    idempotency_key: str | None = None,
    json: AsJson = False,
) -> int:
    """Submit a job. Exits 0 when it was accepted; with --wait: 0 succeeded, 1 failed, 2 refused, 3 cancelled.

    Parameters
    ----------
    file
        The spec as JSON; - is standard input.
    wait
        Follow the job to its end.
    dry_run
        Only check the spec and show what it would become.
    idempotency_key
        A text of your own that makes this command safe to run again: the same key and spec are one job for 48 hours.
    """
    spec = read_spec(file, set or [])
    with connected() as client:
        if dry_run:
            _show_dry_run(client.dry_run(spec), as_json=json)
            return 0
        job = client.submit(spec, idempotency_key=idempotency_key)
        for warning in job.get("warnings", []):
            note(_warned(warning))
        if not wait:
            _show_accepted(job, as_json=json)
            return 0
        job = follow(client, job, as_json=json)
    if json:
        print_json(job)
    return EXIT_CODES[job["status"]]


def read_spec(file: str, changes: list[str]) -> Any:
    """The spec in a file with `a.b=c` changes made; raises `CommandError` naming what cannot be read."""
    from grpo_core import strict_json

    try:
        raw = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror or error}.", EXIT_REFUSED) from error
    try:
        spec = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise CommandError(f"{file}: {error}{_not_a_spec(raw)}", EXIT_REFUSED) from error
    for change in changes:
        set_field(spec, change)
    return spec


def _not_a_spec(raw: bytes) -> str:
    """A hint where the file is something else that people have at hand."""
    lines = raw.split(b"\n", 2)
    is_lines = len(lines) > 1 and all(line.strip().startswith(b"{") and b"}" in line for line in lines[:2])
    return " It looks like a data set: upload it with grpo datasets upload." if is_lines else ""


def set_field(spec: Any, change: str) -> None:
    """Make one change, written `a.b=c`."""
    from grpo_core import strict_json

    path, mark, text = change.partition("=")
    names = path.split(".")
    if not mark or not all(names):
        raise CommandError(f"--set {change!r} is not FIELD=VALUE, such as training.steps=20.", EXIT_REFUSED)
    try:
        value: Any = strict_json.loads(text)
    except strict_json.StrictJsonError:
        value = text
    if (names[0], len(names)) in TEXTS and not isinstance(value, str | None):
        value = text  # a shell takes away the quotes that would say so
    section = spec
    for name in names[:-1]:
        if isinstance(section, dict):
            section = section.setdefault(name, {})
    if not isinstance(section, dict):
        raise CommandError(f"--set {change!r}: {'.'.join(names[:-1]) or 'the spec'} is not an object.", EXIT_REFUSED)
    section[names[-1]] = value


def _show_accepted(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    say(f"{job['id']}: {job['status']}")


def _show_dry_run(result: dict[str, Any], *, as_json: bool) -> None:
    import json

    if as_json:
        print_json(result)
        return
    say(json.dumps(result["spec"], indent=2, ensure_ascii=False))
    for warning in result["warnings"]:
        say(_warned(warning))
    note(_size(result["estimate"]))
    note(f"The spec is accepted, with {count(len(result['warnings']), 'warning')}; nothing was stored.")


def _warned(warning: dict[str, Any]) -> str:
    return f"warning {warning['pointer']}: {warning['message']}"


def _size(estimate: dict[str, Any]) -> str:
    share = estimate["epoch_share"]
    epochs = "" if share is None else f", {'once' if share == 1 else f'{share:g} times'} through the data set"
    return (
        f"{count(estimate['completions'], 'completion')} to {count(estimate['prompts'], 'question')}{epochs}; "
        f"at most {estimate['max_completion_tokens']:,} tokens are drawn."
    )
