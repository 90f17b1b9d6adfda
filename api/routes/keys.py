"""The routes below /keys: list, create and revoke API keys.

Handlers only translate between HTTP and `jobs.service`. Invariants: a secret is in the answer that creates its key and
nowhere else; a key grants nothing that it does not have; without the scope `operator` it sees its owner's keys alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, cast

from litestar import Request, Response, Router, delete, get, post
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import PathParameter, QueryParameter, SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, read_fields
from api.dependencies import IsOperator, Owner, Service
from api.fields import Fields
from api.lists import answer
from api.problems import ApiError, bad_parameter, invalid_body, responses
from api.queries import bad_query
from api.schemas import ApiKey, ApiKeyList, key_of
from jobs.auth.api_keys import KEY_ID, OWNER, OWNER_SCOPES, SCOPES, KeyRecord
from jobs.errors import NotFound

KeyName = Annotated[str, PathParameter(description="The id of a key", schema_extra={"pattern": KEY_ID})]
FIELDS = ("owner", "scopes", "name", "expires_at")


@dataclass(frozen=True, kw_only=True)
class AskedKey:
    """The body of a request for a key."""

    owner: str | None
    """None: the caller."""
    scopes: list[str]
    name: str | None
    expires_at: datetime | None


Asked = NamedDependency[SkipValidation[AskedKey]]


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: answer 404 for anything that cannot be the id of a key."""
    key_id = connection.path_params.get("key")
    if key_id is not None and not re.fullmatch(KEY_ID, key_id):
        raise NotFound("key", key_id[:80])


async def read_key(request: Request[Any, Any, Any]) -> AskedKey:
    """Dependency: what key is asked for."""
    body = await read_fields(request, FIELDS, optional=True)
    return AskedKey(owner=_owner(body), scopes=_scopes(body), name=_name(body), expires_at=_expiry(body))


def _owner(body: Mapping[str, Any]) -> str | None:
    owner = body.get("owner")
    if owner is not None and not (isinstance(owner, str) and re.fullmatch(OWNER, owner)):
        raise invalid_body("/owner", "is no name of an owner", "Use at most 100 letters, digits and . _ @ + -.")
    return owner


def _scopes(body: Mapping[str, Any]) -> list[str]:
    given: Any = body.get("scopes", list(OWNER_SCOPES))
    remedy = f"List some of {', '.join(SCOPES)}."
    if not isinstance(given, list) or not given:
        raise invalid_body("/scopes", "is no list of scopes", remedy)
    for place, name in enumerate(cast("list[object]", given)):
        if name not in SCOPES:
            raise invalid_body(f"/scopes/{place}", f"{str(name)[:80]!r} is no scope", remedy)
    return list(dict.fromkeys(cast("list[str]", given)))


def _name(body: Mapping[str, Any]) -> str | None:
    name = body.get("name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[^\x00-\x1f\x7f]{1,100}", name)):
        raise invalid_body("/name", "is no label", "Use 1 to 100 characters in one line, or leave it out.")
    return name


def _expiry(body: Mapping[str, Any]) -> datetime | None:
    given = body.get("expires_at")
    if given is None:
        return None
    remedy = "Give a later time with its zone, such as 2027-01-01T00:00:00Z, or leave it out for a key that stays."
    try:
        moment = datetime.fromisoformat(given) if isinstance(given, str) else None
        moment = moment.astimezone(UTC) if moment is not None and moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        moment = None
    if moment is None:
        raise invalid_body("/expires_at", "is no time with a zone", remedy)
    if moment <= datetime.now(UTC):
        raise invalid_body("/expires_at", "is in the past", remedy)
    return moment


@get(
    "/",
    operation_id="listKeys",
    summary="List your API keys, newest first",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_keys(
    request: Request[KeyRecord, Any, Any],
    owner: Owner,
    operator: IsOperator,
    service: Service,
    of: Annotated[
        str | None,
        QueryParameter(name="owner", max_length=100, description="For operators: this owner's keys; `*`: all"),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Keys per page")] = 50,
    cursor: Annotated[
        str | None, QueryParameter(description="`next_cursor` of the previous page", schema_extra={"pattern": KEY_ID})
    ] = None,
    fields: Fields = None,
) -> Response[ApiKeyList]:
    """Keys with their scopes, first characters and last use, without their secrets; also revoked and expired ones."""
    if of not in (None, owner) and not operator:
        raise ApiError("forbidden", "Only a key with the scope operator lists keys of other owners. Leave out `owner`.")
    if cursor is not None and not re.fullmatch(KEY_ID, cursor):
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Send the next_cursor of the previous page."))
    found = service.list_keys(None if of == "*" else of or owner, limit=limit, cursor=cursor)
    page = ApiKeyList(
        data=[key_of(listed) for listed in found.items],
        has_more=found.next_cursor is not None,
        next_cursor=found.next_cursor,
    )
    return answer(request, page, fields, ApiKey)


@post(
    "/",
    operation_id="createKey",
    summary="Create an API key",
    opt=scope("keys:write"),
    dependencies={"asked": Provide(read_key)},
    response_description="It can be used at once. `key` is shown this once",
    responses=responses("bad_query", *JSON_ERRORS, "invalid_body", "rejected", "conflict"),
    sync_to_thread=True,
)
def create_key(asked: Asked, request: Request[KeyRecord, Any, Any], service: Service) -> Response[ApiKey]:
    """A key of the same owner; an operator's key creates keys of others too.

    It can have only scopes that the creating key has, and expires no later than that one.
    """
    holder = request.user
    secret, listed = service.create_key(
        holder, asked.owner or holder.owner, asked.scopes, name=asked.name, expires_at=asked.expires_at
    )
    headers = {"Location": f"/keys/{listed.record.id}", "Cache-Control": "no-store"}
    return Response(key_of(listed, secret), status_code=201, headers=headers)


@delete(
    "/{key:str}",
    operation_id="revokeKey",
    summary="Revoke an API key",
    opt=scope("keys:write"),
    status_code=200,
    response_description="No request with it is accepted any more",
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def revoke_key(key: KeyName, owner: Owner, operator: IsOperator, service: Service) -> ApiKey:
    """Revoke a key permanently; the key stays in the list. Sessions that were started with it end too."""
    return key_of(service.revoke_key(key, None if operator else owner))


ROUTER = Router("/keys", route_handlers=[list_keys, create_key, revoke_key], guards=[check_id], tags=["keys"])
