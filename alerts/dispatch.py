"""The dispatcher: what the store holds pending is decided on, delivered, noted and settled.

It knows neither how a finding came about nor how a channel hands it over. At least once: a finding leaves the outbox
only after the channel has taken it, or after it was decided that nobody is told; after a crash in between it is
delivered again, with the same id and the same bytes. What has been told is noted in the log of actions, which outlives
the store: a wiped store, folded anew, pages nobody again.

Better twice than never. While the log is away, findings are told by what is known of acknowledgements and silences; a
channel that refuses one finding for ever does not hold up the others; and two dispatchers at once do no worse than
tell twice.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import structlog

from alerts.channels import JsonLines
from monitor import connect, telemetry
from monitor.actions import (
    ActionsFold,
    Silence,
    Store,
    Told,
    append_actions,
    body_of,
    decode_action,
    due,
    withdraw,
)
from monitor.errors import (
    AnchorwatchError,
    ChannelError,
    ChannelUnavailable,
    EventError,
    LogError,
    StoreUnavailable,
)
from monitor.events import Finding
from monitor.paging import Known, decide
from monitor.placement import partition_of
from monitor.settings import Settings
from monitor.store.store import Outbox, Pending, Reader
from monitor.stream.log import PROJECTIONS, Log
from monitor.worker import stop_on_signals

__all__ = ["Channel", "Dispatcher", "DispatcherStore", "run"]

LEASE = "dispatch"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
ASK_SECONDS = 1.0  # between tries while another one has the lease
IDLE_SECONDS = 0.05
BATCH = 100  # findings in one delivery
MOST = 20_000  # findings looked at in one round
CAUGHT_UP_SECONDS = 60.0
NOTED_DAYS = 30
TIDY_SECONDS = 3600.0
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 30.0

_log = structlog.get_logger("anchorwatch.dispatch")


class Channel(Protocol):
    """One way to people."""

    name: str

    def deliver(self, findings: Sequence[Finding]) -> None:
        """Hand them over, in order; blocks until they are taken, for a bounded time.

        Raises:
            ChannelUnavailable: not now; they are delivered again later, also those of them that were taken.
            ChannelError: never; with several findings, at least one of them.
        """


class DispatcherStore(Outbox, Reader, Store, Protocol):
    """What the dispatcher needs of a store."""


class _Note(NamedTuple):
    """What is known of a finding that has been told."""

    episode_id: str
    time: str


class Dispatcher:
    """Takes findings from one store to one channel. For one thread.

    Args:
        log: where actions are written, and read from.
        store: where findings wait.
        channel: where they go.
        max_age: seconds; see `monitor.paging`.
        topic: the findings' own.
        holder: a name that no other process has.
        clock: unix seconds.
        ticks: monotonic seconds.
    """

    def __init__(
        self,
        log: Log,
        store: DispatcherStore,
        channel: Channel,
        *,
        max_age: float,
        topic: str = PROJECTIONS,
        holder: str | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._store = store
        self._channel = channel
        self._max_age = max_age
        self._topic = topic
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._clock = clock
        self._ticks = ticks
        self._fold = ActionsFold(log, store)
        self._mine = False
        self._lease_next = float("-inf")
        self._partitions = 0
        self._waiting = 0
        self._delivered: dict[str, Pending] = {}  # taken by the channel, not noted yet, so not settled
        self._notes: dict[str, _Note] = {}
        self._log_failures = 0
        self._tidy_next = ticks() + TIDY_SECONDS

    def run(
        self,
        stop: threading.Event,
        *,
        idle_seconds: float = IDLE_SECONDS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Dispatch until `stop` is set; the delivery at hand is finished first, and the lease given back.

        While store or channel are away it waits from 0.2 up to 30 s between tries, at random between half and all of
        it. Waits only by `stop.wait`.

        Raises:
            StoreError: somebody must look.
        """
        failures = 0
        while not stop.is_set():
            try:
                done = self.run_once(stop)
            except (StoreUnavailable, ChannelUnavailable) as error:
                failures += 1
                self._lease_next = float("-inf")
                _say_sometimes("waiting", error, failures)
                longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10))
                stop.wait(longest * (0.5 + 0.5 * jitter()))
                continue
            if failures:
                _log.info("back again", failed_tries=failures)
                failures = 0
            self._tidy_at_times()
            if not done:
                stop.wait(idle_seconds)
        try:
            self._store.release(LEASE, self._holder)
        except AnchorwatchError:
            _log.info("the lease is left to run out", seconds=LEASE_SECONDS)

    def run_once(self, stop: threading.Event | None = None) -> int:
        """One round: says how many findings left the outbox. 0 when nothing is pending, or another one dispatches.

        Raises:
            StoreUnavailable, ChannelUnavailable: nothing is lost; call again later.
            StoreError: somebody must look.
        """
        if not self._lease():
            return 0
        if not self._look():
            return self._note()
        # Forgettings, acknowledgements and silences first: a store that was wiped has none of them yet.
        self._catch_up()
        settled = self._note()
        pending = [one for one in self._look() if one.finding.id not in self._delivered]
        decisions = decide(pending, self._known())
        self._waiting = sum(decision.act == "wait" for decision in decisions)
        kept = [decision for decision in decisions if decision.act == "keep"]
        if kept:
            self._store.settle([decision.pending.reference for decision in kept])
            for decision in kept:
                telemetry.KEPT.labels(decision.reason).inc()
        tell = [decision.pending for decision in decisions if decision.act == "tell"]
        for start in range(0, len(tell), BATCH):
            if stop is not None and stop.is_set():
                break
            settled += self._deliver(tell[start : start + BATCH])
            self._lease()
        return settled + len(kept)

    def _lease(self) -> bool:
        if self._ticks() >= self._lease_next:
            self._mine = self._store.lease(LEASE, self._holder, LEASE_SECONDS)
            self._lease_next = self._ticks() + (RENEW_SECONDS if self._mine else ASK_SECONDS)
        return self._mine

    def _look(self) -> list[Pending]:
        # Those that wait stay at the head of the queue: look beyond them, or they would hold up the others.
        pending = self._store.pending(min(MOST, 5 * BATCH + self._waiting + len(self._delivered)))
        telemetry.OUTBOX_PENDING.set(len(pending))
        oldest = min((one.committed for one in pending), default=None)
        telemetry.OUTBOX_OLDEST_SECONDS.set(0.0 if oldest is None else max(0.0, self._clock() - oldest))
        return pending

    def _catch_up(self) -> None:
        """Take in what operators did; where the log is away, go on with what is known."""
        try:
            while self._fold.run_once():
                pass
            self._partitions = self._log.partitions(self._topic)
        except LogError as error:
            self._log_failed(error)

    def _known(self) -> Known:
        """All that the decisions rest on, read after the pending findings and before their sessions."""
        store, now = self._store, self._clock()
        behind = {
            one.partition
            for one in store.progress(self._topic)
            if one.behind and one.watermark < now - CAUGHT_UP_SECONDS
        }
        self._notes = {key: self._notes.get(key) or _note(key, value) for key, value in store.actions("told/").items()}
        known = {key.removeprefix("told/"): note.episode_id for key, note in self._notes.items()}
        known |= {id: one.finding.episode_id for id, one in self._delivered.items()}
        return Known(
            now=now,
            max_age=self._max_age,
            told=known.keys(),
            told_episodes=set(known.values()),
            acknowledged={key.removeprefix("acknowledge/") for key in store.actions("acknowledge/")},
            silences=_in_force(store.actions("silence/"), now),
            forgetting=due(store),
            behind=lambda conversation: (
                partition_of(conversation, self._partitions) in behind
                if conversation and self._partitions
                else bool(behind)
            ),
            session=cache(store.session),
        )

    def _deliver(self, pending: Sequence[Pending]) -> int:
        """Hand over, note and settle; says how many left the outbox."""
        refused: list[Pending] = []
        try:
            self._channel.deliver([one.finding for one in pending])
            taken = list(pending)
        except ChannelUnavailable:
            telemetry.CHANNEL_FAILURES.labels("unavailable").inc()
            raise
        except ChannelError as error:
            if len(pending) > 1:  # find out which one it is
                return sum(self._deliver([one]) for one in pending)
            telemetry.CHANNEL_FAILURES.labels("refused").inc()
            (one,) = pending
            _log.error(
                "the channel refuses a finding: nobody is told of it",
                finding=one.finding.id,
                channel=self._channel.name,
                problem=error.problem,
                cure=error.cure,
            )
            taken, refused = [], [one]
        for one in taken:
            self._delivered[one.finding.id] = one
            telemetry.TOLD.labels(one.finding.severity).inc()
        if refused:
            self._store.settle([one.reference for one in refused])
        return len(refused) + self._note()

    def _note(self) -> int:
        """Note what has been told, and only then settle it; says how many were settled."""
        if not self._delivered:
            return 0
        told = list(self._delivered.values())
        try:
            append_actions(
                self._log,
                [("told", one.finding.id, Told(one.finding.episode_id, self._channel.name)) for one in told],
                by="dispatch",
                at=_moment(self._clock()),
            )
        except LogError as error:
            self._log_failed(error)
            return 0
        if self._log_failures:
            _log.info("the log of actions is written again", failed_tries=self._log_failures)
            self._log_failures = 0
        self._store.settle([one.reference for one in told])
        self._delivered.clear()
        return len(told)

    def tidy(self) -> int:
        """Withdraw notes that are 30 days old: nothing asks for them any more. Says how many.

        Raises:
            LogError, StoreError: as log and store do.
        """
        before = _moment(self._clock() - timedelta(days=NOTED_DAYS).total_seconds())
        notes = ((key, _note(key, value)) for key, value in self._store.actions("told/").items())
        old = [key.removeprefix("told/") for key, note in notes if note.time < before]
        for start in range(0, len(old), BATCH):
            withdraw(self._log, "told", old[start : start + BATCH])
        return len(old)

    def _tidy_at_times(self) -> None:
        if self._mine and self._ticks() >= self._tidy_next:
            self._tidy_next = self._ticks() + TIDY_SECONDS
            try:
                self.tidy()
            except (LogError, StoreUnavailable) as error:
                _log.info("old notes are withdrawn later", problem=error.problem)

    def _log_failed(self, error: LogError) -> None:
        self._log_failures += 1
        _say_sometimes("the log of actions is away; findings are told nevertheless", error, self._log_failures)


