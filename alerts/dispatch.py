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
import heapq
import os
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import structlog

from alerts.channel import Channel
from alerts.channels import open_channel
from alerts.config import AlertsConfig
from alerts.delivery import Delivery, Landed
from alerts.groups import Groups
from alerts.rules import Rules, one_log
from alerts.stages import moment, seconds
from alerts.table import Table
from monitor import connect, telemetry
from monitor.actions import (
    Action,
    ActionsFold,
    Body,
    Kind,
    Paging,
    Silence,
    Store,
    append_actions,
    body_of,
    decode_action,
    due,
    withdraw,
)
from monitor.alert import Alert, Notification
from monitor.errors import AnchorwatchError, ConfigurationError, EventError, LogError, StoreUnavailable
from monitor.paging import Decision, Known, decide
from monitor.placement import partition_of
from monitor.settings import Settings
from monitor.store.store import Outbox, Pending, Reader, Session
from monitor.stream.log import ACTIONS, PROJECTIONS, Log
from monitor.worker import stop_on_signals

__all__ = ["Dispatcher", "DispatcherStore", "open_channels", "run"]

LEASE = "dispatch"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
ASK_SECONDS = 1.0  # between tries while another one has the lease
IDLE_SECONDS = 0.025
OPERATORS_SECONDS = 1.0  # between looks at what operators did, while nothing is found
BATCH = 200  # findings taken in one round
WRITTEN_AT_ONCE = 200
WAITING_SECONDS = 5.0  # between looks at findings that wait
CHECKS_AT_ONCE = 50  # conversations asked about in one round
CHECK_AGAIN_SECONDS = 60.0
REOPEN_SECONDS = 86_400.0  # so long an alert that has ended is watched for its conversation to go on
CAUGHT_UP_SECONDS = 60.0
KEPT_SECONDS = 7 * 86_400.0
MOST_KEPT = 50_000
TIDY_SECONDS = 600.0
JUMP_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 30.0
DRAIN_SECONDS = 8.0

