"""Promises of grouping and telling, as timelines; and the pure steps by themselves."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from timeline import (
    BEGIN,
    DAY,
    HOUR,
    Timeline,
    acknowledge,
    away,
    between,
    resolve,
    restart,
    route,
    rules,
    shift,
    silence,
    told,
    turns,
    webhook,
)

from alerts.config import AlertmanagerConfig, AlertsConfig, InhibitRule, PagerDutyConfig, Receiver, TimeInterval
from alerts.groups import Groups
from alerts.pagerduty import action
from alerts.stages import Inhibition, Limits, Update, compose, moment, needs_update, places, quiet, silenced
from monitor.actions import Silence
from monitor.alert import Alert, Notification, labels, state
from monitor.matchers import Matcher, parse_matchers

WARN, BAD, WELL = (0.0, 0.0, -3.2), (0.0, 0.0, -9.0), (0.0, 0.0, 0.0, 0.0, 0.0)


# Waiting, grouping, repeating.


def test_a_group_waits_for_others_and_is_told_at_once() -> None:
    t = Timeline(route(group_wait=10))
    t.at(0, turns("a", *BAD))
    t.at(4, turns("b", *WARN))
    t.want(between(10, 11), told("a critical", "b warning", reason="first"))
    t.run(600)


def test_what_comes_later_waits_for_the_interval() -> None:
    t = Timeline(route(group_wait=10, group_interval=60))
    t.at(0, turns("a", *BAD))
    t.at(20, turns("b", *BAD))
    t.at(30, turns("c", *BAD))
    t.want(between(10, 11), told("a critical"))
    t.want(between(70, 71), told("b critical", "c critical", reason="new_alerts"))
    t.run(600)


def test_each_deployment_is_a_group_of_its_own() -> None:
    t = Timeline(route(group_wait=10))
    t.at(0, turns("a", *BAD), shift("bank"))
    t.want(between(10, 11), told("a critical"))
    t.want(between(10, 11), told("shift:bank warning"))
    t.run(600)


def test_an_episode_that_is_over_before_its_turn_is_told_to_nobody() -> None:
    t = Timeline(route(group_wait=30))
    t.at(0, turns("a", *BAD))
    t.at(20, turns("a", *WELL))
    t.run(600)


def test_an_escalation_is_told_and_the_end_is() -> None:
    t = Timeline(route(group_wait=10, group_interval=60))
    t.at(0, turns("a", *WARN))
    t.at(100, turns("a", -9.0))
    t.at(200, turns("a", *WELL))
    t.want(between(10, 11), told("a warning", reason="first"))
    t.want(between(100, 101), told("a critical", reason="escalated"))
    t.want(between(200, 201), told("a resolved", reason="all_resolved"))
    t.run(1000)


def test_the_end_of_one_of_two_says_that_the_other_fires() -> None:
    t = Timeline(route(group_wait=0, group_interval=60))
    t.at(0, turns("a", *BAD), turns("b", *BAD))
    t.at(100, turns("a", *WELL))
    t.want(between(0, 1), told("a critical", "b critical"))
    t.want(between(100, 101), told("a resolved", reason="resolved"))
    t.run(300)


def test_what_fires_is_repeated_until_somebody_has_seen_it_and_its_end_is_told_all_the_same() -> None:
    t = Timeline(route(group_wait=0, repeat_interval=HOUR))
    t.at(0, turns("a", *BAD))
    t.at(2.5 * HOUR, acknowledge("a"))
    t.at(5 * HOUR, turns("a", *WELL))
    t.want(between(0, 1), told("a critical"))
    t.want(between(HOUR, HOUR + 2), told(reason="repeat"))
    t.want(between(2 * HOUR, 2 * HOUR + 4), told(reason="repeat"))
    t.want(between(5 * HOUR, 5 * HOUR + 1), told("a resolved"))
    t.run(8 * HOUR)


@pytest.mark.parametrize("anew", [restart(), lambda one: one.configure(one.config)])
def test_what_fires_is_repeated_after_a_restart_or_by_other_rules_too(anew: Any) -> None:
    t = Timeline(route(group_wait=0, repeat_interval=HOUR))
    t.at(0, turns("a", *BAD))
    t.at(100, anew)
    t.want(between(0, 1), told("a critical"))
    t.want(between(HOUR, HOUR + 2), told(reason="repeat"))
    t.run(1.5 * HOUR)


def test_an_escalation_is_told_though_somebody_has_seen_the_warning() -> None:
    t = Timeline(route(group_wait=30))
    t.at(0, turns("a", *WARN))
    t.at(10, acknowledge("a"))
    t.at(100, turns("a", -9.0))
    t.want(between(100, 131), told("a critical", reason="escalated"))
    t.run(600)


def test_pagerduty_hears_that_somebody_has_seen_it() -> None:
    duty = Receiver(name="ops", integrations=(PagerDutyConfig(receiver="ops", routing_key_file=msgspec.UNSET),))  # type: ignore[arg-type]
    t = Timeline(rules(route(group_wait=0), receivers=(duty,)))
    t.at(0, turns("a", *BAD))
    t.at(100, acknowledge("a"))
    t.want(between(0, 1), told("a critical"))
    t.want(between(100, 101), told(reason="repeat"))
    t.run(600)


def duty(**given: Any) -> Timeline:
    """Groups of PagerDuty's, told at once."""
    ops = Receiver(name="ops", integrations=(PagerDutyConfig(receiver="ops", routing_key_file=Path("key")),))
    return Timeline(rules(route(group_wait=0, repeat_interval=9 * DAY), receivers=(ops,), **given))


