"""Writes the tables of facts into the pages of docs/reference: between `<!-- facts: NAME -->` and `<!-- /facts -->`.

    python scripts/fact_docs.py            # write the tables
    python scripts/fact_docs.py --check    # fail if a committed page is not what would be written

Owns no fact: each one is written where the code has it. Where a table has a column more than its head here, that
column is written by hand in the page and kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "reference", ROOT / "docs" / "how-to")

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from api.schemas import JobDetail  # noqa: E402
from grpo_client import openai_jobs  # noqa: E402
from grpo_core.errors import EXIT_CODES  # noqa: E402
from grpo_core.reasons import EventType, FailureClass, FailureCode, Phase, Reason, WarningCode  # noqa: E402
from grpo_core.run_dir.metrics import described  # noqa: E402
from grpo_core.run_dir.records import COLUMN_TYPES, Rollout  # noqa: E402
from grpo_core.shown import shown_fields  # noqa: E402
from jobs.read.fleet import WorkerState  # noqa: E402
from jobs.read.queue_position import WaitReason  # noqa: E402
from jobs.store.job import JobStatus  # noqa: E402
from jobs.webhooks.events import WebhookEvent  # noqa: E402

Rows = Iterable[Iterable[str]]

BLOCK = re.compile(r"(<!-- facts: ([\w-]+) -->\n\n)(.*?)(\n\n<!-- /facts -->)", re.DOTALL)


def tables() -> dict[str, Rows]:
    """Every table by its name: the head, then the lines."""
    return {
        "statuses": with_sentences("status", JobStatus),
        "phases": with_sentences("phase", Phase),
        "event-types": with_sentences("type", EventType),
        "webhook-events": with_sentences("event", WebhookEvent),
        "failure-classes": with_sentences("class", FailureClass),
        **{f"codes-{one.replace('_', '-')}": codes_of(one) for one in FailureClass},
        "warning-codes": with_sentences("code", WarningCode),
        "wait-reasons": with_sentences("reason", WaitReason),
        "worker-states": with_sentences("state", WorkerState),
        "exit-codes": [("exit code", "class"), *((str(code), f"`{name}`") for name, code in EXIT_CODES.items())],
        "metrics": [
            ("field", "unit", "better", "meaning"),
            *(
                (f"`{one.name}`", one.metric.unit, one.metric.better, one.metric.sentence(with_unit=False))
                for one in described().values()
            ),
        ],
        "job-fields": [
            ("field", "meaning"),
            *((f"`{name}`", each.mark.meaning) for name, each in shown_fields(JobDetail).items()),
        ],
        "openai-fields": [
            ("field", "what happens", "field of the [spec](../reference/spec.md)", "notes"),
            *((f"`{row.param}`", row.how, row.ours, row.note) for row in openai_jobs.TABLE),
        ],
        "rollout-columns": [
            ("column", "type", "meaning"),
            *(
                (f"`{'reward_NAME' if name == 'rewards' else name}`", COLUMN_TYPES[name], each.mark.meaning)
                for name, each in shown_fields(Rollout).items()
            ),
        ],
    }


def with_sentences(head: str, reasons: type[Reason]) -> Rows:
    """Words with their sentences."""
    return [(head, "meaning"), *((f"`{one.value}`", one.sentence) for one in reasons)]


def codes_of(failure_class: FailureClass) -> Rows:
    """What each code of a class means; the page adds what to do."""
    found = [one for one in FailureCode if one.failure_class == failure_class]
    return [("code", "what happened"), *((f"`{one.value}`", one.sentence) for one in found)]


def filled(page: str) -> str:
    """A page with its tables as they should be."""
    made = tables()
    return BLOCK.sub(lambda match: f"{match[1]}{table(made[match[2]], match[3])}{match[4]}", page)


def table(rows: Rows, before: str) -> str:
    """A table in Markdown; what the one before had in further columns stays."""
    lines = [[cell.strip() for cell in line.strip("|").split(" |")] for line in before.splitlines()]
    head, *body = [list(row) for row in rows]
    by_hand = {line[0]: line[len(head) :] for line in lines}
    width = len(lines[0]) if lines and lines[0][0] == head[0] else len(head)
    full = [[*row, *by_hand.get(row[0], [])] for row in (head, *body)]
    full.insert(1, ["---"] * width)
    return "\n".join(f"| {' | '.join([*row, *[''] * (width - len(row))])} |".replace(" --- ", "---") for row in full)


def main() -> int:
    """Write or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are current")
    checks, outdated = parser.parse_args().check, 0
    for path in sorted(page for folder in PAGES for page in folder.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (now := filled(page)) == page:
            continue
        if checks:
            print(f"{path.relative_to(ROOT)} is not current: run python scripts/fact_docs.py")
            outdated = 1
        else:
            path.write_text(now, encoding="utf-8")
    return outdated


if __name__ == "__main__":
    sys.exit(main())
