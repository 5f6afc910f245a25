"""`anchorwatch dispatch`: from settings and the file of rules to a dispatcher that runs.

It knows how the parts are put together, and does nothing of what they do.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import structlog

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import AlertsConfig
from alerts.dispatcher import Dispatcher, DispatcherStore, Reload
from alerts.rules import Rules, one_log
from monitor import connect, telemetry
from monitor.errors import ConfigurationError
from monitor.settings import Settings
from monitor.stream.log import Log
from monitor.worker import stop_on_signals

__all__ = ["make", "open_channels", "reloading", "run"]

_log = structlog.get_logger("anchorwatch.dispatch")


def open_channels(config: AlertsConfig) -> dict[str, Channel]:
    """The channels of all integrations.

    Raises:
        ConfigurationError: one can't be opened; those before it are closed again.
    """
    found: dict[str, Channel] = {}
    try:
        for receiver in config.receivers:
            for integration in receiver.integrations:
                found[integration.name] = open_channel(integration, config)
    except ConfigurationError:
        for channel in found.values():
            channel.close()
        raise
    return found


def reloading(rules: Rules, hang_up: threading.Event) -> Reload:
    """What a dispatcher is given as `reload`: the file's rules when it was written, or `hang_up` is set."""

    def reload() -> tuple[AlertsConfig, Mapping[str, Channel]] | None:
        anyway = hang_up.is_set()
        hang_up.clear()
        if (config := rules.changed(anyway=anyway)) is None:
            return None
        try:
            channels = open_channels(config)
        except ConfigurationError as error:
            rules.refused(error)
            return None
        rules.took()
        return config, channels

    return reload


def make(settings: Settings, log: Log, store: DispatcherStore, out: Path | None = None) -> Dispatcher:
    """The dispatcher of these settings; `out` stands in for the file of rules: one JSON object a line, at once.

    Raises:
        ConfigurationError: the rules are wrong, or a channel can't be opened.
    """
    if out is not None or settings.alerts_file is None:
        config = one_log(out)
        return Dispatcher(log, store, open_channels(config), config, max_age=settings.page_max_age_seconds, live=True)
    rules = Rules(settings.alerts_file)
    hang_up = threading.Event()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: hang_up.set())
    return Dispatcher(
        log,
        store,
        open_channels(rules.config),
        rules.config,
        max_age=settings.page_max_age_seconds,
        reload=reloading(rules, hang_up),
    )


def run(settings: Settings, out: Path | None) -> None:
    """`anchorwatch dispatch`: tell people, until SIGTERM or SIGINT.

    Raises:
        ConfigurationError, LogError, StoreError: it can't begin, or somebody must look.
    """
    stop = stop_on_signals()
    telemetry.serve_metrics(settings.metrics_port)
    log, store = connect.log(settings), connect.store(settings)
    try:
        dispatcher = make(settings, log, store, out)
        to = str(out) if out else str(settings.alerts_file or "standard output")
        _log.info("telling", store=connect.shown(settings.store_url), to=to)
        dispatcher.run(stop)
    finally:
        log.close()
        store.close()
