"""`grpo import-openai` and `grpo export-openai`: OpenAI's fine-tuning jobs as specs, and back, without a server.

Owns what is printed: the result on standard output, and on standard error every field that is not carried over as it
is. `grpo_client.openai_jobs` has the mapping.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from json import dumps
from typing import Annotated, Any, cast

from cyclopts import Parameter

from grpo_client import openai_jobs
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, InputFile, note, print_json
from grpo_client.cli.spec_file import read_spec

Rows = Annotated[int | None, Parameter(negative="")]


def import_job(
    file: InputFile,
    /,
    *,
    model: str | None = None,
    training_file: str | None = None,
    validation_file: str | None = None,
    rows: Rows = None,
    validation_rows: Rows = None,
    json: AsJson = False,
) -> int:
    """Turn a reinforcement job of OpenAI or Azure into a job spec. Exits 2 if it cannot be one.

    Prints the spec, and on standard error each field that is left out or changed.

    Parameters
    ----------
    file
        The job as JSON: the body of a create request, or a job that was retrieved; - is standard input.
    model
        The model to train instead of OpenAI's: a hub name or a folder of models.
    training_file
        The id of the uploaded training file (grpo datasets upload), instead of OpenAI's.
    validation_file
        The id of the uploaded validation file, instead of OpenAI's.
    rows
        Rows of the training file, from which n_epochs becomes steps.
    validation_rows
        Rows of the validation file.
    """
    job = _job(file)
    instead = {"model": model, "training_file": training_file, "validation_file": validation_file}
    changes = {name: value for name, value in instead.items() if value is not None}
    known = {"rows": rows, "validation_rows": validation_rows}
    try:
        mapped = openai_jobs.to_spec({**job, **changes}, **known)
    except openai_jobs.CannotMap as error:
        raise CommandError(f"{file} cannot be a job spec.\n{error}", EXIT_REFUSED) from error
    back = openai_jobs.from_spec(mapped.spec, **known)
    noted = [one.param for one in mapped.notes]
    lines = [f"{one.param}: {one.message}" for one in mapped.notes]
    lines += [
        f"{path}: is not carried over as it is."
        for path in _left(openai_jobs.differences({**job, **changes}, back), noted)
    ]
    lines += _to_replace(mapped.spec)
    _print(mapped.spec, lines, in_one_line=json)
    return 0


def export_job(
    file: InputFile,
    /,
    *,
    rows: Rows = None,
    validation_rows: Rows = None,
    plain: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> int:
    """Turn a job spec into the body of OpenAI's create request.

    Prints the body, and on standard error each field of the spec that OpenAI has none for. They are in `grpo`, which
    this service reads and OpenAI refuses.

    Parameters
    ----------
    file
        The spec as JSON; - is standard input.
    rows
        Rows of the training file, from which steps become n_epochs.
    validation_rows
        Rows of the validation file.
    plain
        Leave `grpo` out.
    """
    job = openai_jobs.from_spec(_job(file), rows=rows, validation_rows=validation_rows)
    extra = job.get(openai_jobs.EXTRA, {})
    lines = [f"{path}: OpenAI has no field for it." for path in (_paths(extra) if extra else ())]
    if plain:
        job.pop(openai_jobs.EXTRA, None)
    _print(job, lines, in_one_line=json)
    return 0


def _job(file: str) -> dict[str, Any]:
    job = read_spec(file, [])
    if not isinstance(job, dict):
        raise CommandError(f"{file} is not a JSON object.", EXIT_REFUSED)
    return cast("dict[str, Any]", job)


def _left(paths: Iterable[str], noted: Iterable[str]) -> list[str]:
    """The paths that no note is about."""
    plain = [name.replace(".0.", ".") for name in noted]
    return [
        path for path in paths if not any(f"{name}.".startswith(f"{path}.") or path.startswith(name) for name in plain)
    ]


def _to_replace(spec: dict[str, Any]) -> list[str]:
    """What a spec names that only OpenAI has."""
    name = str(spec.get("model", {}).get("name", ""))
    lines: list[str] = []
    if openai_jobs.is_openais_model(name):
        lines.append(f"model: {name} is a model of OpenAI's; give one of yours with --model.")
    files = {
        "training_file": spec.get("data", {}).get("dataset"),
        "validation_file": spec.get("evaluation", {}).get("dataset"),
    }
    return lines + [
        f"{param}: {value} is a file of OpenAI's; upload it, and give its id with --{param.replace('_', '-')}."
        for param, value in files.items()
        if isinstance(value, str) and value.startswith("file-")
    ]


def _paths(section: Any, path: str = "") -> list[str]:
    """Every value in an object, by its path with dots."""
    if not isinstance(section, dict) or not section:
        return [path]
    found = cast("dict[str, Any]", section).items()
    return [one for name, value in found for one in _paths(value, f"{path}.{name}".lstrip("."))]


def _print(document: dict[str, Any], lines: Iterable[str], *, in_one_line: bool) -> None:
    if in_one_line:
        print_json(document)
    else:
        sys.stdout.write(dumps(document, indent=2, ensure_ascii=False) + "\n")
    for line in lines:
        note(line)
