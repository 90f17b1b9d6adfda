"""The routes below /webhooks: register, list, read, test and delete webhooks, and look at their deliveries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from litestar import Request, Response, Router, delete, get, post
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import PathParameter, QueryParameter, SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, read_json
from api.dependencies import Owner, Service
from api.fields import Fields
from api.lists import Cursor, Limit, answer, page_of
from api.problems import responses
from api.schemas import Webhook, WebhookDelivery, WebhookDeliveryList, WebhookList, delivery_of, webhook_of
from grpo_core.spec import Problem
from jobs.errors import NotFound, Rejected
from jobs.webhooks.deliveries import Delivery
from jobs.webhooks.registry import WEBHOOK_ID

MAX_DELIVERIES = 100_000
"""More than are kept."""

WebhookId = Annotated[str, PathParameter(description="One of your webhooks", schema_extra={"pattern": WEBHOOK_ID})]


@dataclass(frozen=True, kw_only=True)
class Registration:
    """The body of a registration."""

    url: str
    events: list[str] | None
    """None: all."""


Asked = NamedDependency[SkipValidation[Registration]]


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: answer 404 for anything that cannot be the id of a webhook."""
    webhook_id = connection.path_params.get("webhook_id")
    if webhook_id is not None and not re.fullmatch(WEBHOOK_ID, webhook_id):
        raise NotFound("webhook", webhook_id[:80])


async def read_registration(request: Request[Any, Any, Any]) -> Registration:
    """Dependency: the body of a registration."""
    return await read_json(request, registration_of, expected='Expected {"url": "https://...", "events": [...]}.')


def registration_of(value: object) -> Registration:
    """Read the body. Raises `Rejected` with every problem."""
    if not isinstance(value, dict):
        raise Rejected(_problem("", "not_an_object", "is not a JSON object", 'Send {"url": "https://..."}.'))
    body = cast("Mapping[str, Any]", value)
    url, events = body.get("url"), body.get("events")
    problems = [
        _problem(f"/{name[:80]}", "unknown_field", "is not a field here", "Remove it; the fields are url and events.")
        for name in body
        if name not in ("url", "events")
    ]
    if not isinstance(url, str):
        problems.append(_problem("/url", "bad_type", "is not a string", "Send the URL that events are posted to."))
    if events is not None and not (
        isinstance(events, list) and all(isinstance(name, str) for name in cast("list[object]", events))
    ):
        problems.append(
            _problem("/events", "bad_type", "is not a list of names", "Omit it for all events, or list some.")
        )
    if problems:
        raise Rejected(*problems)
    return Registration(url=cast("str", url), events=cast("list[str] | None", events))


def _problem(pointer: str, code: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=pointer, code=code, detail=detail, remedy=remedy)


@post(
    "/",
    operation_id="createWebhook",
    summary="Register a webhook",
    opt=scope("jobs:write"),
    dependencies={"asked": Provide(read_registration)},
    response_description="It is registered. `secret` is shown this once",
    responses=responses("bad_query", *JSON_ERRORS, "rejected"),
    sync_to_thread=True,
)
def create_webhook(asked: Asked, owner: Owner, service: Service) -> Response[Webhook]:
    """Post events of your jobs to a URL from now on, signed as Standard Webhooks describes."""
    record = service.webhooks.create(owner, asked.url, asked.events)
    return Response(webhook_of(record, secret=True), status_code=201, headers={"Location": f"/webhooks/{record.id}"})


@get(
    "/",
    operation_id="listWebhooks",
    summary="List your webhooks",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_webhooks(
    request: Request[Any, Any, Any],
    owner: Owner,
    service: Service,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[WebhookList]:
    """The caller's webhooks, without their secrets."""
    every = sorted(service.webhooks.all(owner), key=lambda record: record.id)
    found, following = page_of(every, lambda record: record.id, limit=limit, cursor=cursor)
    page = WebhookList(
        data=[webhook_of(record) for record in found], has_more=following is not None, next_cursor=following
    )
    return answer(request, page, fields, Webhook)


@get(
    "/{webhook_id:str}",
    operation_id="getWebhook",
    summary="Look at a webhook",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_webhook(webhook_id: WebhookId, owner: Owner, service: Service) -> Webhook:
    """URL, events and state of a webhook, without its secret."""
    return webhook_of(service.webhooks.get(owner, webhook_id))


@delete(
    "/{webhook_id:str}",
    operation_id="deleteWebhook",
    summary="Delete a webhook",
    opt=scope("jobs:write"),
    status_code=204,
    response_description="Nothing more is sent to it",
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def delete_webhook(webhook_id: WebhookId, owner: Owner, service: Service) -> None:
    """Delete a webhook with its secret and deliveries, also those that wait for another attempt."""
    service.webhooks.delete(owner, webhook_id)


@post(
    "/{webhook_id:str}/test",
    operation_id="testWebhook",
    summary="Send a test event",
    opt=scope("jobs:write"),
    status_code=202,
    response_description="It is sent within a second; its delivery shows the result",
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def test_webhook(webhook_id: WebhookId, owner: Owner, service: Service) -> WebhookDelivery:
    """Send one `webhook.test` event, once. A disabled webhook that accepts it is enabled again."""
    delivery = service.webhooks.test(owner, webhook_id)
    if delivery is None:
        raise NotFound("webhook", webhook_id)
    return delivery_of(delivery)


@get(
    "/{webhook_id:str}/deliveries",
    operation_id="listWebhookDeliveries",
    summary="List a webhook's deliveries, newest first",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def list_deliveries(
    request: Request[Any, Any, Any],
    webhook_id: WebhookId,
    owner: Owner,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Deliveries per page")] = 20,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[WebhookDeliveryList]:
    """Events of the last 8 days with their attempts and the last status. What a receiver answered is not kept."""
    every = service.webhooks.deliveries(owner, webhook_id, limit + 1 if cursor is None else MAX_DELIVERIES)
    found, following = page_of(every, place_of, limit=limit, cursor=cursor, newest_first=True)
    page = WebhookDeliveryList(
        data=[delivery_of(delivery) for delivery in found], has_more=following is not None, next_cursor=following
    )
    return answer(request, page, fields, WebhookDelivery)


def place_of(delivery: Delivery) -> list[Any]:
    """What deliveries are ordered by."""
    return [delivery.created_at.timestamp(), delivery.event_id]


ROUTER = Router(
    "/webhooks",
    route_handlers=[create_webhook, list_webhooks, get_webhook, delete_webhook, test_webhook, list_deliveries],
    guards=[check_id],
    tags=["webhooks"],
)
