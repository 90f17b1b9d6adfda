"""The webhooks of all owners, in the bucket.

Owns registration, limits and the stored form. A secret must be read to sign with it, so it cannot be a hash: it is
sealed (`jobs.sealing`), and with it the address, whose path is a password at many receivers. Without a sealing key both
are stored as plain text. They are in the bucket alone: never in Valkey or a log, and the secret in no answer after the
first. Invariants: an id of another owner does not exist; a webhook that cannot be opened is kept as it is.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from ulid import ULID

from grpo_core import strict_json
from grpo_core.spec import Problem
from jobs.errors import NotFound, Rejected
from jobs.sealing import KEYS, CannotOpen, SealingKeys
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job_store import JobStore, guarded
from jobs.webhooks.address import Addresses
from jobs.webhooks.events import WebhookEvent
from jobs.webhooks.settings import WebhookSettings
from jobs.webhooks.signature import new_secret

log = structlog.get_logger()

WEBHOOK_ID = r"^webhook-[0-9A-HJKMNP-TV-Z]{26}$"
CACHE_SECONDS = 60.0
"""How long a process uses what it has read, if a change could not be announced."""
SEALED: Final = "sealed"
"""Stands in the place of a sealed secret. It is no base64, so an API process of an earlier release, which does not know
sealed secrets, fails to sign and tries again later; it neither loses an event nor sends one with a wrong signature."""


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """A URL that an owner's events are posted to."""

    id: str
    owner: str
    url: str
    events: list[str]
    created_at: datetime
    secret: str = field(repr=False)
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    """In words, for its owner."""
    sealed: str | None = field(default=None, repr=False)
    """Its secret and address as they are stored; None: as plain text."""
    fault: str | None = None
    """Why they cannot be read, for the operator; then `url` is only the address's origin, and `secret` is none."""

    def wants(self, event: str) -> bool:
        """Whether it asks for an event and is sent any."""
        return self.disabled_at is None and event in self.events


@dataclass
class SealReport:
    """How the stored webhooks are sealed."""

    keys: list[str]
    """Names of this process's keys; the first one seals."""
    current: int = 0
    """Webhooks that the first key had sealed before."""
    sealed: int = 0
    """Webhooks that it has sealed now, or would have."""
    plain: int = 0
    """Webhooks that stay plain text, because there is no key."""
    unreadable: dict[str, str] = field(default_factory=dict[str, str])
    """Why webhooks cannot be read, by their ids."""