T = TypeVar("T", Alert, Notification, Silence, Paging)
Rereading: TypeAlias = Callable[[], tuple[AlertsConfig, Mapping[str, Channel]] | None]

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
        reload: Rereading | None = None,
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
        self._fold = ActionsFold(log, store)
        self._landed: queue.SimpleQueue[Landed] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._threads = False
        self._deliveries: dict[str, Delivery] = {}
        self._mine = False
        self._lease_next = float("-inf")
        self._partitions = 0
        self._log_failures = 0
        self._log_next = float("-inf")
        self._reload_next = ticks() + 1.0
        self._tidy_next = ticks() + TIDY_SECONDS
        self._gauges_next = float("-inf")
        self._drift = clock() - ticks()
        self._jumped_at, self._jump = float("-inf"), 0.0
        self._open(channels)
        self._forget_all()

    def _forget_all(self) -> None:
        """Begin anew: what others did in the meantime is in the log."""
        self._loaded = False
        self._table = Table(lambda alert: self._groups.put(alert))
        self._groups = Groups(self._config, self._table.alerts, _held_back)
        self._checks: list[tuple[float, str]] = []
        self._checked: set[str] = set()
        self._records: dict[tuple[str, str], Notification] = {}
        self._unsettled: list[str] = []
        self._taken: set[str] = set()
        self._waiting: set[str] = set()
        self._waiting_next = float("-inf")
        self._operators_next = float("-inf")
        self._actions_at = -1
        self._own = 0
        self._acknowledged: dict[str, str] = {}
        self._resolved: set[str] = set()
        self._forgotten: dict[str, bytes] = {}

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
                        done = self.run_once(stop)
                    except StoreUnavailable as error:
                        failures += 1
                        self._lease_next = float("-inf")
                        _say_sometimes("the store is away", error, failures)
                        try_next = self._ticks() + min(
                            LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10)
                        )
                    else:
                        if failures:
                            _log.info("back again", failed_tries=failures)
                        failures = 0
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
                self._write([])
                self._settle()
        telemetry.DISPATCHER.set(0)
        try:
            self._store.release(LEASE, self._holder)
        except AnchorwatchError:
            _log.info("the lease is left to run out", seconds=LEASE_SECONDS)

    def run_once(self, stop: threading.Event | None = None) -> int:
        """One round: says how much was done. 0 when nothing is to be done, or another one dispatches. Where `run` has
        not been called, it delivers by itself what is due, once.

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
        if fresh or self._ticks() >= self._operators_next:
            # Forgettings and the like first: a store that was wiped has none of them yet.
            self._catch_up()
            fresh = self._look() if fresh else []
        done = self._intake(fresh)
        if len(fresh) < BATCH:
            done += self._check(CHECKS_AT_ONCE)
        done += self._tell()
        self._tidy_at_times()
        if not self._threads:
            for delivery in self._deliveries.values():
                while (stop is None or not stop.is_set()) and delivery.work():
                    done += 1
            done += self._land()
            self._write([])
            self._settle()
        return done

    def _lease(self) -> bool:
        if self._ticks() >= self._lease_next:
            mine = self._store.lease(LEASE, self._holder, LEASE_SECONDS)
            if self._mine and not mine:
                _log.warning("another dispatcher has the lease now")
                for delivery in self._deliveries.values():
                    delivery.clear()
                self._forget_all()
            self._mine = mine
            telemetry.DISPATCHER.set(mine)
            self._lease_next = self._ticks() + (RENEW_SECONDS if self._mine else ASK_SECONDS)
        return self._mine

    # Rules and channels.

    def configure(self, config: AlertsConfig, channels: Mapping[str, Channel]) -> None:
        """Other rules from now on. From the dispatcher's own thread; what is at hand is finished in the background."""
        self._config = config
        self._open(channels)
        self._groups.configure(config)

    def _open(self, channels: Mapping[str, Channel]) -> None:
        before = self._deliveries
        self._deliveries = {
            name: Delivery(
                channel, self._take_back, max_age=max(self._max_age, 60.0), clock=self._clock, ticks=self._ticks
            )
            for name, channel in channels.items()
        }
        for name, delivery in before.items():
            delivery.stop()
            threading.Thread(target=delivery.close, args=(DRAIN_SECONDS,), daemon=True).start()
            for notification in delivery.clear():
                if name in self._deliveries:
                    self._deliveries[name].send(notification)
                else:
                    self._landed.put(Landed(notification, "too_old"))
        for name, delivery in self._deliveries.items():
            delivery.refresh(lambda name=name: self._firing_at(name))  # type: ignore[misc]
            if self._threads:
                delivery.start()

    def _take_back(self, landed: Landed) -> None:
        self._landed.put(landed)
        self._wake.set()

    def _firing_at(self, integration: str) -> list[Alert]:
        # From another thread: a copy, taken in one step.
        alerts = list(self._table.alerts.values())
        return [alert for alert in alerts if alert.firing and alert.told.get(integration) not in (None, "resolved")]

    def _reload_at_times(self) -> None:
        if self._reload is not None and self._ticks() >= self._reload_next:
            self._reload_next = self._ticks() + 1.0
            if (found := self._reload()) is not None:
                self.configure(*found)

    # What is written down, and what operators did.

    def _load(self) -> None:
        """Take over what is written down."""
        self._catch_up()
        for notification in self._bodies("notification/", Notification):
            self._groups.remember(notification)
            if not notification.sent:
                self._records[notification.integration, notification.group] = notification
        for alert in self._bodies("alert/", Alert):
            self._table.load(alert)
            self._watch(alert, alert.changed + self._config.idle_after)
        self._loaded = True
        self._actions_at = -1
        self._operators()
        unsent, self._records = self._records, {}
        for notification in unsent.values():
            if self._groups.live and notification.integration in self._deliveries:
                self._deliveries[notification.integration].send(notification)
            else:
                self._groups.dropped(notification)
        if self._table.alerts:
            _log.info("alerts taken over", alerts=len(self._table.alerts), under_way=len(unsent))

    def _bodies(self, prefix: str, of: type[T]) -> list[T]:
        found: list[T] = []
        for key, value in self._store.actions(prefix).items():
            try:
                body = body_of(key, value)
            except EventError as error:
                _log.error("an action can't be read", kind=prefix.rstrip("/"), problem=error.problem, cure=error.cure)
                continue
            assert isinstance(body, of)
            found.append(body)
        return found

    def _catch_up(self) -> None:
        """Take in what operators did; where the log is away, go on with what is known."""
        self._operators_next = self._ticks() + OPERATORS_SECONDS
        if self._ticks() >= self._log_next:
            try:
                while self._fold.run_once():
                    pass
                self._partitions = self._log.partitions(self._topic)
                if self._loaded:
                    at = self._store.actions_offset(self._log.span(ACTIONS, 0).topic_id)
                    # What is not more than we have written ourselves says nothing new.
                    if at - self._actions_at != self._own or self._actions_at < 0:
                        self._operators()
                    self._actions_at, self._own = at, 0
            except LogError as error:
                self._log_failed(error)

    def _operators(self) -> None:
        """Acknowledgements, resolutions, silences, forgettings and the mode."""
        store, now = self._store, self._clock()
        self._acknowledged = {
            key.removeprefix("acknowledge/"): action.by
            for key, value in store.actions("acknowledge/").items()
            if (action := _action(key, value)) is not None
        }
        self._resolved = {key.removeprefix("resolve/") for key in store.actions("resolve/")}
        self._groups.silence(self._bodies("silence/", Silence))
        modes = self._bodies("paging/", Paging)
        self._groups.mode(self._live if self._live is not None else any(mode.mode == "live" for mode in modes))
        telemetry.ALERTS_MODE.set(self._groups.live)
        for id in self._resolved:
            if (alert := self._table.alerts.get(id)) is not None and alert.firing:
                self._table.resolve(id, "resolved", now)
        seen = {alert.id: by for id, by in self._acknowledged.items() if (alert := self._table.named(id)) is not None}
        for alert in [one for one in self._table.alerts.values() if one.acknowledged_by or one.id in seen]:
            self._acknowledge(alert, seen.get(alert.id, ""))
        before, self._forgotten = self._forgotten, store.actions("forget/")
        for key, value in self._forgotten.items():
            if before.get(key) != value:
                for alert in self._table.of_conversation(key.removeprefix("forget/")):
                    self._watch(alert, now, again=True)

    def _acknowledge(self, alert: Alert, by: str) -> None:
        if alert.acknowledged_by == by:
            return
        self._table.acknowledge(alert.id, by)
        if by:
            for integration in self._groups.acknowledge(self._table.alerts[alert.id]):
                self._table.told(integration, {alert.id: alert.severity})

    # Findings.

    def _look(self) -> list[Pending]:
        """What is pending, except what waits and was looked at a moment ago."""
        again = self._ticks() >= self._waiting_next
        # Those that wait stay at the head of the queue: look beyond them, or they would hold up the others.
        pending = self._store.pending(BATCH + len(self._waiting) + len(self._taken))
        telemetry.OUTBOX_PENDING.set(len(pending))
        oldest = min((one.committed for one in pending), default=None)
        telemetry.OUTBOX_OLDEST_SECONDS.set(0.0 if oldest is None else max(0.0, self._clock() - oldest))
        pending = [one for one in pending if one.reference not in self._taken]
        if again and pending:
            # The more there are, the more a look costs.
            self._waiting_next = self._ticks() + WAITING_SECONDS * (1 + len(self._waiting) / 10_000)
            self._waiting.clear()
            return pending
        return [one for one in pending if one.reference not in self._waiting]

    def _intake(self, fresh: Sequence[Pending]) -> int:
        if not fresh:
            return 0
        session, now = cache(self._store.session), self._clock()
        decisions = decide(fresh, self._known(session))
        for decision in decisions:
            if decision.act == "take":
                self._take(decision, session, now)
            elif decision.act == "wait":
                self._waiting.add(decision.pending.reference)
        kept = [decision for decision in decisions if decision.act == "keep"]
        if kept:
            self._store.settle([decision.pending.reference for decision in kept])
            for decision in kept:
                telemetry.KEPT.labels(decision.reason).inc()
        return sum(decision.act != "wait" for decision in decisions)

    def _take(self, decision: Decision, session: Callable[[str], Session | None], now: float) -> None:
        pending, finding = decision.pending, decision.pending.finding
        conversation = finding.conversation_id
        points = self._store.trajectory(conversation) if conversation else []
        alert = self._table.take(finding, session(conversation) if conversation else None, points, now)
        self._unsettled.append(pending.reference)
        self._taken.add(pending.reference)
        by = self._acknowledged.get(alert.id, "") or self._acknowledged.get(finding.id, "")
        if by and not alert.acknowledged_by:
            self._acknowledge(alert, by)
        if alert.id in self._resolved and alert.firing:
            if len(alert.finding_ids) == 1:
                self._table.resolve(alert.id, "resolved", now)
            else:  # it was resolved, and has become worse: it fires again, and may be resolved again
                self._resolved.discard(alert.id)
                with contextlib.suppress(LogError):
                    withdraw(self._log, "resolve", [alert.id])
                    self._own += 1
        after = self._config.idle_after if conversation else self._config.fleet_after
        self._watch(alert, now + after)

    def _known(self, session: Callable[[str], Session | None]) -> Known:
        """All that the decisions rest on, read after the pending findings and before their sessions."""
        return Known(
            now=self._clock() - self._set_forward(),
            max_age=self._max_age,
            findings=self._table.knows,
            episodes=self._table.alerts.keys(),
            forgetting=due(self._store),
            behind=self._behind(),
            session=session,
        )

    def _behind(self) -> Callable[[str], bool]:
        progress = self._store.progress(self._topic)
        behind = {one.partition for one in progress if one.behind and one.watermark < self._clock() - CAUGHT_UP_SECONDS}
        return lambda conversation: (
            partition_of(conversation, self._partitions) in behind
            if conversation and self._partitions
            else bool(behind)
        )

    # Alerts whose conversation just stops.

    def _watch(self, alert: Alert, at: float, *, again: bool = False) -> None:
        """See at this time whether it goes on."""
        if again or alert.id not in self._checked:
            self._checked.add(alert.id)
            heapq.heappush(self._checks, (at, alert.id))

    def _check(self, most: int) -> int:
        """End what has ended, and reopen what has not; says how many that were."""
        now, done = self._clock(), 0
        if not self._checks or self._checks[0][0] > now:
            return 0
        if self._ticks() < self._jumped_at + self._config.idle_after:
            return 0  # by a clock that has just been set, everybody might have been silent for hours
        lags = cache(self._lags)
        behind = self._behind()
        while most and self._checks and self._checks[0][0] <= now:
            most -= 1
            _, id = heapq.heappop(self._checks)
            alert = self._table.alerts.get(id)
            if alert is None:
                self._checked.discard(id)
                continue
            done += self._check_one(alert, now, lambda key: behind(key) or lags(self._partition(key)))
        return done

    def _check_one(self, alert: Alert, now: float, late: Callable[[str], bool]) -> int:
        if not alert.conversation_id:
            at = alert.accepted + self._config.fleet_after
            if alert.firing and at > now:
                self._watch(alert, at, again=True)
                return 0
            self._checked.discard(alert.id)
            self._table.resolve(alert.id, "expired", now)
            return 1
        if late(alert.conversation_id):
            self._watch(alert, now + CHECK_AGAIN_SECONDS, again=True)
            return 0
        session = self._store.session(alert.conversation_id)
        is_open = session is not None and session.episode_id == alert.id
        until = (session.time if session else 0.0) + self._config.idle_after
        if not alert.firing:
            ended = seconds(alert.ends_at or alert.starts_at)
            if alert.resolution != "ended" or now > ended + REOPEN_SECONDS or not is_open:
                self._checked.discard(alert.id)
                return 0
            if session is not None and session.time > ended and until > now:
                self._table.reopen(alert.id, now)
                self._watch(alert, until, again=True)
                return 1
            self._watch(alert, now + max(CHECK_AGAIN_SECONDS, (now - ended) / 10.0), again=True)
            return 0
        if is_open and until > now:
            self._watch(alert, until, again=True)
            return 0
        forgotten = session is None and f"forget/{alert.conversation_id}" in self._forgotten
        self._table.resolve(alert.id, "forgotten" if forgotten else "ended", now)
        if is_open:
            self._watch(alert, now + CHECK_AGAIN_SECONDS, again=True)
        else:
            self._checked.discard(alert.id)
        return 1

    def _partition(self, conversation: str) -> int:
        return partition_of(conversation, self._partitions) if self._partitions else -1

    def _lags(self, partition: int) -> bool:
        """Whether the store has not come to the end of a partition: then nobody knows who is silent."""
        if partition < 0:
            return True
        position = self._store.position(self._topic, partition)
        try:
            span = self._log.span(self._topic, partition)
        except LogError:
            return True
        return position is None or position.offset < span.end

    def _look_at_the_clock(self) -> None:
        drift = self._clock() - self._ticks()
        if abs(drift - self._drift) > JUMP_SECONDS:
            _log.warning("the clock of this machine was set", by_seconds=round(drift - self._drift, 1))
            self._jumped_at, self._jump = self._ticks(), drift - self._drift
            self._groups.clock_jumped()
        self._drift = drift

    def _set_forward(self) -> float:
        """By how much the clock was set forward within the last `max_age`: findings are not old by that."""
        return max(0.0, self._jump) if self._ticks() < self._jumped_at + self._max_age else 0.0

    # Telling.

    def _tell(self) -> int:
        """Note what has landed, and send what is due; says how much that was."""
        self._reload_at_times()
        done = self._land()
        made = self._groups.due(self._clock())
        self._write(made)
        self._settle()
        for notification in made:
            self._deliveries[notification.integration].send(notification)
        self._measure()
        return done + len(made)

    def _land(self) -> int:
        done = 0
        while True:
            try:
                notification, result, error = self._landed.get_nowait()
            except queue.Empty:
                return done
            done += 1
            if result == "taken":
                record = self._groups.sent(notification)
                self._records[record.integration, record.group] = record
                self._table.told(notification.integration, notification.covered)
            elif result == "refused":
                self._groups.refused(notification, self._clock())
            else:
                self._groups.dropped(notification)
                if error is not None:
                    raise error

    def _write(self, made: Sequence[Notification]) -> None:
        """Write down alerts, then what was sent and what is about to be. Where the log is away, it is done later."""
        for notification in made:
            self._records[notification.integration, notification.group] = notification
        if self._ticks() < self._log_next:
            return
        while self._table.unwritten or self._records:
            ids = list(self._table.unwritten)[:WRITTEN_AT_ONCE]
            # What has been sent is said only after the alerts know that they have been told.
            places = list(self._records)[: WRITTEN_AT_ONCE - len(ids)] if len(ids) < WRITTEN_AT_ONCE else []
            records: list[tuple[Kind, str, Body]] = [("alert", id, self._table.alerts[id]) for id in ids]
            records += [("notification", "/".join(place), self._records[place]) for place in places]
            try:
                self._append(records)
            except LogError as error:
                self._log_failed(error)
                return
            self._table.written(ids)
            for place in places:
                del self._records[place]
        if self._log_failures:
            _log.info("the log of actions is written again", failed_tries=self._log_failures)
            self._log_failures = 0

    def _append(self, records: Sequence[tuple[Kind, str, Body]]) -> None:
        at = moment(self._clock())
        try:
            append_actions(self._log, records, by="dispatch", at=at)
            self._own += len(records)
        except ConfigurationError:
            for record in records:  # one of them can't be written: the others must be
                try:
                    append_actions(self._log, [record], by="dispatch", at=at)
                    self._own += 1
                except ConfigurationError as error:
                    _log.error("an alert can't be written down", kind=record[0], problem=error.problem)

    def _settle(self) -> None:
        """Let go of the findings whose alerts are written down."""
        if self._unsettled and not self._table.unwritten:
            self._store.settle(self._unsettled)
            self._unsettled = []
            self._taken.clear()

    def _log_failed(self, error: LogError) -> None:
        self._log_failures += 1
        wait = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(self._log_failures - 1, 10))
        self._log_next = self._ticks() + wait
        _say_sometimes("the log of actions is away; alerts are told nevertheless", error, self._log_failures)

    def _measure(self) -> None:
        if self._ticks() >= self._gauges_next:
            self._gauges_next = self._ticks() + 5.0
            counts = dict.fromkeys(("warning", "critical", "info"), 0)
            for alert in self._table.alerts.values():
                if alert.firing:
                    counts[alert.severity] += 1
            for severity, count in counts.items():
                telemetry.ALERTS_FIRING.labels(severity).set(count)

    # Tidying.

    def tidy(self) -> int:
        """Forget alerts that have been over for seven days, and those of forgotten conversations once that is told.
        Says how many.

        Raises:
            LogError: as the log does.
        """
        now = self._clock()
        over = [alert for alert in self._table.alerts.values() if not alert.firing]
        over.sort(key=lambda alert: alert.changed)
        surplus = len(over) - MOST_KEPT
        gone = [
            alert.id
            for number, alert in enumerate(over)
            if number < surplus
            or alert.changed < now - KEPT_SECONDS
            or (alert.resolution == "forgotten" and not self._groups.owes(alert))
        ]
        for start in range(0, len(gone), WRITTEN_AT_ONCE):
            some = gone[start : start + WRITTEN_AT_ONCE]
            withdraw(self._log, "alert", some)
            self._own += len(some)
            for id in some:
                self._groups.drop(self._table.alerts[id])
                self._table.drop(id)
                self._checked.discard(id)
        places = [place for place in self._groups.long_gone(now - KEPT_SECONDS) if place not in self._records]
        for start in range(0, len(places), WRITTEN_AT_ONCE):
            some = ["/".join(place) for place in places[start : start + WRITTEN_AT_ONCE]]
            withdraw(self._log, "notification", some)
            self._own += len(some)
        return len(gone)

    def _tidy_at_times(self) -> None:
        if self._ticks() >= self._tidy_next:
            self._tidy_next = self._ticks() + TIDY_SECONDS
            try:
                self.tidy()
            except LogError as error:
                _log.info("old alerts are withdrawn later", problem=error.problem)


