"""Print how a run of `.ci/run` went: the stages' wall times, what passed at a later try only, and what never passed.

Reads `stages.tsv` and pytest's `STAGE.TRY.xml` in the folder that is its argument. What failed at the last try is
printed last and without captured output: of a long log often only the end is kept. Invariant: it decides nothing, since
the exit status of `.ci/run` is that of its stages.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

LINES = 40
"""How many of its last lines are printed of a failed test."""

ENDS = {"0": "", "124": "  ENDED AT ITS LIMIT", "137": "  ENDED AT ITS LIMIT"}
"""What is printed for the exit status of a stage."""

Failures = dict[str, str]


def failures(path: Path) -> Failures:
    """The tests that failed in one run of pytest, each with its traceback."""
    found: Failures = {}
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it
        bad = [part for part in case if part.tag in ("failure", "error")]
        if bad:
            found[f"{case.get('classname')}::{case.get('name')}"] = "\n".join(part.text or "" for part in bad)
    return found


def tries(folder: Path) -> dict[str, list[Failures]]:
    """The failures of each stage's tries, first try first. A try that left no report that can be read is left out."""
    found: dict[str, list[Failures]] = {}
    for path in sorted(folder.glob("*.*.xml")):
        try:
            found.setdefault(path.name.split(".")[0], []).append(failures(path))
        except ET.ParseError:
            print(f"{path.name} cannot be read: pytest was ended before it wrote it.")
    return found


def later(stage: str, runs: list[Failures]) -> list[str]:
    """A line for each test that failed at one try and passed at the next."""
    return [
        f"  {stage}: {test} passed at try {number}"
        for number, (before, after) in enumerate(pairwise(runs), 2)
        for test in before
        if test not in after
    ]


def report(folder: Path) -> str:
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text("utf-8").splitlines()]
    parts = [
        "",
        "Stages:",
        *(f"  {int(took):5} s  {name}{ENDS.get(code, '  FAILED')}" for name, took, code in stages),
    ]
    parts.append(f"  {sum(int(took) for _, took, _ in stages):5} s  together")
    found = tries(folder)
    slow = [line for stage, runs in found.items() for line in later(stage, runs)]
    parts += ["", "Passed at a later try only, which is a defect of the test:", *slow] if slow else []
    for stage, runs in found.items():
        for test, text in runs[-1].items():
            parts += ["", f"FAILED {stage}: {test}", *text.splitlines()[-LINES:]]
    return "\n".join(parts)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
