"""A worker's share of one topic, by consumer group. It knows no store: where to read from it is told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog
from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from kafka.net.compat import KafkaNetClient
from kafka.structs import MemberState, OffsetAndMetadata

from monitor.errors import LogUnavailable
from monitor.stream.kafka.client import connected, milliseconds, open_client
from monitor.stream.kafka.explain import explained, made_anew, no_topic, outside
from monitor.stream.kafka.log import FETCH_BYTES, FETCH_WAIT_SECONDS, LARGEST_ANSWER_BYTES, records
from monitor.stream.log import Batch, Span
from monitor.stream.options import KafkaOptions

__all__ = ["KafkaSubscription"]

TELL_LAG_SECONDS = 5.0
SILENT_SECONDS = 1.0  # without a connection for so long, nothing new is no answer any more
ANEW_SECONDS = 20.0  # and for so long, the client is made anew: whatever it waits for, it has not come
SHORT_SECONDS = 2.0  # for a moment, a new leader may know of fewer records or topics than there are
POLL_GAP_SECONDS = 300.0
LEAVE_SECONDS = 1.0
JOIN_SECONDS = 3.0
JOIN_STEP_SECONDS = 0.25

# What the library says of a partition that went away since the last poll; the next one tells.
_GONE = (ValueError, KeyError, kafka_errors.IllegalStateError)

_Given = dict[TopicPartition, list[Any]]

_log = structlog.get_logger("anchorwatch.kafka")


class _Arrivals(ConsumerRebalanceListener):  # type: ignore[misc]
    """Puts partitions that come to rest before anything of them is fetched, and remembers which came.

    A partition without a position would make the library look for one of its own, so it gets one that is never used.
    The library calls this from its own thread, at any moment: whoever places a partition holds `lock`, so that it is
    done before they come, and done again since they came, or done after.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.lock = threading.Lock()
        self._consumer = consumer
        self._came: set[int] = set()

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Nothing: `poll` sees who owns what."""

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """They came, or came back."""
        with self.lock:
            for here in assigned:
                self._consumer.pause(here)
                self._consumer.seek(here, 0)
                self._came.add(here.partition)

    def take(self) -> set[int]:
        """Those that came since it was last asked."""
        with self.lock:
            came, self._came = self._came, set()
        return came


class _Membership(NamedTuple):
    """One stay in the group."""

    consumer: KafkaConsumer
    network: KafkaNetClient
    arrivals: _Arrivals


class KafkaSubscription:
    """A `Subscription` by consumer group. Joins at the first poll, so it can be made while the cluster is away.

    A worker that comes or goes makes all of them pause for a moment, and moves no more partitions than it must. The
    position of one that comes back within a poll is kept, and so are all while the cluster is away: should another
    worker have had it in between, the store refuses the next commit.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        group: str,
        options: KafkaOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`bootstrap` is host:port, or several with commas between; `clock` gives monotonic seconds."""
        self._bootstrap = bootstrap
        self._topic = topic
        self._group = group
        self._options = options or KafkaOptions()
        self._clock = clock
        self._membership: _Membership | None = None
        self._positions: dict[int, int | None] = {}  # the next offset to give out; None: at rest
        self._topic_id: object = None
        self._told = clock()
        self._silent_since: float | None = None
        self._missing_since: float | None = None
        self._short_since: dict[int, float] = {}

    def assigned(self) -> frozenset[int]:
        """See `Subscription.assigned`."""
        return frozenset(self._positions)

    def seek(self, partition: int, offset: int) -> None:
        """See `Subscription.seek`. For a partition that is not ours nothing happens."""
        if partition not in self._positions:
            return
        self._positions[partition] = offset
        self._short_since.pop(partition, None)
        if (member := self._membership) is not None:
            here = self._here(partition)
            with member.arrivals.lock, contextlib.suppress(*_GONE):
                member.consumer.seek(here, offset)
                member.consumer.resume(here)
                _forget_highwater(member, here)

    def rest(self, partition: int) -> None:
        """See `Subscription.rest`. For a partition that is not ours nothing happens."""
        if partition not in self._positions:
            return
        self._positions[partition] = None
        self._short_since.pop(partition, None)
        if (member := self._membership) is not None:
            with member.arrivals.lock, contextlib.suppress(*_GONE):
                member.consumer.pause(self._here(partition))

    def poll(self, limit: int, timeout: float) -> list[Batch]:
        """See `Subscription.poll`."""
        try:
            with explained(self._bootstrap, self._topic):
                member = self._membership or self._join()
                self._tell_lag(member)
                try:
                    given = self._poll(member, limit, timeout)
                except kafka_errors.OffsetOutOfRangeError as error:
                    self._explain_places(member, error)
                    raise
                self._count_in(member)
                self._same_topic(member)
                if batches := self._batches(member, given):
                    self._silent_since = None
                    return batches
                self._look_into_silence(member)
                return []
        except LogUnavailable:
            now = self._clock()
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since > ANEW_SECONDS:
                self._leave()
                self._silent_since = now
            raise

    def close(self) -> None:
        """See `Subscription.close`."""
        member = self._membership
        if member is not None and connected(member.network) and (done := self._done()):
            with contextlib.suppress(Exception):  # for lag tools only, and we are leaving
                member.consumer.commit(done, timeout_ms=milliseconds(LEAVE_SECONDS))
        self._leave()
        self._positions.clear()

    def _here(self, partition: int) -> TopicPartition:
        return TopicPartition(self._topic, partition)

    def _join(self) -> _Membership:
        options = self._options
        consumer, network = open_client(
            KafkaConsumer,
            self._bootstrap,
            options,
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            partition_assignment_strategy=[StickyPartitionAssignor],
            session_timeout_ms=milliseconds(options.session_seconds),
            heartbeat_interval_ms=milliseconds(options.session_seconds / 4),
            max_poll_interval_ms=milliseconds(POLL_GAP_SECONDS),
            fetch_max_bytes=FETCH_BYTES,
            receive_message_max_bytes=LARGEST_ANSWER_BYTES,
            fetch_max_wait_ms=milliseconds(FETCH_WAIT_SECONDS),
            request_timeout_ms=milliseconds(options.answer_seconds),
        )
        arrivals = _Arrivals(consumer)
        consumer.subscribe([self._topic], listener=arrivals)
        self._membership = _Membership(consumer, network, arrivals)
        return self._membership

    def _leave(self) -> None:
        member, self._membership = self._membership, None
        if member is not None:
            seconds = LEAVE_SECONDS if connected(member.network) else 0.0
            with contextlib.suppress(kafka_errors.KafkaError, RuntimeError):
                member.consumer.close(autocommit=False, timeout_ms=milliseconds(seconds))

    def _poll(self, member: _Membership, limit: int, timeout: float) -> _Given:
        """Up to 3.0.12 the library throws away a join that is answered between two polls, and so makes the whole group
        join again: so no other work is done before it is answered, within reason."""
        until = self._clock() + JOIN_SECONDS
        given: _Given = member.consumer.poll(timeout_ms=milliseconds(timeout), max_records=limit)
        while not given and member.consumer.group_metadata().state is MemberState.REBALANCING and self._clock() < until:
            given = member.consumer.poll(timeout_ms=milliseconds(JOIN_STEP_SECONDS), max_records=limit)
        return given

    def _count_in(self, member: _Membership) -> None:
        """See which partitions are ours now."""
        came = member.arrivals.take()  # first: of one that comes from here on, the next poll learns
        ours = {here.partition for here in member.consumer.assignment()}
        came &= ours
        if not came and ours == self._positions.keys():
            return
        before = self._positions
        self._positions = {partition: before.get(partition) for partition in sorted(ours)}
        for partition in came:
            if (position := self._positions[partition]) is not None:
                self.seek(partition, position)
        if ours != before.keys():
            _log.info("partitions", topic=self._topic, now=sorted(ours), before=sorted(before))

    def _same_topic(self, member: _Membership) -> None:
        topic_id = member.network.cluster.topic_id(self._topic)
        if topic_id is not None and topic_id != self._topic_id:
            if self._topic_id is not None:
                raise made_anew(self._topic)
            self._topic_id = topic_id

    def _batches(self, member: _Membership, given: _Given) -> list[Batch]:
        batches = []
        for here, rows in given.items():
            if self._positions.get(here.partition) is not None:
                self._positions[here.partition] = position = rows[-1].offset + 1
                end = max(position, _highwater(member, here) or 0)
                batches.append(Batch(here.partition, records(self._topic, here.partition, rows), end))
        return batches

    def _look_into_silence(self, member: _Membership) -> None:
        """Nothing came: is nothing new, does nobody answer, is the topic gone, or shorter than it was?"""
        now = self._clock()
        if not connected(member.network):
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since > SILENT_SECONDS:
                raise LogUnavailable(
                    f"no Kafka broker at {self._bootstrap} is connected",
                    cure="check that the brokers run and can be reached from here",
                )
            return
        self._silent_since = None
        if member.network.cluster.partitions_for_topic(self._topic) is not None:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > SHORT_SECONDS:
            raise no_topic(self._topic)
        for partition, position in self._positions.items():
            end = None if position is None else _highwater(member, self._here(partition))
            if position is None or (end is not None and end >= position):
                self._short_since.pop(partition, None)
            elif end is not None:  # an answer that has come since the last one said so
                since = self._short_since.setdefault(partition, now)
                _forget_highwater(member, self._here(partition))
                if now - since > SHORT_SECONDS:
                    self._explain_place(member, partition, position, end)
                    self._short_since.pop(partition)

    def _explain_places(self, member: _Membership, error: kafka_errors.OffsetOutOfRangeError) -> None:
        for here in error.args[0]:
            if (position := self._positions.get(here.partition)) is not None:
                self._explain_place(member, here.partition, position)

    def _explain_place(self, member: _Membership, partition: int, position: int, answered: int = 0) -> None:
        """Raise where the log does not hold that position. `answered`: the end that a fetch was told."""
        here, wait = self._here(partition), milliseconds(self._options.answer_seconds)
        begin = member.consumer.beginning_offsets([here], timeout_ms=wait)[here]
        end = member.consumer.end_offsets([here], timeout_ms=wait)[here]
        end = max(end, answered, _highwater(member, here) or 0)
        if not begin <= position <= end:
            raise outside(self._topic, partition, position, Span(begin, end, ""))

    def _done(self) -> dict[TopicPartition, OffsetAndMetadata]:
        return {
            self._here(partition): OffsetAndMetadata(position, "", -1)
            for partition, position in self._positions.items()
            if position is not None
        }

    def _tell_lag(self, member: _Membership) -> None:
        now = self._clock()
        if now - self._told >= TELL_LAG_SECONDS:
            self._told = now
            if connected(member.network) and (done := self._done()):
                member.consumer.commit_async(done, callback=lambda offsets, result: None)  # noqa: ARG005


def _highwater(member: _Membership, here: TopicPartition) -> int | None:
    """The end of a partition as the last answer had it, where one came and the partition is still ours."""
    with contextlib.suppress(*_GONE):
        end: int | None = member.consumer.highwater(here)
        return end
    return None


def _forget_highwater(member: _Membership, here: TopicPartition) -> None:
    """Have the next answer to a fetch say where the end is: the last one may be older than where we stand.

    There is no public way; of the library's releases that are let in, all have it here.
    """
    if (known := member.consumer._subscription.assignment.get(here)) is not None:
        known.highwater = None
