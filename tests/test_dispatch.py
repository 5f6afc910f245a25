"""Promises of the dispatcher: at least once, a repeat is the same bytes, and nobody is told again after a wipe."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import servers
from msgspec.structs import replace
from service import CONFIG, message, projection
from tiny import environment

from alerts.config import AlertsConfig, Receiver, Route
from alerts.delivery import Landed
from alerts.dispatcher import BATCH, LEASE, Dispatcher
from alerts.receivers import AlertmanagerConfig, LogConfig, WebhookConfig
from alerts.rules import one_log
from monitor.actions import (
    Acknowledgement,
    Paging,
    Silence,
    append_action,
    forget,
    read_actions,
    withdraw,
)
from monitor.alert import Alert, Notification
from monitor.database import sqlite_url
from monitor.errors import ChannelError, ChannelUnavailable, LogUnavailable, StoreUnavailable
from monitor.events import Projection
from monitor.store import Backend
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import ACTIONS, PROJECTIONS, EmbeddedLog
from monitor.worker import Worker

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = 3600.0
LOG = "log/log[0]"
encode = msgspec.json.Encoder(order="sorted").encode


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


class Kept:
    """A channel that keeps what it is given, and fails as it is told to."""

    send_resolved = True
    refresh: float | None = None

    def __init__(self, name: str = LOG) -> None:
        self.name = name
        self.taken: list[Notification] = []
        self.lines: list[bytes] = []
        self.fails: Callable[[Notification], Exception | None] = lambda notification: None

    def deliver(self, notification: Notification) -> None:
        if error := self.fails(notification):
            raise error
        self.taken.append(notification)
        self.lines.append(encode(notification))

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        raise AssertionError("it has no refresh")

    def close(self) -> None:
        pass

    @property
    def told(self) -> list[tuple[str, str]]:
        """Conversation and what was told of it, in order."""
        return [
            (alert.conversation_id, one.covered[alert.id])
            for one in self.taken
            for alert in one.alerts
            if alert.id in one.covered
        ]


class House:
    """Log, worker, store and dispatcher of one installation, in one folder."""

    config: AlertsConfig = one_log(None)
    live: bool | None = True

    def __init__(self, folder: Path, redis: str | None) -> None:
        self.folder = folder
        self.redis = redis
        self.clock, self.ticks = Clock(), Clock()
        self.log = EmbeddedLog(folder / "log.db")
        self.channel = Kept()
        self.channels = {LOG: self.channel}
        self.open()

    def open(self) -> None:
        self.store: Backend
        if self.redis is None:
            path = self.folder / f"store-{len(list(self.folder.iterdir()))}.db"
            self.store = SqliteStore(path, clock=self.clock, busy_seconds=0.05)
        else:
            self.store = RedisStore(self.redis, prefix=servers.fresh("dispatch"))
        self.worker = Worker(self.log, self.store, CONFIG, batch_size=100)
        self.restart()

    def restart(self) -> None:
        """A new dispatcher, as after a kill; the old one's lease is given back, or the new one would wait for it."""
        self.store.release(LEASE, "one")
        self.dispatcher = Dispatcher(
            self.log,
            self.store,
            self.channels,
            self.config,
            max_age=HOUR,
            live=self.live,
            holder="one",
            clock=self.clock,
            ticks=self.ticks,
        )

    def wipe(self) -> None:
        self.store.close()
        self.open()

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.ticks.now += seconds

    def say(
        self, conversation: str, values: Sequence[float], *, first: int = 0, age: float = 60.0, **changes: Any
    ) -> None:
        at = [
            datetime.fromtimestamp(self.clock.now - age, UTC) + timedelta(seconds=number)
            for number in range(len(values))
        ]
        events = [
            replace(
                projection(conversation, first + number, value),
                time=at[number].isoformat().replace("+00:00", "Z"),
                **changes,
            )
            for number, value in enumerate(values)
        ]
        self.log.append(PROJECTIONS, [message(event) for event in events])

    def work(self) -> None:
        while self.worker.run_once() or self.worker.run_once():
            pass

    def dispatch(self) -> None:
        """Until there is nothing more to do."""
        while self.dispatcher.run_once():
            pass

    def alerts(self) -> dict[str, Alert]:
        """Conversation → its newest alert, as it is written down."""
        found = [
            msgspec.convert(msgspec.json.decode(value)["body"], Alert)
            for key, value in read_actions(self.log).items()
            if key.startswith("alert/")
        ]
        return {alert.conversation_id: alert for alert in sorted(found, key=lambda alert: alert.starts_at)}

    def close(self) -> None:
        self.log.close()
        self.store.close()


