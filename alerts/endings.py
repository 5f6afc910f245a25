"""Alerts whose conversation just stops: most people who have had enough leave without a word. Without an end to these,
alerts would fire for ever.

It asks the store when each conversation last spoke, each time an alert may be over, and no sooner. Nobody counts as
silent while the store lags behind the log, nor by a clock that has just been set. What has ended goes on when its
conversation does.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from functools import cache
from typing import Protocol

from alerts.config import AlertsConfig
from alerts.stages import seconds
from alerts.table import Table
from monitor.alert import Alert
from monitor.errors import LogError
from monitor.placement import partition_of
from monitor.store.store import Position, Progress, Session
from monitor.stream.log import Log

__all__ = ["Endings"]

AGAIN_SECONDS = 60.0
LATE_SECONDS = 60.0
WATCHED_SECONDS = 86_400.0  # so long an alert that has ended may go on


class Sessions(Protocol):
    """What `Endings` asks of a store."""

    def session(self, conversation_id: str) -> Session | None:
        """See `monitor.store.store.Reader`."""

    def progress(self, topic: str) -> list[Progress]:
        """See `monitor.store.store.Outbox`."""

    def position(self, topic: str, partition: int) -> Position | None:
        """See `monitor.store.store.Store`."""


class Endings:
    """Which alerts are to be asked about, and when. Time is passed in."""

    def __init__(self, log: Log, store: Sessions, topic: str, table: Table, config: AlertsConfig) -> None:
        self._log = log
        self._store = store
        self._topic = topic
        self._table = table
        self._config = config
        self._times: list[tuple[float, str]] = []
        self._watched: set[str] = set()

    def configure(self, config: AlertsConfig) -> None:
        """Other times from now on."""
        self._config = config

    def watch(self, alert: Alert, now: float, *, at_once: bool = False) -> None:
        """An alert has begun, or been taken over; `at_once`: it may be over now."""
        after = self._config.idle_after if alert.conversation_id else self._config.fleet_after
        if at_once or alert.id not in self._watched:
            self._again(alert, now if at_once else max(now, alert.changed + after))

    def check(self, now: float, most: int, forgotten: Collection[str]) -> int:
        """End what is over, reopen what is not; says how many changed.

        Args:
            most: conversations to ask about at most; the others are asked about at the next call.
            forgotten: conversations that somebody has asked to forget.

        Raises:
            StoreUnavailable, StoreError: as the store does.
        """
        if not self._times or self._times[0][0] > now:
            return 0
        late, done = cache(lambda partition: self._late(partition, now)), 0
        try:
            partitions = self._log.partitions(self._topic)
        except LogError:
            partitions = 0
        while most and self._times and self._times[0][0] <= now:
            most -= 1
            _, id = heapq.heappop(self._times)
            alert = self._table.alerts.get(id)
            if alert is None:
                self._watched.discard(id)
            elif not alert.conversation_id:
                done += self._expire(alert, now)
            elif not partitions or late(partition_of(alert.conversation_id, partitions)):
                self._again(alert, now + AGAIN_SECONDS)
            elif alert.firing:
                done += self._end(alert, now, forgotten)
            else:
                done += self._reopen(alert, now)
        return done

    def _expire(self, alert: Alert, now: float) -> int:
        at = alert.accepted + self._config.fleet_after
        if alert.firing and at > now:
            self._again(alert, at)
            return 0
        self._watched.discard(alert.id)
        self._table.resolve(alert.id, "expired", now)
        return 1

    def _end(self, alert: Alert, now: float, forgotten: Collection[str]) -> int:
        session = self._store.session(alert.conversation_id)
        still_open = session is not None and session.episode_id == alert.id
        if session is not None and still_open and (until := session.time + self._config.idle_after) > now:
            self._again(alert, until)
            return 0
        gone = session is None and alert.conversation_id in forgotten
        self._table.resolve(alert.id, "forgotten" if gone else "ended", now)
        if still_open:
            self._again(alert, now + AGAIN_SECONDS)
        else:
            self._watched.discard(alert.id)
        return 1

    def _reopen(self, alert: Alert, now: float) -> int:
        ended = seconds(alert.ends_at or alert.starts_at)
        session = self._store.session(alert.conversation_id)
        if (
            alert.resolution != "ended"
            or session is None
            or session.episode_id != alert.id
            or now > ended + WATCHED_SECONDS
        ):
            self._watched.discard(alert.id)
            return 0
        if session.time > ended and (until := session.time + self._config.idle_after) > now:
            self._table.reopen(alert.id, now)
            self._again(alert, until)
            return 1
        self._again(alert, now + max(AGAIN_SECONDS, (now - ended) / 10.0))
        return 0

    def _again(self, alert: Alert, at: float) -> None:
        self._watched.add(alert.id)
        heapq.heappush(self._times, (at, alert.id))

    def _late(self, partition: int, now: float) -> bool:
        """Whether the store may not know what has been said there within the last minute."""
        watermarks = {one.partition: one.watermark for one in self._store.progress(self._topic)}
        if watermarks.get(partition, 0.0) >= now - LATE_SECONDS:
            return False
        position = self._store.position(self._topic, partition)
        try:
            return position is None or position.offset < self._log.span(self._topic, partition).end
        except LogError:
            return True
