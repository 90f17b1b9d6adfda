"""`grpo api` and `grpo worker`: run one process of the service in the foreground."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter, validators

from api.cli.errors import service_errors
from grpo_core.confinement.rights import hide_memory
from grpo_core.signals import end_on_term

Port = Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=65535))]


def api(*, host: str | None = None, port: Port = None) -> None:
    """Run the HTTP service until TERM.

    Parameters
    ----------
    host
        Address to listen on; GRPO_API_HOST, else 127.0.0.1.
    port
        Port to listen on; GRPO_API_PORT, else 8080.
    """
    hide_memory()  # before anything secret is read
    end_on_term()
    with service_errors("api"):
        from api.server import serve

        serve(host, port)


def worker() -> None:
    """Run a worker until TERM. It trains with the packages of the extra cpu or cuda."""
    with service_errors("worker"):
        from jobs.__main__ import main

        main()
