"""Where a Redis or a Kafka is: what a URL says, before anybody connects. No client, so that settings can check it."""

from __future__ import annotations

from typing import Literal, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from monitor.errors import ConfigurationError

__all__ = ["REDIS_SCHEMES", "RedisAddress", "kafka_servers", "redis_address"]

_Kind = Literal["", "sentinel", "cluster"]
_KINDS: dict[str, _Kind] = {
    "redis": "",
    "rediss": "",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_PORTS: dict[_Kind, int] = {"": 6379, "cluster": 6379, "sentinel": 26379}
REDIS_SCHEMES = frozenset(_KINDS)


class RedisAddress(NamedTuple):
    """One Redis, however many servers it has.

    Attributes:
        kind: "" for one server, "sentinel" where `hosts` are the sentinels, "cluster" where they are some of its nodes.
        tls: whether connections are encrypted, those to sentinels included.
        hosts: name and port of each.
        service: what the sentinels call it; else empty.
        database: its number; a cluster has 0 only.
        username, password: for the Redis itself, not for sentinels; None when the URL has none.
    """

    kind: _Kind
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    service: str
    database: int
    username: str | None
    password: str | None


def redis_address(url: str) -> RedisAddress:
    """Read `redis://[user:password@]host[:port][/database]`, `redis+sentinel://h1,h2/service[/database]` or
    `redis+cluster://h1,h2`; `rediss` instead of `redis` means TLS. In user and password, %-escape what is special.

    Raises:
        ConfigurationError: it is none of these. The URL is not repeated, for it may hold a password.
    """
    try:
        return _read(urlsplit(url))
    except ValueError as error:
        raise ConfigurationError(
            f"this URL names no Redis: {error}",
            cure="write redis://host:6379/0, redis+sentinel://host1:26379,host2:26379/service or "
            "redis+cluster://host1:6379,host2:6379 (rediss for TLS); a password is best kept in a file "
            "(ANCHORWATCH_STORE_PASSWORD_FILE)",
        ) from None


def kafka_servers(url: str) -> str:
    """`host1:9092,host2:9092` of `kafka://host1:9092,host2:9092`.

    Raises:
        ConfigurationError: a host or a port is missing, or there is more than that. The URL is not repeated, for
            somebody may have put a password into it.
    """
    servers = url.removeprefix("kafka://").removesuffix("/").replace(" ", "")
    for server in servers.split(","):
        host, _, port = server.rpartition(":")
        if not url.startswith("kafka://") or not host or not port.isdecimal() or set("/@?#") & set(server):
            raise ConfigurationError(
                "this URL names no Kafka",
                cure="write kafka://host1:9092,host2:9092; user and password have settings of their own",
            )
    return servers


def _read(parts: SplitResult) -> RedisAddress:
    kind = _KINDS.get(parts.scheme)
    if kind is None:
        raise ValueError(f"no scheme is called {parts.scheme!r}")
    if parts.query or parts.fragment:
        raise ValueError("options in a URL are not read; use settings")
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    path = [unquote(part) for part in parts.path.split("/")[1:] if part]
    service = path.pop(0) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not service:
        raise ValueError("it lacks the name that the sentinels have for it")
    if path[1:] or (path and not path[0].isdecimal()):
        raise ValueError("its path is no database number")
    database = int(path[0]) if path else 0
    if kind == "cluster" and database:
        raise ValueError("a cluster has no database but 0")
    places = tuple(_place(host, _PORTS[kind]) for host in hosts.split(","))
    if not kind and len(places) > 1:
        raise ValueError("more than one host, so write redis+sentinel:// or redis+cluster://")
    return RedisAddress(
        kind,
        parts.scheme.startswith("rediss"),
        places,
        service,
        database,
        unquote(username) or None,
        unquote(password) or None,
    )


def _place(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit("//" + host)
    if not parts.hostname:
        raise ValueError("a host is missing")
    try:
        return parts.hostname, parts.port or port
    except ValueError:
        raise ValueError("a port is no number up to 65535") from None
