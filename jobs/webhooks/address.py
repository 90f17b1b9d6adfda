"""Which addresses webhooks may be sent to, decided when one is registered and again before every attempt.

An owner chooses the URL, so without these rules the API could be made to send requests to servers beside it. Owns the
rules; `post` connects to exactly the address that was checked here, so a name cannot be looked up to another one in
between. Invariant: hosts that the operator has not listed are called over https and at public addresses only.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from grpo_core.egress import Host
from grpo_core.spec import Problem
from jobs.errors import JobsError, Misconfigured, Rejected
from jobs.webhooks.settings import PUBLIC, WebhookSettings

MAX_URL: Final = 2000
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_SIX_TO_FOUR: Final = ipaddress.ip_network("2002::/16")
_TEREDO: Final = ipaddress.ip_network("2001::/32")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefused(JobsError):
    """A webhook may not be sent there; nothing was sent."""


class Addresses:
    """The rules of this service."""

    def __init__(self, settings: WebhookSettings) -> None:
        """Raises `Misconfigured` for an entry that is no host."""
        try:
            self._listed = [Host.parse(entry) for entry in settings.hosts if entry != PUBLIC]
        except ValueError as error:
            raise Misconfigured("GRPO_WEBHOOK_HOSTS", ",".join(settings.hosts), "names no host", str(error)) from None
        self._public = PUBLIC in settings.hosts

    def check(self, url: str) -> None:
        """Raise `Rejected` for a URL that could never be called. Looks up no name, so it sends nothing."""
        detail, remedy = self._fault(url) or ("", "")
        if detail:
            raise Rejected(Problem(pointer="/url", code="url_refused", detail=detail, remedy=remedy))

    def resolve(self, url: str) -> str:
        """Return the IP address to connect to. Raises `AddressRefused`, and `OSError` for an unknown name."""
        fault = self._fault(url)
        if fault:
            raise AddressRefused(fault[0])
        host, port = _host_and_port(url)
        found = [answer[4][0] for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        allowed = [str(address) for address in found if self._may_connect(host, str(address), port)]
        if not allowed:
            raise AddressRefused("the host has no address that webhooks may be sent to")
        return allowed[0]

    def _fault(self, url: str) -> tuple[str, str] | None:
        """What is wrong with a URL, and the remedy."""
        if len(url) > MAX_URL:
            return f"has more than {MAX_URL} characters", "Use a shorter URL."
        try:
            parts = urlsplit(url)
            host, port = _host_and_port(url)
        except ValueError:
            return "is not a URL", "Send a URL such as https://example.com/hooks."
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or any(c <= " " for c in url):
            return "is not a URL that a webhook can be sent to", "Send a URL such as https://example.com/hooks."
        if "@" in parts.netloc or parts.fragment:
            return "has a user, a password or a fragment", "Remove it; signatures show the receiver who sent a request."
        if self._is_listed(host, port):
            return None
        if not self._public:
            return "has a host that the operator has not allowed", "Ask the operator to list it in GRPO_WEBHOOK_HOSTS."
        if parts.scheme != "https":
            return "is not https", "Use https; or ask the operator to list the host in GRPO_WEBHOOK_HOSTS."
        literal = _literal(host)
        if literal is not None and not is_public(literal):
            return "is not a public address", "Ask the operator to list it in GRPO_WEBHOOK_HOSTS."
        return None

    def _is_listed(self, host: str, port: int) -> bool:
        return _any(self._listed, host, port)

    def _may_connect(self, host: str, address: str, port: int) -> bool:
        if self._is_listed(host, port) or self._is_listed(address, port):
            return True
        return self._public and is_public(ipaddress.ip_address(address.partition("%")[0]))


def is_public(address: IpAddress) -> bool:
    """Whether an address is reached through the internet alone, also where it contains an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address in _SIX_TO_FOUR or address in _TEREDO:
            return False
    return address.is_global and not address.is_multicast


def _any(hosts: Iterable[Host], host: str, port: int) -> bool:
    return any(one.has(host, port) for one in hosts)


def _host_and_port(url: str) -> tuple[str, int]:
    """Raises `ValueError` for a port that is none."""
    parts = urlsplit(url)
    port = parts.port
    return parts.hostname or "", (443 if parts.scheme == "https" else 80) if port is None else port


def _literal(host: str) -> IpAddress | None:
    """The address that a host is, also in the forms that C libraries read: 127.1, 0x7f000001, 2130706433."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