@pytest.mark.parametrize("restarted", [False, True])
def test_what_fires_unseen_when_its_incident_is_resolved_opens_another_once_it_is_seen(restarted: bool) -> None:
    t = duty()
    t.at(0, turns("a", *BAD), turns("b", *BAD))
    t.at(100, silence(600, conversation_id="b"))
    t.at(200, turns("a", *WELL))
    if restarted:
        t.at(300, restart())
    t.run_quietly(HOUR)
    assert [(at, one.reason, action(one)) for at, one in t.sent] == [
        (0, "first", "trigger"),
        (200, "all_resolved", "resolve"),
        (700, "first", "trigger"),
    ]
    assert dict(t.covered(t.sent[2][1])) == {"b": "critical"}
    t.at(2 * HOUR, turns("b", *WELL))
    t.run_quietly(2 * HOUR)
    assert [action(one) for _, one in t.sent[3:]] == ["resolve"]


def test_what_ends_unseen_is_not_told_to_be_over_twice() -> None:
    t = duty()
    t.at(0, turns("a", *BAD), turns("b", *BAD))
    t.at(100, silence(600, conversation_id="b"))
    t.at(200, turns("a", *WELL))
    t.at(300, turns("b", *WELL))
    t.run_quietly(HOUR)
    assert [action(one) for _, one in t.sent] == ["trigger", "resolve"]


def test_what_a_fleet_shift_mutes_is_new_after_its_incident_was_resolved() -> None:
    rule = InhibitRule(source=parse_matchers('kind="fleet_shift"'), target=parse_matchers('kind!="fleet_shift"'))
    t = duty(inhibit_rules=(rule,))
    t.at(0, turns("a", *BAD), turns("b", *BAD))
    t.at(100, shift("bank"))  # a group of its own
    t.at(200, turns("a", *WELL))
    t.at(300, resolve(""))
    t.run_quietly(HOUR)
    shop = [one for _, one in t.sent if one.labels == {"deployment": "shop"}]
    assert [action(one) for one in shop] == ["trigger", "resolve", "trigger"]


def test_the_muted_are_too_many_for_one_record_and_are_told_of_all_the_same() -> None:
    update = needs_update([alert("a", **OVER)], {"e-a": "critical"})
    assert update is not None
    muted = tuple(alert("x", id=f"e{number}", risk=float(number)) for number in range(3000))
    made = composed(update._replace(muted=muted), Limits(100))
    assert len(made.covered) == 1000 and made.covered["e-a"] == made.covered["e2999"] == "resolved"
    assert [one.id for one in made.alerts] == ["e-a"] and made.truncated == 0


def test_an_incident_stays_open_though_a_refused_message_shows_the_others_no_more() -> None:
    update = needs_update([alert("a", **OVER), alert("b")], {"e-a": "critical", "e-b": "critical"})
    assert update is not None
    made = composed(update, Limits(1, whole=True, context=False))
    assert made.status == "resolved" and made.truncated == 1 and action(made) == "trigger"


