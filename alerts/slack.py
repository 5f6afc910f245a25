"""Slack: one message in blocks for each notification, through an incoming webhook.

It knows Slack's limits and its markup; what is said comes from `alerts.message`. Names that strangers gave stand in
code, where nothing is parsed, and the header has none. Sources: docs.slack.dev, "Block Kit", "Formatting message text"
and "Sending messages using incoming webhooks". Not run against Slack itself; a repeat is a second message there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from alerts.config import AlertsConfig, SlackConfig
from alerts.escape import code_span, cut, mrkdwn, shown
from alerts.http import Client
from alerts.message import CAUTION, Link, facts, headline, links, more, sentence, title
from alerts.secret import read_secret
from monitor.alert import Alert, Notification

__all__ = ["SlackChannel", "body"]

MOST_BLOCKS = 50
MOST_HEADER = 150
MOST_TEXT = 3000
MOST_FIELD = 2000
MOST_FIELDS = 10
MOST_NAME = 48  # of a name's own characters: written out, each may become ten
MOST_OWN = 500  # of our own sentences: escaped, each character may become five
AROUND = 4  # blocks beside the alerts: header, note, what is not shown, caution
IN_FIELDS = (
    "Severity",
    "Deployment",
    "Model",
    "Since",
    "Until",
    "Reading",
    "Budget",
    "Nearest roles",
    "Acknowledged by",
)


class SlackChannel:
    """The Slack integration."""

    refresh: float | None = None

    def __init__(self, integration: SlackConfig, config: AlertsConfig) -> None:
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self._integration = integration
        self._config = config
        self._client = Client(timeout=integration.timeout, allow_private=integration.allow_private)

    def deliver(self, notification: Notification) -> None:
        """Post it. See `Channel.deliver`."""
        self._client.post(
            read_secret(self._integration.url_file),
            body(notification, self._config, self._integration.max_alerts),
            {"Content-Type": "application/json; charset=utf-8"},
            secret_url=True,
        )

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Nothing to say again: a message stays."""

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def body(notification: Notification, config: AlertsConfig, max_alerts: int) -> bytes:
    """The message as JSON; the same for the same notification."""
    told = notification.alerts[: min(max_alerts, MOST_BLOCKS - AROUND)]
    unseen = len(notification.alerts) - len(told)
    blocks: list[dict[str, Any]] = [{"type": "header", "text": _plain(_mark(notification) + headline(notification))}]
    if notification.note:
        blocks.append(_section(mrkdwn(cut(notification.note, MOST_OWN))))
    blocks += [_alert(alert, config) for alert in told]
    if notification.truncated or unseen:
        blocks.append(_section(more(notification, unseen)))
    blocks.append({"type": "context", "elements": [_mrkdwn(CAUTION)]})
    return msgspec.json.encode(
        {
            "text": cut(mrkdwn(title(notification, lambda name: shown(name, MOST_NAME))), MOST_TEXT),
            "blocks": blocks,
            "unfurl_links": False,
            "unfurl_media": False,
        }
    )


def _alert(alert: Alert, config: AlertsConfig) -> dict[str, Any]:
    text = f"*{alert.severity.capitalize() if alert.firing else 'Resolved'}.* {sentence(alert, _name)}"
    if alert.story:
        text += f"\n{mrkdwn(cut(alert.story, MOST_OWN))}"
    if alert.sparkline:
        text += f"\n{_name(alert.sparkline)}"
    block = _section(_with_links(text, links(alert, config)))
    found = [fact for fact in facts(alert, _name) if fact.label in IN_FIELDS]
    block["fields"] = [_mrkdwn(cut(f"*{label}*\n{value}", MOST_FIELD)) for label, value in found[:MOST_FIELDS]]
    return block


def _with_links(text: str, found: Sequence[Link]) -> str:
    """The text, and below it the links that fit, the most useful first. A link is whole, or left out."""
    text = cut(text, MOST_TEXT)
    line = ""
    for link in found:
        url = mrkdwn(link.url.replace("|", "%7C").replace("<", "%3C").replace(">", "%3E"))
        longer = f"{line} · <{url}|{link.name}>" if line else f"\n<{url}|{link.name}>"
        if len(text) + len(longer) <= MOST_TEXT:
            line = longer
    return text + line


def _name(text: str) -> str:
    return code_span(text, MOST_NAME)


def _mark(notification: Notification) -> str:
    """A coloured dot, to be seen from afar."""
    if notification.status == "resolved":
        return "🟢 " if notification.alerts else "⚪ "
    critical = any(alert.severity == "critical" for alert in notification.alerts if alert.firing)
    return "🔴 " if critical else "🟠 "


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": _mrkdwn(cut(text, MOST_TEXT))}


def _mrkdwn(text: str) -> dict[str, Any]:
    # verbatim: addresses and channels in the text are not made into links.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def _plain(text: str) -> dict[str, Any]:
    return {"type": "plain_text", "text": cut(text, MOST_HEADER), "emoji": False}
