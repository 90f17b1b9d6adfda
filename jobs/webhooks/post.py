"""One attempt to deliver: a POST to the address that was checked, and its status.

Owns the connection. Invariants: it connects only to the address that it is given, whatever the host's name resolves to
by now; no redirect is followed, no proxy is used, and the answer's body is not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from grpo_core import __version__

if TYPE_CHECKING:
    import ssl

HEADERS = {"Content-Type": "application/json", "User-Agent": f"grpo-jobs/{__version__} (webhook)"}


class PostFailed(Exception):
    """No status was received. The message is for the owner: it names the kind of failure and nothing of the answer."""


@cache
def _certificates() -> ssl.SSLContext:
    """Made once, because reading all certificates takes 20 ms."""
    return httpx.create_ssl_context()


def post(url: str, address: str, headers: Mapping[str, str], body: bytes, *, seconds: float) -> int:
    """Send a body to `url` at an IP address and return the status. Raises `PostFailed` after at most `seconds`."""
    return asyncio.run(_post(url, address, headers, body, seconds))


async def _post(url: str, address: str, headers: Mapping[str, str], body: bytes, seconds: float) -> int:
    host = urlsplit(url).netloc
    name = urlsplit(url).hostname or ""
    target = httpx.URL(url).copy_with(host=address)
    try:
        # One limit for everything, because a receiver could send its headers a byte at a time.
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(
                timeout=seconds, verify=_certificates(), trust_env=False, follow_redirects=False, http2=False
            ) as client,
            client.stream(
                "POST",
                target,
                content=body,
                headers={**HEADERS, **headers, "Host": host},
                extensions={"sni_hostname": name},
            ) as answer,
        ):
            return answer.status_code
    except TimeoutError:
        raise PostFailed(f"no answer within {seconds:g} seconds") from None
    except httpx.ConnectError as error:
        kind = "its certificate is not valid" if "CERTIFICATE" in str(error) else "no connection"
        raise PostFailed(kind) from None
    except httpx.HTTPError as error:
        raise PostFailed(f"no answer ({type(error).__name__})") from None
