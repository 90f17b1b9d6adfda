"""Access to the Hugging Face hub, which may be unavailable for a while.

Owns which errors mean that, how long a run waits and which warnings it sends, what the worker's token may be used for,
and where the hub's library may send requests. Callers decide what to download. Invariant: a run never waits after an
answer of the hub, including a refusal, or for a hub that the operator has turned off.
"""

from __future__ import annotations

import fnmatch
import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from grpo_core import egress
from grpo_core.compat.huggingface_hub import default_client
from grpo_core.reasons import WarningCode
from grpo_core.retry import retry

if TYPE_CHECKING:
    import httpx

Warn = Callable[[WarningCode, str], None]
"""Called with a code and a message."""

TIMEOUT_SECONDS: Final = 10.0
"""For the hub to accept a connection, and between two parts of an answer. The library's own default is no limit."""
WAIT_SECONDS: Final = (5.0, 15.0, 40.0)
"""Between one try and the next. Where the host's network knows no such name only the first is waited: that once, since
a name server may err too."""
GIVE_UP_SECONDS: Final = 75.0
"""After the first failed try, no further one is waited for. It ends the run, and the worker begins it anew: a job waits
three times this, and three times the tries themselves."""

TOKEN_REPOS_VARIABLE: Final = "GRPO_HF_TOKEN_REPOS"  # noqa: S105 - a variable's name
"""Repositories for which the token may be used, as comma-separated patterns. A worker always sets it. If you run
`python -m grpo_core` by hand without it, your token is used for everything."""
ASK_FOR_TOKEN: Final = (
    f"If the repository is private or gated, the operator can list it in {TOKEN_REPOS_VARIABLE}, "
    "so that the worker's HF_TOKEN is used for it."
)

T = TypeVar("T")


def token_for(repository: str) -> str | Literal[False]:
    """The token to fetch a repository with; False, which means none at all, unless the operator allowed it."""
    from huggingface_hub import get_token

    return (get_token() or False) if may_use_token(repository, os.environ) else False


def may_use_token(repository: str, environment: Mapping[str, str]) -> bool:
    """Whether the environment lets the token be used for a repository."""
    listed = environment.get(TOKEN_REPOS_VARIABLE)
    if listed is None:
        return True
    patterns = (pattern.strip().lower() for pattern in listed.split(","))
    return any(fnmatch.fnmatchcase(repository.lower(), pattern) for pattern in patterns if pattern)


@cache
def watch_requests() -> None:
    """Let the hub's library send requests, and follow redirects, only to hosts that are allowed; none without limit."""
    from huggingface_hub import constants, set_client_factory

    def check(request: httpx.Request) -> None:
        egress.require_allowed(str(request.url), endpoint=constants.ENDPOINT)
        # The library asks some questions with no limit, and would wait for a silent hub for ever.
        limits: dict[str, float | None] = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: TIMEOUT_SECONDS if limits.get(name) is None else limits[name]
            for name in ("connect", "read", "write", "pool")
        }

    def client() -> httpx.Client:
        made = default_client()
        hooks: dict[str, list[Callable[..., Any]]] = made.event_hooks
        made.event_hooks = {**hooks, "request": [check, *hooks.get("request", [])]}
        return made

    set_client_factory(client)


def turn_off() -> None:
    """Have the libraries ask the hub nothing more, whatever the files that were fetched from it name."""
    from huggingface_hub import constants

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    constants.HF_HUB_OFFLINE = True


def patiently(fetch: Callable[[], T], warn: Warn, *, what: str, otherwise: str) -> T:
    """The result of `fetch`, which is tried again while the hub is away; raises what the last try raises.

    For the warnings: `what` is fetched, and `otherwise` is what to do on a host that has no internet.
    """
    failed_at: list[float] = []

    def note(error: Exception, seconds: float) -> None:
        now = time.monotonic()
        if not is_away(error) or (failed_at and _is_unknown_here()):
            raise error
        failed_at.append(now)
        if now + seconds - failed_at[0] > GIVE_UP_SECONDS:
            raise error
        warn(
            WarningCode.HUB_AWAY,
            f"The run waits for {what}: the Hugging Face hub did not answer. The next try is in {seconds:.0f} s. "
            f"If this worker has no internet, {otherwise}; with HF_HUB_OFFLINE=1 it does not wait.",
        )

    return retry(fetch, Exception, WAIT_SECONDS, note=note)


def is_away(error: BaseException | None) -> bool:
    """Whether a lost or refused connection, or a server's own fault, is at the root."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or egress.refusal(error):
        return False
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | httpx.TransportError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (408, 429, 500, 502, 503, 504):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_unknown_here() -> bool:
    """Whether the host's name server answers that there is no such host as the hub: its network has no internet.

    Where that is only away for a while, the name server gives no answer. Behind a proxy no name need be known.
    """
    from huggingface_hub import constants

    if getproxies().keys() - {"no"}:  # what goes past the proxy is no proxy
        return False
    try:
        # Asked here, since the libraries' errors do not always tell.
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    return False
