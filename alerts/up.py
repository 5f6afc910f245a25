"""`anchorwatch up`: worker, dispatcher, HTTP interface and page in one process. It joins them, and knows none of them.

For one machine: log and store are files unless the settings name servers. Each part has its own connections and its own
thread, and none is taken for well because the others are: when one ends, all do, and its error is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import structlog
from rich.console import Console

from alerts.config import load
from alerts.dispatch import make
from monitor import connect, telemetry
from monitor.ages import show_axis_age
from monitor.api.auth import Keys, read_keys
from monitor.api.server import is_loopback, listen, serving
from monitor.detect.baseline import DetectorConfig
from monitor.errors import ConfigurationError
from monitor.service import fold
from monitor.serving import address, application, keys_file
from monitor.settings import Settings
from monitor.store import Backend
from monitor.stream.log import Log
from monitor.worker import Listener, collect_rarely, stop_on_signals

__all__ = ["Running", "running", "up"]

_log = structlog.get_logger("anchorwatch.up")
_stderr = Console(stderr=True)


class Running(NamedTuple):
    """Everything runs. `page`: where the page is; `ended`: set as soon as a part has ended, or is to."""

    page: str
    ended: threading.Event


class _Part(threading.Thread):
    """One part in its thread: keeps the error that ended it, and ends the others with it."""

    def __init__(self, name: str, run: Callable[[threading.Event], None], stop: threading.Event) -> None:
        super().__init__(name=f"anchorwatch-{name}")
        self.error: BaseException | None = None
        self._run = run
        self._stop_all = stop

    def run(self) -> None:
        try:
            self._run(self._stop_all)
        except BaseException as error:
            self.error = error
            _log.error("a part has ended", part=self.name, error=type(error).__name__)
        finally:
            self._stop_all.set()


@contextmanager
def running(
    settings: Settings,
    config: DetectorConfig,
    out: Path | None = None,
    on_step: Listener | None = None,
    *,
    stop: threading.Event | None = None,
) -> Iterator[Running]:
    """Run all parts for as long as the block does, then end them in good order.

    Args:
        settings: log, store, address of the page, rules of alerts.
        config: judges where no calibration is in force yet.
        out: where alerts go when the settings name no file of rules: one JSON object a line.
        on_step: told of every committed response, from the worker's thread.
        stop: ends it all when it is set.

    Raises:
        ConfigurationError: the page can't be served, or the rules of alerts are wrong.
        LogError, StoreError: of a part that has ended; when the block is left.
    """
    stop = stop or threading.Event()
    loopback = is_loopback(settings.api_host)
    keys = Keys(keys_file(settings), open_without=loopback)
    if not loopback and not read_keys(keys_file(settings)):
        raise ConfigurationError(
            f"there are no keys, and {settings.api_host} can be reached from other machines",
            cure="anchorwatch keys create --name me --scope read --scope act; or ANCHORWATCH_API_HOST=127.0.0.1",
        )
    listener = listen(settings.api_host, settings.api_port)
    with listener, _opened(settings) as (log, store), _opened(settings) as (alerts_log, alerts_store):
        app = application(_linked(settings), log, store, keys)
        dispatcher = make(settings, alerts_log, alerts_store, out)
        parts = [
            _Part("worker", lambda stop: fold(settings, config, stop, on_step), stop),
            _Part("dispatcher", dispatcher.run, stop),
        ]
        certificate, private_key = settings.api_tls_certificate, settings.api_tls_key
        with serving(app, listener, stop, certificate=certificate, private_key=private_key):
            for part in parts:
                part.start()
            try:
                yield Running(address(settings, listener), stop)
            finally:
                stop.set()
                for part in parts:
                    part.join()
    for part in parts:
        if part.error is not None:
            raise part.error


def _linked(settings: Settings) -> Settings:
    """With the links of the rules of alerts, where the page is given none of its own."""
    if settings.alerts_file is None:
        return settings
    rules = load(settings.alerts_file)
    return settings.model_copy(
        update={
            "page_url": settings.page_url or rules.external_url,
            "page_conversation_url": settings.page_conversation_url or rules.conversation_url,
            "page_runbook_url": settings.page_runbook_url or rules.runbook_url,
        }
    )


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Log, Backend]]:
    log = connect.log(settings)
    try:
        store = connect.store(settings)
        try:
            yield log, store
        finally:
            store.close()
    finally:
        log.close()


def up(bundle: str, config: DetectorConfig, settings: Settings) -> None:
    """Run everything until SIGTERM or Ctrl-C, and say where the page is. `bundle`: the axis in use, for its age.

    Raises:
        ConfigurationError, LogError, StoreError: it can't begin, or somebody must look.
    """
    stop = stop_on_signals()
    telemetry.serve_metrics(settings.metrics_port)
    show_axis_age(bundle, config.axis_id)
    collect_rarely()
    out = None if settings.alerts_file else settings.data_dir / "alerts.jsonl"
    with running(settings, config, out=out, stop=stop) as found:
        places = f"{connect.shown(settings.log_url)} into {connect.shown(settings.store_url)}"
        _stderr.print(f"Folding {places}", highlight=False, soft_wrap=True)
        rules = f"by {settings.alerts_file}, once `anchorwatch alerts enable` was said"
        told = rules if settings.alerts_file else f"as JSON lines in {out}; no file of rules (ANCHORWATCH_ALERTS_FILE)"
        _stderr.print(f"Alerts: {told}", highlight=False, soft_wrap=True)
        _stderr.print(f"The page: {found.page}/", highlight=False, soft_wrap=True)
        stop.wait()
