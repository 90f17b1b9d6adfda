"""What commands print: JSON for machines, lines for people; and how an error ends a command."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient
    from grpo_client.json_object import JsonObject

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
    "The service does not know the key in GRPO_API_KEY: it belongs to another service, or is revoked or expired. "
    "`grpo up` writes one to .grpo/env; `grpo keys create` creates one."
)


class CommandError(Exception):
    """A command failed; `document` is what `--json` prints."""

    def __init__(self, message: str, code: int = EXIT_FAILED, document: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.document = document or {"detail": message}


def report(error: CommandError, *, as_json: bool) -> int:
    """Print what went wrong; returns the exit code."""
    if as_json:
        print_json({"error": error.document})
    note(f"grpo: {error}")
    return error.code


def print_json(value: object) -> None:
    """One JSON value in one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=not _shows_all(sys.stdout), default=_raw) + "\n")
    sys.stdout.flush()


def _raw(value: JsonObject) -> dict[str, Any]:
    """What a result is in JSON."""
    return value.raw


def _shows_all(stream: TextIO) -> bool:
    """Whether a stream takes every character; those of Windows may not."""
    return (stream.encoding or "").lower().startswith("utf")


def say(text: str) -> None:
    """A line of the command's result for people."""
    _write(sys.stdout, text)


def show(text: str) -> None:
    """A part of a line of the result, as soon as it is known."""
    _write(sys.stdout, text, end="")


def note(text: str) -> None:
    """A line about the command itself, such as an error or progress."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str, end: str = "\n") -> None:
    # What cannot be shown is escaped, so that no one else's text can steer the terminal.
    text = "".join(c if c.isprintable() or _is_harmless(c) else ascii(c)[1:-1] for c in text)
    if not _shows_all(stream):
        text = text.encode(stream.encoding or "ascii", "backslashreplace").decode(stream.encoding or "ascii")
    stream.write(text + end)
    stream.flush()


def _is_harmless(character: str) -> bool:
    """Whether a character that Python calls unprintable may be shown: a space of any width, or a joiner of emoji."""
    return character in "\n\t\u200d" or unicodedata.category(character) == "Zs"


def confirm(question: str) -> None:
    """Ask before something that cannot be undone; without a terminal, `--yes` is required."""
    if not sys.stdin.isatty():
        raise CommandError("This cannot be undone, and there is no terminal to ask on: add --yes.", EXIT_REFUSED)
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("Nothing was deleted.", EXIT_REFUSED)


def check_place(path: Path) -> None:
    """Refuse to write below a folder that does not exist, because it is usually a typing mistake."""
    if not path.parent.is_dir():
        message = (
            f"{path} cannot be written: there is no folder {path.parent}. Correct the path, or create the folder first."
        )
        raise CommandError(message, EXIT_REFUSED)


@contextmanager
def connected() -> Generator[GrpoClient]:
    """A client of the service named in the environment; its errors end the command."""
    _import_httpx()
    from grpo_client.client import GrpoClient
    from grpo_client.errors import ClientError, NotConfiguredError, ProblemError

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


def _import_httpx() -> None:
    """Import httpx without its own command line, which imports click, rich and pygments where these are installed."""
    if "httpx" not in sys.modules:
        sys.modules["httpx._main"] = None  # type: ignore[assignment]
        import httpx  # noqa: F401  # pyright: ignore[reportUnusedImport]

        del sys.modules["httpx._main"]
