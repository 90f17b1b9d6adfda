"""`grpo admin rebuild|retention|seal|usage`: administration, directly in storage and Valkey, without an API key."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from api.cli.errors import service_errors
from grpo_client.cli.output import EXIT_FAILED, AsJson, print_json, say

if TYPE_CHECKING:
    from jobs.lifecycle.rebuild import RebuildReport
    from jobs.usage.quotas import Usage


def rebuild(*, dry_run: bool = False, json: AsJson = False) -> int:
    """Restore from storage what Valkey has lost. Safe at any time, also while workers run.

    Parameters
    ----------
    dry_run
        Only show what would be restored.
    """
    with service_errors("service"):
        from jobs.lifecycle.rebuild import Rebuild
        from jobs.settings import QueueSettings, StorageSettings

        report = Rebuild.of(StorageSettings(), QueueSettings(), dry_run=dry_run).run()
    if json:
        print_json(asdict(report))
    else:
        _say_report(report)
    return EXIT_FAILED if report.unreadable else 0


def retention(*, json: AsJson = False) -> None:
    """Show what is past its retention by the settings of this environment; deletes nothing."""
    with service_errors("service"):
        from jobs.lifecycle.retention import Retention
        from jobs.settings import QueueSettings, StorageSettings
        from jobs.store.bucket import ObjectStore
        from jobs.store.job_store import JobStore
        from jobs.store.write_once import WriteOnceStore

        surplus = Retention(JobStore(QueueSettings()), WriteOnceStore(ObjectStore(StorageSettings()))).surplus()
    if json:
        print_json(asdict(surplus))
        return
    say("Past their retention:")
    rows = {
        "records of ended jobs in Valkey": surplus.records,
        "ended jobs in storage": surplus.jobs,
        "jobs with old checkpoints": surplus.checkpoints,
        "marks of deletions": surplus.erased,
    }
    for name, count in rows.items():
        say(f"  {name:<34}{count:>8}")


def seal(*, dry_run: bool = False, json: AsJson = False) -> int:
    """Seal the secrets of webhooks with the first of GRPO_SEALING_KEYS, and show how they are stored.

    Parameters
    ----------
    dry_run
        Only show it.
    """
    with service_errors("api"):
        from jobs.sealing import SealingKeys
        from jobs.settings import QueueSettings, StorageSettings
        from jobs.store.bucket import ObjectStore
        from jobs.store.job_store import JobStore
        from jobs.webhooks.registry import Webhooks
        from jobs.webhooks.settings import WebhookSettings

        stores = ObjectStore(StorageSettings()), JobStore(QueueSettings())
        report = Webhooks(*stores, WebhookSettings(), SealingKeys()).seal(dry_run=dry_run)
    if json:
        print_json(asdict(report))
    else:
        say(f"Keys: {', '.join(report.keys) or 'none; set GRPO_SEALING_KEYS'}. Webhooks:")
        rows = {
            "sealed with the first key": report.current,
            f"{'to be ' if dry_run else ''}sealed with it now": report.sealed,
            "stored as plain text": report.plain,
            "unreadable": len(report.unreadable),
        }
        for name, count in rows.items():
            say(f"  {name:<28}{count:>8}")
        for webhook, reason in report.unreadable.items():
            say(f"{webhook}: {reason}")
    return EXIT_FAILED if report.unreadable or report.plain else 0


def usage(*, json: AsJson = False) -> None:
    """Show the GPU-hours and storage of every owner, with the quotas of this environment."""
    with service_errors("service"):
        from jobs.settings import QueueSettings, StorageSettings
        from jobs.store.bucket import ObjectStore
        from jobs.store.job_store import JobStore
        from jobs.store.write_once import WriteOnceStore
        from jobs.usage.gpu_time import GpuTime
        from jobs.usage.quotas import Quotas
        from jobs.usage.stored_bytes import Census

        job_store, store = JobStore(QueueSettings()), ObjectStore(StorageSettings())
        found = Quotas(GpuTime(job_store, store), Census(job_store, WriteOnceStore(store))).all()
    if json:
        print_json({"object": "list", "data": [_fields(each) for each in found]})
        return
    say(f"{'owner':<24}{'GPU-hours':>12}{'GB stored':>12}")
    for each in found:
        say(f"{each.owner:<24}{each.gpu_hours:>12.2f}{each.stored.bytes / 1e9:>12.2f}")


def _fields(usage: Usage) -> dict[str, Any]:
    return {
        "owner": usage.owner,
        "gpu_hours": round(usage.gpu_hours, 6),
        "max_gpu_hours": usage.max_gpu_hours,
        "stored_bytes": usage.stored.bytes,
        "max_stored_bytes": usage.max_stored_bytes,
    }


def _say_report(report: RebuildReport) -> None:
    say("Would be restored:" if report.dry_run else "Restored:")
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
