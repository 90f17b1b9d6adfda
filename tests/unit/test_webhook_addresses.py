"""Where webhooks may be sent: a request to the API must not become a request to a server beside it."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from jobs.errors import Misconfigured, Rejected
from jobs.webhooks.address import Addresses, AddressRefused, is_public
from jobs.webhooks.settings import WebhookSettings


def addresses(*hosts: str) -> Addresses:
    return Addresses(WebhookSettings.model_validate({"hosts": list(hosts)}))


PUBLIC = addresses("public")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hooks",
        "https://example.com:8443/hooks?a=b",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]/",
    ],
)
def test_public_https_is_accepted(url: str) -> None:
    PUBLIC.check(url)


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("http://example.com/", "is not https"),
        ("ftp://example.com/", "is not a URL that a webhook can be sent to"),
        ("file:///etc/passwd", "is not a URL that a webhook can be sent to"),
        ("https://", "is not a URL that a webhook can be sent to"),
        ("hooks", "is not a URL that a webhook can be sent to"),
        ("https://example.com:99999/", "is not a URL"),
        ("https://[::1", "is not a URL"),
        ("https://user:word@example.com/", "has a user, a password or a fragment"),
        ("https://example.com/#a", "has a user, a password or a fragment"),
        ("https://example.com/a b", "is not a URL that a webhook can be sent to"),
        ("https://example.com/\r\nHost: a", "is not a URL that a webhook can be sent to"),
        ("https://例子.example/", "is not a URL that a webhook can be sent to"),
        ("https://example.com/" + "a" * 2000, "has more than 2000 characters"),
        *(
            (f"https://{host}/", "is not a public address")
            for host in (
                *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0"),
                *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"),
                *("[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"),
                *("[2002:7f00:1::]", "[2001:0:7f00:1::]", "[ff02::1]"),
            )
        ),
    ],
)
def test_everything_else_is_refused_with_a_remedy(url: str, detail: str) -> None:
    with pytest.raises(Rejected) as refused:
        PUBLIC.check(url)
    (problem,) = refused.value.problems
    assert (problem.pointer, problem.detail) == ("/url", detail)
    assert problem.remedy


def test_what_the_operator_lists_may_be_private_and_plain() -> None:
    listed = addresses("10.1.0.0/16", "hooks.internal:8443")
    listed.check("http://10.1.2.3:9000/")
    listed.check("https://hooks.internal:8443/")
    for url in ("https://hooks.internal/", "https://10.2.0.1/", "https://example.com/"):
        with pytest.raises(Rejected, match="GRPO_WEBHOOK_HOSTS"):
            listed.check(url)


def answers(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    def look_up(host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_public_name_is_called_at_its_public_addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "127.0.0.1", "10.0.0.1", "8.8.8.8")
    assert PUBLIC.resolve("https://example.com/") == "8.8.8.8"
    answers(monkeypatch, "127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "fe80::1%eth0")
    with pytest.raises(AddressRefused):
        PUBLIC.resolve("https://example.com/")


def test_a_network_that_is_listed_is_for_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "10.1.2.3")
    assert addresses("public", "10.1.0.0/16").resolve("https://example.com/") == "10.1.2.3"


def test_a_url_that_is_no_longer_allowed_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(AddressRefused):
        addresses("other.example").resolve("https://example.com/")


def test_a_wrong_entry_stops_the_start() -> None:
    with pytest.raises(Misconfigured, match="GRPO_WEBHOOK_HOSTS"):
        addresses("public", "http://example.com")


@pytest.mark.parametrize("address", ["192.0.2.1", "240.0.0.1", "255.255.255.255", "::", "2001:db8::1"])
def test_reserved_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
