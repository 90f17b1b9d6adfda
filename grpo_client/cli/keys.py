"""`grpo keys create|list|revoke` with an API key: its owner's keys, and for operators those of everyone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from cyclopts import Parameter, validators

from grpo_client.cli.output import AsJson, connected, note, print_json, say
from grpo_client.results import ApiKey

Days = Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=36500))]
Scopes = Annotated[
    list[str] | None,
    Parameter(
        name="--scope",
        negative="",
        help="jobs:read, jobs:write, datasets:write, metrics:read, keys:write or operator; repeatable. The first three "
        "by default.",
    ),
]


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
        Whose jobs the key sees; yours by default. Others need an operator's key.
    name
        A label.
    expires_in_days
        When the key expires; never by default.
    """
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    with connected() as client:
        made = client.create_key(owner=owner, scopes=scope, name=name, expires_at=expires_at)
    if json:
        print_json(made)
        return
    say(str(made.key))
    say(f"{made.id} of {made.owner}, with {', '.join(made.scopes)}. Keep the key: only its hash is stored.")


def list_keys(*, owner: str | None = None, limit: int = 50, cursor: str | None = None, json: AsJson = False) -> None:
    """List keys, newest first, without their secrets, which are not stored.

    Parameters
    ----------
    owner
        For operators: only this owner's keys; '*': those of all owners.
    limit
        Keys per page, at most 100.
    cursor
        Where the next page starts, as printed by the previous one.
    """
    with connected() as client:
        page = client.keys(owner=owner, limit=limit, cursor=cursor)
    if json:
        print_json(page)
        return
    if not page.data:
        note("There are no such keys.")
    for key in page.data:
        say(_line(key))
    if page.next_cursor:
        say(f"More: grpo keys list --cursor {page.next_cursor}" + (f" --owner '{owner}'" if owner else ""))


def revoke(key_id: str, /, *, json: AsJson = False) -> None:
    """Revoke a key permanently, effective with the next request."""
    with connected() as client:
        gone = client.revoke_key(key_id)
    if json:
        print_json(gone)
        return
    say(f"{gone.id}: revoked")


def _line(key: ApiKey) -> str:
    used = f"used {key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "no use known"
    until = f"until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else ""
    words = [key.id, f"{key.hint or '-':<10}", f"{key.owner:<16}", f"{key.status:<8}", ",".join(key.scopes)]
    return "  ".join([*words, *filter(None, (key.name, used, until))])
