"""What a notification says: title, sentence, facts, links and the whole as plain text. Pure.

It knows no channel. Names that strangers gave are passed through `name`, which each channel chooses for its own markup;
all other words are this project's own, without a character that any markup knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import quote

from alerts.config import AlertsConfig
from alerts.escape import shown
from alerts.story import signed, sparkline, story
from monitor.alert import Alert, Notification

__all__ = [
    "Fact",
    "Link",
    "annotations_of",
    "facts",
    "headline",
    "links",
    "plain",
    "sentence",
    "sparkline",
    "story",
    "title",
]

Name = Callable[[str], str]

_KINDS = {
    "low_start": "low start",
    "sudden_drop": "sudden drop",
    "sustained_drop": "sustained drop",
    "dip": "dip",
    "recovered": "recovered",
    "fleet_shift": "fleet shift",
}
_HAPPENED = {
    "low_start": "began far from the Assistant",
    "sudden_drop": "dropped suddenly away from the Assistant",
    "sustained_drop": "has drifted steadily away from the Assistant",
    "dip": "left the Assistant for a passage of one response",
    "recovered": "came back to the Assistant",
}
_MEASURED = {
    "level": "its level lies {} standard deviations below the healthy mean",
    "drop": "its level lies {} standard deviations below its own beginning",
    "cusum": "what it fell short of the healthy mean adds up to {} standard deviations",
    "dip": "one passage lies {} standard deviations below the healthy mean",
}
_OVER = {
    "recovered": "it came back inside its boundary",
    "ended": "its conversation fell silent, and nobody measured that it recovered",
    "resolved": "somebody resolved it",
    "forgotten": "its conversation was deleted",
    "expired": "its time is up, and nobody measured that it went back",
}
_REASONS: dict[str, str] = {
    "first": "",
    "new_alerts": "new alerts",
    "escalated": "now worse",
    "resolved": "",
    "all_resolved": "",
    "repeat": "still firing",
    "digest": "digest",
    "test": "test",
}
MOST_ROLES = 3
CAUTION = "A low reading is a permissive state of the model, not proof of harm."


class Fact(NamedTuple):
    """One line of a table: what, and its value with names as `name` made them."""

    label: str
    value: str


class Link(NamedTuple):
    """A place to go on from, all ASCII."""

    name: str
    url: str


def headline(notification: Notification) -> str:
    """What it is about in a few words, without a name that strangers gave: `Critical: 2 dips (still firing)`."""
    alerts = notification.alerts
    firing = [alert for alert in alerts if alert.firing]
    word = _REASONS[notification.reason]
    if not alerts:
        return f"Anchorwatch: {word or 'nothing fires'}"
    if firing:
        worst = "Critical" if any(alert.severity == "critical" for alert in firing) else firing[0].severity.capitalize()
        lead = "Warning" if worst == "Info" and any(alert.severity == "warning" for alert in firing) else worst
        said = f"{lead}: {_counted(firing)}"
        if over := len(alerts) - len(firing):
            said += f", {over} resolved"
    else:
        said = f"Resolved: {_counted(alerts)}"
    if notification.truncated:
        said += f", {notification.truncated:,} more"
    return f"{said} ({word})" if word else said


def title(notification: Notification, name: Name = shown) -> str:
    """The headline, and where: `Critical: sudden drop in support-bot, conversation c-17, towards pirate`."""
    where = sorted({alert.deployment for alert in notification.alerts})
    if not where:
        return headline(notification)
    said = f"{headline(notification)} in {name(where[0]) if len(where) == 1 else f'{len(where)} deployments'}"
    if len(notification.alerts) == 1 and not notification.truncated:
        (alert,) = notification.alerts
        said += f", conversation {name(alert.conversation_id)}" if alert.conversation_id else ""
        said += f", towards {name(alert.nearest_roles[0])}" if alert.nearest_roles and alert.firing else ""
    return said


def sentence(alert: Alert, name: Name = shown) -> str:
    """What happened, in one sentence: who, what, how far, over what boundary."""
    if alert.kind == "fleet_shift":
        way = "fell" if alert.value >= 0.0 else "rose"
        said = (
            f"The mean of all conversations of deployment {name(alert.deployment)} {way} by {abs(alert.value):.1f} "
            f"standard deviations; {alert.boundary:.1f} are tolerated."
        )
    else:
        measured = _MEASURED.get(alert.statistic, "its statistic is {}").format(f"{alert.value:.1f}")
        said = (
            f"Conversation {name(alert.conversation_id)} in deployment {name(alert.deployment)} "
            f"{_HAPPENED[alert.kind]}: in turn {alert.turn}, {measured} ({_times(alert)})."
        )
    return said if alert.firing else f"Over: {_OVER[alert.resolution or 'resolved']}. It was: {said}"


def facts(alert: Alert, name: Name = shown) -> list[Fact]:
    """What one looks up, each with its label; those without a value are left out."""
    rows = (
        ("Severity", alert.severity if alert.firing else f"resolved, was {alert.severity}"),
        ("Kind", _KINDS[alert.kind]),
        ("Conversation", name(alert.conversation_id) if alert.conversation_id else ""),
        ("Deployment", name(alert.deployment)),
        ("Model", name(alert.model) if alert.model else ""),
        ("Since", name(alert.starts_at)),
        ("Until", name(alert.ends_at) if alert.ends_at else ""),
        ("Reading", f"{name(alert.statistic)} {alert.value:.2f}, boundary {alert.boundary:.2f}, risk {alert.risk:.2f}"),
        ("Budget", _budget(alert)),
        ("Nearest roles", ", ".join(name(role) for role in alert.nearest_roles[:MOST_ROLES])),
        ("Acknowledged by", name(alert.acknowledged_by) if alert.acknowledged_by else ""),
        ("Trajectory", name(alert.sparkline) if alert.sparkline else ""),
    )
    return [Fact(label, value) for label, value in rows if value]


def links(alert: Alert, config: AlertsConfig) -> list[Link]:
    """Where to look: the session, or for a fleet shift the deployment's; the operator's log viewer; the runbook."""
    found = []
    conversation = quote(alert.conversation_id, safe="")
    if config.external_url:
        place = f"sessions/{conversation}" if conversation else f"?deployment={quote(alert.deployment, safe='')}"
        found.append(Link("Session" if conversation else "Sessions", f"{config.external_url}/{place}"))
    if config.conversation_url and conversation:
        found.append(Link("Log viewer", config.conversation_url.replace("{conversation_id}", conversation)))
    if config.runbook_url:
        found.append(Link("Runbook", config.runbook_url.replace("{kind}", alert.kind)))
    return found


def annotations_of(alert: Alert, config: AlertsConfig) -> dict[str, str]:
    """All of it for machines that show it to people: Alertmanager's annotations. Empty ones are left out."""
    urls = {link.name: link.url for link in links(alert, config)}
    found = {
        "summary": sentence(alert),
        "description": alert.story,
        "sparkline": alert.sparkline,
        "value": f"{alert.value:.4g}",
        "boundary": f"{alert.boundary:.4g}",
        "risk": f"{alert.risk:.4g}",
        "budget": _budget(alert),
        "statistic": shown(alert.statistic),
        "turn": "" if alert.kind == "fleet_shift" else str(alert.turn),
        "nearest_roles": ", ".join(shown(role) for role in alert.nearest_roles),
        "acknowledged_by": shown(alert.acknowledged_by),
        "resolution": alert.resolution or "",
        "session_url": urls.get("Session", "") or urls.get("Sessions", ""),
        "conversation_url": urls.get("Log viewer", ""),
        "runbook_url": urls.get("Runbook", ""),
    }
    return {name: value for name, value in found.items() if value}


