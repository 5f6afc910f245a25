"""Which addresses a message may go to: pure rules over URLs and IP addresses. It resolves no name and opens nothing.

Alerts leave a network that trusts its own members. An address in the rules, or the answer of somebody's name server,
must not turn them into requests to what stands beside the dispatcher: databases, sidecars, a cloud's metadata service.
Networks are those of IANA's registries of special-purpose addresses (RFC 6890, and what came after it).
"""

from __future__ import annotations

import ipaddress
import re

import httpx
from msgspec import Struct

from monitor.errors import ChannelError

__all__ = ["Target", "parse", "refusal"]

MOST_CHARACTERS = 2048

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(table: str) -> list[tuple[_Network, str]]:
    rows = [line.split(maxsplit=1) for line in table.strip().splitlines()]
    return [(ipaddress.ip_network(network), what) for network, what in rows]


# Nobody has a receiver there, however private the network.
_NEVER = _networks("""
    169.254.0.0/16      link-local, where clouds keep their metadata service
    168.63.129.16/32    a cloud's metadata service
    100.100.100.200/32  a cloud's metadata service
    fd00:ec2::254/128   a cloud's metadata service
    fd20:ce::254/128    a cloud's metadata service
    0.0.0.0/8           unspecified
    192.0.0.0/24        reserved
    192.0.2.0/24        for documentation
    192.88.99.0/24      a 6to4 relay
    198.51.100.0/24     for documentation
    203.0.113.0/24      for documentation
    224.0.0.0/4         multicast
    240.0.0.0/4         reserved
    ::/128              unspecified
    fe80::/10           link-local
    fec0::/10           site-local
    ff00::/8            multicast
    2001::/23           reserved, or a Teredo tunnel
    2001:db8::/32       for documentation
    2002::/16           a 6to4 tunnel
    3fff::/20           for documentation
""")
# What `allow_private` lets through.
_PRIVATE = _networks("""
    127.0.0.0/8         loopback
    10.0.0.0/8          private
    172.16.0.0/12       private
    192.168.0.0/16      private
    100.64.0.0/10       shared by a carrier (CGNAT)
    198.18.0.0/15       for benchmarks
    ::1/128             loopback
    fc00::/7            private
    64:ff9b:1::/48      a NAT64 translator of one network
""")
# IPv4 in disguise: judged by what is inside, and only where private addresses are allowed.
_MAPPED = _networks("""
    ::ffff:0:0/96       IPv4-mapped
    64:ff9b::/96        behind a NAT64 translator
""")
_GLOBAL = ipaddress.ip_network("2000::/3")

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")
_PORT = re.compile(r"^(\[[^\]]*\]|[^:\[\]]*)(:[0-9]{1,5})?$")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?")


class Target(Struct, frozen=True, kw_only=True):
    """An address that has been looked at. `host` is as it is resolved and verified: without brackets, in ASCII.

    `path` is the request's target, with its query. No attribute but `origin` is fit for a log or an error.
    """

    scheme: str
    host: str
    port: int
    path: bytes

    @property
    def authority(self) -> str:
        """What the header `Host` says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Where it goes, without path and query: those may be secrets."""
        return f"{self.scheme}://{self.authority}"

    def __repr__(self) -> str:
        return f"Target({self.origin})"


def parse(url: str, *, allow_private: bool) -> Target:
    """Take a URL apart.

    Raises:
        ChannelError: nothing is ever sent there. The error does not repeat the URL.
    """
    if len(url) > MOST_CHARACTERS:
        raise _bad(f"is longer than {MOST_CHARACTERS} characters")
    if not url.isprintable() or " " in url or "\\" in url:
        raise _bad("has blanks, backslashes or control characters in it")
    authority = re.split("[/?#]", url.partition("//")[2], maxsplit=1)[0]
    try:
        found = httpx.URL(url)
        host, port = found.raw_host.decode("ascii"), found.port
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise _bad("is no URL") from None
    if found.scheme not in ("http", "https"):
        raise _bad("does not begin with https://")
    if found.userinfo or "@" in authority:
        raise ChannelError(
            "the receiver's address has a user or a password in it",
            cure="take it out: webhooks are signed (`secret_files`), Alertmanager has `basic_auth_file`",
        )
    if not _PORT.search(authority) or (port is not None and not 0 < port < 65_536):
        raise _bad("has no port in it as ports are written")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host) or len(host) > 253:
            raise _bad("has no host's name in it") from None
        if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise _bad("has an IP address in it that is not written as four decimal numbers") from None
        if f".{host.rstrip('.')}".endswith(".localhost") and not allow_private:
            raise refused(host, "loopback") from None
    else:
        if getattr(literal, "scope_id", None):
            raise _bad("names a network interface")
        if why := refusal(host, allow_private=allow_private):
            raise refused(host, why)
    if found.scheme == "http" and not allow_private:
        raise ChannelError(
            "the receiver's address begins with http://, so everybody on the way could read and change alerts",
            cure="use https://; in a network of your own set `allow_private: true`",
        )
    return Target(scheme=found.scheme, host=host, port=port or _port(found.scheme), path=found.raw_path)


def refusal(address: str, *, allow_private: bool) -> str | None:
    """Why nothing is sent to that IP address, or None. What is no IP address is refused."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "not an IP address"
    for network, what in _MAPPED:
        if found in network:
            inside = str(ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF))
            return refusal(inside, allow_private=True) if allow_private else what
    for network, what in _NEVER:
        if found in network:
            return what
    for network, what in _PRIVATE:
        if found in network:
            return None if allow_private else what
    return "reserved" if found.version == 6 and found not in _GLOBAL else None


def refused(host: str, why: str) -> ChannelError:
    """The error that says so."""
    return ChannelError(
        f"{host} is no place that alerts are sent to: {why}",
        cure="see that the name is right; for a receiver in a network of your own set `allow_private: true`",
    )


def _port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _bad(what: str) -> ChannelError:
    return ChannelError(f"the receiver's address {what}", cure="give a URL such as https://alerts.example.org/path")
