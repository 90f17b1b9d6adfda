"""`python -m grpo_core.datasets.look`: the first records of the hub data set that a spec on standard input names.

It is a process for one look: it connects only where a training process may, reads at most `MAX_BYTES` from the hub and
holds little memory. Owns the form of its answer, which is one JSON object: `records`, or the `problem` in words.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

from grpo_core import egress, hub
from grpo_core.confinement import rights
from grpo_core.datasets.hub import first_records
from grpo_core.datasets.rows import DatasetError
from grpo_core.spec import parse_spec

MAX_BYTES: Final = 64 * 1024**2
MAX_ANSWER_BYTES: Final = 4 * 1024**2
MEMORY_BYTES: Final = 4 * 1024**3
"""Of address space, most of which libraries only reserve."""
_NICE: Final = 10


def main() -> int:
    """Answer one look."""
    rights.bind_to(os.getppid())
    os.nice(_NICE)
    rights.limit(memory_bytes=MEMORY_BYTES, open_files=256)
    rights.hide_memory()
    spec = parse_spec(json.loads(sys.stdin.buffer.read()))
    egress.install()
    try:
        answer: dict[str, Any] = {"records": _short(first_records(spec.data, MAX_BYTES))}
    except DatasetError as error:
        (problem, *_) = error.problems
        answer = {
            "problem": {
                "pointer": problem.pointer,
                "code": str(problem.code),
                "detail": problem.detail,
                "remedy": problem.remedy,
            }
        }
    except ImportError:
        answer = {"problem": None}
    sys.stdout.write(json.dumps(answer))
    return 0


def _short(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many of the first records as an answer may hold."""
    size, kept = 0, list[dict[str, Any]]()
    for record in records:
        size += len(json.dumps(record, default=str))
        if size > MAX_ANSWER_BYTES:
            break
        kept.append(json.loads(json.dumps(record, default=str)))
    return kept


if __name__ == "__main__":
    hub.WAIT_SECONDS = ()  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main())
