"""Brings the dashboards, and findings as annotations, to a Grafana: only what differs, so that doing it twice changes
nothing.

Through grafana-client and Grafana's HTTP API. It knows no setting and prints nothing. A dashboard that somebody has
changed since is written over, at the version that was compared; Grafana keeps the older ones.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

import niquests
from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException, GrafanaServerError, GrafanaTimeoutError

from alerts.differences import differences, short
from alerts.grafana import FOLDER_TITLE, FOLDER_UID, TAG
from monitor.errors import ChannelError, ChannelUnavailable, ConfigurationError
from monitor.events import Finding

__all__ = ["MOST_ANNOTATIONS", "Change", "Grafana", "annotated", "for_page", "reach"]

TIMEOUT_SECONDS = 10.0
# How many annotations Grafana is asked for, and how many findings one push writes at most.
MOST_ANNOTATIONS = 1000
_MESSAGE = "anchorwatch dashboards push"
_CURES = {
    400: "a dashboard that was provisioned by file can't be pushed too: choose one way",
    401: "give a token that is valid: in Grafana under Administration, Service accounts",
    403: "give the token's service account the role Editor, and leave to read data sources",
    404: "give the address of Grafana itself, with the path that it is served under, if any",
    412: "somebody has changed it this moment, or another one has its title in this folder; look, and push again",
}


class Change(NamedTuple):
    """One thing that is not, or was not, as it should be.

    Attributes:
        what: such as `dashboard Fleet`.
        how: created, updated, or unchanged.
        lines: what differs, one thing a line, ours last.
    """

    what: str
    how: Literal["created", "updated", "unchanged"]
    lines: tuple[str, ...] = ()


class Grafana:
    """One Grafana. Every call blocks, for a bounded time.

    Args:
        dry_run: only look: what would be done is returned, and not done.
    """

    def __init__(self, api: GrafanaApi, *, dry_run: bool = False) -> None:
        self._api = api
        self._dry_run = dry_run

    def version(self) -> str:
        """Which Grafana answers.

        Raises:
            ChannelUnavailable, ChannelError: as every method.
        """
        with _told("Grafana"):
            found = self._api.client.GET("/health")  # the client's own `health` asks for much that we don't need
        if not isinstance(found, dict) or "database" not in found:
            raise ChannelError("what answers is no Grafana", cure=_CURES[404])
        return str(found.get("version", "of a version that it does not tell"))

    def data_source(self, uid: str | None = None) -> str:
        """The uid of the Prometheus to take: the one asked for, else the default one, else the only one.

        Raises:
            ConfigurationError: there is none, or it is not clear which.
        """
        with _told("the data sources"):
            every = self._api.datasource.list_datasources()
            sources = {str(one["uid"]): one for one in every if one.get("type") == "prometheus"}
            shown = ", ".join(f"{found} ({one.get('name')})" for found, one in sources.items()) or "none"
        if uid is not None:
            if uid not in sources:
                raise ConfigurationError(f"Grafana has no Prometheus data source {uid!r}", cure=f"it has {shown}")
            return uid
        defaults = [found for found, one in sources.items() if one.get("isDefault")]
        if len(defaults or sources) != 1:
            raise ConfigurationError(
                "it is not clear which Prometheus the dashboards are to read"
                if sources
                else "Grafana has no Prometheus",
                cure=f"give --data-source UID; there is {shown}"
                if sources
                else "add it as a data source in Grafana first",
            )
        return (defaults or list(sources))[0]

    def folder(self) -> Change:
        """See to it that our folder is there."""
        with _told("the folder"):
            try:
                self._api.folder.get_folder(FOLDER_UID)
            except GrafanaClientError as error:
                if error.status_code != 404:
                    raise
                if not self._dry_run:
                    self._api.folder.create_folder(FOLDER_TITLE, uid=FOLDER_UID)
                return Change(f"folder {FOLDER_TITLE}", "created")
        return Change(f"folder {FOLDER_TITLE}", "unchanged")

    def dashboard(self, ours: dict[str, Any]) -> Change:
        """See to it that a dashboard is there, in our folder, and shows what ours does."""
        what = f"dashboard {ours['title']}"
        with _told(what):
            try:
                found = self._api.dashboard.get_dashboard(ours["uid"])
            except GrafanaClientError as error:
                if error.status_code != 404:
                    raise
                self._save(ours, version=None)
                return Change(what, "created")
            theirs = found["dashboard"]
            lines = list(differences(ours, theirs))
            if (folder := found.get("meta", {}).get("folderUid", "")) != FOLDER_UID:
                lines.insert(0, f"folder: {short(folder)} → {short(FOLDER_UID)}")
            if not lines:
                return Change(what, "unchanged")
            self._save(ours, version=theirs.get("version"))
            return Change(what, "updated", tuple(lines))

    def annotate(self, findings: Sequence[Finding], *, page: str = "") -> Change:
        """See to it that each finding is an annotation; one that is there already is left as it is."""
        wanted = {made["tags"][1]: made for made in annotated(findings, page=page)[-MOST_ANNOTATIONS:]}
        if not wanted:
            return Change("annotations", "unchanged")
        times = [made["time"] for made in wanted.values()]
        with _told("the annotations"):
            found = self._api.annotations.find_annotations(
                time_from=min(times), time_to=max(times) + 1, tags=[TAG], ann_type="annotation", limit=10_000
            )
            there = {tag for one in found for tag in one.get("tags", ())}
            missing = [made for tag, made in wanted.items() if tag not in there]
            for made in missing if not self._dry_run else ():
                self._api.annotations.add_annotation(time_from=made["time"], tags=made["tags"], text=made["text"])
        lines = tuple(f"{made['tags'][2]} {made['tags'][3]} {made['tags'][1]}" for made in missing)
        return Change("annotations", "created" if missing else "unchanged", lines)

    def close(self) -> None:
        """Give the connections back."""
        self._api.client.s.close()

    def _save(self, ours: dict[str, Any], *, version: int | None) -> None:
        if self._dry_run:
            return
        body = {**ours, "id": None} if version is None else {**ours, "version": version}
        saved = {"dashboard": body, "folderUid": FOLDER_UID, "message": _MESSAGE, "overwrite": False}
        self._api.dashboard.update_dashboard(saved)


def reach(url: str, token_file: Path | None, *, ca_file: Path | None = None) -> GrafanaApi:
    """A client of the Grafana at `url`. It follows no redirect, since the token would go with it.

    Raises:
        ConfigurationError: the address or the token can't be used.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigurationError(
            "this is no address of a Grafana", cure="give it as https://grafana.example.org, and the token by file"
        )
    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
            raise ConfigurationError(
                f"the token in {token_file} can't be read: {reason}", cure="write a service account's token into it"
            ) from None
        if not token or not token.isprintable() or " " in token:
            raise ConfigurationError(f"{token_file} holds no token", cure="write a service account's token into it")
    if ca_file is not None and not ca_file.is_file():
        raise ConfigurationError(f"there is no file {ca_file}", cure="give the PEM file of the authority")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = f"{parts.path.strip('/')}/".lstrip("/")
    api = GrafanaApi(
        token,
        protocol=parts.scheme,
        host=host,
        port=port,
        url_path_prefix=path,
        verify=True if ca_file is None else str(ca_file),
        timeout=TIMEOUT_SECONDS,
        user_agent="anchorwatch",
    )
    api.client.s.max_redirects = 0
    return api


