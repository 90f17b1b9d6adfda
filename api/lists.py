"""What every list of the API has in common: pages with an opaque cursor, a `Link` to the next, and chosen fields.

Owns the parameters of lists that come whole by default, their cursors, and the answer; how jobs, data sets and
rollouts are paged is up to `jobs`. Invariant: `next_cursor` in the body and `Link: <...>; rel="next"` say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

from litestar import MediaType, Request, Response
from litestar.params import QueryParameter
from litestar.serialization import encode_json
from msgspec import Struct, structs

from api.fields import narrowed, wanted
from jobs.errors import BadCursor
from jobs.read.cursors import decode, encode

T = TypeVar("T")

Limit = Annotated[int | None, QueryParameter(ge=1, le=1000, description="Entries per page; default: all")]
Cursor = Annotated[
    str | None, QueryParameter(min_length=1, max_length=600, description="`next_cursor` of the previous page")
]


def page_of(
    items: Sequence[T], key: Callable[[T], Any], *, limit: int | None, cursor: str | None, newest_first: bool = False
) -> tuple[list[T], str | None]:
    """A page of a list that is sorted by `key`, and the cursor of the next. Raises `BadCursor`."""
    left = list(items)
    if cursor is not None:
        after = decode(cursor)
        try:
            left = [item for item in left if (key(item) < after if newest_first else key(item) > after)]
        except TypeError:
            raise BadCursor("is the cursor of another list") from None
    if limit is None or len(left) <= limit:
        return left, None
    return left[:limit], encode(key(left[limit - 1]))


def answer(
    request: Request[Any, Any, Any], page: Struct, fields: str | None = None, entry: Any = None
) -> Response[Any]:
    """A page of a list, its entries with the chosen fields; `entry` is their type. Raises `ApiError`."""
    tree = wanted(fields, entry)
    body: Any = page
    if tree is not None:
        values = {field.encode_name: getattr(page, field.name) for field in structs.fields(page)}
        body = {**values, "data": narrowed(values["data"], tree)}
    return Response(body, headers=next_link(request, getattr(page, "next_cursor", None)))


def encoded(found: Response[Any], headers: Mapping[str, str] | None = None) -> Response[Any]:
    """The same, encoded here: a page may have megabytes, and Litestar would do it in the event loop."""
    body: Any = encode_json(found.content)
    return Response(body, media_type=MediaType.JSON, headers={**found.headers, **(headers or {})})


def next_link(request: Request[Any, Any, Any], cursor: str | None) -> Mapping[str, str]:
    """The header that leads to the next page, at the address of this one."""
    if cursor is None:
        return {}
    path = request.scope.get("raw_path") or request.scope["path"].encode()
    given = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    target = f"{quote(path.decode('latin-1'), safe='/%:@~')}?{urlencode([*given, ('cursor', cursor)])}"
    return {"Link": f'<{target}>; rel="next"'}
