"""The commands of the HTTP interface: `anchorwatch api`, and `anchorwatch keys` for who may use it.

They know the settings and where each one goes. FastAPI and uvicorn are loaded by `api` only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from monitor import connect, telemetry
from monitor.api.auth import SCOPES, Keys, create_key, read_keys, revoke_key
from monitor.errors import ConfigurationError
from monitor.settings import Settings, load_settings

__all__ = ["api", "keys_app"]

keys_app = typer.Typer(help="Keys of the HTTP interface.", no_args_is_help=True)
_stderr = Console(stderr=True)


def api() -> None:
    """Serve the HTTP interface until SIGTERM or Ctrl-C."""
    settings = load_settings()
    try:
        from monitor.api.app import Options, create_app
        from monitor.api.server import is_loopback, listen, serve
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the HTTP interface needs {error.name}", cure="pip install 'anchorwatch[api]'"
        ) from error
    loopback = is_loopback(settings.api_host)
    keys = Keys(_keys_file(settings), open_without=loopback)
    if not loopback and not read_keys(_keys_file(settings)):
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
    options = Options(
        items=settings.api_max_items,
        body_bytes=settings.api_max_body_bytes,
        queue_bytes=settings.api_queue_bytes,
        rate=settings.api_rate,
        patience_seconds=settings.api_patience_seconds,
    )
    telemetry.serve_metrics(settings.metrics_port)
    log = connect.log(settings)
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.api_tls_certificate is None else "https"
    place = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        asked = "no key is asked for" if keys.open else "keys are asked for"
        _stderr.print(
            f"Serving {place} into {connect.shown(settings.log_url)}; {asked}", highlight=False, soft_wrap=True
        )

    try:
        serve(
            create_app(log, keys, options),
            listener,
            certificate=settings.api_tls_certificate,
            private_key=settings.api_tls_key,
            ready=ready,
        )
    finally:
        log.close()


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="What you call it: who is to use it, and where.")],
    scope: Annotated[
        list[str],
        typer.Option(help=f"What it may do: {', '.join(SCOPES)}. Give it more than once for more."),
    ],
) -> None:
    """Make a key, and print it: the only time that it is shown. A running server knows it at once."""
    print(create_key(_keys_file(load_settings()), name, scope))


@keys_app.command("list")
def keys_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array on standard output.")] = False,
) -> None:
    """Show all keys, without their secrets."""
    keys = read_keys(_keys_file(load_settings()))
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
    key = revoke_key(_keys_file(load_settings()), identifier)
    _stderr.print(f"Revoked {key.id} ({key.name}).", markup=False, highlight=False)


def _keys_file(settings: Settings) -> Path:
    return settings.api_keys_file or settings.data_dir / "api-keys.json"
