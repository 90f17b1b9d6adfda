"""HTTP requests of graders: concurrent, retried, within a deadline, and logged.

Owns how a request is sent and when it is retried: after 408, 409, 429, 5xx and lost connections, not before
`Retry-After`. No redirect is followed and no proxy of the environment is used. Invariant: `Caller.all` returns one
outcome for each request, in order, and exceeds its deadline by at most one connection timeout.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import httpx

from grpo_core.rewards.graders.protocol import ErrorKind

MAX_ANSWER_BYTES: Final = 1024**2
MAX_WAIT: Final = 60.0
_FIRST_WAIT = 0.5
_OK = 200
_SERVER_ERRORS = 500
_AGAIN = frozenset((408, 409, 425, 429))

T = TypeVar("T")


class CallFailed(Exception):
    """A call returned no score."""

    def __init__(self, kind: ErrorKind, message: str, *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.again, self.wait = again, wait


@dataclass(slots=True)
class CallLog:
    """What is recorded of one call: attempts, seconds, tokens, and further values."""

    tries: int = 0
    seconds: float = 0.0
    tokens: int = 0
    more: dict[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Outcome:
    """The value that a call returned, or why it returned none."""

    value: Any
    failure: CallFailed | None
    log: CallLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Limits of the calls of one grader."""

    concurrency: int
    timeout: float
    attempts: int
    deadline: float
    """Seconds for all calls together."""
    rate: float | None = None
    """Largest number of calls per second; None: any."""


class Caller:
    """Sends one grader's requests."""

    def __init__(self, headers: Mapping[str, str], patience: Patience) -> None:
        self._headers, self._patience = dict(headers), patience
        self._next = 0.0

    def all(
        self, bodies: Sequence[T], call: Callable[[httpx.AsyncClient, T, CallLog], Awaitable[Any]]
    ) -> list[Outcome]:
        """Return the outcome for each body. `call` sends one body and raises `CallFailed` if it fails.

        Starts an event loop, so the calling thread must not have one.
        """
        return asyncio.run(self._all(bodies, call))

    async def _all(self, bodies: Sequence[Any], call: Callable[..., Awaitable[Any]]) -> list[Outcome]:
        patience = self._patience
        end = time.monotonic() + patience.deadline
        gate = asyncio.Semaphore(patience.concurrency)
        limits = httpx.Limits(max_connections=patience.concurrency, max_keepalive_connections=patience.concurrency)
        async with httpx.AsyncClient(
            timeout=patience.timeout, limits=limits, headers=self._headers, trust_env=False, follow_redirects=False
        ) as client:

            async def one(body: Any) -> Outcome:
                log = CallLog()
                began = time.monotonic()
                try:
                    async with asyncio.timeout(max(0.0, end - time.monotonic())), gate:
                        began = time.monotonic()
                        value, failure = await self._patiently(client, body, call, log, end)
                except TimeoutError:
                    message = f"the step's calls took more than {patience.deadline:g} s"
                    value, failure = None, CallFailed("unresponsive_reward_error", message)
                log.seconds = round(time.monotonic() - began, 4)
                return Outcome(value, failure, log)

            return list(await asyncio.gather(*map(one, bodies)))

    async def _patiently(
        self, client: httpx.AsyncClient, body: Any, call: Callable[..., Awaitable[Any]], log: CallLog, end: float
    ) -> tuple[Any, CallFailed | None]:
        while True:
            log.tries += 1
            await self._take_turn()
            try:
                return await call(client, body, log), None
            except CallFailed as error:
                failure = error
            except httpx.HTTPError as error:
                failure = CallFailed("model_grader_server_error", f"no answer: {type(error).__name__}", again=True)
            if not failure.again or log.tries >= self._patience.attempts:
                return None, failure
            wait = _FIRST_WAIT * 2 ** (log.tries - 1) * (0.5 + random.random())  # noqa: S311 - spreads tries
            wait = max(min(wait, MAX_WAIT), failure.wait)
            if time.monotonic() + wait > end:
                return None, failure
            await asyncio.sleep(wait)

    async def _take_turn(self) -> None:
        if self._patience.rate is None:
            return
        now = time.monotonic()
        self._next = max(now, self._next) + 1 / self._patience.rate
        await asyncio.sleep(max(0.0, self._next - 1 / self._patience.rate - now))


async def post_json(client: httpx.AsyncClient, url: str, body: object, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object that the server answers with; raises `CallFailed`."""
    sent = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    async with client.stream(
        "POST", url, content=sent, headers={"Content-Type": "application/json", **headers}
    ) as response:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise CallFailed(
                    "model_grader_server_error", f"the answer is longer than {MAX_ANSWER_BYTES} bytes", again=True
                )
    status = response.status_code
    if status in _AGAIN or status >= _SERVER_ERRORS:
        wait = _retry_after(response.headers.get("retry-after"))
        raise CallFailed("model_grader_server_error", f"HTTP {status}", again=True, wait=wait)
    if status != _OK:
        # Such as a wrong key or an unknown model: a retry would fail too.
        raise CallFailed("model_grader_server_error", f"HTTP {status}: {bytes(content[:200]).decode(errors='replace')}")
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise CallFailed("model_grader_server_error", "the answer is not a JSON object", again=True)
    return answer


def _retry_after(value: str | None) -> float:
    """Read `Retry-After` (seconds or a date) as seconds, at most `MAX_WAIT`, because the server is not trusted."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(MAX_WAIT, max(0.0, seconds)) if seconds == seconds else 0.0
