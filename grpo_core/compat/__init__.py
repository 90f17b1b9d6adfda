"""Uses of other libraries that those do not promise to keep: private names, internal objects, log lines.

Owns these uses and the check that the installed version still supports each. There is one module per library; those of
the HTTP server are in `api.compat`. No other module uses a private name of a library (`tests/unit/test_compat.py`).
Invariant: if a library has changed, the run, or the start of the server, fails with `library_changed`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode


class LibraryChanged(JobFailure):
    """A library differs from the version that this project was written for."""

    def __init__(self, library: str, read_in: str, fault: str) -> None:
        super().__init__(
            FailureCode.LIBRARY_CHANGED,
            f"{library} {installed(library)} {fault}; this was written for {library} {read_in}.",
            hint=f"Install the locked versions, or {library}=={read_in}, and report it.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A name that this project uses although its library does not promise to keep it."""

    name: str
    """`module:attribute`, the attribute dotted."""
    positional: int = 0
    """How many positional arguments it is called with, including `self`. 0 with no named ones: it is not called."""
    named: tuple[str, ...] = ()
    """The keyword arguments that it is called with."""


def require(library: str, read_in: str, uses: Iterable[Use]) -> None:
    """Raise `LibraryChanged` unless the installed library has each name and each accepts the arguments given here."""
    for use in uses:
        module, _, path = use.name.partition(":")
        try:
            found: Any = reduce(getattr, path.split("."), import_module(module))
        except (ImportError, AttributeError) as error:
            raise LibraryChanged(library, read_in, f"has no {use.name}") from error
        if use.positional or use.named:
            try:
                inspect.signature(found).bind(*[None] * use.positional, **dict.fromkeys(use.named))
            except TypeError as error:
                raise LibraryChanged(library, read_in, f"takes other arguments for {use.name} ({error})") from error


def reach(library: str, read_in: str, root: Any, path: str) -> Any:
    """The object at a dotted path below `root`. Raises `LibraryChanged` if it does not exist."""
    try:
        return reduce(getattr, path.split("."), root)
    except AttributeError as error:
        raise LibraryChanged(library, read_in, f"has no {path} below {type(root).__name__}") from error


def installed(library: str) -> str:
    """The installed version of a library, or "(not installed)"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
