"""The dispatcher: findings become alerts, alerts are told, and what has been told is written down.

It knows neither how a finding came about, nor the rules (`alerts.groups`), nor how a channel hands anything over
(`alerts.delivery`). At least once: a finding leaves the outbox only after its alert is in the log of actions; a
notification is in that log before it is sent, so that after a crash it is sent again with the same id and the same
bytes; and what has been told is in that log, too, which outlives the store: a wiped store, folded anew, pages nobody
again.

Better twice than never. While the log is away, alerts are told by what is known; while the store is away, those that
are known are told; a receiver that refuses one alert for ever does not hold up the others; and two dispatchers at once
do no worse than tell twice.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Protocol, TypeAlias

import structlog

from alerts.channel import Channel
from alerts.config import AlertsConfig
from alerts.delivery import Delivery, Landed
from alerts.endings import Endings
from alerts.groups import Groups
from alerts.journal import Journal, read_bodies
from alerts.operators import Operators
from alerts.table import Table
from monitor import telemetry
from monitor.actions import Store, due
from monitor.alert import Alert, Notification
from monitor.errors import AnchorwatchError, LogError, StoreUnavailable
from monitor.paging import Known, decide
from monitor.placement import partition_of
from monitor.store.store import Outbox, Pending, Reader, Session
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["Dispatcher", "DispatcherStore", "Reload"]

LEASE = "dispatch"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
ASK_SECONDS = 1.0  # between tries while another one has the lease
IDLE_SECONDS = 0.025
OPERATORS_SECONDS = 1.0  # between looks at what operators did, while nothing is found
FOLD_SECONDS = 5.0  # until the store has what we wrote ourselves, where no worker is faster
BATCH = 200  # findings looked at in one round
WAITING_SECONDS = 5.0  # between looks at findings that wait
CHECKS_AT_ONCE = 50  # conversations asked about in one round
CAUGHT_UP_SECONDS = 60.0
KEPT_SECONDS = 7 * 86_400.0
MOST_KEPT = 10_000  # alerts that are over; twice as many where their end has still to be told
TIDY_SECONDS = 600.0
TIDIED_AT_ONCE = 5_000  # and the others a moment later: to write it down takes time that pages do not have
JUMP_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 30.0
DRAIN_SECONDS = 8.0

Reload: TypeAlias = Callable[[], tuple[AlertsConfig, Mapping[str, Channel]] | None]

_log = structlog.get_logger("anchorwatch.dispatch")


class DispatcherStore(Outbox, Reader, Store, Protocol):
    """What the dispatcher needs of a store."""


class Dispatcher:
    """Takes findings from one store to many channels. For one thread; each channel has another.

    Args:
        log: where actions are written, and read from.
        store: where findings wait.
        channels: integration → channel, of all integrations of `config`.
        config: rules and routes.
        max_age: seconds; see `monitor.paging`.
        topic: the findings' own.
        live: True: notifications go out whatever the mode is. None: as the action `paging/mode` says.
        reload: asked once a second for other rules and their channels.
        holder: a name that no other process has.
        clock: unix seconds.
        ticks: monotonic seconds.
    """

    def __init__(
        self,
        log: Log,
        store: DispatcherStore,
        channels: Mapping[str, Channel],
        config: AlertsConfig,
        *,
        max_age: float,
        topic: str = PROJECTIONS,
        live: bool | None = None,
        reload: Reload | None = None,
        holder: str | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._store = store
        self._config = config
        self._max_age = max_age
        self._topic = topic
        self._live = live
        self._reload = reload
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._clock = clock
        self._ticks = ticks
        self._wake = threading.Event()
        self._threads = False
        self._deliveries: dict[str, Delivery] = {}
        self._mine = False
        self._lease_next = float("-inf")
        self._reload_next = self._tidy_next = self._gauges_next = ticks() + 1.0
        self._drift = clock() - ticks()
        self._jumped_at, self._jump = float("-inf"), 0.0
        self._open(channels)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing is known: what others did in the meantime is in the log."""
        self._loaded = False
        self._landed: queue.SimpleQueue[Landed] = queue.SimpleQueue()
        self._landing: dict[str, set[str]] = {}  # integration → ids of what has landed, and is not taken in
        self._table = Table(lambda alert: self._groups.put(alert))
        self._groups = Groups(self._config, self._table.alerts, _held_back)
        self._journal = Journal(self._log, self._store, self._table, self._clock, self._ticks)
        self._operators = Operators(self._store, self._journal, self._table, self._groups, live=self._live)
        self._endings = Endings(self._log, self._store, self._topic, self._table, self._config)
        self._taken: dict[str, None] = {}  # references of findings that are part of an alert, and not settled
        self._waiting: set[str] = set()
        self._waiting_next = float("-inf")
        self._operators_next = self._fold_next = float("-inf")

    # The loop.

    def run(self, stop: threading.Event, *, idle_seconds: float = IDLE_SECONDS) -> None:
        """Dispatch until `stop` is set; deliveries at hand are finished first, for 8 s at most, and the lease given
        back.

        While the store is away it waits from 0.2 up to 30 s between tries, and goes on telling what it knows. May run
        in any thread.

        Raises:
            StoreError, ConfigurationError: somebody must look.
        """
        self._threads = True
        for delivery in self._deliveries.values():
            delivery.start()
        failures, try_next = 0, float("-inf")
        try:
            while not stop.is_set():
                telemetry.DISPATCHER_LOOP.set(self._clock())
                done = 0
                if self._ticks() >= try_next:
                    try:
                        done = self.run_once()
                        if failures:
                            _log.info("back again", failed_tries=failures)
                        failures = 0
                    except StoreUnavailable as error:
                        failures += 1
                        self._lease_next = float("-inf")
                        if failures & (failures - 1) == 0:  # a long outage must not fill the log file
                            _log.warning("waiting", problem=error.problem, cure=error.cure, failed_tries=failures)
                        wait = FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10)
                        try_next = self._ticks() + min(LONGEST_BACKOFF_SECONDS, wait)
                elif self._mine and self._loaded:
                    done = self._tell()
                if not done:
                    self._wake.wait(idle_seconds)
                    self._wake.clear()
        finally:
            self._end()

    def _end(self) -> None:
        until = time.monotonic() + DRAIN_SECONDS
        for delivery in self._deliveries.values():
            delivery.stop()
        for delivery in self._deliveries.values():
            delivery.close(max(0.0, until - time.monotonic()))
        with contextlib.suppress(AnchorwatchError):
            if self._mine and self._loaded:
                self._land()
                self._journal.write()
                self._settle()
        telemetry.DISPATCHER.set(0)
        try:
            self._store.release(LEASE, self._holder)
        except AnchorwatchError:
            _log.info("the lease is left to run out", seconds=LEASE_SECONDS)

    def run_once(self) -> int:
        """One round: says how much was done; 0 when there is nothing to do, or another one dispatches. Where `run` has
        not been called, it delivers by itself what is due.

        Raises:
            StoreUnavailable: nothing is lost; call again later.
            StoreError, ConfigurationError: somebody must look.
        """
        self._look_at_the_clock()
        if not self._lease():
            return 0
        if not self._loaded:
            self._load()
        fresh = self._look()
        # Forgettings and the like first: a store that was wiped has none of them yet.
        if self._catch_up(at_once=bool(fresh)) and fresh:
            fresh = self._look()
        done = self._intake(fresh)
        if len(fresh) < BATCH and self._ticks() >= self._jumped_at + self._config.idle_after:
            done += self._endings.check(self._clock(), CHECKS_AT_ONCE, self._operators.forgotten.keys())
        done += self._tell()
        self._settle()
        self._now_and_then()
        if not self._threads:
            for delivery in self._deliveries.values():
                while delivery.work():
                    done += 1
            done += self._tell()
            self._settle()
        return done

    def _lease(self) -> bool:
        if self._ticks() >= self._lease_next:
            mine = self._store.lease(LEASE, self._holder, LEASE_SECONDS)
            if self._mine and not mine:
                _log.warning("another dispatcher has the lease now")
                for delivery in self._deliveries.values():
                    delivery.abandon()
                self._begin_anew()
            self._mine = mine
            telemetry.DISPATCHER.set(mine)
            self._lease_next = self._ticks() + (RENEW_SECONDS if mine else ASK_SECONDS)
        return self._mine

    # Rules and channels.

    def configure(self, config: AlertsConfig, channels: Mapping[str, Channel]) -> None:
        """Other rules from now on. From the dispatcher's own thread; what is at hand is finished in the background."""
        self._config = config
        self._open(channels)
        self._groups.configure(config)
        self._endings.configure(config)

    def _open(self, channels: Mapping[str, Channel]) -> None:
        before, self._deliveries = self._deliveries, {}
        for name, channel in channels.items():
            delivery = Delivery(
                channel, self._take_back, max_age=max(self._max_age, 60.0), clock=self._clock, ticks=self._ticks
            )
            delivery.refresh(lambda name=name: self._firing_at(name))  # type: ignore[misc]
            self._deliveries[name] = delivery
        for name, delivery in before.items():
            delivery.stop()
            for notification in delivery.clear():
                if name in self._deliveries:
                    self._deliveries[name].send(notification)
                else:
                    self._take_back(Landed(notification, "left"))
            threading.Thread(target=delivery.close, args=(DRAIN_SECONDS,), daemon=True).start()
        if self._threads:
            for delivery in self._deliveries.values():
                delivery.start()

    def _take_back(self, landed: Landed) -> None:
        self._landing.setdefault(landed.notification.integration, set()).add(landed.notification.id)
        self._landed.put(landed)
        self._wake.set()

    def _firing_at(self, integration: str) -> list[Alert] | None:
        if not self._groups.live:
            return []
        if self._landing.get(integration):
            return None  # what it was told a moment ago is not known here yet
        # From another thread: of a copy, which is taken in one step.
        alerts = list(self._table.alerts.values())
        return [alert for alert in alerts if alert.firing and alert.told.get(integration) not in (None, "resolved")]

    # What is known.

    def _load(self) -> None:
        """Take over what is written down."""
        self._journal.fold()
        notifications = read_bodies(self._store.actions("notification/"), Notification)
        for notification in notifications:
            self._groups.remember(notification)
        for alert in read_bodies(self._store.actions("alert/"), Alert):
            self._table.load(alert)
            self._endings.watch(alert, self._clock())
        self._loaded = True
        self._read_operators()
        unsent = [notification for notification in notifications if not notification.sent]
        for notification in unsent:
            if self._groups.live and notification.integration in self._deliveries:
                self._deliveries[notification.integration].send(notification)
            else:
                self._groups.dropped(notification)
        if self._table.alerts:
            _log.info("alerts taken over", alerts=len(self._table.alerts), under_way=len(unsent))

    def _catch_up(self, *, at_once: bool) -> bool:
        """See what operators did, if it is time to; says whether they did anything."""
        news, now = False, self._ticks()
        if not at_once and now >= self._fold_next:
            self._fold_next = now + FOLD_SECONDS
            news = self._journal.fold()
        elif at_once or now >= self._operators_next:
            self._operators_next = now + OPERATORS_SECONDS
            news = self._journal.catch_up()
        if news:
            self._read_operators()
        return news

    def _read_operators(self) -> None:
        now, live = self._clock(), self._groups.live
        for alert in self._operators.read(now):
            self._endings.watch(alert, now, at_once=True)
        if live and not self._groups.live:
            for delivery in self._deliveries.values():
                for notification in delivery.clear():
                    self._groups.dropped(notification)

    # Findings.

    def _look(self) -> list[Pending]:
        """What is pending, except what waits and was looked at a moment ago."""
        # Those that wait stay at the head of the queue: look beyond them, or they would hold up the others.
        pending = self._store.pending(BATCH + len(self._waiting) + len(self._taken))
        telemetry.OUTBOX_PENDING.set(len(pending))
        oldest = min((one.committed for one in pending), default=None)
        telemetry.OUTBOX_OLDEST_SECONDS.set(0.0 if oldest is None else max(0.0, self._clock() - oldest))
        if self._waiting and self._ticks() >= self._waiting_next:
            # The more there are, the more a look costs.
            self._waiting_next = self._ticks() + WAITING_SECONDS * (1 + len(self._waiting) / 10_000)
            self._waiting.clear()
        return [one for one in pending if one.reference not in self._waiting and one.reference not in self._taken]

    def _intake(self, fresh: Sequence[Pending]) -> int:
        """Make them part of alerts, or leave them; says how many were decided on."""
        if not fresh:
            return 0
        session, now = cache(self._store.session), self._clock()
        decisions = decide(fresh, self._known(session))
        kept = []
        for decision in decisions:
            conversation = decision.pending.finding.conversation_id
            match decision.act:
                case "take" if conversation in self._operators.forgotten and session(conversation) is None:
                    kept.append(decision.pending.reference)  # forgotten in this very moment
                case "take":
                    self._take(decision.pending, session, now)
                case "wait":
                    self._waiting.add(decision.pending.reference)
                case "keep":
                    kept.append(decision.pending.reference)
                    telemetry.KEPT.labels(decision.reason).inc()
        if kept:
            self._store.settle(kept)
        return sum(decision.act != "wait" for decision in decisions)

    def _take(self, pending: Pending, session: Callable[[str], Session | None], now: float) -> None:
        finding = pending.finding
        conversation = finding.conversation_id
        points = self._store.trajectory(conversation) if conversation else []
        alert = self._table.take(finding, session(conversation) if conversation else None, points, now)
        self._taken[pending.reference] = None
        self._operators.took(alert, finding, now)
        self._endings.watch(alert, now)

    def _known(self, session: Callable[[str], Session | None]) -> Known:
        """All that the decisions rest on, read after the pending findings and before their sessions."""
        now = self._clock()
        progress = self._store.progress(self._topic)
        behind = {one.partition for one in progress if one.behind and one.watermark < now - CAUGHT_UP_SECONDS}
        try:
            partitions = self._log.partitions(self._topic) if behind else 0
        except LogError:
            partitions = 0
        set_forward = self._jump if self._ticks() < self._jumped_at + self._max_age else 0.0
        return Known(
            now=now - max(0.0, set_forward),  # nothing is old because somebody has set a clock
            max_age=self._max_age,
            taken=self._table.knows,
            episodes=self._table.alerts.keys(),
            forgetting=due(self._store),
            behind=lambda conversation: (
                partition_of(conversation, partitions) in behind if conversation and partitions else bool(behind)
            ),
            session=session,
        )

    def _settle(self) -> None:
        """Let go of the findings whose alerts are written down."""
        if self._taken and not self._table.unwritten:
            self._store.settle(list(self._taken))
            self._taken.clear()

    # Telling.

    def _tell(self) -> int:
        """Note what has landed, write down what is due, and send it; says how much that was. The store is not asked:
        it may be away."""
        if self._reload is not None and self._ticks() >= self._reload_next:
            self._reload_next = self._ticks() + 1.0
            if (found := self._reload()) is not None:
                self.configure(*found)
        done = self._land()
        made = self._groups.due(self._clock())
        for notification in made:
            self._journal.note(notification)
        self._journal.write()
        for notification in made:
            self._deliveries[notification.integration].send(notification)
        return done + len(made)

    def _land(self) -> int:
        done = 0
        while True:
            try:
                notification, result, error = self._landed.get_nowait()
            except queue.Empty:
                return done
            done += 1
            match result:
                case "taken":
                    self._journal.note(self._groups.sent(notification))
                    self._table.told(notification.integration, notification.covered)
                case "refused":
                    self._groups.refused(notification, self._clock())
                case "left" if self._groups.live and notification.integration in self._deliveries:
                    self._deliveries[notification.integration].send(notification)
                case "left" | "too_old" | "broken":
                    self._groups.dropped(notification)
            self._landing.get(notification.integration, set()).discard(notification.id)
            if error is not None:
                raise error

    # Now and then.

    def _look_at_the_clock(self) -> None:
        drift = self._clock() - self._ticks()
        if abs(drift - self._drift) > JUMP_SECONDS:
            _log.warning("the clock of this machine was set", by_seconds=round(drift - self._drift, 1))
            self._jumped_at, self._jump = self._ticks(), drift - self._drift
            self._groups.clock_jumped()
        self._drift = drift

    def _now_and_then(self) -> None:
        if self._ticks() >= self._gauges_next:
            self._gauges_next = self._ticks() + 5.0
            counts = dict.fromkeys(("warning", "critical", "info"), 0)
            for alert in self._table.alerts.values():
                if alert.firing:
                    counts[alert.severity] += 1
            for severity, count in counts.items():
                telemetry.ALERTS_FIRING.labels(severity).set(count)
        if self._ticks() >= self._tidy_next:
            self._tidy_next = self._ticks() + TIDY_SECONDS
            try:
                if self.tidy() == TIDIED_AT_ONCE:
                    self._tidy_next = self._ticks() + RENEW_SECONDS
            except LogError as error:
                _log.info("old alerts are withdrawn later", problem=error.problem)

    def tidy(self) -> int:
        """Forget alerts that have been over for seven days, and those of forgotten conversations, once their end is
        told; an untold end is waited for as long again (of a forgotten conversation for seven days), or until there are
        twice as many as are kept. Says how many, 5,000 at most.

        Raises:
            LogError: as the log does.
        """
        before = self._clock() - KEPT_SECONDS
        over = sorted(
            (alert for alert in self._table.alerts.values() if not alert.firing), key=lambda alert: alert.changed
        )
        gone: list[str] = []
        untold = 0
        for number, alert in enumerate(over):
            if len(gone) == TIDIED_AT_ONCE:
                break
            too_many, owed = number < len(over) - MOST_KEPT, self._groups.owes(alert)
            forgotten = alert.resolution == "forgotten"
            longest = before if forgotten else before - KEPT_SECONDS
            if not owed and (too_many or forgotten or alert.changed < before):
                gone.append(alert.id)
            elif owed and (number < len(over) - 2 * MOST_KEPT or alert.changed < longest):
                gone.append(alert.id)
                untold += 1
        if untold:
            _log.error("alerts are given up whose end nobody took", alerts=untold)
        self._journal.withdraw("alert", gone)
        for id in gone:
            self._groups.drop(self._table.alerts[id])
            self._table.drop(id)
        self._journal.withdraw("notification", ["/".join(place) for place in self._groups.long_gone(before)])
        return len(gone)


def _held_back(integration: str, cause: str, many: int) -> None:
    telemetry.HELD_BACK.labels(integration, cause).inc(many)
