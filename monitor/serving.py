"""The commands of the HTTP interface: `anchorwatch api`, and `anchorwatch keys` for who may use it.

They know the settings and where each one goes. FastAPI and uvicorn are loaded by `api` only.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from monitor import connect, telemetry
from monitor.api.auth import SCOPES, Keys, create_key, read_keys, revoke_key
from monitor.errors import ConfigurationError
from monitor.settings import Settings, installation_key, load_settings
from monitor.store import Backend
from monitor.stream.log import Log

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["address", "api", "application", "keys_app", "keys_file"]

keys_app = typer.Typer(help="Keys of the HTTP interface.", no_args_is_help=True)
_stderr = Console(stderr=True)


def api() -> None:
    """Serve the HTTP interface and the page until SIGTERM or Ctrl-C."""
    settings = load_settings()
    if settings.log_url.startswith("kafka:") and "ANCHORWATCH_STORE_URL" not in os.environ:
        raise ConfigurationError(
            "the log is Kafka, and no store is named: there would be nothing to show",
            cure="set ANCHORWATCH_STORE_URL, to the same store as the workers'",
        )
    try:
        from monitor.api.server import is_loopback, listen, serve
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    loopback = is_loopback(settings.api_host)
    keys = Keys(keys_file(settings), open_without=loopback)
    if not loopback and not read_keys(keys_file(settings)):
        raise ConfigurationError(
            f"there are no keys, and {settings.api_host} can be reached from other machines",
            cure="anchorwatch keys create --name collector-1 --scope ingest; or ANCHORWATCH_API_HOST=127.0.0.1",
        )
    if not loopback and settings.api_tls_certificate is None:
        _stderr.print(
            "[yellow]note:[/] keys travel in the clear without TLS: set ANCHORWATCH_API_TLS_CERTIFICATE and "
            "ANCHORWATCH_API_TLS_KEY, or put a proxy that has TLS in front",
            highlight=False,
        )
    listener = listen(settings.api_host, settings.api_port)
    telemetry.serve_metrics(settings.metrics_port)
    log, store = connect.log(settings), connect.store(settings)
    place = address(settings, listener)

    def ready() -> None:
        asked = "no key is asked for" if keys.open else "keys are asked for"
        places = f"{connect.shown(settings.log_url)} and from {connect.shown(settings.store_url)}"
        _stderr.print(f"Serving {place} into {places}; {asked}", highlight=False, soft_wrap=True)

    try:
        serve(
            application(settings, log, store, keys),
            listener,
            certificate=settings.api_tls_certificate,
            private_key=settings.api_tls_key,
            ready=ready,
        )
    finally:
        log.close()
        store.close()


def application(settings: Settings, log: Log, store: Backend, keys: Keys) -> FastAPI:
    """The HTTP interface and the page, by the settings. It leaves log and store open.

    Raises:
        ConfigurationError: FastAPI is not installed, or the installation's key can't be used.
    """
    try:
        from monitor.api.app import Options, create_app
        from monitor.api.page import Links, mount_page
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    options = Options(
        items=settings.api_max_items,
        body_bytes=settings.api_max_body_bytes,
        queue_bytes=settings.api_queue_bytes,
        rate=settings.api_rate,
        patience_seconds=settings.api_patience_seconds,
    )
    app = create_app(log, store, keys, options)
    links = Links(
        conversation_url=settings.page_conversation_url,
        runbook_url=settings.page_runbook_url,
        page_url=settings.page_url,
    )
    mount_page(app, log, store, secret=installation_key(settings), links=links)
    return app


def address(settings: Settings, listener: socket.socket) -> str:
    """Where a listener is reached, as a URL."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.api_tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def keys_file(settings: Settings) -> Path:
    """Where the keys are."""
    return settings.api_keys_file or settings.data_dir / "api-keys.json"


def _missing(error: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(f"the HTTP interface needs {error.name}", cure="pip install 'anchorwatch[api]'")


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="What you call it: who is to use it, and where.")],
    scope: Annotated[
        list[str],
        typer.Option(help=f"What it may do: {', '.join(SCOPES)}. Give it more than once for more."),
    ],
) -> None:
    """Make a key, and print it: the only time that it is shown. A running server knows it at once."""
    print(create_key(keys_file(load_settings()), name, scope))


@keys_app.command("list")
def keys_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array on standard output.")] = False,
) -> None:
    """Show all keys, without their secrets."""
    keys = read_keys(keys_file(load_settings()))
    if as_json:
        rows = [
            {"id": key.id, "name": key.name, "scopes": key.scopes, "created": key.created, "revoked": key.revoked}
            for key in keys
        ]
        print(json.dumps(rows))
        return
    table = Table("id", "name", "scopes", "created", "revoked")
    for key in keys:
        table.add_row(key.id, key.name, " ".join(key.scopes), key.created, key.revoked or "")
    Console().print(table)


@keys_app.command("revoke")
def keys_revoke(identifier: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]) -> None:
    """Make a key useless, with the next request of a running server."""
    key = revoke_key(keys_file(load_settings()), identifier)
    _stderr.print(f"Revoked {key.id} ({key.name}).", markup=False, highlight=False)
