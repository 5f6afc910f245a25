"""Rules and routes: what the one YAML file says, checked. It knows how alerts go out, and sends none.

Words and meaning are Alertmanager's wherever it has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from monitor.matchers import Matcher

__all__ = [
    "AlertmanagerConfig",
    "AlertsConfig",
    "EmailConfig",
    "InhibitRule",
    "LogConfig",
    "PagerDutyConfig",
    "Receiver",
    "Route",
    "SlackConfig",
    "TimeInterval",
    "WebhookConfig",
]


class Integration(Struct, frozen=True, kw_only=True):
    """One way to one place. `index` counts those of one type within a receiver; see `name`."""

    receiver: str
    index: int = 0
    send_resolved: bool = True

    @property
    def name(self) -> str:
        """What metrics, notes and logs call it, such as `ops/webhook[0]`."""
        return f"{self.receiver}/{type(self).__name__.removesuffix('Config').lower()}[{self.index}]"


class WebhookConfig(Integration, frozen=True, kw_only=True):
    """Alertmanager's webhook body, signed by Standard Webhooks with every secret given (two, while one is rotated)."""

    url: str
    secret_files: tuple[Path, ...] = ()
    max_alerts: int = 100
    timeout: float = 10.0
    allow_private: bool = False


class AlertmanagerConfig(Integration, frozen=True, kw_only=True):
    """Alertmanager's API v2. It groups and repeats by itself: alerts go there one by one, and are refreshed."""

    url: str
    basic_auth_file: Path | None = None
    bearer_token_file: Path | None = None
    refresh: float = 60.0
    timeout: float = 10.0
    allow_private: bool = False


class PagerDutyConfig(Integration, frozen=True, kw_only=True):
    """PagerDuty's Events API v2: one incident for each group."""

    routing_key_file: Path
    url: str = "https://events.pagerduty.com/v2/enqueue"
    timeout: float = 10.0
    allow_private: bool = False


class SlackConfig(Integration, frozen=True, kw_only=True):
    """Slack's incoming webhooks; the address is the secret, so it comes from a file."""

    url_file: Path
    max_alerts: int = 10
    timeout: float = 10.0
    allow_private: bool = False


class EmailConfig(Integration, frozen=True, kw_only=True):
    """One mail to all of `to`."""

    to: tuple[str, ...]
    sender: str
    host: str
    port: int = 587
    username: str = ""
    password_file: Path | None = None
    tls: Literal["starttls", "tls", "none"] = "starttls"
    max_alerts: int = 100
    timeout: float = 10.0


class LogConfig(Integration, frozen=True, kw_only=True):
    """One JSON object a line, in a file or on standard output."""

    path: Path | None = None


AnyIntegration = WebhookConfig | AlertmanagerConfig | PagerDutyConfig | SlackConfig | EmailConfig | LogConfig


class Receiver(Struct, frozen=True, kw_only=True):
    """Whom to tell, and how much at most. A cap of None is none; resolutions and digests do not count."""

    name: str
    integrations: tuple[AnyIntegration, ...]
    max_per_day: int | None = None
    max_per_deployment_per_day: int | None = None


class TimeInterval(Struct, frozen=True, kw_only=True):
    """Hours of the week, in one time zone: quiet hours. Minutes since midnight, half open; weekdays 0 = Monday."""

    name: str
    times: tuple[tuple[int, int], ...] = ((0, 1440),)
    weekdays: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    location: str = "UTC"


class Route(Struct, frozen=True, kw_only=True):
    """One node of the tree; what a child does not say it has from its parent. Durations in seconds.

    Attributes:
        path: its place in the tree, such as `0/2`: part of the group's identity.
        group_by: label names; ("...",) is every label, so that each alert is a group.
        mute: quiet hours: names of time intervals in which nothing goes out.
    """

    path: str
    receiver: str
    matchers: tuple[Matcher, ...] = ()
    group_by: tuple[str, ...] = ("deployment", "kind")
    group_wait: float = 10.0
    group_interval: float = 300.0
    repeat_interval: float = 4 * 3600.0
    continues: bool = False
    mute: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()


class InhibitRule(Struct, frozen=True, kw_only=True):
    """While an alert that matches the source fires, targets that agree with it on `equal` are not told of."""

    source: tuple[Matcher, ...]
    target: tuple[Matcher, ...]
    equal: tuple[str, ...] = ()


class AlertsConfig(Struct, frozen=True, kw_only=True):
    """The whole file. Durations in seconds.

    Attributes:
        external_url: where people reach the page, without a trailing slash; empty: messages carry no link to a session.
        conversation_url: template of the operator's own log viewer, with `{conversation_id}` in it; or empty.
        runbook_url: template with `{kind}`.
        idle_after: an episode whose conversation has been silent for so long is over: `ended`.
        fleet_after: a fleet shift's alert is over after so long.
    """

    route: Route
    receivers: tuple[Receiver, ...]
    inhibit_rules: tuple[InhibitRule, ...] = ()
    time_intervals: tuple[TimeInterval, ...] = ()
    external_url: str = ""
    conversation_url: str = ""
    runbook_url: str = "https://anchorwatch.invalid/runbooks/{kind}"
    idle_after: float = 1800.0
    fleet_after: float = 86_400.0