@pytest.fixture(params=["sqlite", "redis"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, request.getfixturevalue("shared_redis") if request.param == "redis" else None)
    yield made
    made.close()


LOW = [0.0, 0.0, -9.0]
BACK = [0.0, 0.0, 0.0, 0.0]
SLOW = [-3.6, -3.6]


def test_what_is_found_is_told_once_and_the_outbox_is_empty_then(house: House) -> None:
    house.say("c", LOW)
    house.work()
    (found,) = house.store.findings(9)
    house.dispatch()
    (first,) = house.channel.taken
    (alert,) = first.alerts
    assert (alert.id, alert.finding_ids, alert.conversation_id) == (found.episode_id, (found.id,), "c")
    assert alert.story and alert.sparkline and alert.model == "toy"
    assert (first.reason, first.status, first.covered) == ("first", "firing", {alert.id: found.severity})
    assert not house.store.pending(9)
    house.dispatch()
    assert house.channel.taken == [first]
    house.say("c", BACK, first=3)
    house.work()
    house.dispatch()
    assert house.channel.told == [("c", found.severity), ("c", "resolved")]
    assert house.channel.taken[-1].reason == "all_resolved"
    assert house.alerts()["c"].resolution == "recovered"


def test_a_wiped_store_tells_nobody_again_and_the_end_of_what_was_told(house: House) -> None:
    house.say("c", LOW)
    house.say("d", LOW)
    house.work()
    house.dispatch()
    first = list(house.channel.lines)
    assert len(first) == 2
    house.wipe()
    house.work()
    assert len(house.store.pending(9)) == 2
    house.dispatch()
    assert house.channel.lines == first and not house.store.pending(9)
    house.say("c", BACK, first=3)
    house.work()
    house.dispatch()
    assert house.channel.told[2:] == [("c", "resolved")]


def test_catching_up_pages_for_what_is_young_or_still_open_at_the_end(house: House) -> None:
    house.say("over", [*LOW, *BACK], age=3 * HOUR)
    house.say("left", LOW, age=3 * HOUR)
    house.say("open", LOW, age=2 * HOUR)
    house.say("heals", LOW, age=2 * HOUR)
    house.say("young", LOW)
    house.say("open", [-9.0], first=3)
    house.say("heals", BACK, first=3)
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=18)
    house.worker.run_once()
    assert house.store.progress(PROJECTIONS)[0].behind
    house.dispatch()
    assert house.channel.told == []
    assert {one.finding.conversation_id for one in house.store.pending(9)} == {"left", "open", "heals"}
    house.work()
    house.pass_time(6)
    house.dispatch()
    assert sorted({conversation for conversation, _ in house.channel.told}) == ["open", "young"]
    assert not house.store.pending(9)


def test_what_waits_does_not_hold_up_what_comes_behind_it(house: House) -> None:
    many = 2 * BATCH
    for number in range(many):
        house.say(f"c{number}", [-9.0], age=2 * HOUR)
    house.say("still", [0.0], age=2 * HOUR)
    house.say("loud", [-9.0])
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=many + 1)
    house.worker.run_once()
    house.dispatch()
    assert house.channel.told == [] and len(house.store.pending(2 * many)) == many
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=1)
    house.worker.run_once()
    house.dispatch()
    assert house.channel.told == [("loud", "critical")]


def test_what_is_silenced_leaves_the_outbox_and_is_told_when_the_silence_ends(house: House) -> None:
    append_action(house.log, "silence", "s", Silence("2026-06-01T12:10:00Z", deployment="shop", kind="dip"), by="ann")
    house.say("c", LOW)
    house.say("loud", [-9.0])
    house.work()
    house.dispatch()
    assert [conversation for conversation, _ in house.channel.told] == ["loud"] and not house.store.pending(9)
    house.pass_time(500)
    house.dispatch()
    assert len(house.channel.told) == 1
    house.pass_time(101)
    house.dispatch()
    assert house.channel.told[1][0] == "c"


@pytest.mark.parametrize("seconds", [1.1, 6.0])  # what is read by itself, and with the dispatcher's own notes
def test_a_silence_that_is_withdrawn_ends_at_once(house: House, seconds: float) -> None:
    append_action(house.log, "silence", "s", Silence("2026-06-01T13:00:00Z"), by="ann")
    house.say("c", LOW)
    house.work()
    house.dispatch()
    assert house.channel.told == []
    withdraw(house.log, "silence", ["s"])
    house.pass_time(seconds)
    house.dispatch()
    assert [conversation for conversation, _ in house.channel.told] == ["c"]


def test_what_was_acknowledged_is_not_told_but_its_end_is(house: House) -> None:
    house.say("c", LOW)
    house.work()
    (one,) = house.store.pending(9)
    append_action(house.log, "acknowledge", one.finding.id, Acknowledgement(), by="ann")
    house.dispatch()
    assert house.channel.lines == [] and not house.store.pending(9)
    assert house.alerts()["c"].acknowledged_by == "ann"
    house.say("c", BACK, first=3)
    house.work()
    house.dispatch()
    assert house.channel.told == [("c", "resolved")]


