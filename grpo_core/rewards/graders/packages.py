"""The packages that a grader may import, and where an interpreter finds them.

Owns the list. By default it has those of the worker's packages that OpenAI's graders have too, with their dependencies:
neither torch nor a client of any service. If the operator names another interpreter, graders may import all its
packages.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

PYTHON: Final = "GRPO_GRADER_PYTHON"
"""Variable with the interpreter that runs `python` graders. Without it, the worker's interpreter runs them, with the
packages in `OFFERED`."""

OFFERED: Final = (
    *("numpy", "scipy", "sympy", "pandas", "rapidfuzz", "scikit-learn", "rouge-score", "deepdiff", "jsonschema"),
    *("pydantic", "pyyaml", "nltk", "sqlparse", "rdkit", "scikit-bio", "ast-grep-py"),
)
"""Distributions from OpenAI's list. Those that are not installed are left out."""
FOR_MATH: Final = ("math-verify", "latex2sympy2-extended", "antlr4-python3-runtime", "sympy")

_SYSTEM: Final = ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo")
_NEVER: Final = frozenset({"torch", "boto3", "celery", "redis", "litestar"})


@dataclass(frozen=True, slots=True)
class Packages:
    """How to start an interpreter, and what it may import."""

    argv: tuple[str, ...]
    folders: tuple[str, ...]
    """Folders of packages; empty if the interpreter finds its packages itself."""
    names: tuple[str, ...] | None
    """Modules that may be imported beside the standard library; None: all that are installed."""
    readable: tuple[str, ...]
    listable: tuple[str, ...]


def packages_for(environment: Mapping[str, str], wanted: tuple[str, ...] = OFFERED) -> Packages:
    """Return the interpreter and packages for a grader's process."""
    named = environment.get(PYTHON)
    if named and wanted is OFFERED:
        return _of_interpreter(named)
    folders = tuple(dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")))
    entries = _entries(wanted)
    places = [str(place) for folder in folders for entry in entries if (place := Path(folder, entry)).exists()]
    return Packages(
        argv=(sys.executable, "-I", "-S"),
        folders=folders,
        names=tuple(sorted({entry.partition(".")[0] for entry in entries if not entry.endswith((".libs", "-info"))})),
        readable=(*_SYSTEM, *_standard_library(), *places),
        listable=folders,
    )


def _of_interpreter(path: str) -> Packages:
    program = Path(path)
    home = program.parent.parent
    real = program.resolve().parent.parent
    return Packages(
        argv=(path, "-I"),
        folders=(),
        names=None,
        readable=(*_SYSTEM, str(home / "lib"), str(home / "pyvenv.cfg"), str(real / "lib")),
        listable=(),
    )


def _standard_library() -> Iterator[str]:
    for kind in ("stdlib", "platstdlib"):
        yield sysconfig.get_paths()[kind]
    # Modules of the standard library open shared libraries there.
    yield str(Path(sys.base_prefix) / "lib")


@cache
def _entries(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the files and folders of these distributions and their dependencies."""
    entries: dict[str, None] = {}
    for name in sorted(_with_needs(wanted)):
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                entries[top] = None
    return tuple(entries)


def _with_needs(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name in _NEVER:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [_name_of(need) for need in needs if "extra ==" not in need]
    return found


def _name_of(requirement: str) -> str:
    end = next((at for at, letter in enumerate(requirement) if not (letter.isalnum() or letter in "-_.")), None)
    return requirement[:end].lower()


def exists(environment: Mapping[str, str]) -> bool:
    """Whether the operator's interpreter can be started; True if the operator named none."""
    named = environment.get(PYTHON)
    return not named or os.access(named, os.X_OK)