def test_a_repeat_shows_what_fires_though_a_message_was_refused() -> None:
    update = needs_update([alert("a"), alert("b")], {"e-a": "critical", "e-b": "critical"}, repeat=True)
    assert update is not None
    made = composed(update, Limits(1, whole=True, context=False))
    assert len(made.alerts) == 1 and made.truncated == 1


def test_other_rules_try_at_once_what_was_refused() -> None:
    alerts = {"e-a": alert("a")}
    groups = Groups(rules(route(group_wait=0)), alerts)
    groups.mode(True)
    groups.put(alerts["e-a"])
    (made,) = groups.due(BEGIN)
    groups.refused(made, BEGIN)
    assert groups.due(BEGIN + 60) == []
    groups.configure(rules(route(group_wait=0, group_interval=5)))
    (again,) = groups.due(BEGIN + 61)
    assert again.covered == made.covered


def test_somebody_resolves_it_and_it_becomes_worse() -> None:
    t = Timeline(route(group_wait=0, group_interval=10))
    t.at(0, turns("a", *WARN))
    t.at(100, resolve("a"))
    t.at(200, turns("a", -9.0))
    t.want(between(0, 1), told("a warning"))
    t.want(between(100, 101), told("a resolved", reason="all_resolved"))
    t.want(between(200, 201), told("a critical", reason="first"))
    t.run(600)


# Routes.


def test_what_is_worse_goes_elsewhere_and_ends_in_both_places() -> None:
    critical = route(path="0/0", receiver="night", matchers=parse_matchers('severity="critical"'), group_wait=0)
    t = Timeline(rules(route(group_wait=10, routes=(critical,))))
    t.at(0, turns("a", *WARN))
    t.at(100, turns("a", -9.0))
    t.at(300, turns("a", *WELL))
    t.want(between(10, 11), told("a warning", at="ops"))
    t.want(between(100, 101), told("a critical", at="night", reason="first"))
    t.want(between(300, 301), told("a resolved", at="night"))
    t.want(between(300, 301), told("a resolved", at="ops"))
    t.run(5 * HOUR)


def test_the_same_holds_where_severity_makes_the_group_and_after_a_restart() -> None:
    t = Timeline(route(group_by=("severity",), group_wait=0))
    t.at(0, turns("a", *WARN))
    t.at(100, turns("a", -9.0))
    t.at(200, restart())
    t.at(300, turns("a", *WELL))
    t.want(between(0, 1), told("a warning"))
    t.want(between(100, 101), told("a critical"))
    t.want(between(300, 301), told("a resolved"))
    t.want(between(300, 301), told("a resolved"))
    t.run(3 * HOUR)


def test_a_route_that_continues_tells_two() -> None:
    both = route(path="0/0", receiver="night", continues=True, group_wait=0)
    rest = route(path="0/1", group_wait=0)
    t = Timeline(rules(route(routes=(both, rest))))
    t.at(0, turns("a", *BAD))
    t.want(between(0, 1), told("a critical", at="night"))
    t.want(between(0, 1), told("a critical", at="ops"))
    t.run(600)


def test_other_rules_tell_nobody_again_and_what_is_new_by_them() -> None:
    t = Timeline(route(group_wait=0))
    t.at(0, turns("a", *BAD))
    t.at(100, lambda one: one.configure(rules(route(group_wait=0, group_interval=5))))
    t.at(200, turns("b", *BAD))
    t.at(300, lambda one: one.configure(rules(route(group_wait=0, receiver="night"))))
    t.want(between(0, 1), told("a critical", at="ops"))
    t.want(between(200, 201), told("b critical", at="ops"))
    t.want(between(300, 301), told("a critical", "b critical", at="night"))
    t.run(HOUR)


# Muting.


def test_a_silence_holds_back_until_it_ends_and_does_not_hide_an_end() -> None:
    t = Timeline(route(group_wait=0, group_interval=10))
    t.at(0, turns("told", *BAD))
    t.at(50, silence(500))
    t.at(100, turns("new", *BAD))
    t.at(200, turns("told", *WELL))
    t.want(between(0, 1), told("told critical"))
    t.want(between(200, 211), told("told resolved"))
    t.want(between(550, 551), told("new critical"))
    t.run(HOUR)
    assert [what[1] for what in t.held] == ["silenced", "silenced"]


