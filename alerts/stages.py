"""What is told of a group of alerts, and when: small pure steps. Time and all that is known are passed in.

route → inhibit → silence → quiet hours → needs_update → compose. They know no channel, no store and no clock; the words
and what they mean are Alertmanager's. `alerts.groups` says when a group's turn has come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from msgspec.structs import replace

from alerts.config import InhibitRule, Route, TimeInterval, taken_by
from monitor.actions import Silence
from monitor.alert import Alert, Notification, Reason, State, labels, state
from monitor.matchers import matches

__all__ = [
    "Inhibition",
    "Limits",
    "Place",
    "Update",
    "compose",
    "moment",
    "needs_update",
    "places",
    "quiet",
    "seconds",
    "silenced",
]

MOST_COVERED = 1000  # alerts in one notification
MOST_BYTES = 600 * 1024  # of the alerts that it shows
CONTEXT = 100  # alerts that are shown beside those that are told of, at most

_encode = msgspec.json.Encoder(order="sorted").encode


# Route and group.


class Place(NamedTuple):
    """Where an alert is told of: the route that took it, and what of its labels makes the group."""

    route: Route
    labels: tuple[tuple[str, str], ...]
    group: str


def places(route: Route, alert: Alert) -> list[Place]:
    """The routes that take the alert, and its group in each."""
    found = labels(alert)
    return [_place(taken, found) for taken in taken_by(route, found)]


def _place(route: Route, found: Mapping[str, str]) -> Place:
    # Severity alone changes while an alert fires: by "every label" all but that is meant, or it would change its group.
    names = [name for name in found if name != "severity"] if route.group_by == ("...",) else route.group_by
    chosen = tuple(sorted((name, found[name]) for name in names if name in found))
    said = "\x1f".join([route.receiver, route.path, *(f"{name}\x1e{value}" for name, value in chosen)])
    return Place(route, chosen, hashlib.sha256(said.encode()).hexdigest()[:32])


# Inhibit, silence, quiet hours.


class Inhibition:
    """Which alerts are not told of because another one fires. As in Alertmanager, what matches both sides of a rule is
    not inhibited by what does so too, itself included."""

    def __init__(self, rules: Sequence[InhibitRule]) -> None:
        self._rules = rules
        self._sources: list[dict[tuple[str, ...], dict[str, bool]]] = [{} for _ in rules]
        self._places: dict[str, list[tuple[int, tuple[str, ...]]]] = {}

    def put(self, alert: Alert) -> bool:
        """Take in an alert as it is now; True when that changed what is inhibited."""
        if not self._rules:
            return False
        before = self._places.pop(alert.id, [])
        for rule, values in before:
            of_values = self._sources[rule][values]
            del of_values[alert.id]
            if not of_values:
                del self._sources[rule][values]
        now = []
        if alert.firing:
            found = labels(alert)
            for number, rule_ in enumerate(self._rules):
                if matches(rule_.source, found):
                    values = tuple(found.get(name, "") for name in rule_.equal)
                    both = matches(rule_.target, found)
                    self._sources[number].setdefault(values, {})[alert.id] = both
                    now.append((number, values))
        if now:
            self._places[alert.id] = now
        return now != before

    def drop(self, alert: Alert) -> None:
        """Forget it."""
        self.put(replace(alert, ends_at=alert.ends_at or alert.starts_at))

    def inhibits(self, alert: Alert) -> bool:
        """Whether it is not told of now."""
        if not self._places:
            return False
        found = labels(alert)
        for rule, sources in zip(self._rules, self._sources, strict=True):
            if not sources or not matches(rule.target, found):
                continue
            firing = sources.get(tuple(found.get(name, "") for name in rule.equal), {})
            if firing and (not matches(rule.source, found) or not all(firing.values())):
                return True
        return False


def silenced(alert: Alert, silences: Sequence[Silence]) -> bool:
    """Whether one of them is about it."""
    if not silences:
        return False
    found = labels(alert)
    return any(silence.mutes(found) for silence in silences)


def quiet(route: Route, intervals: Iterable[TimeInterval], now: float) -> bool:
    """Whether a route's quiet hours are on; several intervals may have one name."""
    if not route.mute:
        return False
    for interval in intervals:
        if interval.name in route.mute:
            local = datetime.fromtimestamp(now, ZoneInfo(interval.location))
            minute = local.hour * 60 + local.minute
            if local.weekday() in interval.weekdays and any(start <= minute < end for start, end in interval.times):
                return True
    return False


# Needs update.


class Update(NamedTuple):
    """Why something is to be told, of which alerts, and which others fire beside them. Riskiest first.

    `muted` fire, too, and have been told, but are not to be seen now: when all is told to be over, so are they.
    """

    reason: Reason
    news: tuple[Alert, ...]
    others: tuple[Alert, ...] = ()
    muted: tuple[Alert, ...] = ()


