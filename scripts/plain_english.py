"""Fails on phrases of this project's old dialect, and says what to write instead: `make check` runs it.

    python scripts/plain_english.py              # check the whole repository
    python scripts/plain_english.py PATH ...     # check these files or folders

Owns the list of phrases; CONTRIBUTING.md has the style. Generated pages are checked in the files they are made from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PHRASES = {
    r"go(?:es)? on (?:from|with|without|training|as)|going on from|went on from": "continue(s), resume(s)",
    r"whoever|whosoever": "anyone who, the client, the owner",
    r"whatever (?:fails|happens to|else)": "say which cases",
    r"of (?:its|their|our) own": "its own X, a separate X",
    r"so many|so much|so long|so few": "give the number, or: this many",
    r"(?:is|are|was|were|be|been) told|told (?:of|to|by|at|what|apart)|untold": "is sent, is reported, receives",
    r"(?:is|are) asked(?! for)": "is requested, is queried, receives the request",
    r"at the least|at the most": "at least, at most",
    r"to the letter|to the bit": "exactly",
    r"for (?:its|their) own good|for good\b": "permanently",
    r"nobody (?:here )?(?:asked|reads?|looks?|else|had|has|claimed|is told)": "name who",
    r"that there (?:is|are|was|were) (?:not|none)|there is none of": "missing, does not exist",
    r"(?:pays|paid|paying) (?:\d|for|up to|the|all)": "the reward is, scores",
    r"best paid|worst paid|paid the same|can pay": "highest reward, largest reward",
    r"rings? (?:again|for|once)|\brung\b|\brang\b": "publishes a wake-up",
    r"is had\b|are had\b|can(?:not)? be had|to be had": "is available, can be read",
    r"\bmend(?:s|ed|ing)?\b": "repair(s), fix(es)",
    r"in hand\b|at hand\b": "holds, has",
    r"speaks? up|spoke up": "warns",
    r"without a word|not a word": "without a message",
    r"(?:of|with) which (?:one|it) acts": "one of which acts",
    r"as ever\b|ever after": "as usual",
    r"comes? to (?:the same|nothing|much)": "equals, is",
    r"of those (?:that|who)|those there are": "which ones",
    r"makes? (?:nothing|something|little|much) of": "interprets, is sensitive to",
    r"is no (?:number|event|pair|wall|id|JSON|new)": "is not a",
    r"what (?:is|was) (?:asked|wanted|meant|had)\b": "the request, the intended X",
    r"put (?:up with|to rights|right)": "accept, correct",
    r"let(?:s)? (?:it|them) (?:be|go on)": "leaves unchanged",
    r"in the (?:asked|wanted|told) ": "in the required",
    r"the asked\b": "the required",
    r"(?:^|[.!?:\"] )(?-i:Of) (?:a|an|the|those|what|these|requests|bodies|earlier|it|all)\b": "start with the subject",
}
"""What to look for, without regard to case, and what to write instead."""

CHECKED = ("*.md", "*.py", "api/page/static/locale/en.json", "*.yaml", "*.yml", "*.toml", "Makefile", "Dockerfile")
SKIPPED = (
    "scripts/plain_english.py",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tests/",
    "docs/reference/spec.md",
    "api/page/static/vendor",
)


def main(arguments: list[str]) -> int:
    """Print what is found; returns the exit status."""
    chosen = [path for path in tracked(arguments or CHECKED) if arguments or not within(path, SKIPPED)]
    lines = [line for path in chosen for line in found(path)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


def tracked(patterns: Iterable[str]) -> Iterator[Path]:
    """The files of the repository that match."""
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    yield from (Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file())


def within(path: Path, rooms: Iterable[str]) -> bool:
    """Whether a path is one of the files or is inside one of the folders."""
    return any(path.as_posix() == room or path.as_posix().startswith(room.rstrip("/") + "/") for room in rooms)


def found(path: Path) -> Iterator[str]:
    """A line for each phrase in a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for phrase, instead in PHRASES.items():
        for match in re.finditer(phrase.replace(" ", r"\s+"), text, re.IGNORECASE | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path}:{line}: “{' '.join(match[0].split())}”: write {instead}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
