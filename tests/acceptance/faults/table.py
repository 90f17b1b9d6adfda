"""The table of faults in docs/appendix/fault-table.md: collected while the tests run, written when asked for.

`GRPO_FAULT_TABLE=1 pytest tests/acceptance/faults` replaces what stands between the marks `faults` and `/faults`,
for the modules that ran. Invariant: a line stands there only where its test passed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "appendix" / "fault-table.md"
ORDER = [
    "Processes",
    "Servers",
    "Network",
    "Killed between two writes",
    "Data, disks, messages",
    "Orders",
    "Outages of minutes, leases of 60 s",
]
HEAD = "| what was done | what happened | recovered after |\n|---|---|---|\n"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One fault, as it went."""

    group: str
    done: str
    happened: str
    seconds: float | None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f"{self.seconds:.1f} s"
        return f"| {self.done} | {self.happened} | {took} |"


def render(lines: list[Line], before: str = "") -> str:
    """The tables, one a group; a group without a line keeps the table it had before."""
    tables = {part.split("\n")[0]: f"### {part.strip()}" for part in before.split("### ")[1:]}
    for group in {line.group for line in lines}:
        tables[group] = f"### {group}\n\n{HEAD}" + "\n".join(str(line) for line in lines if line.group == group)
    return "\n\n".join(tables[group] for group in sorted(tables, key=ORDER.index))


def replace_between(page: str, mark: str, text: str) -> str:
    """The page with other text between `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)", re.DOTALL)
    assert pattern.search(page), f"the page has no marks <!-- {mark} -->"
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", page)


def write(lines: list[Line]) -> None:
    """Put the tables into the page."""
    page = PAGE.read_text("utf-8")
    before = page.split("<!-- faults -->")[1].split("<!-- /faults -->")[0]
    PAGE.write_text(replace_between(page, "faults", render(lines, before)), encoding="utf-8")
