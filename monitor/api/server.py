"""Serves an application with uvicorn: deadlines for slow clients, an orderly end, and quiet log lines.

It knows nothing of the application, but for `app.state.ending`: where there is such a function, it ends what would
never end by itself. SIGTERM or Ctrl-C: that, no new connections, requests under way are answered, the end.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from monitor.errors import ConfigurationError

__all__ = ["is_loopback", "listen", "serve", "serving"]

HEADER_SECONDS = 10.0
UNREAD_SECONDS = 60.0
IDLE_SECONDS = 30
DRAIN_SECONDS = 8
CONNECTIONS = 4_000

_log = structlog.get_logger("anchorwatch.http")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        ConfigurationError: somebody else listens there, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError(
            f"can't listen on {host}, port {port}: {error.strerror}",
            cure="choose others: ANCHORWATCH_API_HOST, ANCHORWATCH_API_PORT",
        ) from error
    # asyncio does it for sockets of its own making only; without it every answer waits 40 ms for the client's system.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    private_key: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. For the main thread. `ready` is called when requests are being taken.

    Raises:
        ConfigurationError: certificate and key can't be used.
    """
    server = _Server(app, _config(app, certificate, private_key), ready)
    # uvicorn sends itself the signal once more when it has ended in good order; by then it means nothing new.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def serving(
    app: FastAPI,
    listener: socket.socket,
    ended: threading.Event,
    *,
    certificate: Path | None = None,
    private_key: Path | None = None,
) -> Iterator[None]:
    """Serve in a thread of its own for as long as the block runs. Signals are somebody else's; `ended` is set when the
    server ends for reasons of its own.

    Raises:
        ConfigurationError: certificate and key can't be used, or it does not start.
    """
    ready = threading.Event()
    server = _Server(app, _config(app, certificate, private_key), ready.set)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="anchorwatch-api")
    thread.start()
    try:
        while thread.is_alive() and not ready.wait(0.05):
            pass
        if not ready.is_set():
            raise ConfigurationError("the HTTP interface did not start", cure="see its log lines above")
        yield
    finally:
        server.should_exit = True
        thread.join()


def _config(app: FastAPI, certificate: Path | None, private_key: Path | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=_Patient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigurationError(
            f"the TLS certificate or its key can't be used: {error}",
            cure="ANCHORWATCH_API_TLS_CERTIFICATE and ANCHORWATCH_API_TLS_KEY name a PEM file each",
        ) from error
    _tell_uvicorns_log()
    return config


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self._ending: Callable[[], None] | None = getattr(app.state, "ending", None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._ending is not None:
            self._ending()
        await super().shutdown(sockets)


class _Patient(H11Protocol):
    """HTTP/1.1 that does not wait for ever for a request's headers, nor for a client that does not read what it is
    sent. A body's deadline is the application's."""

    _due: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Between two requests uvicorn's own timer runs, until the first byte of the next one.
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._due is None:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._flow()
        self._stalled = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._flow()
        super().connection_lost(exc)

    def _flow(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait(self) -> None:
        self._due = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def _tell_uvicorns_log() -> None:
    """Its warnings in our form, and without tracebacks, which may hold content."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
            message = record.getMessage().splitlines()[0]
            _log.log(record.levelno, message, **({"error": error} if error else {}))

    logger = logging.getLogger("uvicorn.error")
    logger.handlers = [Forward()]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
