"""What owners do with their webhooks; the facade of this package for the API.

Owns who may do what: every method takes the owner and finds nothing of another one. Invariant: no method waits for a
receiver.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from jobs.auth.rate_limit import RateLimiter
from jobs.sealing import SealingKeys, SealingSettings
from jobs.store.bucket import ObjectStore
from jobs.store.job_store import JobStore
from jobs.webhooks.courier import Courier
from jobs.webhooks.deliveries import Deliveries, Delivery
from jobs.webhooks.events import TEST, body_of
from jobs.webhooks.registry import Webhook, Webhooks
from jobs.webhooks.settings import WebhookSettings

TESTS_PER_MINUTE = 20
LEASE_TIMEOUTS = 4
"""How many times longer than an attempt may take, since looking up a name is not part of that, its lease lasts."""


class WebhookService:
    """The webhooks of all owners."""

    def __init__(
        self,
        store: ObjectStore,
        job_store: JobStore,
        settings: WebhookSettings | None = None,
        sealing: SealingSettings | None = None,
    ) -> None:
        """Raises `Misconfigured` for hosts or sealing keys that are none."""
        settings = settings or WebhookSettings()
        self._webhooks = Webhooks(store, job_store, settings, SealingKeys(sealing))
        self._deliveries = Deliveries(job_store, lease_seconds=LEASE_TIMEOUTS * settings.timeout_seconds)
        self.courier = Courier(store, job_store, self._webhooks, self._deliveries, settings)
        self._tests = RateLimiter(
            job_store,
            rate=TESTS_PER_MINUTE / 60,
            burst=TESTS_PER_MINUTE,
            refusal=f"You may test webhooks {TESTS_PER_MINUTE} times per minute, and have done so more often.",
        )

    def start(self) -> None:
        """Start to deliver, and warn the operator if secrets are stored as plain text."""
        self._webhooks.warn()
        self.courier.start()

    def create(self, owner: str, url: str, events: Iterable[str] | None = None) -> Webhook:
        """Register a webhook, for all events by default. Raises `Rejected`."""
        return self._webhooks.create(owner, url, events)

    def all(self, owner: str) -> list[Webhook]:
        """Return an owner's webhooks, oldest first."""
        return self._webhooks.of(owner)

    def get(self, owner: str, webhook_id: str) -> Webhook:
        """Return a webhook. Raises `NotFound`."""
        return self._webhooks.get(owner, webhook_id)

    def delete(self, owner: str, webhook_id: str) -> None:
        """Delete a webhook with everything about it. Raises `NotFound`."""
        webhook = self._webhooks.get(owner, webhook_id)
        self._webhooks.delete(webhook)
        self._deliveries.forget_webhook(owner, webhook_id)

    def test(self, owner: str, webhook_id: str) -> Delivery | None:
        """Queue one attempt to deliver a `webhook.test` event. If it is accepted, a disabled webhook is enabled.

        Returns the delivery; None if the webhook is deleted meanwhile. Raises `NotFound` and `RateLimited`.
        """
        webhook = self._webhooks.get(owner, webhook_id)
        self._tests.take(f"webhook-tests:{owner}")
        body = body_of(f"evt_{secrets.token_hex(16)}", TEST, int(time.time() * 1000), {"id": webhook.id})
        self._deliveries.add(webhook.id, owner, body)
        return self._deliveries.get(webhook.id, body["id"])

    def deliveries(self, owner: str, webhook_id: str, limit: int) -> list[Delivery]:
        """Return a webhook's last deliveries, newest first. Raises `NotFound`."""
        self._webhooks.get(owner, webhook_id)
        return self._deliveries.latest(webhook_id, limit)
