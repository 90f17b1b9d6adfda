"""What commands print: JSON for machines, lines for people; and how an error ends a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

if TYPE_CHECKING:
    from api.client import GrpoClient

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_CANCELLED = 3
EXIT_INTERRUPTED = 130

AsJson = Annotated[
    bool, Parameter(name="--json", negative="", help="Print JSON, and nothing else, on standard output.")
]

Yes = Annotated[bool, Parameter(negative="", help="Do not ask.")]

InputFile = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A path, or - for standard input."""


_NO_KEY = (
    "The service does not know the key in GRPO_API_KEY: it is of another service, revoked or expired. "
    "`grpo up` leaves one in .grpo/env; `grpo keys create` makes one."
)


class CommandError(Exception):
    """A command that cannot do what was asked; `document` is what `--json` prints of it."""

    def __init__(self, message: str, code: int = EXIT_FAILED, document: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.document = document or {"detail": message}


def report(error: CommandError, *, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    if as_json:
        print_json({"error": error.document})
    note(f"grpo: {error}")
    return error.code


def print_json(value: object) -> None:
    """One JSON value in one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line of the command's result for people."""
    _write(sys.stdout, text)


def note(text: str) -> None:
    """A line about the command itself: an error, or that it takes a while."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    # What cannot be shown is escaped, so that no one else's text can steer the terminal.
    stream.write("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text) + "\n")
    stream.flush()


def confirm(question: str) -> None:
    """Ask before what cannot be undone; where nobody can answer, only `--yes` says so."""
    if not sys.stdin.isatty():
        raise CommandError("This cannot be undone, and nobody is there to ask: add --yes.", EXIT_REFUSED)
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("Nothing was deleted.", EXIT_REFUSED)


def check_place(path: Path) -> None:
    """Refuse a place to write to below a folder that is not there: it is misspelt more often than meant."""
    if not path.parent.is_dir():
        message = (
            f"{path} cannot be written: there is no folder {path.parent}. Correct the path, or make the folder first."
        )
        raise CommandError(message, EXIT_REFUSED)


@contextmanager
def connected() -> Generator[GrpoClient]:
    """A client of the service named in the environment; its errors end the command."""
    from api.client import ClientError, GrpoClient, NotConfiguredError, ProblemError

    try:
        with GrpoClient() as client:
            yield client
    except ProblemError as error:
        if error.code == "unauthorized":
            raise CommandError(_NO_KEY, EXIT_REFUSED, error.document) from error
        code = EXIT_REFUSED if error.status < 500 else EXIT_FAILED
        raise CommandError(str(error), code, error.document) from error
    except NotConfiguredError as error:
        raise CommandError(str(error), EXIT_REFUSED) from error
    except ClientError as error:
        raise CommandError(str(error)) from error


@contextmanager
def needs_extra(extra: str) -> Generator[None]:
    """Around imports that only an extra brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("api", "jobs", "grpo_core", "deploy"):
            raise
        raise CommandError(
            f"This command needs {error.name}, which is not installed: pip install 'grpo-jobs[{extra}]'.", EXIT_REFUSED
        ) from error


@contextmanager
def service_errors(extra: str) -> Generator[None]:
    """Around commands that are the service, or reach behind it: what its environment lacks is one sentence."""
    with needs_extra(extra):
        from pydantic import ValidationError

        from jobs.errors import JobsError, Misconfigured, Unavailable
    try:
        with needs_extra(extra):
            yield
    except Misconfigured as error:
        raise CommandError(str(error), EXIT_REFUSED) from error
    except JobsError as error:
        hint = " Do S3_ENDPOINT, S3_BUCKET, the AWS_ keys and REDIS_URL name the servers that are running?"
        raise CommandError(f"{error}{hint if isinstance(error, Unavailable) else ''}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise CommandError(f"The environment has settings that cannot be used: {wrong}.", EXIT_REFUSED) from error
