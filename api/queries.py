"""Query parameters beyond single values: the metadata filter, and the refusal of names a route does not have.

Single values and their bounds are declared on the handlers. Invariant: a parameter that would be ignored is refused.
"""

from __future__ import annotations

import re
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler

from api.auth import is_open
from api.parameters import METADATA, declared
from api.problems import ApiError, bad_parameter, unknown_parameter

MAX_FILTERS = 16
MAX_PARAMETERS = 128
METADATA_PARAMETER = re.compile(r"metadata\[([^\x00-\x1f\x7f]{1,64})\]")

Metadata = NamedDependency[dict[str, str]]


async def check_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard of the whole application: no parameter that the route does not have, and none twice."""
    query = connection.query_params
    # Machines that send probes may add their own parameters.
    if not query or is_open(connection, handler):
        return
    if len(query) > MAX_PARAMETERS:
        # Before any of them is looked at: to say of thousands what each was meant to be takes long.
        raise ApiError("bad_query", f"The query has {len(query)} parameters, of at most {MAX_PARAMETERS}. Send fewer.")
    known = declared(handler)
    errors = [
        unknown_parameter(name[:80], known)
        for name in query
        if name not in known and not (METADATA in known and METADATA_PARAMETER.fullmatch(name))
    ]
    errors += [
        bad_parameter(name[:80], "is given more than once", "Give it once.")
        for name in query
        if len(query.getall(name)) > 1 and not (name in known and known[name].repeats)
    ]
    errors += [
        # Litestar reads this word as None, which would be no filter at all.
        bad_parameter(name, "Invalid value 'null'", f"Give {known[name].expected}.")
        for name, value in query.items()
        if name in known and known[name].is_choice and value.lower() == "null"
    ]
    if errors:
        raise bad_query(*errors)


def metadata_filter(request: Request[Any, Any, Any]) -> dict[str, str]:
    """Dependency: the pairs that a listed job must have."""
    pairs = {
        match[1]: value for name, value in request.query_params.items() if (match := METADATA_PARAMETER.fullmatch(name))
    }
    if len(pairs) > MAX_FILTERS:
        detail = f"{len(pairs)} pairs are given; a job has at most {MAX_FILTERS}"
        raise bad_query(bad_parameter("metadata", detail, "Filter by fewer."))
    return pairs


def bad_query(*errors: Any) -> ApiError:
    """The problem of one or more wrong query parameters."""
    names = ", ".join(error.parameter for error in errors)
    return ApiError("bad_query", f"Wrong in the query: {names}; `errors` names each with its remedy.", errors=errors)
