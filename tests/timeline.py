"""Timelines: what happens when, and what a receiver is told when. Time is passed in, so a week takes a moment.

    t = Timeline(route(group_wait=10))
    t.at(0, turns("c", 0, 0, -9))
    t.want(between(10, 11), told("c", "critical"))
    t.run(60)

Detector, decision, table and groups are the real ones; the store is a dictionary, the channel a list, and the loop asks
every `step` seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeAlias

from msgspec.structs import replace
from service import CONFIG, projection

from alerts.config import AlertsConfig, AnyIntegration, InhibitRule, Receiver, Route, TimeInterval
from alerts.groups import Groups
from alerts.receivers import WebhookConfig
from alerts.stages import moment
from alerts.table import Table
from monitor.actions import Silence
from monitor.alert import Notification
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, step
from monitor.events import Finding
from monitor.paging import Known, decide
from monitor.store.store import Pending

BEGIN = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()  # a Monday, noon
HOUR, DAY = 3600.0, 86_400.0


class Span(NamedTuple):
    """From, to; seconds since the timeline began."""

    begin: float
    end: float


class Told(NamedTuple):
    """What a notification has to say: conversation and state of those that it covers, and perhaps why."""

    what: frozenset[tuple[str, str]]
    reason: str | None = None
    at: str | None = None


Event: TypeAlias = "Callable[[Timeline], None]"


def between(begin: float, end: float) -> Span:
    return Span(begin, end)


def told(*what: str, reason: str | None = None, at: str | None = None) -> Told:
    """`told("c critical", "d resolved")`; `at` names the integration."""
    pairs = [one.split() for one in what]
    return Told(frozenset((name, word) for name, word in pairs), reason, at)


def turns(conversation: str, *values: float, deployment: str = "shop") -> Event:
    """Responses of one conversation, one second apart, the last of them now."""

    def happen(timeline: Timeline) -> None:
        timeline.respond(conversation, values, deployment)

    return happen


def shift(deployment: str = "shop") -> Event:
    """The whole deployment moves."""

    def happen(timeline: Timeline) -> None:
        finding = Finding(
            id=f"shift of {deployment} at {timeline.now}",
            time=moment(timeline.now),
            conversation_id="",
            turn=0,
            deployment=deployment,
            axis_id="axis-1",
            kind="fleet_shift",
            severity="warning",
            statistic="adwin",
            value=1.0,
            boundary=0.5,
            risk=2.0,
            budget=None,
            certification="uncertified",
            config_id="k",
            episode_id=f"shift of {deployment} at {timeline.now}",
        )
        timeline.pending.append(Pending("shift", finding, timeline.now))

    return happen


def silence(seconds: float, **given: str) -> Event:
    def happen(timeline: Timeline) -> None:
        timeline.silences.append(Silence(moment(timeline.now + seconds), **given))
        timeline.groups.silence(timeline.silences)

    return happen


def acknowledge(conversation: str) -> Event:
    def happen(timeline: Timeline) -> None:
        for alert in timeline.table.of_conversation(conversation):
            timeline.table.acknowledge(alert.id, "ann")
            timeline.groups.acknowledge(timeline.table.alerts[alert.id])

    return happen


def resolve(conversation: str) -> Event:
    def happen(timeline: Timeline) -> None:
        for alert in timeline.table.of_conversation(conversation):
            timeline.table.resolve(alert.id, "resolved", timeline.now)

    return happen


def away(seconds: float) -> Event:
    """The receiver takes nothing for so long."""

    def happen(timeline: Timeline) -> None:
        timeline.away_until = timeline.now + seconds

    return happen


def restart() -> Event:
    """A new dispatcher, which knows what is written down."""

    def happen(timeline: Timeline) -> None:
        timeline.restart()

    return happen


def route(**given: object) -> Route:
    """A root route; quick, unless it says otherwise."""
    return Route(
        **{  # type: ignore[arg-type]
            "path": "0",
            "receiver": "ops",
            "group_by": ("deployment",),
            "group_wait": 10.0,
            "group_interval": 60.0,
            "repeat_interval": 4 * HOUR,
            **given,
        }
    )


def rules(root: Route, **given: object) -> AlertsConfig:
    """Rules with a webhook `ops` and a webhook `night`."""
    return AlertsConfig(
        **{  # type: ignore[arg-type]
            "route": root,
            "receivers": (webhook("ops"), webhook("night")),
            **given,
        }
    )


def webhook(name: str, **given: object) -> Receiver:
    shown = {"max_alerts": given.pop("max_alerts")} if "max_alerts" in given else {}
    integrations: tuple[AnyIntegration, ...] = (
        WebhookConfig(receiver=name, url="https://hook.example", **shown),  # type: ignore[arg-type]
    )
    return Receiver(name=name, integrations=integrations, **given)  # type: ignore[arg-type]


class Timeline:
    """What happens, what is wanted, and `run`, which sees whether it is so and nothing else is."""

    def __init__(self, config: AlertsConfig | Route, *, step: float = 1.0, live: bool = True) -> None:
        self.config = rules(config) if isinstance(config, Route) else config
        self.detector: DetectorConfig = CONFIG
        self.now = BEGIN
        self.step = step
        self.live = live
        self.pending: list[Pending] = []
        self.silences: list[Silence] = []
        self.away_until = 0.0
        self.sent: list[tuple[float, Notification]] = []
        self._flying: list[Notification] = []
        self._written: dict[tuple[str, str], Notification] = {}
        self._states: dict[str, ConversationState] = {}
        self._turns: dict[str, int] = {}
        self._events: list[tuple[float, int, Event]] = []
        self._wants: list[tuple[Span, Told]] = []
        self.held: list[tuple[str, str, int]] = []
        self.table = Table(lambda alert: self.groups.put(alert))
        self._open()

    def _open(self) -> None:
        self.groups = Groups(self.config, self.table.alerts, lambda *what: self.held.append(what))
        self.groups.mode(self.live)
        self.groups.silence(self.silences)

    def restart(self) -> None:
        alerts = list(self.table.alerts.values())
        self.table = Table(lambda alert: self.groups.put(alert))
        self._open()
        for notification in self._written.values():
            self.groups.remember(notification)
        self._flying = [one for one in self._written.values() if not one.sent]
        for alert in alerts:
            self.table.load(alert)

    def configure(self, config: AlertsConfig) -> None:
        self.config = config
        self.groups.configure(config)

    def at(self, seconds: float, *events: Event) -> None:
        self._events += [(BEGIN + seconds, len(self._events) + n, event) for n, event in enumerate(events)]

    def want(self, span: Span, what: Told) -> None:
        self._wants.append((span, what))

    def respond(self, conversation: str, values: Sequence[float], deployment: str) -> None:
        for number, value in enumerate(values):
            turn = self._turns.get(conversation, 0)
            self._turns[conversation] = turn + 1
            event = replace(
                projection(conversation, turn, value, deployment=deployment),
                time=moment(self.now - (len(values) - 1 - number)),
            )
            done = step(self._states.get(conversation), event, self.detector)
            self._states[conversation] = done.state
            self.pending += [Pending(found.id, found, self.now) for found in done.findings]

    def run(self, seconds: float) -> None:
        """Let so many seconds pass, and compare."""
        self.run_quietly(seconds)
        self._compare()

    def run_quietly(self, seconds: float) -> None:
        """Let so many seconds pass."""
        events = sorted(self._events, key=lambda one: one[:2])
        end = self.now + seconds
        while self.now <= end:
            while events and events[0][0] <= self.now:
                events.pop(0)[2](self)
            self.round()
            self.now += self.step
        self._events = events

    def round(self) -> None:
        """One look of the dispatcher."""
        known = Known(
            now=self.now,
            max_age=HOUR,
            taken=self.table.knows,
            episodes=self.table.alerts.keys(),
            forgetting=set(),
            behind=lambda conversation: False,
            session=lambda conversation: None,
        )
        for decision in decide(self.pending, known):
            if decision.act == "take":
                self.table.take(decision.pending.finding, None, [], self.now)
        self.pending.clear()
        for notification in self.groups.due(self.now):
            self._written[notification.integration, notification.group] = notification
            self._flying.append(notification)
        if self.now >= self.away_until:
            for notification in self._flying:
                self.sent.append((self.now - BEGIN, notification))
                record = self.groups.sent(notification)
                self._written[record.integration, record.group] = record
                self.table.told(notification.integration, notification.covered)
            self._flying.clear()

    def _compare(self) -> None:
        left = list(self._wants)
        strays = []
        for at, notification in self.sent:
            hit = next((one for one in left if _fits(one, at, notification, self)), None)
            if hit is None:
                strays.append(f"{at:g}: {self.describe(notification)}")
            else:
                left.remove(hit)
        missing = [f"{span.begin:g}..{span.end:g}: {sorted(what.what)} {what.reason or ''}" for span, what in left]
        assert not strays and not missing, "\n".join(["unwanted:", *strays, "missing:", *missing])
        self._wants.clear()
        self.sent.clear()

    def covered(self, notification: Notification) -> Iterator[tuple[str, str]]:
        """Conversation, or a shift's deployment, and state."""
        for id, word in notification.covered.items():
            alert = self.table.alerts[id]
            yield alert.conversation_id or f"shift:{alert.deployment}", word

    def describe(self, notification: Notification) -> str:
        return f"{notification.integration} {notification.reason} {sorted(self.covered(notification))}"


def _fits(want: tuple[Span, Told], at: float, notification: Notification, timeline: Timeline) -> bool:
    span, what = want
    return (
        span.begin <= at <= span.end
        and frozenset(timeline.covered(notification)) == what.what
        and what.reason in (None, notification.reason)
        and (what.at is None or notification.integration.startswith(what.at))
    )


__all__ = [
    "BEGIN",
    "DAY",
    "HOUR",
    "InhibitRule",
    "TimeInterval",
    "Timeline",
    "acknowledge",
    "away",
    "between",
    "resolve",
    "restart",
    "route",
    "rules",
    "shift",
    "silence",
    "told",
    "turns",
    "webhook",
]