def test_a_silence_is_about_what_it_matches() -> None:
    t = Timeline(route(group_wait=0, group_by=("...",)))
    t.at(0, silence(500, matchers=parse_matchers('conversation_id=~"a.*"')))
    t.at(1, turns("ab", *BAD), turns("b", *BAD))
    t.want(between(1, 2), told("b critical"))
    t.want(between(500, 501), told("ab critical"))
    t.run(HOUR)


def test_a_fleet_shift_mutes_its_conversations_and_no_others() -> None:
    rule = InhibitRule(
        source=parse_matchers('kind="fleet_shift"'), target=parse_matchers('kind!="fleet_shift"'), equal=("deployment",)
    )
    t = Timeline(rules(route(group_wait=10), inhibit_rules=(rule,)))
    t.at(0, shift("shop"))
    t.at(5, turns("a", *BAD))
    t.at(100, resolve(""))
    t.want(between(10, 11), told("shift:shop warning"))
    t.want(between(100, 101), told("shift:shop resolved", "a critical"))
    t.run(HOUR)
    assert ("ops/webhook[0]", "inhibited", 1) in t.held


def test_quiet_hours_hold_back_everything_until_they_are_over() -> None:
    night = TimeInterval(name="night", times=((13 * 60, 14 * 60),))
    t = Timeline(rules(route(group_wait=0, mute=("night",), group_interval=10), time_intervals=(night,)))
    t.at(0, turns("a", *BAD))
    t.at(HOUR + 60, turns("b", *BAD))
    t.at(HOUR + 120, turns("a", *WELL))
    t.want(between(0, 1), told("a critical"))
    t.want(between(2 * HOUR, 2 * HOUR + 1), told("a resolved", "b critical"))
    t.run(3 * HOUR)


def test_in_shadow_everything_is_made_and_nobody_is_told() -> None:
    t = Timeline(route(group_wait=0), live=False)
    t.at(0, turns("a", *BAD))
    t.at(500, lambda one: one.groups.mode(True))
    t.want(between(500, 501), told("a critical", reason="first"))
    t.run(HOUR)
    assert t.held == [("ops/webhook[0]", "shadow", 1)]


# Caps.


def test_a_cap_holds_back_the_rest_of_the_day_and_a_digest_tells_of_it() -> None:
    t = Timeline(
        rules(
            route(group_wait=0, group_by=("...",), repeat_interval=9 * DAY), receivers=(webhook("ops", max_per_day=2),)
        )
    )
    for number in range(5):
        t.at(10 * number, turns(f"c{number}", *BAD))
    t.at(100, turns("c0", *WELL), turns("c4", *WELL))
    t.at(200, restart())
    t.want(between(0, 1), told("c0 critical"))
    t.want(between(10, 11), told("c1 critical"))
    t.want(between(100, 101), told("c0 resolved"))  # ends do not count
    midnight = DAY / 2
    t.want(between(midnight, midnight + 61), told("c2 critical", "c3 critical", reason="digest"))
    t.run(midnight + 2 * HOUR)
    assert ("ops/webhook[0]", "cap", 1) in t.held


def test_the_digest_tells_what_is_over_by_then_too_and_the_last_one_says_that_it_is_the_last() -> None:
    t = Timeline(
        rules(
            route(group_wait=0, group_by=("...",), repeat_interval=9 * DAY), receivers=(webhook("ops", max_per_day=1),)
        ),
        step=5,
    )
    t.at(0, turns("a", *BAD))
    t.at(10, turns("b", *BAD))
    t.at(50, turns("b", *WELL))
    t.run_quietly(DAY / 2 + 100)
    first, digest = [one for _, one in t.sent]
    assert "cap of 1 notifications a day is reached" in first.note
    assert digest.reason == "digest" and "1 alert, of which 1 is over by now" in digest.note
    assert list(digest.covered.values()) == ["resolved"]


def test_a_cap_for_each_deployment_leaves_the_others_alone() -> None:
    capped = webhook("ops", max_per_deployment_per_day=1)
    t = Timeline(rules(route(group_wait=0, group_by=("...",)), receivers=(capped,)))
    t.at(0, turns("a", *BAD))
    t.at(10, turns("b", *BAD))
    t.at(20, shift("bank"))
    t.want(between(0, 1), told("a critical"))
    t.want(between(20, 21), told("shift:bank warning"))
    t.run(HOUR)


# Faults.


