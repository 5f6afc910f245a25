"""Where records wait between a collector and a worker. Backends are chosen by URL, here and nowhere else."""

from __future__ import annotations

from urllib.parse import urlsplit

from monitor.database import sqlite_path
from monitor.errors import ConfigurationError
from monitor.stream.log import EmbeddedLog, Log

__all__ = ["open_log"]


def open_log(url: str) -> Log:
    """The log that `url` names: `sqlite:///absolute/path`.

    Raises:
        ConfigurationError: no such backend.
        LogError: it can't be opened.
    """
    match urlsplit(url).scheme:
        case "sqlite":
            return EmbeddedLog(sqlite_path(url))
        case scheme:
            raise ConfigurationError(f"no log is called {scheme!r}", cure="ANCHORWATCH_LOG_URL=sqlite:///absolute/path")