def open_channels(config: AlertsConfig) -> dict[str, Channel]:
    """The channels of all integrations.

    Raises:
        ConfigurationError: one can't be opened; those before it are closed again.
    """
    found: dict[str, Channel] = {}
    try:
        for receiver in config.receivers:
            for integration in receiver.integrations:
                found[integration.name] = open_channel(integration, config)
    except ConfigurationError:
        for channel in found.values():
            channel.close()
        raise
    return found


def reloading(
    rules: Rules, hang_up: threading.Event
) -> Callable[[], tuple[AlertsConfig, Mapping[str, Channel]] | None]:
    """What a dispatcher is given as `reload`: the file's rules when it was written, or `hang_up` is set."""

    def reload() -> tuple[AlertsConfig, Mapping[str, Channel]] | None:
        anyway = hang_up.is_set()
        hang_up.clear()
        if (config := rules.changed(anyway=anyway)) is None:
            return None
        try:
            channels = open_channels(config)
        except ConfigurationError as error:
            rules.refused(error)
            return None
        rules.took()
        return config, channels

    return reload


def make(settings: Settings, log: Log, store: DispatcherStore, out: Path | None = None) -> Dispatcher:
    """The dispatcher of these settings; `out` stands in for the file of rules: one JSON object a line, at once.

    Raises:
        ConfigurationError: the rules are wrong, or a channel can't be opened.
    """
    if out is not None or settings.alerts_file is None:
        config = one_log(out)
        return Dispatcher(log, store, open_channels(config), config, max_age=settings.page_max_age_seconds, live=True)
    rules = Rules(settings.alerts_file)
    hang_up = threading.Event()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: hang_up.set())
    return Dispatcher(
        log,
        store,
        open_channels(rules.config),
        rules.config,
        max_age=settings.page_max_age_seconds,
        reload=reloading(rules, hang_up),
    )


def run(settings: Settings, out: Path | None) -> None:
    """`anchorwatch dispatch`: tell people, until SIGTERM or SIGINT.

    Raises:
        ConfigurationError, LogError, StoreError: it can't begin, or somebody must look.
    """
    stop = stop_on_signals()
    telemetry.serve_metrics(settings.metrics_port)
    log, store = connect.log(settings), connect.store(settings)
    try:
        dispatcher = make(settings, log, store, out)
        to = str(out) if out else str(settings.alerts_file or "standard output")
        _log.info("telling", store=connect.shown(settings.store_url), to=to)
        dispatcher.run(stop)
    finally:
        log.close()
        store.close()


def _action(key: str, value: bytes) -> Action | None:
    try:
        return decode_action(key, value)
    except EventError:
        return None


def _held_back(integration: str, cause: str, many: int) -> None:
    telemetry.HELD_BACK.labels(integration, cause).inc(many)


def _say_sometimes(event: str, error: AnchorwatchError, failures: int) -> None:
    """At failures 1, 2, 4, 8 … so that a long outage does not fill the log file."""
    if failures & (failures - 1) == 0:
        _log.warning(event, problem=error.problem, cure=error.cure, failed_tries=failures)
