"""`anchorwatch dashboards`: write the dashboards into files, bring them to a Grafana, or say what differs there.

Thin: it reads options and settings, and prints. What does the work needs the extra `grafana`, and is loaded when it is
called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from monitor import connect
from monitor.errors import ConfigurationError
from monitor.events import Finding
from monitor.settings import load_settings

if TYPE_CHECKING:
    from alerts.push import Change, Grafana

__all__ = ["dashboards_app"]

PAGE = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option(help="Address of Grafana, with the path that it is served under, if any.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with a token of a service account that has the role Editor.")
]
Page = Annotated[str, typer.Option(help="Where people reach Anchorwatch's page: links lead there.")]
DataSource = Annotated[
    str | None, typer.Option(help="Uid of the Prometheus to read. [default: Grafana's default one, or its only one]")
]
CaFile = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed Grafana's certificate.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

dashboards_app = typer.Typer(
    help="Grafana's dashboards: build, push, compare.", no_args_is_help=True, add_completion=False
)
_stdout = Console(highlight=False)
_stderr = Console(stderr=True, highlight=False)


@dashboards_app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="Folder for fleet.json, sessions.json and health.json.")],
    page: Page = PAGE,
    data_source: DataSource = None,
) -> None:
    """Write the dashboards into files, for Grafana to read from a folder or for an import by hand."""
    with _extra():
        from alerts.grafana import built, text
        from alerts.push import for_page
    _checked(page)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, dashboard in built().items():
            file = out / f"{name}.json"
            file.write_text(text(for_page(dashboard, page=page, data_source=data_source)), encoding="utf-8")
            print(file)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or out} can't be written: {error.strerror}",
            cure="name a folder that this user may write to",
        ) from error


@dashboards_app.command("push")
def push(
    url: Url,
    token_file: TokenFile = None,
    page: Page = PAGE,
    data_source: DataSource = None,
    annotations: Annotated[
        str, typer.Option(help="Write findings of so long as annotations, too: 90m, 24h, 7d; at most the newest 1,000.")
    ] = "",
    ca_file: CaFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the dashboards into a folder of Grafana. What is there already is left alone: do it whenever you like."""
    findings = _findings(annotations) if annotations else []
    with _grafana(url, token_file, ca_file, dry_run=dry_run) as grafana:
        changes = [grafana.folder(), *_dashboards(grafana, page, data_source)]
        if annotations:
            changes.append(grafana.annotate(findings, page=page))
    _say(changes, dry_run=dry_run, as_json=as_json)


@dashboards_app.command("diff")
def diff(
    url: Url,
    token_file: TokenFile = None,
    page: Page = PAGE,
    data_source: DataSource = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what Grafana has otherwise. Exits 1 if something differs."""
    with _grafana(url, token_file, ca_file, dry_run=True) as grafana:
        changes = [grafana.folder(), *_dashboards(grafana, page, data_source)]
    _say(changes, dry_run=True, as_json=as_json)
    if any(change.how != "unchanged" for change in changes):
        raise typer.Exit(1)


def _dashboards(grafana: Grafana, page: str, data_source: str | None) -> list[Change]:
    from alerts.grafana import built
    from alerts.push import for_page

    _checked(page)
    source = grafana.data_source(data_source)
    return [grafana.dashboard(for_page(one, page=page, data_source=source)) for one in built().values()]


@contextmanager
def _grafana(url: str, token_file: Path | None, ca_file: Path | None, *, dry_run: bool) -> Iterator[Grafana]:
    with _extra():
        from alerts.push import Grafana, reach
    if (
        url.startswith("http://")
        and token_file is not None
        and not re.match(r"http://(127\.|localhost\b|\[::1\])", url)
    ):
        _stderr.print("note: the token travels in the clear: give an https:// address")
    grafana = Grafana(reach(url, token_file, ca_file=ca_file), dry_run=dry_run)
    try:
        _stderr.print(f"Grafana {grafana.version()}", markup=False)
        yield grafana
    finally:
        grafana.close()


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the dashboards need {error.name}", cure="pip install 'anchorwatch[grafana]'"
        ) from error


def _findings(lasts: str) -> list[Finding]:
    """The newest findings of the store, of so long."""
    from alerts.push import MOST_ANNOTATIONS

    found = re.fullmatch(r"(\d{1,5})([mhd])", lasts)
    if found is None or not int(found[1]):
        raise ConfigurationError(f"{lasts!r} is no length of time", cure="write it as 90m, 24h or 7d")
    span = int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]
    since = datetime.now(UTC) - span
    store = connect.store(load_settings())
    try:
        newest = store.findings(MOST_ANNOTATIONS)
    finally:
        store.close()
    return [one for one in newest if datetime.fromisoformat(one.time) >= since]


def _checked(page: str) -> None:
    if not re.fullmatch(r"https?://[^\s\"'<>?#]+[^\s\"'<>?#/]", page):
        raise ConfigurationError(
            "this is no address of a page",
            cure="give it as https://anchorwatch.example.org, without a slash at its end",
        )


def _say(changes: list[Change], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        told: list[dict[str, Any]] = [{"what": one.what, "how": one.how, "lines": one.lines} for one in changes]
        print(json.dumps({"dry_run": dry_run, "changes": told}))
        return
    for change in changes:
        how = f"would be {change.how}" if dry_run and change.how != "unchanged" else change.how
        _stdout.print(f"{change.what}: {how}", markup=False, soft_wrap=True)
        for line in change.lines:
            _stdout.print(f"    {line}", markup=False, soft_wrap=True)
