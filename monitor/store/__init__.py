"""What a worker keeps and people read. Backends are chosen by URL, here and nowhere else."""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

from monitor.address import REDIS_SCHEMES
from monitor.database import sqlite_path
from monitor.errors import ConfigurationError
from monitor.store.sqlite import SqliteStore
from monitor.store.store import Actions, Fleet, Housekeeping, Outbox, Reader, Store

__all__ = ["Backend", "open_store"]


class Backend(Store, Reader, Outbox, Housekeeping, Fleet, Actions, Protocol):
    """All the seams in one. Ask for the one that you need; this is for those who open a store."""


def open_store(
    url: str,
    *,
    trajectory_points: int = 256,
    ttl_seconds: float = 604_800.0,
    password: str | None = None,
    sentinel_password: str | None = None,
    ca_file: str | None = None,
) -> Backend:
    """The store that `url` names: `sqlite:///absolute/path`, or a Redis (`monitor.address` has the forms).

    All but `trajectory_points` concern Redis only; see `RedisStore`.

    Raises:
        ConfigurationError: no such backend, or it is not installed.
        StoreError: it can't be used. A Redis that does not answer now is no error here: it is checked when it does.
    """
    match urlsplit(url).scheme:
        case "sqlite":
            return SqliteStore(sqlite_path(url), trajectory_points=trajectory_points)
        case scheme if scheme in REDIS_SCHEMES:
            try:
                from monitor.store.redis import RedisStore
            except ModuleNotFoundError as error:
                raise ConfigurationError(
                    f"the store is a Redis, which needs {error.name}", cure="pip install 'anchorwatch[redis]'"
                ) from error
            return RedisStore(
                url,
                trajectory_points=trajectory_points,
                ttl_seconds=ttl_seconds,
                password=password,
                sentinel_password=sentinel_password,
                ca_file=ca_file,
            )
        case scheme:
            raise ConfigurationError(
                f"no store is called {scheme!r}",
                cure="ANCHORWATCH_STORE_URL=sqlite:///absolute/path, or redis://host:6379/0",
            )
