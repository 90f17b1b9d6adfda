"""`grpo webhooks add`, `list`, `test`, `deliveries` and `remove`: have events of your jobs posted to a URL."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from grpo_client.cli.output import EXIT_FAILED, AsJson, CommandError, Yes, confirm, connected, note, print_json, say

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient
    from grpo_client.results import WebhookDelivery

POLL_SECONDS = 0.3
TEST_SECONDS = 75.0
"""Longer than the longest time that an operator can give one attempt."""

Events = Annotated[
    list[str] | None,
    Parameter(name="--event", negative="", help="An event, such as fine_tuning.job.failed; repeatable. Default: all."),
]


def add(url: str, /, *, event: Events = None, json: AsJson = False) -> None:
    """Register a webhook, and print its secret. It cannot be shown again.

    Parameters
    ----------
    url
        Where events are posted to: https, at a public address, or a host that the operator allows.
    """
    with connected() as client:
        webhook = client.create_webhook(url, event)
    if json:
        print_json(webhook)
        return
    say(webhook.secret or "")
    say(f"{webhook.id} gets {', '.join(webhook.events)}. Keep the secret: it is not shown again.")
    say(f"Try it: grpo webhooks test {webhook.id}")


def list_webhooks(*, json: AsJson = False) -> None:
    """List your webhooks, oldest first."""
    with connected() as client:
        found = client.webhooks()
    if json:
        print_json({"object": "list", "data": found})
        return
    if not found:
        note("No webhooks yet: register one with grpo webhooks add URL.")
    for webhook in found:
        say(f"{webhook.id}  {webhook.status:<8}  {webhook.url}  {','.join(webhook.events)}")
        if webhook.disabled_reason:
            say(f"  {webhook.disabled_reason} Repair it, then: grpo webhooks test {webhook.id}")


def send_test(webhook_id: str, /, *, json: AsJson = False) -> None:
    """Send one test event and show the result. A disabled webhook that accepts it is enabled again."""
    with connected() as client:
        delivery = _ended(client, webhook_id, client.test_webhook(webhook_id))
    if json:
        print_json(delivery)
    else:
        say(f"{webhook_id}: {_result(delivery)}")
    if delivery.state != "delivered":
        raise CommandError("The test event was not accepted.", EXIT_FAILED)


def deliveries(webhook_id: str, /, *, limit: int = 20, json: AsJson = False) -> None:
    """Show a webhook's last deliveries, newest first.

    Parameters
    ----------
    limit
        Deliveries to show, at most 1000.
    """
    with connected() as client:
        found = client.webhook_deliveries(webhook_id, limit=limit)
    if json:
        print_json({"object": "list", "data": found})
        return
    if not found:
        note("Nothing was sent yet: try it with grpo webhooks test.")
    for delivery in found:
        when = f"{delivery.created_at:%Y-%m-%d %H:%M:%S}"
        say("  ".join([when, f"{delivery.type:<26}", delivery.job or "-", _result(delivery)]))


def remove(webhook_id: str, /, *, yes: Yes = False, json: AsJson = False) -> None:
    """Delete a webhook with its deliveries. This cannot be undone."""
    if not yes:
        confirm(f"Delete {webhook_id}?")
    with connected() as client:
        client.delete_webhook(webhook_id)
    if json:
        print_json({"webhook": webhook_id, "deleted": True})
    else:
        say(f"{webhook_id}: deleted")


def _ended(client: GrpoClient, webhook_id: str, delivery: WebhookDelivery) -> WebhookDelivery:
    """Wait for the result of a test."""
    until = time.monotonic() + TEST_SECONDS
    while delivery.state == "pending" and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        found = client.webhook_deliveries(webhook_id, limit=50)
        delivery = next((one for one in found if one.event_id == delivery.event_id), delivery)
    return delivery


def _result(delivery: WebhookDelivery) -> str:
    answer = f"HTTP {delivery.last_status}" if delivery.last_status is not None else ""
    words = [delivery.state, answer, delivery.last_error or ""]
    if delivery.state == "pending" and delivery.attempts and delivery.next_attempt_at:
        words.append(f"attempt {delivery.attempts + 1} at {delivery.next_attempt_at:%H:%M:%S} UTC")
    return ", ".join(word for word in words if word)
