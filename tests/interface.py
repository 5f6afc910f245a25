"""The HTTP interface over a real socket, in a thread of the test, on a real log and store that the test can reach."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from servers import fresh
from service import CONFIG

from monitor.actions import ActionsFold, append_actions
from monitor.alert import Alert
from monitor.api.app import Options, create_app
from monitor.api.auth import SCOPES, Keys, create_key
from monitor.api.server import listen, serving
from monitor.detect.baseline import DetectorConfig
from monitor.store import Backend
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message
from monitor.worker import Worker

STORES = ("sqlite", "redis")


class Interface:
    """A running interface: its address, a key of each scope, its log and its store."""

    def __init__(self, url: str, folder: Path, log: EmbeddedLog, store: Backend) -> None:
        self.url = url
        self.folder = folder
        self.log = log
        self.store = store
        self.keys = folder / "api-keys.json"
        self.tokens: dict[str, str] = {}

    def client(self, scope: str | None = "read", **options: Any) -> httpx.Client:
        """A client with a key of this scope; None: without."""
        headers = {"Authorization": f"Bearer {self.tokens[scope]}"} if scope else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def fold(self, messages: Sequence[Message], config: DetectorConfig = CONFIG) -> None:
        """Have a worker fold these."""
        self.log.append(PROJECTIONS, messages)
        worker = Worker(self.log, self.store, config, batch_size=500)
        while worker.run_once():
            pass

    def alert(self, *alerts: Alert) -> None:
        """Write alerts down as the dispatcher does."""
        append_actions(self.log, [("alert", alert.id, alert) for alert in alerts], by="dispatch")
        while ActionsFold(self.log, self.store).run_once():
            pass


def open_store(kind: str, folder: Path, redis_url: str) -> Backend:
    """An empty store of this kind."""
    if kind == "redis":
        return RedisStore(redis_url, prefix=fresh("api"))
    return SqliteStore(folder / "store.db")


@contextmanager
def interface(
    folder: Path, store: Backend, log_path: Path | None = None, *, open: bool = False, **options: Any
) -> Iterator[Interface]:
    """One that runs for as long as the block does; an open one has no keys."""
    folder.mkdir(exist_ok=True)
    log = EmbeddedLog(log_path or folder / "log.db", busy_seconds=1.0)
    listener = listen("127.0.0.1", 0)
    made = Interface(f"http://127.0.0.1:{listener.getsockname()[1]}", folder, log, store)
    if not open:
        made.tokens = {scope: create_key(made.keys, f"{scope}-key", [scope]) for scope in SCOPES}
    app = create_app(log, store, Keys(made.keys, open_without=open), Options(**options))
    try:
        with serving(app, listener, threading.Event()):
            yield made
    finally:
        log.close()
        store.close()
