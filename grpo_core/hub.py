"""The Hugging Face hub as something that may be away for a while.

Owns which errors mean that, and how long a run waits before it gives up; what is fetched is the callers' business.
Invariant: an answer of the hub, also one that says no, and a hub that the operator has turned off are never waited on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

Warn = Callable[[str, str], None]
"""Takes a code and a message."""

WAIT_SECONDS: Final = (5.0, 15.0, 40.0, 120.0)
"""Between one try and the next. A hub that stays away ends the run, and the worker begins it anew: three times this."""

T = TypeVar("T")


def patiently(fetch: Callable[[], T], warn: Warn) -> T:
    """The result of `fetch`, which is tried again while the hub is away; raises what the last try raises."""
    for seconds in WAIT_SECONDS:
        try:
            return fetch()
        except Exception as error:
            if not is_away(error):
                raise
            warn("hub_away", f"The hub does not answer; the next try is in {seconds:.0f} s.")
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
