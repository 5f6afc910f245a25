"""PagerDuty, Events API v2: one incident for each group, triggered, acknowledged and resolved.

It knows the event's fields and limits; what is said comes from `alerts.message`. Sources: PagerDuty's developer
documentation, "Events API v2" (Overview, Send an Alert Event), and its published OpenAPI document of that API. Not run
against PagerDuty itself. A repeat does no harm: the same `dedup_key` is the same incident.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from alerts.config import AlertsConfig, PagerDutyConfig
from alerts.escape import cut, shown
from alerts.http import Client
from alerts.message import CAUTION, facts, links, sentence, title
from alerts.secret import read_secret
from monitor.alert import Alert, Notification

__all__ = ["PagerDutyChannel", "action", "event"]

MOST_DEDUP_KEY = 255
MOST_SUMMARY = 1024
MOST_BYTES = 500_000  # PagerDuty takes 512 KB
MOST_LINKS = 20
MOST_ALERTS = 100

Action = Literal["trigger", "acknowledge", "resolve"]


class PagerDutyChannel:
    """The PagerDuty integration."""

    refresh: float | None = None

    def __init__(self, integration: PagerDutyConfig, config: AlertsConfig) -> None:
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self._integration = integration
        self._config = config
        self._client = Client(timeout=integration.timeout, allow_private=integration.allow_private)

    def deliver(self, notification: Notification) -> None:
        """Send its event. See `Channel.deliver`."""
        key = read_secret(self._integration.routing_key_file)
        self._client.post(
            self._integration.url, event(notification, self._config, key), {"Content-Type": "application/json"}
        )

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Nothing to say again: an incident stays open."""

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def action(notification: Notification) -> Action:
    """What becomes of the group's incident.

    It is resolved once nothing in the group fires, shown or not; acknowledged where all that fires is, and nothing is
    new. A digest opens one of its own, since somebody is to read it; whoever has, closes it.
    """
    if notification.reason == "digest" or not notification.alerts:
        return "trigger"
    over = notification.reason == "all_resolved" or not notification.truncated
    if over and notification.status == "resolved":
        return "resolve"
    firing = [alert for alert in notification.alerts if alert.firing]
    news = notification.reason in ("first", "new_alerts", "escalated")
    if firing and not news and not notification.truncated and all(alert.acknowledged_by for alert in firing):
        return "acknowledge"
    return "trigger"


def event(notification: Notification, config: AlertsConfig, routing_key: str) -> bytes:
    """The event as JSON; the same for the same notification. Alerts that don't fit are counted in it, not listed."""
    found: dict[str, Any] = {
        "routing_key": routing_key,
        "event_action": action(notification),
        "dedup_key": notification.group[:MOST_DEDUP_KEY],
    }
    if found["event_action"] != "trigger":
        return msgspec.json.encode(found)
    count = min(len(notification.alerts), MOST_ALERTS)
    while True:
        encoded = msgspec.json.encode(found | _told(notification, config, count))
        if len(encoded) <= MOST_BYTES or not count:
            return encoded
        count //= 2


def _told(notification: Notification, config: AlertsConfig, count: int) -> dict[str, Any]:
    alerts = notification.alerts
    first = alerts[0] if alerts else None
    deployments = sorted({alert.deployment for alert in alerts})
    source = shown(deployments[0]) if len(deployments) == 1 else "anchorwatch"
    payload: dict[str, Any] = {
        "summary": cut(_summary(notification), MOST_SUMMARY),
        "source": source,
        "severity": _severity(notification),
        "timestamp": notification.time,
        "group": source,
        "class": first.kind if first and len({alert.kind for alert in alerts}) == 1 else "persona_drift",
        "custom_details": {
            "note": notification.note,
            "reason": notification.reason,
            "alerts": [_details(alert, config) for alert in alerts[:count]],
            "not_shown": notification.truncated + len(alerts) - count,
            "caution": CAUTION,
        },
    }
    if first and first.model and len({alert.model for alert in alerts}) == 1:
        payload["component"] = shown(first.model)
    told: dict[str, Any] = {"payload": payload, "client": "Anchorwatch"}
    if config.external_url:
        told["client_url"] = config.external_url
    if first:
        told["links"] = [
            {"href": url, "text": label if len(alerts) == 1 else f"{label}, riskiest alert"}
            for label, url in links(first, config)[:MOST_LINKS]
        ]
    return told


def _summary(notification: Notification) -> str:
    if len(notification.alerts) == 1 and not notification.truncated:
        return f"{title(notification)}: {sentence(notification.alerts[0])}"
    return title(notification) + (f". {notification.note}" if notification.note else "")


def _severity(notification: Notification) -> str:
    """PagerDuty's words; what tells of nothing that fires is for information."""
    words = {alert.severity for alert in notification.alerts if alert.firing}
    return next((word for word in ("critical", "warning", "info") if word in words), "info")


def _details(alert: Alert, config: AlertsConfig) -> dict[str, str]:
    return {
        "summary": sentence(alert),
        "trajectory": alert.story,
        **dict(facts(alert)),
        **dict(links(alert, config)),
        "Alert": shown(alert.id),
    }
