"""`grpo admin rebuild`: for who runs the service, straight in storage and Valkey, since nobody's key still opens it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from api.cli.output import EXIT_FAILED, AsJson, print_json, say, service_errors

if TYPE_CHECKING:
    from jobs.rebuild import Report


def rebuild(*, dry_run: bool = False, json: AsJson = False) -> int:
    """Put back what Valkey has lost, from storage. Safe at any time, also while workers run.

    Parameters
    ----------
    dry_run
        Only say what would be put back.
    """
    with service_errors("service"):
        from jobs.rebuild import Rebuild
        from jobs.settings import QueueSettings, StorageSettings

        report = Rebuild.of(StorageSettings(), QueueSettings(), dry_run=dry_run).run()
    if json:
        print_json(asdict(report))
    else:
        _say_report(report)
    return EXIT_FAILED if report.unreadable else 0


def _say_report(report: Report) -> None:
    say("What would be put back:" if report.dry_run else "What was put back:")
    rows = {
        **{f"{status} jobs": count for status, count in report.restored.items()},
        "API keys": report.keys,
        "records corrected": report.corrected,
        "jobs left alone": report.present,
        "jobs unreadable": len(report.unreadable),
        "jobs in storage": report.jobs,
    }
    for name, count in rows.items():
        say(f"  {name:<20}{count:>8}")
    for job_id, reason in report.unreadable.items():
        say(f"{job_id}: {reason}")
