"""Where alerts never go: sixty hostile addresses, and every IP address that the registries keep from the world."""

from __future__ import annotations

import ipaddress
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alerts.guard import parse, refusal
from alerts.http import Client
from monitor.errors import ChannelError

SECRET = "hush-4711"

HOSTILE = r"""
http://alerts.example.org/
http://example.org:443/
ftp://example.org/
file:///etc/passwd
gopher://127.0.0.1:6379/_FLUSHALL
javascript:alert(1)
data:text/plain,hello
//example.org/
example.org/hook
https://
https:///path
https://?q
https://#f
https://:443/
https://.example.org/
https://a..b/
https://-a.example.org/
https://a-.example.org/
https://exa mple.org/
https://example.org/a b
https://example.org\\@127.0.0.1/
https://example.org\\.internal/
https://example.org\t/
https://example.org/\r\nX-Injected: 1
https://example.org/\x00
https://example.org%00.evil.example/
https://127%2e0%2e0%2e1/
https://user:hush-4711@example.org/
https://hush-4711@example.org/
https://@example.org/
https://example.org@127.0.0.1/
https://example.org:0/
https://example.org:65536/
https://example.org:-1/
https://example.org:٤٤٣/
https://example.org:443:443/
https://127.0.0.1/
https://127.0.0.1:9093/api/v2/alerts
https://127.1/
https://127.255.255.254/
https://2130706433/
https://0x7f000001/
https://0x7f.0.0.1/
https://0177.0.0.1/
https://017700000001/
https://127.0.0.1./
https://１２７.0.0.1/
https://①②⑦.0.0.1/
https://127。0。0。1/
https://0/
https://0.0.0.0/
https://10.0.0.1/
https://172.31.255.255/
https://192.168.1.1/
https://100.64.0.1/
https://100.100.100.200/latest/meta-data/
https://169.254.169.254/latest/meta-data/
https://168.63.129.16/
https://198.18.0.1/
https://224.0.0.1/
https://255.255.255.255/
https://240.0.0.1/
https://[::1]/
https://[::]/
https://[0:0:0:0:0:0:0:1]/
https://[::ffff:127.0.0.1]/
https://[::ffff:7f00:1]/
https://[::ffff:8.8.8.8]/
https://[::127.0.0.1]/
https://[::ffff:0:127.0.0.1]/
https://[64:ff9b::127.0.0.1]/
https://[64:ff9b::8.8.8.8]/
https://[64:ff9b:1::1]/
https://[2002:7f00:1::]/
https://[2001:0:7f00:1::]/
https://[fe80::1]/
https://[fe80::1%25eth0]/
https://[2606:4700::1111%25eth0]/
https://[fc00::1]/
https://[fd00:ec2::254]/
https://[ff02::1]/
https://[2001:db8::1]/
https://[100::1]/
https://[::1/
https://[v1.x]/
https://localhost/
https://localhost./
https://deep.localhost/
https://LOCALHOST/
https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/
"""
URLS = [line.encode().decode("unicode_escape").encode("latin-1").decode() for line in HOSTILE.strip().splitlines()]
URLS += [
    "",
    " ",
    "https://" + "a" * 64 + ".example.org/",
    "https://" + "a." * 127 + "org/",
    "https://e.org/" + "a" * 3000,
]

_connected: list[object] | None = None
_others: set[int] = set()


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and _connected is not None and threading.get_ident() not in _others:
        _connected.append(arguments[1])


sys.addaudithook(_watch)


@pytest.fixture
def connected() -> Iterator[list[object]]:
    """Every address that this thread, and those that begin meanwhile, connect to; not those of other tests' clients
    that are still at it."""
    global _connected, _others
    _others = {thread.ident or 0 for thread in threading.enumerate()} - {threading.get_ident()}
    _connected = []
    yield _connected
    _connected = None


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(timeout=10, allow_private=False)


def test_there_are_sixty_of_them() -> None:
    assert len(set(URLS)) == len(URLS) >= 60


@pytest.mark.parametrize("url", URLS)
def test_nothing_is_ever_sent_to_a_hostile_url(client: Client, url: str, connected: list[object]) -> None:
    with pytest.raises(ChannelError) as caught:
        client.post(url, b"alert", {})
    assert not connected
    # No alert's fault: it waits until somebody has corrected the address, and nothing is sent meanwhile.
    assert caught.value.retry and caught.value.cure
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://169.254.169.254/",
        "https://[fd00:ec2::254]/",
        "https://[::ffff:169.254.169.254]/",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://[fe80::1]/",
        "https://[ff02::1]/",
        "file:///etc/passwd",
        "http://user:password@127.0.0.1/",
    ],
)
def test_a_private_network_has_its_limits_too(url: str, connected: list[object]) -> None:
    with pytest.raises(ChannelError):
        Client(timeout=10, allow_private=True).post(url, b"alert", {})
    assert not connected


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://alerts.example.org/a/b?c=d#e", "https://alerts.example.org", b"/a/b?c=d"),
        ("https://ALERTS.example.org.:8443", "https://alerts.example.org.:8443", b"/"),
        ("https://münchen.example/", "https://xn--mnchen-3ya.example", b"/"),
        ("https://8.8.8.8/", "https://8.8.8.8", b"/"),
        ("https://[2606:4700::1111]:444/", "https://[2606:4700::1111]:444", b"/"),
    ],
)
def test_good_addresses_are_taken_apart(url: str, origin: str, path: bytes) -> None:
    target = parse(url, allow_private=False)
    assert (target.origin, target.path) == (origin, path)
    assert "/a/b" not in repr(target)


@given(st.ip_addresses())
def test_what_is_let_through_is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert refusal(str(address), allow_private=False) is not None or (address.is_global and not address.is_multicast)


SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.168.0.0/16
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 ::1/128 ::/128 fc00::/7 fe80::/10 ff00::/8
2001:db8::/32 64:ff9b:1::/48 2002::/16 2001::/32
"""
EDGES = [str(ipaddress.ip_network(network)[edge]) for network in SPECIAL.split() for edge in (0, -1)]


@pytest.mark.parametrize("address", EDGES)
def test_every_special_network_is_refused_to_its_edges(address: str) -> None:
    assert refusal(address, allow_private=False)


@given(st.ip_addresses(v=4), st.booleans())
def test_ipv4_in_disguise_gets_no_further_than_ipv4(address: ipaddress.IPv4Address, allow_private: bool) -> None:
    for disguise in (f"::ffff:{address}", f"64:ff9b::{address}"):
        if refusal(disguise, allow_private=allow_private) is None:
            assert allow_private and refusal(str(address), allow_private=True) is None
    assert refusal(f"::{address}", allow_private=False)
    assert refusal(f"::ffff:0:{address}", allow_private=False)


@given(st.text(max_size=40))
def test_any_text_is_taken_apart_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://example.org/{text}"):
        try:
            target = parse(url, allow_private=False)
        except ChannelError:
            continue
        assert target.scheme == "https" and target.host.isascii() and 0 < target.port < 65_536
        assert b"\r" not in target.path and b"\n" not in target.path and b" " not in target.path
