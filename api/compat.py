"""Private uses of Litestar and uvicorn: the router, the protocol of a connection, and the server's connections.

Owns these uses and the check that the installed versions still support them; `grpo_core.compat` does the same for the
training libraries. Decides nothing: limits are in `connections`, problem documents in `problems`. Invariant: no other
module of the API uses an internal part of either library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from litestar.exceptions import MethodNotAllowedException
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from grpo_core.compat import LibraryChanged, Use, require

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.handlers import BaseRouteHandler
    from litestar.types import ASGIApp, Method
    from litestar.typing import FieldDefinition

LITESTAR_READ_IN: Final = "2.25.0"
UVICORN_READ_IN: Final = "0.54.0"
_HANDLER: Final = "litestar.handlers:BaseRouteHandler"
_PROTOCOL: Final = "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol"
_CYCLE: Final = "uvicorn.protocols.http.httptools_impl:RequestResponseCycle"

LITESTAR_USES: Final = (
    Use(name=f"{_HANDLER}.parsed_fn_signature"),
    Use(name="litestar.handlers:HTTPRouteHandler.resolve_request_max_body_size", positional=1),
    Use(name="litestar._asgi.asgi_router:ASGIRouter.handle_routing"),
)
UVICORN_USES: Final = (
    *(Use(name=f"{_PROTOCOL}.{name}", positional=1) for name in ("on_message_begin", "on_headers_complete")),
    *(Use(name=f"{_PROTOCOL}.{name}", positional=1) for name in ("on_message_complete", "on_response_complete")),
    *(Use(name=f"{_PROTOCOL}.{name}", positional=1) for name in ("pause_writing", "resume_writing")),
    *(Use(name=f"{_PROTOCOL}.{name}", positional=2) for name in ("data_received", "on_url", "on_body")),
    Use(name=f"{_PROTOCOL}.send_400_response", positional=2),
    Use(name=f"{_PROTOCOL}.on_header", positional=3),
    Use(name=_PROTOCOL, named=("config", "server_state", "app_state")),
    Use(name="uvicorn:Server.on_tick", positional=2),
    Use(name="uvicorn:Server.startup", named=("sockets",), positional=1),
    Use(name="uvicorn:Server.shutdown", named=("sockets",), positional=1),
)
_METHODS: Final[tuple[Method, ...]] = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
HELD: Final = ("cycle", "pipeline", "flow", "headers", "client", "transport")
"""Attributes of a connection, which its constructor sets."""


def check() -> None:
    """Raise `LibraryChanged` if Litestar or uvicorn differs from what this module relies on."""
    require("litestar", LITESTAR_READ_IN, LITESTAR_USES)
    require("uvicorn", UVICORN_READ_IN, UVICORN_USES)
    for name in HELD:
        if name not in HttpToolsProtocol.__init__.__code__.co_names:
            raise LibraryChanged("uvicorn", UVICORN_READ_IN, f"has no HttpToolsProtocol.{name}")


def parameters_of(handler: BaseRouteHandler) -> Mapping[str, FieldDefinition]:
    """A handler's parameters by name."""
    return handler.parsed_fn_signature.parameters


def body_limit(handler: Any) -> int | None:
    """The largest request body in bytes that a handler accepts."""
    return handler.resolve_request_max_body_size()


def methods_at(app: Litestar, path: str) -> list[str]:
    """The methods that the router accepts at a path. Its own list of them can be incomplete."""
    found: list[str] = []
    for method in _METHODS:
        try:
            app.asgi_router.handle_routing(path=path, method=method)
        except MethodNotAllowedException:
            continue
        found.append(method)
    return found


def wrap(app: Litestar, wrapper: Callable[[ASGIApp], ASGIApp]) -> None:
    """Wrap the whole application. Its middleware does not run for a path without a route."""
    app.asgi_handler = wrapper(app.asgi_handler)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol of one connection, with public names for its state."""

    @property
    def peer(self) -> str:
        """The client's address, or an empty string if it has none."""
        return self.client[0] if self.client else ""

    @property
    def user(self) -> Any:
        """The user that the middleware found for the newest request."""
        return self.cycle.scope.get("user") if self.cycle else None

    @property
    def path(self) -> str:
        """Path of the newest request."""
        return self.scope["path"]

    @property
    def is_answering(self) -> bool:
        """Whether a request is waiting for its response or for the rest of it."""
        return bool(self.cycle) and not self.cycle.response_complete

    @property
    def has_begun_answer(self) -> bool:
        """Whether part of the newest request's response has been sent."""
        return self.cycle.response_started

    @property
    def is_body_held_up(self) -> bool:
        """Whether the client must wait for this server before it can send more of a body."""
        return self.flow.read_paused or self.cycle.waiting_for_100_continue

    @property
    def requests_ahead(self) -> int:
        """How many pipelined requests wait for the response to an earlier one."""
        return len(self.pipeline)

    @property
    def header_count(self) -> int:
        """How many headers of the newest request have arrived."""
        return len(self.headers)

    def write_answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Write a complete response without calling the application, and close the connection."""
        self.transport.write(STATUS_LINE[status] + headers + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server, with an operation on its connections."""

    def cut_connections(self) -> None:
        """Abort every open connection."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