def run(settings: Settings, out: Path | None) -> None:
    """`anchorwatch dispatch`: tell, as JSON lines in `out` or on standard output, until SIGTERM or SIGINT.

    Raises:
        ConfigurationError, LogError, StoreError: it can't begin, or somebody must look.
    """
    channel = JsonLines(out)
    channel.check()
    stop = stop_on_signals()
    telemetry.serve_metrics(settings.metrics_port)
    _log.info("telling", store=connect.shown(settings.store_url), to=str(out or "standard output"))
    log, store = connect.log(settings), connect.store(settings)
    try:
        Dispatcher(log, store, channel, max_age=settings.page_max_age_seconds).run(stop)
    finally:
        log.close()
        store.close()


def _note(key: str, value: bytes) -> _Note:
    try:
        action, body = decode_action(key, value), body_of(key, value)
    except EventError:
        return _Note("", "")
    assert isinstance(body, Told)
    return _Note(body.episode_id, action.time)


def _in_force(silences: dict[str, bytes], now: float) -> list[Silence]:
    found = []
    for key, value in silences.items():
        try:
            silence = body_of(key, value)
        except EventError:
            continue  # of a release to come: better told than not
        if isinstance(silence, Silence) and datetime.fromisoformat(silence.until).timestamp() > now:
            found.append(silence)
    return found


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _say_sometimes(event: str, error: AnchorwatchError, failures: int) -> None:
    """At failures 1, 2, 4, 8 … so that a long outage does not fill the log file."""
    if failures & (failures - 1) == 0:
        _log.warning(event, problem=error.problem, cure=error.cure, failed_tries=failures)