def test_an_alert_that_somebody_resolves_is_over_and_stays_so_after_a_wipe(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatch()
    append_action(house.log, "resolve", house.alerts()["c"].id, Acknowledgement(), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    assert house.channel.told[1:] == [("c", "resolved")] and house.alerts()["c"].resolution == "resolved"
    house.wipe()
    house.work()
    house.pass_time(1.1)
    house.dispatch()
    assert len(house.channel.told) == 2 and not house.store.pending(9)


def test_a_weak_identity_pages_nobody(house: House) -> None:
    house.say("c", LOW, attributes={"identity": "weak"})
    house.work()
    house.dispatch()
    assert house.store.findings(9) and house.channel.lines == [] and not house.store.pending(9)


def test_nobody_is_told_of_a_conversation_that_is_forgotten_also_after_a_wipe(house: House) -> None:
    house.say("gone", LOW)
    house.say("stays", LOW)
    forget(house.log, "gone", by="ann")
    house.work()
    house.wipe()
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=4)
    house.worker.run_once()
    house.dispatch()
    house.work()
    house.pass_time(6)
    house.dispatch()
    assert [conversation for conversation, _ in house.channel.told] == ["stays"]
    assert not house.store.findings(9, conversation_id="gone") and not house.store.pending(9)


def test_the_alert_of_a_conversation_that_is_forgotten_is_over_and_its_record_goes(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatch()
    forget(house.log, "c", by="ann")
    house.pass_time(1.1)
    house.dispatch()
    assert house.channel.told[1:] == [("c", "resolved")] and house.alerts()["c"].resolution == "forgotten"
    assert house.dispatcher.tidy() == 1 and house.alerts() == {}


def test_an_episode_whose_conversation_falls_silent_has_ended_and_goes_on_with_it(house: House) -> None:
    house.say("c", LOW, age=0)
    house.say("talks", LOW, age=0)
    house.work()
    house.dispatch()
    house.pass_time(1700)
    house.say("talks", [-9.0], first=3, age=0)
    house.work()
    house.dispatch()
    assert {word for _, word in house.channel.told} == {"critical"}
    house.pass_time(110)
    house.dispatch()
    assert house.channel.told[2:] == [("c", "resolved")]
    assert house.alerts()["c"].resolution == "ended" and house.alerts()["talks"].firing
    house.pass_time(600)
    house.say("c", [-9.0], first=3, age=0)
    house.work()
    house.dispatch()
    assert house.channel.told[3:] == [("c", "critical")] and house.alerts()["c"].firing


def test_nobody_counts_as_silent_while_the_worker_lags(house: House) -> None:
    house.say("c", LOW, age=0)
    house.work()
    house.dispatch()
    house.pass_time(3000)
    house.say("c", [-9.0], first=3, age=2000)
    house.dispatch()
    assert house.alerts()["c"].firing
    house.work()
    house.pass_time(61)
    house.dispatch()
    assert house.alerts()["c"].resolution == "ended"


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_clock_that_jumps_ends_nothing_pages_nobody_twice_and_swallows_no_page(house: House, jump: float) -> None:
    house.say("c", LOW, age=0)
    house.work()
    house.dispatch()
    began = house.clock.now
    house.clock.now += jump
    house.ticks.now += 1
    house.dispatch()
    assert house.alerts()["c"].firing and len(house.channel.told) == 1
    house.say("d", LOW, age=house.clock.now - began)  # the collector's clock was not set
    house.work()
    house.dispatch()
    assert [conversation for conversation, _ in house.channel.told] == ["c", "d"]


# Shadow


def test_a_new_installation_tells_nobody_until_it_is_enabled(house: House) -> None:
    house.live = None
    house.restart()
    house.say("c", LOW)
    house.work()
    house.dispatch()
    assert house.channel.taken == [] and house.alerts()["c"].told == {} and not house.store.pending(9)
    append_action(house.log, "paging", "mode", Paging("live"), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    assert [conversation for conversation, _ in house.channel.told] == ["c"]
    append_action(house.log, "paging", "mode", Paging("shadow"), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    house.say("d", LOW)
    house.work()
    house.dispatch()
    assert len(house.channel.told) == 1


# Failures


class Crash(Exception):
    """As a kill at this moment."""


def crash(*arguments: object) -> Any:
    raise Crash


def test_a_crash_after_the_delivery_delivers_the_same_bytes_again(house: House) -> None:
    house.say("c", LOW)
    house.work()
    append = house.log.append
    deliver = house.channel.deliver

    def last_words(notification: Notification) -> None:
        deliver(notification)
        house.log.append = crash  # type: ignore[method-assign]

    house.channel.deliver = last_words  # type: ignore[method-assign]
    with pytest.raises(Crash):
        house.dispatch()
    house.log.append, house.channel.deliver = append, deliver  # type: ignore[method-assign]
    house.restart()
    house.dispatch()
    first, second = house.channel.lines
    assert first == second and not house.store.pending(9)


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_while_the_alert_is_written_down_loses_nothing(house: House, after: bool) -> None:
    house.say("c", LOW)
    house.work()
    append = house.log.append

    def dies(*arguments: Any) -> Any:
        if after:
            append(*arguments)
        raise Crash

    house.log.append = dies  # type: ignore[method-assign]
    with pytest.raises(Crash):
        house.dispatch()
    assert house.channel.lines == [] and len(house.store.pending(9)) == 1
    house.log.append = append  # type: ignore[method-assign]
    house.restart()
    house.dispatch()
    assert len(house.channel.lines) == 1 and not house.store.pending(9)


def test_a_crash_before_the_settlement_delivers_nothing_again(house: House) -> None:
    house.say("c", LOW)
    house.work()
    settle = house.store.settle
    house.store.settle = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        house.dispatch()
    house.store.settle = settle  # type: ignore[method-assign]
    house.restart()
    house.dispatch()
    assert len(house.channel.lines) == 1 and not house.store.pending(9)


def test_while_the_log_is_away_alerts_are_told_once_and_written_down_later(house: House) -> None:
    house.say("c", LOW)
    house.work()
    real = house.log

    class Away:
        def __getattr__(self, name: str) -> object:
            def fails(*arguments: object) -> None:
                raise LogUnavailable("the log is away", cure="wait")

            return fails

    journal = house.dispatcher._journal
    house.dispatcher._log = journal._log = journal._fold._log = Away()  # type: ignore[assignment]
    for _ in range(3):
        house.dispatch()
        house.pass_time(40)
    assert len(house.channel.lines) == 1 and len(house.store.pending(9)) == 1
    house.dispatcher._log = journal._log = journal._fold._log = real
    house.dispatch()
    assert len(house.channel.lines) == 1 and not house.store.pending(9)
    assert house.alerts()["c"].told == {LOG: "critical"}


def test_a_receiver_that_is_away_loses_nothing_and_keeps_the_order(house: House) -> None:
    house.channel.fails = lambda notification: ChannelUnavailable("away", cure="wait")
    house.say("c", LOW)
    house.work()
    for _ in range(3):
        house.dispatch()
        house.pass_time(40)
    house.say("c", BACK, first=3)
    house.work()
    house.dispatch()
    assert not house.store.pending(9)
    house.channel.fails = lambda notification: None
    house.pass_time(40)
    house.dispatch()
    assert house.channel.told == [("c", "critical"), ("c", "resolved")]


def test_a_receiver_that_asks_for_time_is_given_it(house: House) -> None:
    house.channel.fails = lambda notification: ChannelUnavailable("busy", cure="wait", retry_after=100.0)
    house.say("c", LOW)
    house.work()
    house.dispatch()
    house.channel.fails = lambda notification: None
    house.pass_time(99)
    house.dispatch()
    assert house.channel.taken == []
    house.pass_time(2)
    house.dispatch()
    assert len(house.channel.taken) == 1


def test_what_nobody_took_while_it_was_young_is_told_in_other_words_or_not_at_all(house: House) -> None:
    house.channel.fails = lambda notification: ChannelUnavailable("away", cure="wait")
    house.say("c", LOW)
    house.say("d", LOW)
    house.work()
    house.dispatch()
    for number in range(3):
        house.pass_time(1300)
        house.say("c", [-9.0], first=3 + number, age=0)
        house.work()
        house.dispatch()
    house.channel.fails = lambda notification: None
    house.pass_time(40)
    house.dispatch()
    assert house.channel.told == [("c", "critical")]
    assert house.channel.taken[0].sequence == 1


def test_an_alert_that_is_refused_for_ever_holds_up_no_other_and_is_tried_again(house: House) -> None:
    house.config = AlertsConfig(
        route=Route(path="0", receiver="log", group_by=(), group_wait=0.0, group_interval=1.0),
        receivers=(Receiver(name="log", integrations=(LogConfig(receiver="log"),)),),
    )
    house.restart()
    house.channel.fails = lambda one: (
        ChannelError("no", cure="x") if any(alert.conversation_id == "bad" for alert in one.alerts) else None
    )
    for name in ("a", "bad", "b"):
        house.say(name, LOW)
    house.work()
    for _ in range(20):
        house.dispatch()
        house.pass_time(30)
    assert sorted(conversation for conversation, _ in house.channel.told) == ["a", "b"]
    assert not house.store.pending(9) and house.alerts()["bad"].told == {}
    house.channel.fails = lambda one: None
    house.pass_time(HOUR - 1000)
    for name in ("a", "bad", "b"):
        house.say(name, [-9.0], first=3, age=0)
    house.work()
    for _ in range(20):
        house.pass_time(100)
        house.dispatch()
    assert "bad" in {conversation for conversation, _ in house.channel.told}


def test_only_who_has_the_lease_tells(house: House) -> None:
    assert house.store.lease(LEASE, "another", 600.0)
    house.say("c", LOW)
    house.work()
    assert house.dispatcher.run_once() == 0 and house.channel.lines == []
    house.store.release(LEASE, "another")
    assert house.dispatcher.run_once() == 0  # it asks once a second only
    house.ticks.now += 1.1
    house.dispatch()
    assert len(house.channel.lines) == 1


def test_who_lost_the_lease_stops_telling_and_takes_over_what_the_other_did(house: House) -> None:
    house.dispatch()
    house.store.release(LEASE, "one")
    other = Dispatcher(
        house.log,
        house.store,
        {LOG: house.channel},
        house.config,
        max_age=HOUR,
        live=True,
        holder="two",
        clock=house.clock,
        ticks=house.ticks,
    )
    house.say("c", LOW)
    house.work()
    while other.run_once():
        pass
    house.pass_time(5.1)
    assert house.dispatcher.run_once() == 0
    house.store.release(LEASE, "two")
    house.pass_time(1.1)
    house.dispatch()
    assert len(house.channel.lines) == 1
    house.say("c", BACK, first=3)
    house.work()
    house.dispatch()
    assert house.channel.told[1:] == [("c", "resolved")]


def test_a_reload_loses_nothing_of_what_is_under_way(house: House) -> None:
    before, after = house.channel, Kept()
    began, hold = threading.Event(), threading.Event()

    def stuck(notification: Notification) -> Exception | None:
        began.set()
        hold.wait(30)
        return ChannelUnavailable("it went away while it had the call", cure="wait")

    before.fails = stuck
    other: list[tuple[AlertsConfig, dict[str, Any]]] = []
    house.restart()
    house.dispatcher._reload = lambda: other.pop() if other else None
    house.dispatcher._ticks = time.monotonic
    house.dispatcher._reload_next = 0.0
    stop = threading.Event()
    thread = threading.Thread(target=house.dispatcher.run, args=(stop,))
    thread.start()
    try:
        house.say("c", LOW)
        house.work()
        assert began.wait(30)
        other.append((house.config, {LOG: after}))
        until(lambda: house.dispatcher._deliveries[LOG].channel is after)
        hold.set()
        until(lambda: bool(after.taken))
    finally:
        hold.set()
        stop.set()
        thread.join(20)
    assert before.taken == [] and [one.sequence for one in after.taken] == [0]


class Refreshed(Kept):
    """One that is told again, every minute, what fires."""

    refresh: float | None = 60.0

    def __init__(self) -> None:
        super().__init__("am/alertmanager[0]")
        self.kept: list[list[tuple[str, str]]] = []

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        self.kept.append([(alert.conversation_id, alert.told[self.name]) for alert in alerts])


def refreshed(house: House) -> Refreshed:
    """The house has an Alertmanager instead of its log."""
    channel = Refreshed()
    house.config = AlertsConfig(
        route=Route(path="0", receiver="am", group_wait=0.0, group_interval=0.0),
        receivers=(
            Receiver(name="am", integrations=(AlertmanagerConfig(receiver="am", url="http://am.example:9093"),)),
        ),
    )
    house.channels = {channel.name: channel}  # type: ignore[dict-item]
    house.live = None
    house.restart()
    house.clock.now += 0.1
    return channel


def minutes(house: House, many: int) -> None:
    for _ in range(many):
        house.pass_time(60.1)
        house.dispatch()


def test_nothing_is_said_again_in_shadow_nor_what_was_only_acknowledged(house: House) -> None:
    channel = refreshed(house)
    house.say("c", LOW)
    house.work()
    house.dispatch()
    append_action(house.log, "acknowledge", house.alerts()["c"].id, Acknowledgement(), by="ann")
    minutes(house, 3)
    assert house.alerts()["c"].acknowledged_by == "ann" and house.alerts()["c"].told == {}
    append_action(house.log, "paging", "mode", Paging("live"), by="ann")
    append_action(house.log, "silence", "s", Silence("2026-06-01T13:00:00Z", conversation_id="quiet"), by="ann")
    minutes(house, 1)
    house.say("quiet", LOW)
    house.say("loud", LOW)
    house.work()
    house.dispatch()
    append_action(house.log, "acknowledge", house.alerts()["quiet"].id, Acknowledgement(), by="ann")
    minutes(house, 3)
    assert channel.told == [("loud", "critical")]
    assert channel.kept and all(kept in ([], [("loud", "critical")]) for kept in channel.kept)
    append_action(house.log, "paging", "mode", Paging("shadow"), by="ann")
    minutes(house, 1)
    channel.kept.clear()
    minutes(house, 3)
    assert channel.kept == []


def test_what_was_acknowledged_unseen_and_then_gets_worse_is_told_also_by_the_next_dispatcher(house: House) -> None:
    append_action(house.log, "silence", "s", Silence("2026-06-01T12:10:00Z"), by="ann")
    house.say("c", [0.0, *SLOW])
    house.say("d", [0.0, *SLOW])
    house.work()
    house.dispatch()
    for name in "cd":
        assert house.alerts()[name].severity == "warning"
        append_action(house.log, "acknowledge", house.alerts()[name].id, Acknowledgement(), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    house.say("c", [-9.0], first=3, age=0)
    house.work()
    house.dispatch()
    house.restart()
    house.dispatch()
    assert house.channel.told == []
    house.pass_time(600)
    house.dispatch()
    assert house.channel.told == [("c", "critical")]


def test_in_shadow_nothing_goes_out_that_had_waited_for_its_receiver(house: House) -> None:
    house.live = None
    house.restart()
    append_action(house.log, "paging", "mode", Paging("live"), by="ann")
    house.channel.fails = lambda notification: ChannelUnavailable("away", cure="wait")
    house.say("c", LOW)
    house.work()
    house.dispatch()
    append_action(house.log, "paging", "mode", Paging("shadow"), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    house.channel.fails = lambda notification: None
    minutes(house, 3)
    assert house.channel.told == []
    append_action(house.log, "paging", "mode", Paging("live"), by="ann")
    minutes(house, 1)
    assert house.channel.told == [("c", "critical")]


def test_what_got_worse_while_the_log_was_away_is_not_resolved_by_what_was_said_before(house: House) -> None:
    house.say("c", [0.0, *SLOW])
    house.work()
    house.dispatch()
    append_action(house.log, "resolve", house.alerts()["c"].id, Acknowledgement(), by="ann")
    house.pass_time(1.1)
    house.dispatch()
    house.say("c", [-9.0], first=3, age=0)
    house.work()
    append = house.log.append

    def away(*arguments: Any) -> Any:
        raise LogUnavailable("away", cure="wait")

    house.log.append = away  # type: ignore[method-assign]
    house.dispatch()
    house.log.append = append  # type: ignore[method-assign]
    told = [("c", "warning"), ("c", "resolved"), ("c", "critical")]
    assert house.channel.told == told
    append_action(house.log, "acknowledge", "another", Acknowledgement(), by="bob")
    minutes(house, 2)
    assert house.channel.told == told and house.alerts()["c"].firing
    assert not [key for key in read_actions(house.log) if key.startswith("resolve/")]
    house.restart()
    house.dispatch()
    assert house.channel.told == told and house.alerts()["c"].firing


@pytest.mark.parametrize("most", [2, 1])
def test_what_has_still_to_be_told_is_not_forgotten(house: House, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("alerts.dispatcher.MOST_KEPT", most)
    for number in range(4):
        house.say(f"c{number}", LOW)
        house.work()
        house.dispatch()
    house.channel.fails = lambda notification: ChannelUnavailable("away", cure="wait")
    for number in range(4):
        house.say(f"c{number}", BACK, first=3, age=0)
        house.work()
        house.pass_time(1.0)
        house.dispatch()
    gone = house.dispatcher.tidy()
    assert gone == (0 if most == 2 else 2), "the hard bound is twice as many"
    house.channel.fails = lambda notification: None
    minutes(house, 2)
    over = {conversation for conversation, word in house.channel.told if word == "resolved"}
    assert over >= {f"c{number}" for number in range(gone, 4)}
    assert house.dispatcher.tidy() == 4 - gone - most


@pytest.mark.parametrize(("forgotten", "days"), [(False, 14), (True, 7)])
def test_an_end_that_nobody_takes_is_not_waited_for_for_ever(house: House, forgotten: bool, days: int) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatch()
    house.channel.fails = lambda notification: ChannelUnavailable("away", cure="wait")
    if forgotten:
        forget(house.log, "c", by="ann")
    else:
        append_action(house.log, "resolve", house.alerts()["c"].id, Acknowledgement(), by="ann")
    house.work()
    house.pass_time(1.1)
    house.dispatch()
    house.pass_time(60)
    house.dispatch()
    assert house.alerts()["c"].resolution == ("forgotten" if forgotten else "resolved")
    house.pass_time((days - 1) * 86400)
    house.dispatch()
    assert set(house.alerts()) == {"c"}
    house.pass_time(86400)
    house.dispatch()
    assert house.alerts() == {}


def test_old_alerts_go_in_parts_and_soon(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alerts.dispatcher.MOST_KEPT", 1)
    monkeypatch.setattr("alerts.dispatcher.TIDIED_AT_ONCE", 2)
    for number in range(6):
        house.say(f"c{number}", LOW)
        house.say(f"c{number}", BACK, first=3, age=0)
    house.work()
    house.dispatch()
    kept = []
    house.pass_time(601)
    for _ in range(4):
        house.dispatch()
        kept.append(len(house.alerts()))
        house.pass_time(5.1)
    assert kept == [4, 2, 1, 1]


def test_who_lost_the_lease_sends_nothing_of_what_was_under_way(house: House) -> None:
    house.say("c", LOW)
    house.work()

    def lost(notification: Notification) -> Exception:
        house.store.release(LEASE, "one")
        assert house.store.lease(LEASE, "two", 600.0)
        house.pass_time(5.1)
        house.dispatcher._lease()
        return ChannelUnavailable("away", cure="wait")

    house.channel.fails = lost
    house.dispatcher.run_once()
    house.channel.fails = lambda notification: None
    house.pass_time(60)
    for delivery in house.dispatcher._deliveries.values():
        assert not delivery.work()
    assert house.channel.taken == []
    house.store.release(LEASE, "two")
    house.pass_time(1.1)
    house.dispatch()
    assert house.channel.told == [("c", "critical")]


def test_what_was_handed_back_before_the_lease_was_lost_is_not_sent_after(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatch()
    (one,) = house.channel.taken
    house.dispatcher._take_back(Landed(one, "left"))
    house.store.release(LEASE, "one")
    assert house.store.lease(LEASE, "two", 600.0)
    house.pass_time(5.1)
    assert house.dispatcher.run_once() == 0
    house.store.release(LEASE, "two")
    house.pass_time(1.1)
    house.dispatch()
    assert house.channel.taken == [one]


def test_what_was_just_told_is_known_before_it_is_said_again(house: House) -> None:
    channel = refreshed(house)
    append_action(house.log, "paging", "mode", Paging("live"), by="ann")
    house.say("c", [0.0, *SLOW])
    house.work()
    house.dispatch()
    assert channel.told == [("c", "warning")]
    house.pass_time(50)
    house.say("c", [-9.0], first=3, age=0)
    house.work()
    channel.fails = lambda notification: house.pass_time(20)  # type: ignore[func-returns-value]
    house.dispatch()
    assert channel.told[1:] == [("c", "critical")]
    minutes(house, 1)
    assert channel.kept and all(kept == [("c", "critical")] for kept in channel.kept)


def test_run_waits_while_the_store_is_away_and_goes_on(house: House) -> None:
    house.say("c", LOW)
    house.work()
    lease, tries = house.store.lease, 0

    def away(*arguments: Any) -> bool:
        nonlocal tries
        tries += 1
        if tries == 3:
            house.store.lease = lease  # type: ignore[method-assign]
        raise StoreUnavailable("away", cure="wait")

    house.store.lease = away  # type: ignore[method-assign]
    house.dispatcher._ticks = time.monotonic
    stop = threading.Event()
    thread = threading.Thread(target=house.dispatcher.run, args=(stop,))
    thread.start()
    try:
        until(lambda: bool(house.channel.lines))
    finally:
        stop.set()
        thread.join(20)
    assert len(house.channel.lines) == 1 and tries == 3
    assert house.store.lease(LEASE, "another", 1.0)  # it was given back


def test_what_is_known_is_told_while_the_store_is_away(house: House) -> None:
    house.config = replace(house.config, route=replace(house.config.route, group_wait=10.0))
    house.restart()
    house.say("c", LOW)
    house.work()
    house.dispatch()
    assert house.channel.lines == []
    house.clock.now += 11
    house.ticks.now += 11

    def away(*arguments: Any) -> bool:
        raise StoreUnavailable("away", cure="wait")

    house.store.lease = away  # type: ignore[method-assign]
    stop = threading.Event()
    thread = threading.Thread(target=house.dispatcher.run, args=(stop,))
    thread.start()
    try:
        until(lambda: bool(house.channel.lines))
    finally:
        stop.set()
        thread.join(20)


def test_a_store_that_goes_away_before_findings_are_let_go_ends_nothing_and_is_not_asked_all_the_time(
    house: House,
) -> None:
    settle, lease, asked = house.store.settle, house.store.lease, 0

    def away(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        house.store.lease = away  # type: ignore[method-assign]
        raise StoreUnavailable("away", cure="wait")

    house.store.settle = away  # type: ignore[method-assign]
    house.say("c", LOW)
    house.work()
    stop = threading.Event()
    thread = threading.Thread(target=house.dispatcher.run, args=(stop,))
    thread.start()
    try:
        until(lambda: len(house.channel.lines) == 1)
        rounds, tell = 0, house.dispatcher._tell

        def counted() -> int:
            nonlocal rounds
            rounds += 1
            return tell()

        house.dispatcher._tell = counted  # type: ignore[method-assign]
        until(lambda: rounds >= 5)  # it goes on telling; its clock stands still, so the store is not tried again
        assert thread.is_alive() and asked == 1
        house.store.settle, house.store.lease = settle, lease  # type: ignore[method-assign]
        house.pass_time(60)
        until(lambda: not house.store.pending(1))
    finally:
        stop.set()
        thread.join(20)
    assert len(house.channel.lines) == 1


def test_a_slow_receiver_holds_up_neither_the_others_nor_the_intake(house: House) -> None:
    house.config = AlertsConfig(
        route=house.config.route,
        receivers=(Receiver(name="log", integrations=(LogConfig(receiver="log"), LogConfig(receiver="log", index=1))),),
    )
    slow, hold = Kept("log/log[1]"), threading.Event()
    slow.fails = lambda one: None if hold.wait(30) else ChannelUnavailable("slow", cure="wait")
    house.channels = {LOG: house.channel, slow.name: slow}
    house.restart()
    house.dispatcher._ticks = time.monotonic
    stop = threading.Event()
    thread = threading.Thread(target=house.dispatcher.run, args=(stop,))
    thread.start()
    try:
        for number in range(3):
            house.say(f"c{number}", LOW)
            house.work()
            until(lambda number=number: len(house.channel.taken) == number + 1)  # type: ignore[misc]
        assert slow.taken == []
        hold.set()
        until(lambda: len(slow.taken) == 3)
    finally:
        hold.set()
        stop.set()
        thread.join(20)
    assert set(house.alerts()["c2"].told) == {LOG, slow.name}


def test_a_storm_of_10_000_conversations_becomes_few_messages_with_none_missing(tmp_path: Path) -> None:
    house = House(tmp_path, None)
    house.config = AlertsConfig(
        route=Route(path="0", receiver="ops", group_wait=10.0),
        receivers=(Receiver(name="ops", integrations=(WebhookConfig(receiver="ops", url="https://ops.example"),)),),
    )
    house.channel.name = "ops/webhook[0]"
    house.channels = {house.channel.name: house.channel}
    house.restart()
    many = 10_000
    at = datetime.fromtimestamp(house.clock.now - 60, UTC).isoformat().replace("+00:00", "Z")
    events = [replace(projection(f"c{number}", 0, -9.0), time=at) for number in range(many)]
    house.log.append(PROJECTIONS, [message(event) for event in events])
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=1000)
    house.work()
    house.dispatch()
    assert house.channel.taken == [] and not house.store.pending(9)
    house.pass_time(11)
    house.dispatch()
    assert len(house.channel.taken) == 10
    assert all(len(one.alerts) == 100 and one.truncated == many - 100 for one in house.channel.taken)
    covered = [id for one in house.channel.taken for id in one.covered]
    assert len(covered) == len(set(covered)) == many
    assert set(covered) == {found.episode_id for found in house.store.findings(2 * many)}
    lengths = [len(record.value) for record in house.log.read(ACTIONS, 0, 0, 10**6)]
    assert max(lengths) < 900 * 1024
    house.restart()
    house.dispatch()
    assert len(house.channel.taken) == 10
    house.close()


def test_old_alerts_are_withdrawn_and_their_notifications(house: House) -> None:
    house.say("c", LOW, age=0)
    house.say("c", BACK, first=3, age=0)
    house.say("d", LOW, age=0)
    house.work()
    house.dispatch()
    assert house.dispatcher.tidy() == 0
    house.pass_time(8 * 86400)
    house.dispatch()
    assert set(house.alerts()) == {"d"} and house.alerts()["d"].resolution == "ended"
    house.pass_time(8 * 86400)
    house.dispatch()
    assert not [key for key in read_actions(house.log) if key.startswith(("alert/", "notification/"))]


def test_a_record_that_was_sent_holds_no_alert_any_more(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatch()
    (value,) = [value for key, value in read_actions(house.log).items() if key.startswith("notification/")]
    body = msgspec.json.decode(value)["body"]
    assert body["sent"] and body["alerts"] == []
    assert house.log.read(ACTIONS, 0, 0, 99)


# Real processes

PROGRAM = "from pathlib import Path; import sys; from alerts.dispatch import run; from monitor.settings import "
PROGRAM += "load_settings; run(load_settings(), Path(sys.argv[1]))"


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    settings = {
        "ANCHORWATCH_LOG_URL": sqlite_url(folder / "log.db"),
        "ANCHORWATCH_STORE_URL": sqlite_url(folder / "store.db"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)],
        env={**environment(), **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_killed_at_any_moment_everything_is_told_with_the_same_bytes_and_sigterm_drains(tmp_path: Path) -> None:
    log, out = EmbeddedLog(tmp_path / "log.db"), tmp_path / "out.jsonl"
    store = SqliteStore(tmp_path / "store.db")
    now = datetime.now(UTC)

    def young(event: Projection, number: int) -> Projection:
        return replace(event, time=(now + timedelta(milliseconds=number)).isoformat().replace("+00:00", "Z"))

    conversations = 900
    worker = Worker(log, store, CONFIG)
    process = start(tmp_path, out)
    try:
        for round_number in range(3):
            first = round_number * conversations // 3
            events = [young(projection(f"c{first + i}", 0, -9.0), i) for i in range(conversations // 3)]
            log.append(PROJECTIONS, [message(event) for event in events])
            while worker.run_once() or worker.run_once():
                pass
            until(lambda first=first: len(lines(out)) > first)  # type: ignore[misc]
            process.kill()
            process.wait()
            store.release(LEASE, next(iter(leases(tmp_path)), ""))  # else the next one waits for it to run out
            process = start(tmp_path, out)
        until(lambda: len(set(lines(out))) >= conversations and not store.pending(1) and bool(leases(tmp_path)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    told: dict[str, set[str]] = {}
    for line in lines(out):
        one = msgspec.json.decode(line)
        for alert in one["alerts"]:
            told.setdefault(alert["labels"]["conversation_id"], set()).add(one["id"])
    assert told.keys() == {one.conversation_id for one in store.findings(2 * conversations)}
    assert len(told) == conversations and all(len(ids) == 1 for ids in told.values())  # never a second id
    assert len(set(lines(out))) == conversations  # a repeat is the same line
    assert store.lease(LEASE, "another", 1.0)  # given back
    log.close()
    store.close()


def leases(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "store.db") as connection:
        return [row[0] for row in connection.execute("SELECT holder FROM leases WHERE name = ?", (LEASE,))]