def plain(notification: Notification, config: AlertsConfig) -> str:
    """The whole message as text of 7 to 100 lines or so for each alert; ends with a newline."""
    return "\n".join(_lines(notification, config)) + "\n"


def _lines(notification: Notification, config: AlertsConfig) -> Iterable[str]:
    yield title(notification)
    if notification.note:
        yield ""
        yield notification.note
    for alert in notification.alerts:
        yield ""
        yield sentence(alert)
        if alert.story:
            yield alert.story
        yield from (f"  {label + ':':<17}{value}" for label, value in facts(alert))
        yield from (f"  {label + ':':<17}{url}" for label, url in links(alert, config))
    if notification.truncated:
        yield ""
        yield more(notification)
    yield ""
    yield CAUTION


def more(notification: Notification, unseen: int = 0) -> str:
    """That alerts are not shown: those that the notification leaves out, and `unseen` more."""
    count = notification.truncated + unseen
    return f"{count:,} more {'alert is' if count == 1 else 'alerts are'} not shown here; the page lists all of them."


def _counted(alerts: list[Alert] | tuple[Alert, ...]) -> str:
    """`sudden drop`, `3 sudden drops`, or `3 sudden drops, 1 dip`."""
    counts = Counter(_KINDS[alert.kind] for alert in alerts)
    if len(alerts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.most_common())


def _times(alert: Alert) -> str:
    if alert.risk >= 1.0:
        return f"{alert.risk:.1f} times its warning boundary"
    return f"boundary {signed(alert.boundary)}, risk {alert.risk:.2f}"


def _budget(alert: Alert) -> str:
    """What the boundary promises, in words."""
    if alert.budget is None:
        return (
            "uncertified: nobody counted how many healthy ones would alarm"
            if alert.certification != "certified"
            else ""
        )
    share = f"{alert.budget * 100.0:.3g} % of healthy conversations may warn"
    return share if alert.certification == "certified" else f"{share}, uncertified"
