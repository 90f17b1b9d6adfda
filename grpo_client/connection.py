"""The connection to one service: requests, and what each answer means.

Owns the address, the key and the errors of HTTP; knows no route. Invariant: a request is sent once; callers decide what
is safe to send again.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from grpo_client.errors import NotConfiguredError, ProblemError, UnreachableError

NO_CONTENT = 204
NOT_MODIFIED = 304
TOO_MANY = 429
KNOWN = 32
KNOWN_BYTES = 16 * 1024**2
"""How much is kept of what was read, to be asked for only if it changes."""
GATEWAY_ERRORS = frozenset({502, 503, 504})
"""What a proxy answers while the service behind it is away."""

_Answer = TypeVar("_Answer")


class Connection:
    """Sends requests to one service with one key."""

    def __init__(self, url: str | None, key: str | None, timeout: float, transport: httpx.BaseTransport | None) -> None:
        self.url = _address(url or os.environ.get("GRPO_URL", ""))
        headers = {"Authorization": f"Bearer {_checked_key(key or os.environ.get('GRPO_API_KEY', ''))}"}
        self._known: dict[str, tuple[str, bytes]] = {}
        """ETag and body by URL, the one that was read last behind the others."""
        self.http = httpx.Client(
            base_url=self.url,
            headers={**headers, "Accept": "application/json"},
            timeout=timeout,
            transport=transport,
            verify=_certificates(self.url),
        )

    def close(self) -> None:
        """Close the connection."""
        self.http.close()

    def json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON object that a request is answered with."""
        if method == "GET":
            return self._read(path, **request)
        with self.reaching():
            response = self.http.request(method, path, **request)
        return self.answer(response)

    def _read(self, path: str, **request: Any) -> dict[str, Any]:
        """The JSON object at `path`; what has not changed since it was last read is not sent again."""
        asked = self.http.build_request("GET", path, **request)
        known = self._known.pop(str(asked.url), None)
        if known:
            asked.headers["If-None-Match"] = known[0]
        with self.reaching():
            response = self.http.send(asked)
        if response.status_code == NOT_MODIFIED and known:
            self._keep(str(asked.url), *known)
            return json.loads(known[1])
        found = self.answer(response)
        if tag := response.headers.get("etag"):
            self._keep(str(asked.url), tag, response.content)
        return found

    def _keep(self, url: str, tag: str, body: bytes) -> None:
        """Remember what was read last, and forget what was not read for longest."""
        self._known[url] = (tag, body)
        if len(self._known) > KNOWN or sum(len(held) for _, held in self._known.values()) > KNOWN_BYTES:
            del self._known[next(iter(self._known))]

    def delete(self, path: str) -> None:
        """Delete what is at `path`."""
        with self.reaching():
            response = self.http.delete(path)
        if response.status_code != NO_CONTENT:
            self.answer(response)
            raise self.not_this_api(response)

    def text(self, path: str, media_type: str, params: Mapping[str, Any] | None = None) -> str:
        """The text that `path` has in this media type."""
        with self.reaching():
            response = self.http.get(path, params=params, headers={"Accept": media_type})
        if response.is_success and response.headers.get("content-type", "").startswith(media_type):
            return response.text
        self.answer(response)
        raise self.not_this_api(response)

    def chunks(self, path: str, body: Mapping[str, Any], *, timeout: float) -> Iterator[dict[str, Any]]:
        """The chunks that OpenAI's streams consist of."""
        with self.reaching(), self.http.stream("POST", path, json=body, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                self.answer(response)
                raise self.not_this_api(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk: dict[str, Any] = json.loads(data)
                if "error" in chunk:
                    raise ProblemError(response.status_code, _as_problem(chunk))
                yield chunk

    @contextmanager
    def reaching(self) -> Generator[None]:
        """Around a request: a connection that fails becomes `UnreachableError`."""
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as error:
            message = f"The service at {self.url} cannot be reached ({why(error)}). {_what_to_check(error)}"
            raise UnreachableError(message, may_pass=isinstance(error, httpx.TransportError)) from error

    def answer(self, response: httpx.Response) -> dict[str, Any]:
        """The JSON object of an answer; raises `ProblemError` or `UnreachableError` for any other."""
        body = _object_of(response)
        if response.is_success and body is not None:
            return body
        if body is None or not response.is_error:
            raise self.not_this_api(response)
        raise ProblemError(response.status_code, _as_problem(body))

    def not_this_api(self, response: httpx.Response) -> UnreachableError:
        """The error for an answer that no service of this kind gives."""
        message = (
            f"{self.url} answered {response.status_code} with something that is not this API. "
            "GRPO_URL must be the API's address, without a path."
        )
        return UnreachableError(message, may_pass=response.status_code in GATEWAY_ERRORS)


def retry(ask: Callable[[], _Answer], pause: float, patience: float) -> _Answer:
    """Call `ask`, which changes nothing, until it is answered or `patience` seconds are over."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return ask()
        except (UnreachableError, ProblemError) as error:
            if not is_passing(error) or time.monotonic() >= deadline:
                raise
        time.sleep(pause)


def is_passing(error: UnreachableError | ProblemError) -> bool:
    """Whether the same request may succeed later: the service is away or busy, and has not refused."""
    if isinstance(error, UnreachableError):
        return error.may_pass
    return error.status >= 500 or error.status == TOO_MANY


def why(error: Exception) -> str:
    """A transport's error in a few words."""
    return str(error) or type(error).__name__


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        given = f"{url!r} lacks http:// or https://" if url else "GRPO_URL is not set"
        raise NotConfiguredError(
            f"The address of the service is missing: {given}. Set GRPO_URL, for example to http://127.0.0.1:8080."
        )
    return url.rstrip("/")


def _checked_key(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable():
        given = "GRPO_API_KEY holds characters that no key has" if key else "GRPO_API_KEY is not set"
        raise NotConfiguredError(
            f"The API key is missing: {given}. Set it to a key that `grpo keys create` printed; `grpo up` leaves one "
            "in .grpo/env."
        )
    return key


def _certificates(url: str) -> ssl.SSLContext | bool:
    """What the service is checked against. Reading the certificates takes longer than a request to a local service."""
    return url.startswith("https://") or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _object_of(response: httpx.Response) -> dict[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _as_problem(body: dict[str, Any]) -> dict[str, Any]:
    """The same for OpenAI's error object, which the routes of its API answer."""
    error = body.get("error")
    if not isinstance(error, dict):
        return body
    return {"code": error.get("code"), "detail": error.get("message"), "parameter": error.get("param"), **body}


def _what_to_check(error: Exception) -> str:
    if "WRONG_VERSION_NUMBER" in str(error):
        return "It speaks no TLS: set GRPO_URL to http:// instead of https://."
    return "Check that it is running (`grpo up` starts it) and that GRPO_URL is its address."