def test_while_the_receiver_is_away_one_notification_waits_and_what_came_since_follows() -> None:
    t = Timeline(route(group_wait=0, group_interval=10))
    t.at(0, away(100), turns("a", *BAD))
    t.at(50, turns("a", *WELL), turns("b", *BAD))
    t.want(between(100, 101), told("a critical"))
    t.want(between(101, 102), told("a resolved", "b critical"))
    t.run(HOUR)


def test_a_restart_at_any_second_tells_the_same_with_the_same_ids() -> None:
    def happen(kill: float | None) -> list[tuple[str, str]]:
        t = Timeline(route(group_wait=10, group_interval=20))
        t.at(0, turns("a", *WARN))
        t.at(15, turns("a", -9.0), turns("b", *BAD))
        t.at(25, away(10))
        t.at(60, turns("a", *WELL))
        if kill is not None:
            t.at(kill, restart())
        with pytest.raises(AssertionError) as caught:
            t.run(120)
        return sorted((line.split(": ", 1)[1], "") for line in str(caught.value).splitlines() if "ops" in line)

    whole = happen(None)
    assert len(whole) == 3
    for second in range(0, 110, 3):
        assert happen(second + 0.5) == whole, second


@pytest.mark.parametrize("jump", [-6 * HOUR, 6 * HOUR])
def test_a_clock_that_jumps_delays_nothing_by_more_than_it_should(jump: float) -> None:
    t = Timeline(route(group_wait=10, group_interval=60))
    t.at(0, turns("a", *BAD))
    t.run_quietly(20)
    t.now += jump
    t.groups.clock_jumped()
    t.respond("b", BAD, "shop")
    before = len(t.sent)
    t.run_quietly(70)
    assert any("b" in dict(t.covered(one)) for _, one in t.sent[before:])
    assert len(t.sent) <= before + 2


# Storms.


def test_a_storm_becomes_few_messages_with_none_missing() -> None:
    t = Timeline(route(group_wait=5))
    many = 10_000
    one = alert("x")
    for number in range(many):
        t.table.put(replace(one, id=f"e{number}", conversation_id=f"c{number}", accepted=BEGIN, changed=BEGIN))
    t.run_quietly(30)
    assert len(t.sent) == 10
    covered = [id for _, notification in t.sent for id in notification.covered]
    assert len(covered) == len(set(covered)) == many
    assert all(len(one.alerts) == 100 and one.truncated >= 900 for _, one in t.sent)
    assert all(len(msgspec.json.encode(one)) < 900 * 1024 for _, one in t.sent)


def test_100_000_open_episodes_cost_what_changes_among_them() -> None:
    alerts: dict[str, Alert] = {}
    groups = Groups(rules(route(group_wait=0)), alerts)
    groups.mode(True)
    one = alert("x")
    for number in range(100_000):
        made = replace(
            one, id=f"e{number}", deployment=f"d{number % 50}", told={"ops/webhook[0]": one.severity}, changed=BEGIN
        )
        alerts[made.id] = made
        groups.put(made)
    groups.due(BEGIN + 1)
    began = time.process_time()
    looked = 0
    for second in range(2, 202):
        new = replace(one, id=f"new{second}", deployment=f"d{second % 50}", changed=BEGIN + second)
        alerts[new.id] = new
        groups.put(new)
        looked += len(groups.due(BEGIN + second))
    assert looked
    assert time.process_time() - began < 20.0  # every group has 2,000 members; a look at all of them is minutes


class Looked(dict[str, Alert]):
    """Alerts, and how often one was looked at."""

    times = 0

    def __getitem__(self, id: str) -> Alert:
        self.times += 1
        return super().__getitem__(id)


@pytest.mark.parametrize("channel", ["alertmanager", "webhook"])
def test_what_changes_nothing_costs_no_look_at_the_others(channel: str) -> None:
    alerts, groups = open_episodes(channel, 2000)
    alerts.times = 0
    for number in range(200):
        worse = replace(alerts[f"e{number}"], value=9.0, turn=7)
        alerts[worse.id] = worse
        groups.put(worse)
        assert groups.due(BEGIN + number) == []
    assert alerts.times < 1000


