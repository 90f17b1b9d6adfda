"""The thread that turns changes of jobs into deliveries, and makes them: in every API process, one acts at a time.

Owns when an event is sent, again and no more. Four parts, each of which can be interrupted and repeated:

- *report*: the job store's scripts record each change in the step that makes it; here it becomes a delivery to every
  webhook that asks for it, and only then is it removed.
- *send*: one attempt of each due delivery; a failed one is repeated after each of `GRPO_WEBHOOK_RETRY_SECONDS`.
- *reconcile*: every end of the last day without a delivery gets one. Valkey's list of ended jobs, which a recovery
  corrects by the bucket, and the marks in the bucket decide, so this needs nothing that was forgotten.
- *tidy*: marks older than three days are deleted, and webhooks sealed that are not, or with an older key.

Invariants: an error in one webhook delays no other for longer than the time of one attempt; deliveries to a webhook
whose secret this process cannot read wait, and another process is given the turn.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import groupby

import structlog

from jobs.errors import Unavailable
from jobs.lifecycle.turns import Turns
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job import TERMINAL, JobRecord
from jobs.store.job_store import JobStore, guarded
from jobs.webhooks import signature
from jobs.webhooks.address import AddressRefused
from jobs.webhooks.deliveries import Deliveries, Delivery, Due
from jobs.webhooks.events import TEST, Change, body_of, data_of, ended_id, type_of_end
from jobs.webhooks.post import PostFailed, post
from jobs.webhooks.registry import Webhook, Webhooks
from jobs.webhooks.settings import WebhookSettings

log = structlog.get_logger()

INTERVAL_SECONDS = 0.5
THREADS = 16
OWNER_THREADS = 4
"""Attempts at once, in all and of one owner; one of each webhook."""
TURN_SECONDS = 5.0
WEBHOOKS_AT_ONCE = 1000
BATCH = 200
MAX_PENDING = 10_000
"""Largest number of deliveries that wait for one webhook; then it is disabled."""
RECONCILE_SECONDS = 60.0
RECONCILED = timedelta(minutes=15)
"""Ends of this age are looked at every minute, and every hour those of `RECOVERED`."""
RECOVERED = timedelta(hours=25)
HOUR_SECONDS = 3600.0
KEEP_MARKS = timedelta(days=3)
GONE = 410
UNREADABLE_SECONDS = 10.0
"""How long nothing is sent to a webhook whose secret cannot be read."""
UNREADABLE = "the service cannot read this webhook's secret: its operator has to set GRPO_SEALING_KEYS"


class Courier:
    """The thread."""

    def __init__(
        self,
        store: ObjectStore,
        job_store: JobStore,
        webhooks: Webhooks,
        deliveries: Deliveries,
        settings: WebhookSettings,
    ) -> None:
        self._store = store
        self._job_store = job_store
        self._webhooks = webhooks
        self._deliveries = deliveries
        self._settings = settings
        self._turns = Turns(job_store, "courier", max(1.0, INTERVAL_SECONDS))
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")
        self._busy: dict[str, str] = {}
        """By webhook, the owner: attempts under way."""
        self._unreadable: dict[str, float] = {}
        """By webhook whose secret could not be read, when to try again, by the monotonic clock."""
        self._lacks_key = threading.Event()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._next_reconcile = self._next_full = 0.0
        self._compared: str | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current attempts, or abandon them: they are repeated by another process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._turns.release()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                if self._turns.mine():
                    self._webhooks.refresh()
                    self.report()
                    self.send()
                    self._reconcile_if_due()
                    if self._lacks_key.is_set():
                        self._lacks_key.clear()
                        self._turns.pass_on()
            except Unavailable as error:
                self._turns.pass_on()
                log.warning("webhooks_failed", reason=str(error))
            except Exception:  # the thread's outermost loop: no error may end it
                log.exception("webhooks_broken")

    # --- Report ---

    def report(self) -> None:
        """Make deliveries of the recorded changes, oldest first."""
        found: list[tuple[str, float]] = guarded(
            lambda: self._job_store.client.zrange(self._changes, 0, BATCH - 1, withscores=True)
        )
        changes = [Change.read(member, at_ms) for member, at_ms in found]
        wanted = [change for change in changes if self._webhooks.cached(change.owner)]
        records = {record.id: record for record in self._job_store.get_many(sorted({c.job for c in wanted}))}
        for change in wanted:
            self._report(change, records.get(change.job))
        if changes:
            guarded(lambda: self._job_store.client.zrem(self._changes, *(change.member for change in changes)))

    def _report(self, change: Change, record: JobRecord | None) -> None:
        event = change.type(record)
        data = data_of(change.job, change.status, record)
        if change.evaluation is not None:
            found = self._job_store.events(change.job, after=change.evaluation - 1, limit=1)
            data["evaluation"] = found[0]["data"] if found else None
        for webhook in self._webhooks.cached(change.owner):
            is_sent = change.ends and self._is_sent(webhook, change.event_id)
            if webhook.wants(event) and not is_sent:
                self._add(webhook, body_of(change.event_id, event, change.at_ms, data))

    def _add(self, webhook: Webhook, body: dict[str, object]) -> None:
        if self._deliveries.add(webhook.id, webhook.owner, body):
            log.info("webhook_queued", webhook=webhook.id, event_id=body["id"], type=body["type"])
            if self._deliveries.pending(webhook.id) > MAX_PENDING:
                self._disable(webhook, f"More than {MAX_PENDING} events waited for it.")

    def _is_sent(self, webhook: Webhook, event_id: str) -> bool:
        return self._store.head(object_keys.sent(webhook.owner, webhook.id, event_id)) is not None

    @property
    def _changes(self) -> str:
        return f"{self._job_store.prefix}:changes"

    # --- Send ---

    def send(self) -> None:
        """Begin to send what is due, as far as there is room."""
        for owner, webhook_id in self._deliveries.due(WEBHOOKS_AT_ONCE):
            if self._take(owner, webhook_id):
                self._pool.submit(self._send, owner, webhook_id)

    def _take(self, owner: str, webhook_id: str) -> bool:
        with self._lock:
            owners = Counter(self._busy.values())
            if (
                self._is_unreadable(webhook_id)
                or webhook_id in self._busy
                or owners[owner] >= OWNER_THREADS
                or len(self._busy) >= THREADS
            ):
                return False
            self._busy[webhook_id] = owner
            return True

    def _send(self, owner: str, webhook_id: str) -> None:
        """Send what is due to one webhook, for some seconds: then others may be waiting for the thread."""
        until = time.monotonic() + TURN_SECONDS
        try:
            while not self._stop.is_set() and (due := self._deliveries.begin(owner, webhook_id)) is not None:
                self.deliver(due)
                if time.monotonic() > until or self._is_unreadable(webhook_id):
                    break
        except Unavailable as error:
            log.warning("webhook_unrecorded", webhook=webhook_id, reason=str(error))
        except Exception:  # the attempt is repeated once its lease has expired
            log.exception("webhook_broken", webhook=webhook_id)
        finally:
            with self._lock:
                self._busy.pop(webhook_id, None)

    def deliver(self, due: Due) -> None:
        """Make one attempt and record its result."""
        webhook = self._webhooks.find(due.owner, due.webhook)
        delivery = self._deliveries.get(due.webhook, due.event)
        if webhook is None or delivery is None or not delivery.body:
            self._deliveries.forget(due)
            return
        if webhook.disabled_at is not None and delivery.type != TEST:
            self._deliveries.forget(due)  # once it is enabled, `reconcile` finds the ends of jobs again
            return
        if webhook.fault is not None:
            self._wait_for_key(webhook, due, delivery)
            return
        status, error = self._post(webhook, due.event, delivery.body.encode())
        attempts = delivery.attempts + 1
        if status is not None and 200 <= status < 300:
            self._accepted(webhook, due, delivery, attempts, status)
            return
        log.info("webhook_refused", webhook=due.webhook, event_id=due.event, attempt=attempts, status=status, why=error)
        if delivery.type != TEST and status != GONE and attempts <= len(self._settings.waits):
            wait = self._settings.waits[attempts - 1] * random.uniform(0.9, 1.1)  # noqa: S311 - spreads attempts
            self._deliveries.retry(due, seconds=wait, attempts=attempts, status=status, error=error)
            return
        self._give_up(webhook, due, delivery, attempts, status, error)

    def _is_unreadable(self, webhook_id: str) -> bool:
        return self._unreadable.get(webhook_id, 0.0) > time.monotonic()

    def _wait_for_key(self, webhook: Webhook, due: Due, delivery: Delivery) -> None:
        """Keep a delivery, and count no attempt: another process has the key, or this one at its next start."""
        self._unreadable[webhook.id] = time.monotonic() + UNREADABLE_SECONDS
        self._lacks_key.set()
        self._deliveries.retry(
            due, seconds=UNREADABLE_SECONDS, attempts=delivery.attempts, status=None, error=UNREADABLE
        )
        log.error("webhook_unreadable", webhook=webhook.id, event_id=due.event, reason=webhook.fault)

    def _post(self, webhook: Webhook, event_id: str, body: bytes) -> tuple[int | None, str | None]:
        """Return the status, or None and what went wrong."""
        try:
            address = self._webhooks.addresses.resolve(webhook.url)
            headers = signature.headers(webhook.secret, event_id, int(time.time()), body)
            status = post(webhook.url, address, headers, body, seconds=self._settings.timeout_seconds)
        except AddressRefused as error:
            return None, str(error)
        except OSError:
            return None, "the host's name is unknown"
        except PostFailed as error:
            return None, str(error)
        return status, "redirects are not followed" if 300 <= status < 400 else None

    def _accepted(self, webhook: Webhook, due: Due, delivery: Delivery, attempts: int, status: int) -> None:
        self._mark(webhook, due, delivery)
        self._deliveries.end(due, "delivered", attempts=attempts, status=status, error=None)
        self._deliveries.note_accepted(webhook.id)
        log.info("webhook_delivered", webhook=due.webhook, event_id=due.event, attempts=attempts)
        if webhook.disabled_at is not None:
            self._webhooks.enable(webhook)
            self._next_reconcile = self._next_full = 0.0
            log.info("webhook_enabled", webhook=webhook.id)

    def _give_up(
        self, webhook: Webhook, due: Due, delivery: Delivery, attempts: int, status: int | None, error: str | None
    ) -> None:
        if delivery.type == TEST:
            self._deliveries.end(due, "failed", attempts=attempts, status=status, error=error)
            return
        if status == GONE:
            self._disable(webhook, "It answered 410 Gone.")
        elif self._deliveries.accepted_ms(webhook.id) < delivery.created_at.timestamp() * 1000:
            since = delivery.created_at.strftime("%Y-%m-%d %H:%M UTC")
            answer = error or f"it answered {status}"
            self._disable(webhook, f"No event was accepted since {since}; at the last attempt: {answer}.")
        self._mark(webhook, due, delivery)
        self._deliveries.end(due, "failed", attempts=attempts, status=status, error=error)

    def _mark(self, webhook: Webhook, due: Due, delivery: Delivery) -> None:
        if delivery.job is not None and due.event == ended_id(delivery.job):
            self._store.put(object_keys.sent(webhook.owner, webhook.id, due.event), b"", content_type="text/plain")

    def _disable(self, webhook: Webhook, reason: str) -> None:
        self._webhooks.disable(webhook, reason)
        log.warning("webhook_disabled", webhook=webhook.id, owner=webhook.owner, reason=reason)

    # --- Reconcile ---

    def _reconcile_if_due(self) -> None:
        now = time.monotonic()
        compared: str | None = guarded(
            lambda: self._job_store.client.hget(f"{self._job_store.prefix}:server", "compared")
        )
        is_full = now >= self._next_full or compared != self._compared
        if not is_full and now < self._next_reconcile:
            return
        self.reconcile(RECOVERED if is_full else RECONCILED)
        self._compared, self._next_reconcile = compared, now + RECONCILE_SECONDS
        if is_full:
            self._next_full = now + HOUR_SECONDS
            self.tidy()
            self._seal()

    def reconcile(self, window: timedelta) -> None:
        """Queue the ends of jobs of that age that no delivery was made for."""
        for owner in self._webhooks.owners():
            for webhook in self._webhooks.cached(owner):
                if webhook.disabled_at is None:
                    self._reconcile(webhook, window)

    def _reconcile(self, webhook: Webhook, window: timedelta) -> None:
        now_ms = self._job_store.now_ms()
        oldest = max(now_ms - int(window.total_seconds() * 1000), int(webhook.created_at.timestamp() * 1000))
        # Without an upper bound, because retention postpones jobs by a later time.
        ended: list[str] = guarded(
            lambda: self._job_store.client.zrangebyscore(
                f"{self._job_store.prefix}:ended:{webhook.owner}", oldest, "+inf"
            )
        )
        known = self._deliveries.known(webhook.id, [ended_id(job_id) for job_id in ended])
        missing = [job_id for job_id, is_known in zip(ended, known, strict=True) if not is_known]
        if not missing:
            return
        prefix = object_keys.sent_of(webhook.owner, webhook.id)
        sent = {item.key.removeprefix(prefix) for item in self._store.list(prefix)}
        unsent = [job_id for job_id in missing if ended_id(job_id) not in sent]
        for record in self._records(unsent):
            event = type_of_end(record.status, record) if record.status in TERMINAL else ""
            at_ms = round((record.finished_at or record.updated_at).timestamp() * 1000)
            if webhook.wants(event) and at_ms >= oldest:
                self._add(webhook, body_of(ended_id(record.id), event, at_ms, data_of(record.id, None, record)))

    def _records(self, job_ids: Sequence[str]) -> Iterator[JobRecord]:
        for _, batch in groupby(enumerate(job_ids), lambda pair: pair[0] // BATCH):
            yield from self._job_store.get_many([job_id for _, job_id in batch])

    def tidy(self) -> None:
        """Delete marks that no reconciliation reads."""
        oldest = datetime.now(UTC) - KEEP_MARKS
        for owner in self._webhooks.owners():
            for webhook in self._webhooks.cached(owner):
                for item in list(self._store.list(object_keys.sent_of(owner, webhook.id))):
                    if item.modified is not None and item.modified < oldest:
                        self._store.delete(item.key)

    def _seal(self) -> None:
        report = self._webhooks.seal()
        if report.sealed:
            log.info("webhooks_sealed", count=report.sealed, key=report.keys[0])
        if report.unreadable:
            (example, reason) = next(iter(report.unreadable.items()))
            log.error("webhooks_unreadable", count=len(report.unreadable), example=example, reason=reason)
