"""The Hugging Face hub as something that may be away for a while.

Owns which errors mean that, how long a run waits before it gives up, and what its owner is told meanwhile; what is
fetched is the callers' business. Invariant: an answer of the hub, also one that says no, and a hub that the operator
has turned off are never waited on.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

Warn = Callable[[str, str], None]
"""Takes a code and a message."""

WAIT_SECONDS: Final = (5.0, 15.0, 40.0, 120.0)
"""Between one try and the next. A hub that stays away ends the run, and the worker begins it anew: three times this.
Where the host's network knows no such name only the first is waited: that once, since a name server may err too."""

T = TypeVar("T")


def patiently(fetch: Callable[[], T], warn: Warn, *, what: str, otherwise: str) -> T:
    """The result of `fetch`, which is tried again while the hub is away; raises what the last try raises.

    For the warnings: `what` is fetched, and `otherwise` is what to do on a host that has no internet.
    """
    for tries, seconds in enumerate(WAIT_SECONDS):
        try:
            return fetch()
        except Exception as error:
            if not is_away(error) or (tries and _is_unknown_here()):
                raise
            warn(
                "hub_away",
                f"The Hugging Face hub does not answer for {what}; the next try is in {seconds:.0f} s. "
                f"If this worker has no internet, {otherwise}; with HF_HUB_OFFLINE=1 it does not wait.",
            )
        time.sleep(seconds)
    return fetch()


def is_away(error: BaseException | None) -> bool:
    """Whether a lost or refused connection, or a server's own fault, is at the root."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
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
