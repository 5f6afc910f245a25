"""Rules and routes: what the one YAML file says, checked. It knows how alerts go out, and sends none.

Words and meaning are Alertmanager's wherever it has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args
from zoneinfo import ZoneInfo

from msgspec import Struct
from msgspec.structs import replace

from alerts.document import Problem, read_document
from alerts.receivers import (
    AlertmanagerConfig,
    AnyIntegration,
    EmailConfig,
    LogConfig,
    PagerDutyConfig,
    Receiver,
    SlackConfig,
    WebhookConfig,
    read_receiver,
)
from alerts.section import Section, near
from monitor.alert import LABELS
from monitor.errors import ConfigurationError
from monitor.events import Kind
from monitor.matchers import Matcher, matches, parse_matchers

__all__ = [
    "LABELS",
    "AlertmanagerConfig",
    "AlertsConfig",
    "AnyIntegration",
    "EmailConfig",
    "InhibitRule",
    "LogConfig",
    "PagerDutyConfig",
    "Receiver",
    "Route",
    "SlackConfig",
    "TimeInterval",
    "WebhookConfig",
    "load",
    "load_with_advice",
    "taken_by",
]

# What `monitor.alert.labels` gives: a matcher on another label would never be what somebody meant.
VALUES: dict[str, tuple[str, ...]] = {
    "alertname": ("AnchorwatchPersonaDrift", "AnchorwatchFleetShift"),
    "severity": ("warning", "critical", "info"),
    "kind": tuple(kind for kind in get_args(Kind) if kind != "recovered"),
}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


class TimeInterval(Struct, frozen=True, kw_only=True):
    """Hours of the week, in one time zone: quiet hours. Minutes since midnight, half open; weekdays 0 = Monday."""

    name: str
    times: tuple[tuple[int, int], ...] = ((0, 1440),)
    weekdays: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    location: str = "UTC"


class Route(Struct, frozen=True, kw_only=True):
    """One node of the tree; what a child does not say it has from its parent, matchers, continue and mute aside.
    Durations in seconds.

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
        runbook_url: template with `{kind}`; or empty.
        idle_after: an episode whose conversation has been silent for so long is over: `ended`.
        fleet_after: a fleet shift's alert is over after so long.
    """

    route: Route
    receivers: tuple[Receiver, ...]
    inhibit_rules: tuple[InhibitRule, ...] = ()
    time_intervals: tuple[TimeInterval, ...] = ()
    external_url: str = ""
    conversation_url: str = ""
    runbook_url: str = ""
    idle_after: float = 1800.0
    fleet_after: float = 86_400.0


def taken_by(route: Route, labels: Mapping[str, str]) -> tuple[Route, ...]:
    """The nodes that take an alert with these labels: the deepest that match, in the file's order, up to the first that
    does not say `continue`; the node itself where no child does. Empty where the node does not match."""
    if not matches(route.matchers, labels):
        return ()
    found: list[Route] = []
    for child in route.routes:
        taken = taken_by(child, labels)
        found += taken
        if taken and not child.continues:
            break
    return tuple(found) or (route,)


def load(path: Path) -> AlertsConfig:
    """Read the file of rules; see docs/alerts.md. Blocks while it reads it and the files it names.

    Raises:
        ConfigurationError: the file can't be read, or is wrong; it tells every mistake with its line.
    """
    return load_with_advice(path)[0]


def load_with_advice(path: Path) -> tuple[AlertsConfig, list[Problem]]:
    """The same, and what is no mistake but may not be meant."""
    root, problems = read_document(Path(path))
    top = Section(root, "", problems)
    receivers: list[Receiver] = []
    for section in top.sections("receivers"):
        receiver = read_receiver(section)
        if any(receiver.name == other.name for other in receivers):
            section.wrong("name", f"there are two receivers {receiver.name!r}")
        receivers.append(receiver)
    if not receivers:
        top.wrong("receivers", "name at least one: - name: ops")
    intervals = _intervals(top.sections("time_intervals"))
    names = {receiver.name for receiver in receivers}
    route_section = top.section("route", required=True)
    route = Route(path="0", receiver="")
    if route_section is not None:
        route = _route(route_section, None, "0", names, intervals)
        for unused in sorted(names - _used(route)):
            top.advise("receivers", f"no route leads to {unused!r}")
    rules = tuple(_inhibit_rule(section) for section in top.sections("inhibit_rules"))
    runbooks = top.template("runbook_url", "kind", "")
    external = top.url("external_url", "").rstrip("/")
    if "?" in external:
        top.wrong("external_url", "must be the page's address, without a query")
    if not external:
        top.advise("external_url", "is not given: messages carry no link to the session")
    if "runbook_url" not in top:
        top.advise("runbook_url", "is not given: messages carry no link to a runbook")
    config = AlertsConfig(
        route=route,
        receivers=tuple(receivers),
        inhibit_rules=rules,
        time_intervals=tuple(one for several in intervals.values() for one in several),
        external_url=external,
        conversation_url=top.template("conversation_url", "conversation_id", ""),
        runbook_url=runbooks,
        idle_after=top.seconds("idle_after", 1800.0, 1.0),
        fleet_after=top.seconds("fleet_after", 86_400.0, 1.0),
    )
    top.finish()
    problems.refuse()
    return config, sorted(problems.advice)


def _route(
    section: Section,
    parent: Route | None,
    path: str,
    receivers: set[str],
    intervals: Mapping[str, Sequence[TimeInterval]],
) -> Route:
    """One node and all below it; a struct's defaults are the root's."""
    above = parent or Route(path=path, receiver="")
    receiver = section.text("receiver", None if parent is None else above.receiver)
    if receiver and receiver not in receivers:
        section.wrong("receiver", f"there is no receiver {receiver!r}{near(receiver, receivers)}")
    group_by = section.texts("group_by", above.group_by)
    if "..." in group_by and len(group_by) > 1:
        section.wrong("group_by", "'...' means every label, and stands alone")
    _known_labels(section, "group_by", tuple(name for name in group_by if name != "..."))
    if "severity" in group_by and "group_by" in section:
        section.advise("group_by", "severity changes while an alert fires: it leaves its group when it grows worse")
    mute: list[str] = []
    for name in section.texts("mute_time_intervals"):
        if name not in intervals:
            section.wrong("mute_time_intervals", f"there is no time interval {name!r}{near(name, intervals)}")
        mute += [one.name for one in intervals.get(name, ())]
    matchers = _matchers(section, "matchers")
    continues = section.truth("continue", False)
    if parent is None and (matchers or continues):
        section.wrong("matchers" if matchers else "continue", "the root takes every alert: put it into a child")
    node = Route(
        path=path,
        receiver=receiver,
        matchers=matchers,
        group_by=group_by,
        group_wait=section.seconds("group_wait", above.group_wait, 0.0, 86_400.0),
        group_interval=section.seconds("group_interval", above.group_interval, 1.0),
        repeat_interval=section.seconds("repeat_interval", above.repeat_interval, 60.0),
        continues=continues,
        mute=tuple(mute),
    )
    if node.repeat_interval < node.group_interval:
        section.advise("repeat_interval", "is shorter than group_interval, so that one counts")
    children: list[Route] = []
    for place, child in enumerate(section.sections("routes")):
        if any(not before.matchers and not before.continues for before in children):
            child.advise("matchers", "no alert comes here: an earlier route takes them all")
        children.append(_route(child, node, f"{path}/{place}", receivers, intervals))
    section.finish()
    return replace(node, routes=tuple(children))


def _used(route: Route) -> set[str]:
    return {route.receiver}.union(*(_used(child) for child in route.routes))


def _inhibit_rule(section: Section) -> InhibitRule:
    rule = InhibitRule(
        source=_matchers(section, "source_matchers"),
        target=_matchers(section, "target_matchers"),
        equal=section.texts("equal"),
    )
    for key in ("source_matchers", "target_matchers"):
        if not section.texts(key):
            section.wrong(key, "name at least one: without, every alert would do")
    _known_labels(section, "equal", rule.equal)
    section.finish()
    return rule


def _matchers(section: Section, key: str) -> tuple[Matcher, ...]:
    found: list[Matcher] = []
    for text in section.texts(key):
        try:
            found += parse_matchers(text)
        except ConfigurationError as error:
            section.wrong(key, f"{error.problem}; {error.cure}")
    _known_labels(section, key, tuple(matcher.label for matcher in found))
    for matcher in found:
        options = VALUES.get(matcher.label)
        if options and matcher.operator in ("=", "!=") and matcher.value not in options:
            hint = near(matcher.value, options) or f"; there are {', '.join(options)}"
            section.wrong(key, f"no alert has the {matcher.label} {matcher.value!r}{hint}")
    return tuple(found)


def _known_labels(section: Section, key: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in LABELS:
            section.wrong(key, f"no alert has a label {name!r}{near(name, LABELS) or '; see docs/alerts.md'}")
    if len(set(names)) < len(names) and key != "matchers":
        section.wrong(key, "names a label twice")


def _intervals(sections: Sequence[Section]) -> dict[str, list[TimeInterval]]:
    """By the name that routes know. One that has several parts becomes several intervals, each with a name of its own:
    a route that names it names them all."""
    intervals: dict[str, list[TimeInterval]] = {}
    for section in sections:
        name = section.text("name")
        if name in intervals:
            section.wrong("name", f"there are two time intervals {name!r}")
        parts = section.sections("time_intervals")
        if not parts:
            section.wrong("time_intervals", "say at least one: - times: [{start_time: '22:00', end_time: '24:00'}]")
        intervals[name] = [
            _interval(part, name if place == 0 else f"{name}[{place}]") for place, part in enumerate(parts)
        ]
        section.finish()
    return intervals


def _interval(section: Section, name: str) -> TimeInterval:
    times = []
    for part in section.sections("times"):
        start, end = (_minute(part, key) for key in ("start_time", "end_time"))
        if start >= end:
            part.wrong("end_time", "must come after start_time: a night is two times, one up to 24:00, one from 00:00")
        times.append((start, end))
        part.finish()
    weekdays: set[int] = set()
    for text in section.texts("weekdays"):
        first, _, last = text.lower().partition(":")
        if first not in DAYS or (last or first) not in DAYS:
            section.wrong("weekdays", f"{text!r} is no weekday: write monday, or monday:friday")
            continue
        begin = DAYS.index(first)
        weekdays |= {(begin + step) % 7 for step in range((DAYS.index(last or first) - begin) % 7 + 1)}
    location = section.text("location", "UTC")
    try:
        ZoneInfo(location)
    except (ValueError, OSError, KeyError):
        section.wrong("location", f"{location!r} is no time zone: write it as Europe/Berlin")
    section.finish()
    return TimeInterval(
        name=name,
        times=tuple(times) or ((0, 1440),),
        weekdays=tuple(sorted(weekdays)) or tuple(range(7)),
        location=location,
    )


def _minute(section: Section, key: str) -> int:
    text = section.written(key, "")
    hour, colon, minute = text.partition(":")
    good = colon and len(hour) == len(minute) == 2 and (hour + minute).isdecimal() and (hour + minute).isascii()
    if not good or int(minute) > 59 or int(hour) * 60 + int(minute) > 1440:
        section.wrong(key, f"{text[:20]!r} is no time of day: write it as 22:00; midnight is 24:00 at the end")
        return 0 if key == "start_time" else 1440
    return int(hour) * 60 + int(minute)
