"""The file of rules and routes, read again when it changes. A file that has become wrong leaves the rules as they are.

It knows when, not what: that is for `alerts.config`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import structlog

from alerts.config import AlertsConfig, LogConfig, Receiver, Route, load
from monitor import telemetry
from monitor.errors import ConfigurationError

__all__ = ["Rules", "one_log"]

_log = structlog.get_logger("anchorwatch.dispatch")

Stamp: TypeAlias = tuple[int, int, int] | None


class Rules:
    """One file.

    Attributes:
        config: what is in force.
    """

    def __init__(
        self,
        path: Path,
        *,
        load: Callable[[Path], AlertsConfig] = load,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Reads it.

        Raises:
            ConfigurationError: it is wrong, or can't be read.
        """
        self._path = path
        self._load = load
        self._clock = clock
        self._stamp = _stamp(path)
        self.config = load(path)
        self._loaded()

    def changed(self, *, anyway: bool = False) -> AlertsConfig | None:
        """What it says now, where it has been written since, or `anyway`; None where there is nothing new, or it is
        wrong, which is logged. Blocks while it reads."""
        stamp = _stamp(self._path)
        if stamp == self._stamp and not anyway:
            return None
        self._stamp = stamp
        try:
            config = self._load(self._path)
        except ConfigurationError as error:
            self.refused(error)
            return None
        except Exception:  # a fault of the reader's must not end a dispatcher whose rules are good
            telemetry.ALERTS_CONFIG_LOADED.set(0)
            _log.exception("the rules and routes can't be read; those before stay in force", file=str(self._path))
            return None
        self.config = config
        return config

    def took(self) -> None:
        """What it says is in force."""
        self._loaded()
        _log.info("the rules and routes have been read again", file=str(self._path))

    def refused(self, error: ConfigurationError) -> None:
        """What it says can't be."""
        telemetry.ALERTS_CONFIG_LOADED.set(0)
        _log.error(
            "the rules and routes are wrong; those before stay in force",
            file=str(self._path),
            problem=error.problem,
            cure=error.cure,
        )

    def _loaded(self) -> None:
        telemetry.ALERTS_CONFIG_LOADED.set(1)
        telemetry.ALERTS_CONFIG_LOADED_AT.set(self._clock())


def one_log(path: Path | None) -> AlertsConfig:
    """Rules without a file: every alert by itself, at once, as a line in a file or on standard output."""
    return AlertsConfig(
        route=Route(path="0", receiver="log", group_by=("...",), group_wait=0.0, group_interval=0.0),
        receivers=(Receiver(name="log", integrations=(LogConfig(receiver="log", path=path),)),),
    )


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
