"""Turns SVAMP's word problems into the two files beside this script: 700 to train on, 300 never trained on.

    python examples/smollm2/make_data.py SVAMP.json

SVAMP (Patel, Bhattamishra and Goyal, 2021; MIT licence, in LICENSE-SVAMP) is at github.com/arkilpatel/SVAMP. The split
is by position after a seeded shuffle, so that it is the same everywhere.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HELD_OUT = 300


def main() -> None:
    problems = [to_row(problem) for problem in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    random.Random(0).shuffle(problems)
    write(HERE / "heldout.jsonl", problems[:HELD_OUT])
    write(HERE / "train.jsonl", problems[HELD_OUT:])


def to_row(problem: dict[str, Any]) -> dict[str, str]:
    """One problem as question and answer, the answer without a useless fraction."""
    body = problem["Body"].strip()
    end = "" if body.endswith((".", "?", "!", ",")) else "."
    return {"question": f"{body}{end} {problem['Question'].strip()}", "answer": f"{problem['Answer']:g}"}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