def test_in_alertmanager_a_change_costs_no_look_at_what_has_not_changed() -> None:
    alerts, groups = open_episodes("alertmanager", 2000)
    alerts.times = 0
    for number in range(100):
        second = BEGIN + number
        new = alert("x", id=f"new{number}", changed=second)
        over = replace(alerts[f"e{number}"], ends_at=moment(second), resolution="recovered", changed=second)
        for one in (new, over):
            alerts[one.id] = one
            groups.put(one)
        (made,) = groups.due(second)
        assert made.covered == {new.id: "critical", over.id: "resolved"} and made.reason == "new_alerts"
        groups.sent(made)
        assert groups.due(second) == []
    assert alerts.times < 5000
    last = replace(alerts["e1000"], ends_at=moment(BEGIN), resolution="recovered")
    alerts[last.id] = last
    groups.put(last)
    (made,) = groups.due(BEGIN + 101)
    assert made.reason == "resolved", "others fire, though none of them was looked at"


def test_in_alertmanager_an_end_while_its_beginning_is_under_way_is_told_and_what_was_muted_is() -> None:
    alerts, groups = open_episodes("alertmanager", 0)
    alerts["e-a"] = alert("a")
    groups.put(alerts["e-a"])
    (begun,) = groups.due(BEGIN)
    alerts["e-a"] = alert("a", **OVER)
    groups.put(alerts["e-a"])
    assert groups.due(BEGIN + 1) == []
    groups.sent(begun)
    (ended,) = groups.due(BEGIN + 2)
    assert ended.covered == {"e-a": "resolved"} and ended.reason == "all_resolved"
    groups.sent(ended)
    groups.silence([Silence(moment(BEGIN + 100), conversation_id="b")])
    for name in "bc":
        alerts[f"e-{name}"] = alert(name)
        groups.put(alerts[f"e-{name}"])
    (one,) = groups.due(BEGIN + 3)
    assert one.covered == {"e-c": "critical"}
    groups.sent(one)
    (unmuted,) = groups.due(BEGIN + 100)
    assert unmuted.covered == {"e-b": "critical"}
    groups.refused(unmuted, BEGIN + 100)
    assert groups.due(BEGIN + 101) == []
    (again,) = groups.due(BEGIN + 100 + 2 * HOUR)
    assert again.covered == {"e-b": "critical"}


def test_in_alertmanager_what_goes_to_another_group_before_its_turn_is_told_there_alone() -> None:
    there = Receiver(name="ops", integrations=(AlertmanagerConfig(receiver="ops", url="http://am:9093"),))
    t = Timeline(rules(route(group_by=("severity",)), receivers=(there,)), live=False)
    t.at(0, turns("a", *WARN), turns("b", *WARN))
    t.at(5, turns("a", -9.0))
    t.at(10, lambda one: one.groups.mode(True))
    t.at(20, turns("b", -9.0))
    t.at(30, turns("b", *WELL))
    t.want(between(10, 11), told("a critical"))
    t.want(between(10, 11), told("b warning"))
    t.want(between(20, 21), told("b critical"))
    t.want(between(30, 31), told("b resolved"))
    t.want(between(30, 31), told("b resolved"))
    t.run(HOUR)


def open_episodes(channel: str, many: int) -> tuple[Looked, Groups]:
    """So many alerts of one deployment, all of them told."""
    here = (
        AlertmanagerConfig(receiver="ops", url="http://am:9093")
        if channel == "alertmanager"
        else webhook("ops").integrations[0]
    )
    alerts = Looked()
    groups = Groups(rules(route(group_wait=0), receivers=(Receiver(name="ops", integrations=(here,)),)), alerts)
    groups.mode(True)
    for number in range(many):
        alerts[f"e{number}"] = alert("x", id=f"e{number}", told={here.name: "critical"})
        groups.put(alerts[f"e{number}"])
    assert groups.due(BEGIN) == []
    return alerts, groups


def test_a_record_of_the_worst_alerts_is_bounded() -> None:
    worst, limits = "\U0001f9ff" * 256, Limits(1000, whole=True)
    many = tuple(
        replace(alert("x"), id=f"{number:032}", conversation_id=worst, deployment=worst, model=worst, story="s" * 1000)
        for number in range(1000)
    )
    made = compose(
        Update("first", many),
        limits,
        integration="i",
        group="g",
        group_labels={},
        sequence=0,
        now=1.0,
    )
    assert 0 < len(made.alerts) < 1000 and len(msgspec.json.encode(made)) < 900 * 1024
    assert made.covered.keys() == {one.id for one in made.alerts}, "what is not shown is left for the next one"