def for_page(dashboard: dict[str, Any], *, page: str, data_source: str | None) -> dict[str, Any]:
    """The dashboard with links to the page at this address, and this data source picked at the start, if any."""
    changed: dict[str, Any] = json.loads(json.dumps(dashboard))
    for variable in changed["templating"]["list"]:
        if variable["name"] == "page":
            variable["query"] = page
            variable["current"] = {"selected": True, "text": page, "value": page}
        elif variable["name"] == "datasource" and data_source is not None:
            variable["current"] = {"selected": True, "text": data_source, "value": data_source}
    return changed


def annotated(findings: Sequence[Finding], *, page: str = "") -> list[dict[str, Any]]:
    """What Grafana is told of findings, oldest first. Its tags are `anchorwatch`, the finding's id, kind and severity.

    Grafana shows a text as HTML, so every name in it is escaped.
    """
    made = []
    for finding in sorted(findings, key=lambda one: (one.time, one.id)):
        who = finding.conversation_id
        says = [f"{finding.kind.replace('_', ' ')}, {finding.severity}, in deployment {finding.deployment}"]
        if who:
            says.append(f"conversation {who}, turn {finding.turn}, risk {finding.risk:.2f}")
        if finding.nearest_roles:
            says.append(f"nearest to {', '.join(finding.nearest_roles[:3])}")
        text = "<br>".join(html.escape(line) for line in says)
        if page and who:
            text += f'<br><a href="{html.escape(page)}/sessions/{quote(who, safe="")}">Open the conversation</a>'
        when = round(datetime.fromisoformat(finding.time).timestamp() * 1000)
        made.append(
            {"time": when, "tags": [TAG, f"finding:{finding.id}", finding.kind, finding.severity], "text": text}
        )
    return made


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Every way in which Grafana fails, as one of our errors. Its own words are shown, shortened; the token is not."""
    try:
        yield
    except GrafanaTimeoutError as error:
        raise ChannelUnavailable(f"{what}: Grafana did not answer in {TIMEOUT_SECONDS:.0f} s", cure=_AWAY) from error
    except GrafanaServerError as error:
        raise ChannelUnavailable(f"{what}: Grafana says {error.status_code}{_words(error)}", cure=_AWAY) from error
    except GrafanaException as error:
        cure = _CURES.get(error.status_code, "see Grafana's own log")
        raise ChannelError(f"{what}: Grafana says {error.status_code}{_words(error)}", cure=cure) from error
    except niquests.exceptions.TooManyRedirects as error:
        raise ChannelError(f"{what}: Grafana points elsewhere", cure="give the address that it points to") from error
    except niquests.exceptions.SSLError as error:
        raise ChannelError(f"{what}: the certificate is not trusted", cure="give --ca-file") from error
    except niquests.exceptions.JSONDecodeError as error:
        raise ChannelError(f"{what}: what answers is no Grafana", cure=_CURES[404]) from error
    except (niquests.exceptions.RequestException, OSError) as error:
        raise ChannelUnavailable(f"{what}: Grafana can't be reached", cure=_AWAY) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ChannelError(f"{what}: Grafana's answer is not what its API says", cure=_CURES[404]) from error


_AWAY = "look whether it runs at this address, and try again: what was done before stays, and is not done twice"


def _words(error: GrafanaException) -> str:
    message = error.response.get("message", "") if isinstance(error.response, dict) else ""
    clean = "".join(letter if letter.isprintable() else " " for letter in str(message))[:200]
    return f": {clean}" if clean else ""
