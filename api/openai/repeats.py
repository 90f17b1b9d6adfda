"""Requests that OpenAI's SDK repeats: it sends no Idempotency-Key, but says that a request repeats an earlier one.

Owns how a request gets its key, and the wait for an attempt that is still being served. Invariant: a repetition of an
accepted request, with the same API key and body within ten minutes, creates nothing new.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from litestar import Request

from api.idempotency import read_key
from jobs.lifecycle.admission import InProgress, RequestKey

RETRY_COUNT: Final = "x-stainless-retry-count"
"""The SDK's header: 0 for a new request."""
WAIT_SECONDS: Final = 5.0
"""How long a repetition waits for the request that it repeats."""
_PAUSE_SECONDS: Final = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Repeatable:
    """A request with its key."""

    key: RequestKey
    is_repetition: bool

    def run(self, attempt: Callable[[RequestKey], T]) -> T:
        """Serve the request. A repetition first waits for the attempt before it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return attempt(self.key)
            except InProgress:
                if not self.is_repetition or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)


def request_key(request: Request[Any, Any, Any], service: Any, owner: str, key_id: str, body: str) -> Repeatable:
    """The key of a request, whose content is `body` in a form that does not depend on the attempt."""
    operation = request.url.path
    given = read_key(request)
    if given is not None:
        return Repeatable(RequestKey.of(operation, given, body), is_repetition=False)
    count = request.headers.get(RETRY_COUNT, "0")
    again = count.isdecimal() and len(count) < 10 and int(count) > 0
    return Repeatable(service.repeatable(owner, key_id, operation, body, again=again), is_repetition=again)