# The steps by themselves.


def alert(conversation: str, severity: str = "critical", **changes: Any) -> Alert:
    made = Alert(
        id=f"e-{conversation}",
        conversation_id=conversation,
        deployment="shop",
        model="toy",
        axis_id="axis-1",
        config_id="k",
        kind="dip",
        persona="pirate",
        severity=severity,  # type: ignore[arg-type]
        starts_at=moment(BEGIN),
        accepted=BEGIN,
        changed=BEGIN,
        finding_ids=(f"f-{conversation}",),
        turn=2,
        statistic="dip",
        value=4.0,
        boundary=3.0,
        risk=1.3,
        certification="uncertified",
    )
    return replace(made, **changes)


OVER = {"ends_at": moment(BEGIN + 5), "resolution": "recovered"}


@pytest.mark.parametrize(
    ("alerts", "told_before", "given", "reason"),
    [
        ([alert("a")], {}, {}, "first"),
        ([alert("a")], {"e-b": "warning"}, {}, "new_alerts"),
        ([alert("a")], {"e-a": "resolved"}, {}, "first"),
        ([alert("a")], {"e-a": "warning"}, {}, "escalated"),
        ([alert("a")], {"e-a": "critical"}, {}, None),
        ([alert("a")], {"e-a": "critical"}, {"repeat": True}, "repeat"),
        ([alert("a", acknowledged_by="ann")], {"e-a": "critical"}, {"repeat": True}, None),
        ([alert("a", acknowledged_by="ann")], {"e-a": "critical"}, {"seen": True}, "repeat"),
        ([alert("a")], {"e-a": "critical"}, {"seen": True}, None),
        ([alert("a", **OVER)], {}, {}, None),
        ([alert("a", **OVER)], {"e-a": "critical"}, {}, "all_resolved"),
        ([alert("a", **OVER)], {"e-a": "critical"}, {"send_resolved": False}, None),
        ([alert("a", **OVER), alert("b")], {"e-a": "critical", "e-b": "critical"}, {}, "resolved"),
        ([alert("a", **OVER), alert("b")], {"e-a": "critical"}, {}, "new_alerts"),
        ([], {}, {"repeat": True}, None),
    ],
)
def test_needs_update_says_why(alerts: list[Alert], told_before: Any, given: Any, reason: str | None) -> None:
    update = needs_update(alerts, told_before, **given)
    assert (update and update.reason) == reason


ALERTS = st.lists(
    st.builds(
        lambda number, severity, over, risk: alert(
            f"c{number}", severity, id=f"e{number}", risk=risk, **(OVER if over else {})
        ),
        st.integers(0, 30),
        st.sampled_from(["warning", "critical"]),
        st.booleans(),
        st.floats(0, 9),
    ),
    max_size=20,
    unique_by=lambda one: one.id,
)
WORDS = st.dictionaries(
    st.integers(0, 30).map("e{}".format), st.sampled_from(["warning", "critical", "resolved"]), max_size=20
)


@given(ALERTS, WORDS, st.integers(1, 12), st.booleans(), st.booleans())
def test_telling_comes_to_an_end_and_leaves_nothing_untold(
    alerts: list[Alert], before: dict[str, Any], shown: int, whole: bool, context: bool
) -> None:
    told_now, rounds = dict(before), 0
    while (update := needs_update(alerts, told_now)) is not None:
        made = compose(
            update,
            Limits(shown, whole, context),
            integration="i",
            group="g",
            group_labels={},
            sequence=rounds,
            now=1.0,
        )
        assert made.covered and len(made.alerts) <= shown
        if any(one.firing for one in (*update.news, *update.others)) and context and shown > 1:
            assert made.status == "firing", "nothing says that all is over while something fires"
        told_now |= made.covered
        rounds += 1
        assert rounds <= len(alerts)
    for one in alerts:
        if one.firing:
            assert told_now[one.id] == state(one) or before.get(one.id) == "critical"
        elif before.get(one.id) in ("warning", "critical"):
            assert told_now[one.id] == "resolved"


def test_the_id_of_a_notification_is_the_hash_of_all_it_says() -> None:
    one, same, other = group([alert("a")]), group([alert("a")]), group([alert("b")])
    assert one == same and one.id != other.id != replace(one, note="x").id


