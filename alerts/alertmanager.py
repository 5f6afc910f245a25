"""The Alertmanager integration: alerts go there one by one, by its API v2, and are said again while they fire.

It knows no HTTP beyond headers; what an alert says comes from `alerts.message`. The API is that of
https://github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml, `POST /alerts`. There an alert is its labels.
Severity is one of them, since routes need it; so an alert that becomes critical is a new one there, and the old one is
told to be over in the same breath. No end is announced for what fires: where nobody says it again for Alertmanager's
own `resolve_timeout` (five minutes, unless somebody has changed it), it is over there.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from alerts.config import AlertmanagerConfig, AlertsConfig
from alerts.http import Client
from alerts.message import annotations_of, links
from alerts.secret import read_secret
from monitor.alert import Alert, Notification, labels
from monitor.errors import ChannelError, ChannelUnavailable

__all__ = ["MOST_ALERTS", "AlertmanagerChannel", "posted"]

PATH = "/api/v2/alerts"
MOST_ALERTS = 500  # in one POST

_encoder = msgspec.json.Encoder(order="sorted")


class AlertmanagerChannel:
    """Posts alerts, and posts them again. See `Channel`."""

    def __init__(self, integration: AlertmanagerConfig, config: AlertsConfig) -> None:
        """Nothing is opened before it is needed."""
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self.refresh: float | None = integration.refresh
        self._integration = integration
        self._config = config
        self._client = Client(timeout=integration.timeout, allow_private=integration.allow_private)

    def deliver(self, notification: Notification) -> None:
        """See `Channel.deliver`. A note has no place in an alert, and is left out."""
        self._post(
            entry
            for alert in notification.alerts
            for entry in posted(alert, self.name, notification.time, self._config)
        )

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Say them again, by the labels that were told. See `Channel.keep_firing`."""
        self._post(
            _entry(alert, alert.told.get(self.name, alert.severity), self._config)
            for alert in alerts
            if alert.firing and alert.told.get(self.name) != "resolved"
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _post(self, entries: Iterable[dict[str, Any]]) -> None:
        """All of them, though one be refused: Alertmanager takes the others of the same POST, too."""
        url = self._integration.url.rstrip("/") + PATH
        headers = {"Content-Type": "application/json", **self._authorization()}
        rest, refused = iter(entries), None
        while part := list(itertools.islice(rest, MOST_ALERTS)):
            try:
                self._client.post(url, _encoder.encode(part), headers)
            except ChannelUnavailable:
                raise
            except ChannelError as error:
                refused = error
        if refused is not None:
            raise refused

    def _authorization(self) -> dict[str, str]:
        if path := self._integration.bearer_token_file:
            return {"Authorization": f"Bearer {read_secret(path)}"}
        if path := self._integration.basic_auth_file:
            secret = read_secret(path)
            if ":" not in secret:
                raise ChannelUnavailable(f"{path} holds no user and password", cure="write it as user:password")
            return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
        return {}


def posted(alert: Alert, integration: str, time: str, config: AlertsConfig) -> list[dict[str, Any]]:
    """What is posted of one alert; `time` is the notification's.

    Where Alertmanager knows it by other labels than now, those come second, as over: should a message of its own go out
    in between, it says too much rather than too little.
    """
    ends = None if alert.firing else alert.ends_at
    entries = [_entry(alert, alert.severity, config, ends=ends, told=time)]
    before = alert.told.get(integration)
    if before not in (None, "resolved", alert.severity):
        entries.append(_entry(alert, before, config, ends=ends or time, told=time))
    return entries


def _entry(
    alert: Alert, severity: str | None, config: AlertsConfig, *, ends: str | None = None, told: str = ""
) -> dict[str, Any]:
    """One postable alert. Events have their collectors' time, but what has not begun or ended here by now has not there
    either: so it begins no later than it was accepted, ends no later than it is told, and never before it began.
    """
    begun = min(_moment(alert.starts_at), datetime.fromtimestamp(alert.accepted, UTC))
    entry: dict[str, Any] = {
        "labels": labels(alert) | {"severity": severity},
        "annotations": annotations_of(alert, config),
        "startsAt": _written(begun),
    }
    if ends is not None:
        entry["endsAt"] = _written(max(begun, min(_moment(ends), _moment(told))))
    session = next((link.url for link in links(alert, config) if link.name.startswith("Session")), "")
    return entry | ({"generatorURL": session} if session else {})


def _moment(time: str) -> datetime:
    return datetime.fromisoformat(time)


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
