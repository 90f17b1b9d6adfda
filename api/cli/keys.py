"""`grpo keys create|list|revoke`: API keys, straight in storage and Valkey, since no one has a key before the first."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from api.cli.output import EXIT_REFUSED, AsJson, CommandError, print_json, say, service_errors

if TYPE_CHECKING:
    from jobs.keys import KeyRecord, KeyStore

Days = Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=36500))]
Scopes = Annotated[
    list[str] | None,
    Parameter(
        name="--scope",
        negative="",
        help="jobs:read, jobs:write, datasets:write or metrics:read; repeat it. All but the last by default.",
    ),
]


def create(
    *, owner: str, scope: Scopes = None, name: str | None = None, expires_in_days: Days = None, json: AsJson = False
) -> None:
    """Create a key and print it. It cannot be shown again.

    Parameters
    ----------
    owner
        Whose jobs the key sees; keys of one owner share them.
    name
        A label for people.
    expires_in_days
        When the key ends; never by default.
    """
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    with _keys() as keys:
        from jobs.keys import OWNER_SCOPES

        try:
            key, record = keys.create(owner, scope or OWNER_SCOPES, name=name, expires_at=expires_at)
        except ValueError as error:
            raise CommandError(str(error), EXIT_REFUSED) from error
    if json:
        print_json({"key": key, **_fields(record)})
        return
    say(key)
    say(f"{record.id} of {owner}, with {', '.join(record.scopes)}. Keep the key: only its hash is stored.")


def list_keys(*, owner: str | None = None, json: AsJson = False) -> None:
    """List keys; their secrets are not known.

    Parameters
    ----------
    owner
        Only this owner's.
    """
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
    """Revoke a key for good, from the next request on."""
    with _keys() as keys:
        record = keys.revoke(key_id)
    if json:
        print_json(_fields(record))
        return
    say(f"{record.id}: revoked")


@contextmanager
def _keys() -> Generator[KeyStore]:
    with service_errors("service"):
        from jobs.keys import KeyStore
        from jobs.ledger import Ledger
        from jobs.settings import QueueSettings, StorageSettings
        from jobs.storage import ObjectStore

        yield KeyStore(ObjectStore(StorageSettings()), Ledger(QueueSettings()))


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