def group(alerts: list[Alert]) -> Notification:
    update = needs_update(alerts, {})
    assert update is not None
    return composed(update, Limits(100))


def composed(update: Update, limits: Limits) -> Notification:
    return compose(
        update,
        limits,
        integration="log/log[0]",
        group="g",
        group_labels={"deployment": "shop"},
        sequence=0,
        now=BEGIN,
    )


def test_every_label_but_severity_makes_the_group_where_all_are_asked_for() -> None:
    every = route(group_by=("...",))
    (one,), (worse,) = places(every, alert("a", "warning")), places(every, alert("a", "critical"))
    assert one == worse and dict(one.labels).keys() == labels(alert("a")).keys() - {"severity"}
    (here,), (there,) = places(route(), alert("a")), places(route(path="0/1"), alert("a"))
    assert here.group != there.group and places(route(), alert("b"))[0] == here


def test_what_matches_both_sides_does_not_inhibit_itself_nor_its_like() -> None:
    inhibition = Inhibition(
        [InhibitRule(source=(Matcher("kind", "=", "dip"),), target=(Matcher("model", "=", "toy"),))]
    )
    for name in "ab":
        inhibition.put(alert(name))
    assert not inhibition.inhibits(alert("a"))
    inhibition.put(alert("c", model="other"))
    assert inhibition.inhibits(alert("a")) and not inhibition.inhibits(alert("c", model="other"))
    inhibition.put(alert("c", model="other", **OVER))
    assert not inhibition.inhibits(alert("a"))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from(["dip", "low_start"])), max_size=20))
def test_inhibition_is_what_a_look_at_all_alerts_says(steps: list[tuple[str, bool, str]]) -> None:
    rule = InhibitRule(source=(Matcher("kind", "=", "dip"),), target=(Matcher("kind", "!=", "dip"),), equal=("model",))
    inhibition, now = Inhibition([rule]), dict[str, Alert]()
    for name, firing, kind in steps:
        now[name] = alert(name, kind=kind, model="m" if name < "c" else "n", **({} if firing else OVER))
        inhibition.put(now[name])
        for one in now.values():
            sources = [s for s in now.values() if s.firing and s.kind == "dip" and s.model == one.model]
            assert inhibition.inhibits(one) == (one.kind != "dip" and bool(sources))


def test_silences_see_labels() -> None:
    until = moment(BEGIN)
    assert silenced(alert("a"), [Silence(until, matchers=parse_matchers("persona=pirate"))])
    assert silenced(alert("a"), [Silence(until, deployment="shop", kind="dip")]) and silenced(
        alert("a"), [Silence(until)]
    )
    assert not silenced(alert("a"), [Silence(until, conversation_id="b")]) and not silenced(alert("a"), [])


def test_quiet_hours_are_local_and_know_summer_time() -> None:
    office = TimeInterval(name="office", times=((9 * 60, 17 * 60),), weekdays=(0, 1), location="Europe/Berlin")
    at = {
        "2026-06-01T06:59:59Z": False,  # a Monday, in summer two hours behind
        "2026-06-01T07:00:00Z": True,
        "2026-06-01T15:00:00Z": False,
        "2026-06-03T10:00:00Z": False,
        "2026-12-01T07:30:00Z": False,
        "2026-12-01T08:00:00Z": True,
    }
    muted = route(mute=("office",))
    for text, expected in at.items():
        assert quiet(muted, [office], datetime.fromisoformat(text).astimezone(UTC).timestamp()) is expected, text
    assert not quiet(route(), [office], BEGIN)


def test_alertmanager_is_told_at_once_of_each_change_and_never_twice() -> None:
    there = Receiver(name="ops", integrations=(AlertmanagerConfig(receiver="ops", url="http://am:9093"),))
    t = Timeline(AlertsConfig(route=route(group_wait=600, group_interval=600), receivers=(there,)))
    t.at(0, turns("a", *WARN))
    t.at(5, turns("b", *BAD))
    t.at(6, turns("a", -9.0))
    t.at(7, turns("b", *WELL))
    t.want(between(0, 1), told("a warning"))
    t.want(between(5, 5), told("b critical"))
    t.want(between(6, 6), told("a critical"))
    t.want(between(7, 7), told("b resolved"))
    t.run(9 * HOUR)
