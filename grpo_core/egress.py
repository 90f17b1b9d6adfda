"""Which hosts a training process may connect to.

Owns the list (the hub, hosts that the operator allows, the job's trackers, proxies) and the two places that enforce it:
every request of the hub's library, redirects included, and every socket that Python code connects. This is defence in
depth, not confinement: it does not see connections of libraries in C, Go or Rust, nor of a new process that Python
starts. Invariant: a refusal comes before any name is looked up or packet sent, so it is the same for an open port, a
closed one and a host that does not exist.
"""

from __future__ import annotations

import errno
import fnmatch
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

from grpo_core.errors import GrpoError

HOSTS_VARIABLE: Final = "GRPO_EGRESS_HOSTS"
CLOSED_VARIABLE: Final = "GRPO_EGRESS_CLOSED"
"""Comma-separated loopback ports that stay closed: the worker lists the ports of its servers."""
DEFAULT_HOSTS: Final = ("huggingface.co", "*.huggingface.co", "*.hf.co")
"""The hub and the hosts that it sends downloads to."""

_ENTRY = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9*?._-]+|[0-9.]+/\d{1,2})(?::(?P<port>\d{1,5}))?")
_MOST_TOLD = 100
_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379}
_OTHER_FAMILIES = (socket.AF_UNIX, getattr(socket, "AF_NETLINK", None), getattr(socket, "AF_ALG", None))
"""They lead to no other machine."""


class EgressRefused(GrpoError, PermissionError):
    """A connection to a host that is not allowed; nothing was sent. For libraries it is an `OSError` as any other."""

    def __init__(self, host: str) -> None:
        self.host = host[:253]
        super().__init__(errno.EACCES, f"connections to {self.host!r} are not allowed here")


@dataclass(frozen=True, slots=True)
class Host:
    """Hosts that are allowed: a name, a pattern such as `*.hf.co`, an address or a network; and a port, or all."""

    pattern: str
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Host:
        """Raises `ValueError` for what is neither `HOST` nor `HOST:PORT`."""
        match = _ENTRY.fullmatch(entry.strip())
        port = int(match["port"]) if match and match["port"] else None
        if match is None or (port is not None and not 0 < port < 65_536):
            raise ValueError(f"{entry!r} is no host: write NAME, *.NAME or ADDRESS, with :PORT behind it for one port")
        return cls(match["host"].strip("[]").lower(), port)

    @classmethod
    def of_url(cls, url: str) -> Host | None:
        """The host of an address, with its port; None where it names none."""
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError:
            return None
        return cls(parts.hostname, port) if parts.hostname and port else None

    def has(self, host: str, port: int | None) -> bool:
        """Whether it is one of these; a port of None is any."""
        if self.port is not None and port is not None and port != self.port:
            return False
        address = _address(host)
        if address is None or self.pattern == "*":
            return fnmatch.fnmatchcase(host.lower().rstrip("."), self.pattern)
        try:
            return address in ipaddress.ip_network(self.pattern, strict=False)
        except ValueError:
            return False


def allowed_hosts(environment: Mapping[str, str], urls: Iterable[str] = ()) -> tuple[Host, ...]:
    """Those that the environment allows, the hub, and the hosts of the addresses that are given."""
    listed = environment.get(HOSTS_VARIABLE, "").split(",")
    entries = [entry for entry in listed if entry.strip()] or DEFAULT_HOSTS
    hub = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    named = (Host.of_url(url) for url in (hub, *urls))
    return (*(Host.parse(entry) for entry in entries), *(host for host in named if host))


def require_allowed(url: str, *, endpoint: str) -> None:
    """Raise `EgressRefused` for the address of a request that the hub's library is about to send."""
    asked = Host.of_url(url)
    hosts = allowed_hosts(os.environ, [endpoint])
    if asked is None or not any(host.has(asked.pattern, asked.port) for host in hosts):
        raise _refused(urlsplit(url).hostname or url)


def refusal(error: BaseException | None) -> EgressRefused | None:
    """The refusal at the root of an error: libraries wrap what they catch."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, EgressRefused):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


_told: set[str] = set()


def _refused(host: str) -> EgressRefused:
    """Told once in the log: libraries keep such errors to themselves."""
    error = EgressRefused(host)
    if error.host not in _told and len(_told) < _MOST_TOLD:
        _told.add(error.host)
        sys.stderr.write(f"{error.strerror}; the operator can list hosts in {HOSTS_VARIABLE}\n")
    return error


def install(trackers: Iterable[Host] = ()) -> None:
    """From now on this process connects only to allowed hosts, to those of its trackers, to proxies and to itself.

    It cannot be taken back: Python keeps an audit hook for as long as the process lives.
    """
    hosts = (*allowed_hosts(os.environ, _proxy_urls()), *trackers)
    if Host("*") in hosts:
        return
    # Its downloads are made in Rust, which is not seen here; without it they go the way of all other requests.
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    guard = _Guard(hosts, closed=frozenset(_ports(os.environ.get(CLOSED_VARIABLE, ""))))
    socket.getaddrinfo = guard.remembering(socket.getaddrinfo)
    sys.addaudithook(guard.judge)


class _Guard:
    def __init__(self, hosts: Sequence[Host], *, closed: frozenset[int]) -> None:
        self._hosts = hosts
        self._closed = closed
        self._own_names = {"", "localhost", socket.gethostname().lower()}
        self._found: dict[str, set[str]] = {}
        """By address, the allowed names that were looked up to it."""

    def remembering(self, look_up: Callable[..., Any]) -> Callable[..., Any]:
        """`getaddrinfo`, whose answers for allowed names are then allowed addresses."""

        def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
            answers = look_up(host, port, *arguments, **options)
            name = _text(host)
            if self._may_look_up(name) and name.lower() not in self._own_names:
                for *_, address in answers:
                    self._found.setdefault(str(address[0]), set()).add(name)
            return answers

        return getaddrinfo

    def judge(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook. It is called for all that Python does, so it must be quick for all but sockets."""
        if not event.startswith("socket."):
            return
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            sock, address = arguments
            if address is not None:
                self._require(sock.family, address)
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = _text(arguments[0])
            if not self._may_look_up(host):
                raise _refused(host)

    def _require(self, family: int, address: Any) -> None:
        if family in _OTHER_FAMILIES:
            return
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise _refused(str(address))
        host, port = _text(address[0]), int(address[1])
        if is_loopback(host) or host.lower() in self._own_names:
            if port in self._closed:
                raise _refused(f"{host}:{port}")
            return
        names = (host, *self._found.get(host, ()))
        if not any(allowed.has(name, port) for allowed in self._hosts for name in names):
            raise _refused(host)

    def _may_look_up(self, host: str) -> bool:
        if host.lower() in self._own_names or _address(host) is not None:
            return True  # connecting to it is another matter
        return any(allowed.has(host, None) for allowed in self._hosts)


def is_loopback(host: str) -> bool:
    """Whether connecting there stays on this machine: "any address" does too."""
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return _short_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def _short_address(host: str) -> ipaddress.IPv4Address | None:
    """Addresses in the forms that C libraries take too: 127.1, 0x7f000001, 2130706433."""
    if not re.fullmatch(r"[0-9a-fA-Fx.]+", host):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def _proxy_urls() -> Iterator[str]:
    for scheme, address in getproxies().items():
        if scheme != "no":
            yield address if "://" in address else f"http://{address}"


def _ports(listed: str) -> Iterable[int]:
    return (int(port) for port in listed.split(",") if port.strip())


def _text(host: Any) -> str:
    if host is None:
        return ""
    return host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host)
