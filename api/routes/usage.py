"""The routes below /usage: what an owner has used, with the limits; and for operators, what everyone has.

Handlers only translate between HTTP and `jobs.service`. Invariant: without the scope `operator`, a key sees nothing of
other owners.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from litestar import Request, Response, Router, get
from litestar.params import QueryParameter
from litestar.response import Stream

from api import usage_table
from api.auth import scope
from api.dependencies import IsOperator, Owner, Service
from api.fields import Fields
from api.lists import answer, encoded
from api.problems import ApiError, bad_parameter, responses
from api.queries import bad_query
from api.schemas import GpuHours, GpuHoursList, OwnerUsageList, UsageReport, gpu_hours_of, usage_of
from jobs.usage.report import MAX_DAYS

USUAL_DAYS = 30
"""Days of a report whose start is not given."""


@get(
    "/",
    operation_id="getUsage",
    summary="What you have used, and your limits",
    opt=scope("jobs:read"),
    responses=responses("bad_query"),
    sync_to_thread=True,
)
def get_usage(owner: Owner, service: Service) -> UsageReport:
    """GPU-hours of the last days, bytes in storage and unfinished jobs, each with its limit and what is left."""
    return usage_of(*service.usage(owner))


@get(
    "/owners",
    operation_id="listOwnersUsage",
    summary="What each owner has used, with the limits",
    opt=scope("operator"),
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_owners_usage(
    request: Request[Any, Any, Any],
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Owners per page")] = 50,
    cursor: Annotated[
        str | None, QueryParameter(max_length=100, description="`next_cursor` of the previous page")
    ] = None,
    fields: Fields = None,
) -> Response[OwnerUsageList]:
    """The same as `GET /usage` of every owner who has used GPUs or storage, by name."""
    found = service.list_usage(limit=limit, cursor=cursor)
    page = OwnerUsageList(
        data=[usage_of(*each) for each in found.items],
        has_more=found.next_cursor is not None,
        next_cursor=found.next_cursor,
    )
    return answer(request, page, fields, UsageReport)


@get(
    "/gpu-hours",
    operation_id="listGpuHours",
    summary="Who used which GPUs for how long",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_gpu_hours(
    request: Request[Any, Any, Any],
    owner: Owner,
    operator: IsOperator,
    service: Service,
    since: Annotated[
        date | None, QueryParameter(description="The first day (UTC); by default 29 days before the last")
    ] = None,
    until: Annotated[date | None, QueryParameter(description="The last day (UTC), included; by default today")] = None,
    by: Annotated[
        Literal["day", "week", "total"], QueryParameter(description="A row for each day, each week, or the whole time")
    ] = "day",
    of: Annotated[
        str | None,
        QueryParameter(
            name="owner", max_length=100, description="For operators: this owner's use; `*`: that of all owners"
        ),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Rows per page; CSV has all rows")] = 100,
    cursor: Annotated[
        str | None, QueryParameter(max_length=400, description="`next_cursor` of the previous page")
    ] = None,
    format: Annotated[  # noqa: A002 - the parameter's name
        Literal["json", "csv"] | None, QueryParameter(description="Takes precedence over the Accept header")
    ] = None,
    fields: Fields = None,
) -> Response[GpuHoursList]:
    """GPU-hours by period, owner and kind of GPU, with the jobs and, where the operator has set prices, the cost.

    GPU-hours are the hours for which workers held jobs, times their GPUs on all hosts: of every run, also of jobs that
    failed, and of current ones up to now. A run that lasts over midnight counts in each day. 400 days are kept.
    """
    if of not in (None, owner) and not operator:
        raise ApiError("forbidden", "Only a key with the scope operator sees the use of others. Leave out `owner`.")
    last = until or datetime.now(UTC).date()
    first = since or max(last, date(1, 2, 1)) - timedelta(days=USUAL_DAYS - 1)
    _check_days(first, last)
    after = None if cursor is None else _place(cursor)
    found = service.usage_rows(None if of == "*" else of or owner, first, last, by)
    rows = [gpu_hours_of(row) for row in found]
    currency = service.prices.currency
    preferred = request.accept.best_match(["application/json", usage_table.MEDIA_TYPE], "application/json")
    vary = {"Vary": "Accept"}
    if format == "csv" or (format is None and preferred == usage_table.MEDIA_TYPE):
        name = f"gpu-hours-{first}-{last}.csv"
        headers = {**vary, "Content-Disposition": f'attachment; filename="{name}"'}
        table: Any = Stream(usage_table.to_csv(rows, currency), media_type=usage_table.MEDIA_TYPE, headers=headers)
        return table
    left = [row for row in rows if after is None or _order(row) > after]
    has_more = len(left) > limit
    page = GpuHoursList(
        since=first,
        until=last,
        by=by,
        currency=currency,
        data=left[:limit],
        has_more=has_more,
        next_cursor="~".join(_order(left[limit - 1])) if has_more else None,
    )
    return encoded(answer(request, page, fields, GpuHours), vary)


def _order(row: GpuHours) -> tuple[str, str, str]:
    return row.start.isoformat(), row.owner, row.gpu or ""


def _place(cursor: str) -> tuple[str, str, str]:
    parts = cursor.split("~", 2)
    if len(parts) != 3:
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Send the next_cursor of the previous page."))
    return parts[0], parts[1], parts[2]


def _check_days(first: date, last: date) -> None:
    if first > last:
        raise bad_query(bad_parameter("since", f"{first} is after {last}", "Give an earlier day, or a later `until`."))
    if (last - first).days >= MAX_DAYS:
        remedy = f"Ask for at most {MAX_DAYS} days at a time."
        raise bad_query(bad_parameter("since", f"{first} to {last} are more than {MAX_DAYS} days", remedy))


ROUTER = Router("/usage", route_handlers=[get_usage, list_owners_usage, list_gpu_hours], tags=["usage"])