class Webhooks:
    """Registers webhooks and finds them. Thread-safe."""

    def __init__(
        self, store: ObjectStore, job_store: JobStore, settings: WebhookSettings, keys: SealingKeys | None = None
    ) -> None:
        self._store = store
        self._keys = keys or SealingKeys()
        self._client = lambda: job_store.client
        self._version_key = f"{job_store.prefix}:webhooks-version"
        self._settings = settings
        self.addresses = Addresses(settings)
        self._lock = threading.Lock()
        self._cached: dict[str, list[Webhook]] = {}
        self._version: str | None = None
        self._read_at = 0.0

    def create(self, owner: str, url: str, events: Iterable[str] | None) -> Webhook:
        """Register a webhook for some events, or all. Raises `Rejected`."""
        self.addresses.check(url)
        if len(self.of(owner)) >= self._settings.most:
            detail = f"you have {self._settings.most} webhooks, which is the limit (GRPO_MAX_OWNER_WEBHOOKS)"
            raise Rejected(
                Problem(pointer="", code="too_many_webhooks", detail=detail, remedy="Delete one that you do not need.")
            )
        webhook = Webhook(
            id=f"webhook-{ULID()}",
            owner=owner,
            url=url,
            events=checked_events(events),
            created_at=datetime.now(UTC),
            secret=new_secret(),
        )
        self._save(webhook)
        return webhook

    def of(self, owner: str) -> list[Webhook]:
        """Return an owner's webhooks from the bucket, oldest first."""
        ids = list(self._store.folders(object_keys.webhooks_of(owner)))
        return [webhook for one in ids if (webhook := self.find(owner, one)) is not None]

    def get(self, owner: str, webhook_id: str) -> Webhook:
        """Return a webhook. Raises `NotFound`."""
        webhook = self.find(owner, webhook_id)
        if webhook is None:
            raise NotFound("webhook", webhook_id)
        return webhook

    def find(self, owner: str, webhook_id: str) -> Webhook | None:
        """Return a webhook; None for an unknown one."""
        body = self._store.get_json(object_keys.webhook(owner, webhook_id))
        return None if body is None else self._opened(_decode(body), object_keys.webhook(owner, webhook_id))

    def delete(self, webhook: Webhook) -> None:
        """Delete a webhook with its secret and marks; the secret first, so that nothing more is sent."""
        self._store.delete(object_keys.webhook(webhook.owner, webhook.id))
        for item in list(self._store.list(object_keys.webhook_folder(webhook.owner, webhook.id))):
            self._store.delete(item.key)
        self._tell()

    def disable(self, webhook: Webhook, reason: str) -> None:
        """Send nothing more to a webhook, until it is enabled again."""
        if self.find(webhook.owner, webhook.id) is not None:
            self._save(replace(webhook, disabled_at=datetime.now(UTC), disabled_reason=reason))

    def enable(self, webhook: Webhook) -> None:
        """Send events to a disabled webhook again."""
        if self.find(webhook.owner, webhook.id) is not None:
            self._save(replace(webhook, disabled_at=None, disabled_reason=None))

    def cached(self, owner: str) -> list[Webhook]:
        """Return an owner's webhooks as last read, which is at most a minute ago."""
        with self._lock:
            if owner not in self._cached:
                self._cached[owner] = self.of(owner)
            return self._cached[owner]

    def refresh(self) -> None:
        """Forget what was read if a process has changed a webhook since. Raises `Unavailable`."""
        version: str | None = guarded(lambda: self._client().get(self._version_key))
        now = time.monotonic()
        with self._lock:
            if version != self._version or now > self._read_at + CACHE_SECONDS:
                self._cached.clear()
                self._version, self._read_at = version, now

    def warn(self) -> None:
        """Warn the operator if secrets are stored as plain text."""
        if not self._keys.names and self._settings.most:
            log.warning(
                "webhook_secrets_plain",
                reason="Addresses and secrets of webhooks are stored as plain text: anyone who can read the bucket can "
                "forge events.",
                remedy=f"Set {KEYS} to a random key, as of `openssl rand -hex 32`, for every API process.",
            )

    def seal(self, *, dry_run: bool = False) -> SealReport:
        """Seal what is plain text or sealed with an older key, as far as there are keys.

        A change of the same webhook in the same moment may be overwritten, as by `disable` and `enable`.
        """
        report = SealReport(keys=self._keys.names)
        for owner in self.owners():
            for webhook in self.of(owner):
                if webhook.fault is not None:
                    report.unreadable[webhook.id] = webhook.fault
                elif webhook.sealed is not None and self._keys.is_newest(webhook.sealed):
                    report.current += 1
                elif not self._keys.names:
                    report.plain += 1
                else:
                    report.sealed += 1
                    if not dry_run:
                        self._save(webhook)
        return report

    def owners(self) -> Iterator[str]:
        """Yield every owner with webhooks."""
        for name in self._store.folders(object_keys.WEBHOOKS):
            yield object_keys.unquoted(name)

    def _save(self, webhook: Webhook) -> None:
        place = object_keys.webhook(webhook.owner, webhook.id)
        self._store.put_json(place, _encode(self._closed(webhook, place)))
        self._tell()

    def _closed(self, webhook: Webhook, place: str) -> Webhook:
        """Return a webhook as it is stored."""
        if webhook.fault is not None or not self._keys.names:
            return webhook
        sealed = self._keys.seal(strict_json.dumps({"url": webhook.url, "secret": webhook.secret}), place)
        parts = urlsplit(webhook.url)
        return replace(webhook, url=f"{parts.scheme}://{parts.netloc}/", secret=SEALED, sealed=sealed)

    def _opened(self, webhook: Webhook, place: str) -> Webhook:
        """Return a stored webhook as it is used."""
        if webhook.sealed is None:
            return webhook
        try:
            opened = strict_json.loads(self._keys.open(webhook.sealed, place))
        except CannotOpen as error:
            return replace(webhook, fault=str(error))
        return replace(webhook, url=opened["url"], secret=opened["secret"])

    def _tell(self) -> None:
        # A random value, because a Valkey that forgets its last writes would repeat a number.
        guarded(lambda: self._client().set(self._version_key, secrets.token_hex(8)))


def checked_events(events: Iterable[str] | None) -> list[str]:
    """Return the names of events in their order here; all for None. Raises `Rejected` for unknown ones."""
    known = [event.value for event in WebhookEvent]
    asked = list(known if events is None else events)
    problems = [
        Problem(
            pointer=f"/events/{place}",
            code="unknown_event",
            detail=f"{name[:80]!r} is not an event",
            remedy=f"Use some of {', '.join(known)}.",
        )
        for place, name in enumerate(asked)
        if name not in known
    ]
    if not asked:
        problems = [
            Problem(pointer="/events", code="no_events", detail="names no event", remedy="Omit it for all events.")
        ]
    if problems:
        raise Rejected(*problems)
    return [name for name in known if name in asked]


def _encode(webhook: Webhook) -> dict[str, Any]:
    body: dict[str, Any] = {"v": 1, **webhook.__dict__}
    for name in ("created_at", "disabled_at"):
        body[name] = body[name].isoformat() if body[name] else None
    del body["fault"]
    return body


def _decode(body: dict[str, Any]) -> Webhook:
    names = Webhook.__dataclass_fields__
    known = {name: value for name, value in body.items() if name in names}  # a later release may add some
    for name in ("created_at", "disabled_at"):
        known[name] = datetime.fromisoformat(known[name]) if known[name] else None
    return Webhook(**known)
