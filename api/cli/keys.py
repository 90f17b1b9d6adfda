"""`grpo keys create|list|revoke`: manage API keys, directly in storage and Valkey.

That is how the first key is made. Owns which way is taken: an environment with an API key and without credentials of
storage is a person's, who asks the service (`grpo_client.cli.keys`).
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from api.cli.errors import service_errors
from grpo_client.cli import keys as by_key
from grpo_client.cli.keys import Days, Scopes
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, print_json, say

if TYPE_CHECKING:
    from jobs.auth.api_keys import KeyRecord, KeyStore
    from jobs.store.audit_log import AuditLog


def create(
    *,
    owner: str | None = None,
    scope: Scopes = None,
    name: str | None = None,
    expires_in_days: Days = None,
    json: AsJson = False,
) -> None:
    """Create a key and print it. It cannot be shown again.

    Parameters
    ----------
    owner
        Whose jobs the key sees; keys of one owner share them. With a key of your own: you by default.
    name
        A label.
    expires_in_days
        When the key expires; never by default.
    """
    if _asks_the_service():
        by_key.create(owner=owner, scope=scope, name=name, expires_in_days=expires_in_days, json=json)
        return
    if owner is None:
        raise CommandError("Say whose key it is: --owner NAME.", EXIT_REFUSED)
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    with _keys() as keys:
        from jobs.auth.api_keys import OWNER_SCOPES

        audit = _audit()
        try:
            key, record = keys.create(owner, scope or OWNER_SCOPES, name=name, expires_at=expires_at)
        except ValueError as error:
            raise CommandError(str(error), EXIT_REFUSED) from error
        audit.write_command("createKey", owner=record.owner, object=record.id)
    if json:
        print_json({"key": key, **_fields(record)})
        return
    say(key)
    say(f"{record.id} of {owner}, with {', '.join(record.scopes)}. Keep the key: only its hash is stored.")


def list_keys(*, owner: str | None = None, json: AsJson = False) -> None:
    """List keys, without their secrets, which are not stored.

    Parameters
    ----------
    owner
        Only this owner's keys.
    """
    if _asks_the_service():
        by_key.list_keys(owner=owner, limit=100, json=json)
        return
    with _keys() as keys:
        records = keys.list(owner)
    if json:
        print_json({"object": "list", "data": [_fields(record) for record in records]})
        return
    for record in records:
        until = f"until {_time(record.expires_at)}" if record.expires_at else ""
        words = [record.id, f"{record.owner:<16}", f"{_state(record):<10}", ",".join(record.scopes)]
        say("  ".join([*words, *filter(None, (record.name, until))]))


def revoke(key_id: str, /, *, json: AsJson = False) -> None:
    """Revoke a key permanently, effective with the next request."""
    if _asks_the_service():
        by_key.revoke(key_id, json=json)
        return
    with _keys() as keys:
        audit = _audit()
        record = keys.revoke(key_id)
        audit.write_command("revokeKey", owner=record.owner, object=record.id)
    if json:
        print_json(_fields(record))
        return
    say(f"{record.id}: revoked")


def _asks_the_service() -> bool:
    return bool(os.environ.get("GRPO_API_KEY")) and not os.environ.get("AWS_ACCESS_KEY_ID")


def _audit() -> AuditLog:
    """Open the audit log before anything is changed, so that an unwritable log is reported first."""
    from jobs.store.audit_log import AuditLog, AuditSettings

    return AuditLog.of_command(AuditSettings())


@contextmanager
def _keys() -> Generator[KeyStore]:
    with service_errors("service"):
        from jobs.auth.api_keys import KeyStore
        from jobs.settings import QueueSettings, StorageSettings
        from jobs.store.bucket import ObjectStore
        from jobs.store.job_store import JobStore

        yield KeyStore(ObjectStore(StorageSettings()), JobStore(QueueSettings()))


def _fields(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "owner": record.owner,
        "name": record.name,
        "scopes": record.scopes,
        "created_at": _time(record.created_at),
        "expires_at": _time(record.expires_at),
        "revoked_at": _time(record.revoked_at),
    }


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else None


def _state(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if record.expires_at is not None and record.expires_at <= datetime.now(UTC) else "valid"