def needs_update(
    alerts: Sequence[Alert],
    told: Mapping[str, State],
    *,
    repeat: bool = False,
    seen: bool = False,
    send_resolved: bool = True,
) -> Update | None:
    """What there is to tell of a group, and why; None when there is nothing.

    Args:
        alerts: those of the group that may be told of now.
        told: alert id → what this group was last told of it.
        repeat: whether it is time to say again what still fires. What everybody has seen is not repeated.
        seen: whether to say, once, that everybody who had to see what fires has seen it.
        send_resolved: whether ends are told.
    """
    new, escalated, over, others = [], [], [], []
    for alert in alerts:
        before, now = told.get(alert.id), state(alert)
        fired = before not in (None, "resolved")
        if now == "resolved":
            if fired and send_resolved:
                over.append(alert)
        elif not fired:
            new.append(alert)
        elif now != before:
            escalated.append(alert)
        else:
            others.append(alert)
    reason: Reason
    if new:
        fires = any(word != "resolved" for word in told.values())
        reason = "new_alerts" if fires else "first"
    elif escalated:
        reason = "escalated"
    elif over:
        reason = "resolved" if others else "all_resolved"
    elif others and (seen if all(alert.acknowledged_by for alert in others) else repeat):
        return Update("repeat", (), _riskiest(others))
    else:
        return None
    return Update(reason, _riskiest([*new, *escalated]) + _riskiest(over), _riskiest(others))


def _riskiest(alerts: Sequence[Alert]) -> tuple[Alert, ...]:
    return tuple(sorted(alerts, key=lambda alert: (-alert.risk, alert.starts_at, alert.id)))


# Compose.


class Limits(NamedTuple):
    """How much one integration is told at once.

    Attributes:
        shown: alerts in one message, at most.
        whole: whether it must be shown each alert that it is told of: then the rest goes into further messages.
        context: whether it is shown what else fires in the group.
    """

    shown: int
    whole: bool = False
    context: bool = True


def compose(
    update: Update,
    limits: Limits,
    *,
    integration: str,
    group: str,
    group_labels: Mapping[str, str],
    sequence: int,
    now: float,
    note: str = "",
    spent: Mapping[str, int] | None = None,
) -> Notification:
    """The message. Its id is the hash of all that is in it, so that one id never stands for two of them.

    What it covers may be less than there is to tell; the rest is left for the next one.
    """
    news = update.news[: min(MOST_COVERED, limits.shown if limits.whole else MOST_COVERED)]
    shown = list(_fitting(news[: limits.shown]))
    others = update.others if limits.context or not news else ()
    if update.reason == "repeat" or not news:
        shown = list(_fitting(others[: min(limits.shown, CONTEXT)]))
    elif others:
        # While something fires, something that fires is shown: else the message would say that all is over.
        if len(shown) >= limits.shown and not any(alert.firing for alert in shown) and limits.shown > 1:
            shown.pop()
        room = max(0, min(limits.shown, CONTEXT) - len(shown))
        shown = list(_fitting([*shown, *others[:room]]))
    ids = {alert.id for alert in shown}
    covers = tuple(alert for alert in news if alert.id in ids) if limits.whole else news
    covered = {alert.id: state(alert) for alert in covers}
    for alert in _riskiest(update.muted)[: MOST_COVERED - len(covered)]:
        covered[alert.id] = "resolved"
    shown.sort(key=lambda alert: (not alert.firing, -alert.risk, alert.starts_at, alert.id))
    made = Notification(
        id="",
        integration=integration,
        group=group,
        labels=dict(group_labels),
        reason=update.reason,
        time=moment(now),
        sequence=sequence,
        alerts=tuple(replace(alert, told=_word(alert, integration)) for alert in shown),
        covered=covered,
        truncated=sum(alert.id not in ids for alert in (*(covers if limits.whole else update.news), *update.others)),
        note=note,
        spent=dict(spent or {}),
    )
    return replace(made, id=hashlib.sha256(_encode(made)).hexdigest()[:32])


def _word(alert: Alert, integration: str) -> dict[str, State]:
    return {integration: alert.told[integration]} if integration in alert.told else {}


def _fitting(alerts: Iterable[Alert]) -> Iterator[Alert]:
    """As many as a record can hold; at least one."""
    size = 0
    for number, alert in enumerate(alerts):
        size += len(_encode(alert))
        if number and size > MOST_BYTES:
            return
        yield alert


def moment(now: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC, to the microsecond."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds(time: str) -> float:
    """And back."""
    return datetime.fromisoformat(time).timestamp()
