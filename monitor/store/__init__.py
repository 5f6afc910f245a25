"""What a worker keeps and people read. Backends are chosen by URL, here and nowhere else."""

from __future__ import annotations

from urllib.parse import urlsplit

from monitor.database import sqlite_path
from monitor.errors import ConfigurationError
from monitor.store.sqlite import SqliteStore

__all__ = ["open_store"]


def open_store(url: str) -> SqliteStore:
    """The store that `url` names: `sqlite:///absolute/path`. It is `Store`, `Reader` and `Outbox` in one.

    Raises:
        ConfigurationError: no such backend.
        StoreError: it can't be opened.
    """
    match urlsplit(url).scheme:
        case "sqlite":
            return SqliteStore(sqlite_path(url))
        case scheme:
            raise ConfigurationError(
                f"no store is called {scheme!r}", cure="ANCHORWATCH_STORE_URL=sqlite:///absolute/path"
            )
