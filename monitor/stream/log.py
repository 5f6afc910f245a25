"""The log: an append-only sequence of records per topic and partition, and its embedded twin in one SQLite file.

It knows nothing of what the records mean. Kafka offers the same `Log` behind the same contract tests. Topic names are
constants here, because a collector and a worker must agree on them.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from msgspec import Struct

from monitor.database import BUSY_SECONDS, Database
from monitor.errors import LogError, LogUnavailable

__all__ = [
    "ACTIONS",
    "DEAD_LETTERS",
    "PROJECTIONS",
    "Batch",
    "EmbeddedLog",
    "EmbeddedSubscription",
    "Headers",
    "Log",
    "Message",
    "Record",
    "Span",
    "Subscription",
]

PROJECTIONS = "anchorwatch.projections"
DEAD_LETTERS = "anchorwatch.dead-letters"
ACTIONS = "anchorwatch.actions"

Headers = tuple[tuple[str, bytes], ...]


class Message(Struct, frozen=True, gc=False):
    """What goes into the log. Messages of equal key keep their order.

    Its partition is murmur2 of the key, as every Kafka client has it, unless `partition` names one: only a control
    record does, which concerns a whole partition and no key.
    """

    key: str
    value: bytes
    headers: Headers = ()
    partition: int | None = None


class Record(Struct, frozen=True, gc=False):
    """What comes out of the log: a message and its place. Offsets rise; in the embedded log without gaps.

    A foreign producer may have sent no key, or one that is no text: that comes out empty, with U+FFFD for what is none.
    """

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes
    headers: Headers = ()


class Span(NamedTuple):
    """The offsets a partition holds: `begin` is the first one kept, `end` the one the next record will get.

    `topic_id` is made with the topic, so that a log which was thrown away and begun anew is not taken for the old one.
    """

    begin: int
    end: int
    topic_id: str


class Log(Protocol):
    """Append-only records. Every method raises `LogUnavailable` where trying again may help, else `LogError`."""

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        """Add them all, in order, and say at which offset of its partition each one lies. Blocks until they are safe.

        Safe is what the backend means by it: flushed to disk, or acknowledged by all replicas in sync. After
        `LogUnavailable` some may have been written: append them again, readers know an id that comes twice.
        """

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """Up to `limit` records from `offset` on; an empty list when there is nothing new.

        Raises:
            LogError: `offset` is outside the log. Never silently the nearest one: that would lose records.
        """

    def span(self, topic: str, partition: int) -> Span:
        """First and next offset. A topic that nobody has written to yet begins and ends at 0."""

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has, from 0."""

    def close(self) -> None:
        """Give everything back."""


class Batch(NamedTuple):
    """Consecutive records of one partition, at least one; `end` is the offset that its next record will get."""

    partition: int
    records: list[Record]
    end: int


class Subscription(Protocol):
    """One worker's share of a topic. Raises as `Log` does. For one thread.

    A partition that becomes this worker's own is at rest until it is sought; one that is taken away is simply gone from
    `assigned`. Both happen inside `poll` only, so a worker that commits between two polls always owns what it commits.
    """

    def assigned(self) -> frozenset[int]:
        """The partitions that are this worker's own, as of the last poll."""

    def seek(self, partition: int, offset: int) -> None:
        """Read on from here. Whether the log still holds it shows at the next poll."""

    def rest(self, partition: int) -> None:
        """Give out nothing of this partition until it is sought again. It stays this worker's own."""

    def poll(self, limit: int, timeout: float) -> list[Batch]:
        """What is new, at most `limit` records; waits up to `timeout` seconds for the first. Call it often, also when
        all partitions are at rest: it is what keeps this worker in its group.

        To poll again says that what was given out before has been dealt with; lag tools are told so.

        Raises:
            LogError: a sought offset is outside the log.
        """

    def close(self) -> None:
        """Leave, so that another worker may take the partitions over at once."""


_SCHEMA = """
CREATE TABLE topics (
    topic TEXT PRIMARY KEY, topic_id TEXT NOT NULL, begin_offset INTEGER NOT NULL, end_offset INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE records (
    topic TEXT NOT NULL, offset INTEGER NOT NULL, appended REAL NOT NULL,
    key TEXT NOT NULL, value BLOB NOT NULL, headers BLOB,
    UNIQUE (topic, offset)
)
"""
_APPLICATION = 0x41574C47  # "AWLG"
_VERSION = 1
_RESCUE = (
    "Restore the log from a copy, or move it and its -wal and -shm files aside, and the store with it: "
    "a store can't outlive the log it was folded from. Both then begin empty."
)
_headers = msgspec.msgpack.Decoder(Headers)


class EmbeddedLog:
    """A `Log` in one SQLite file, for one machine: one partition a topic, no server.

    Any number of threads and processes may append and read. An append is flushed to disk before it returns, so append
    in batches: a flush costs milliseconds, a record microseconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int | None = None,
        busy_seconds: float = BUSY_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives unix seconds and is used for retention by age only. See `Database` for the rest."""
        self._clock = clock
        self._database = Database(
            path,
            name="log",
            schema=_SCHEMA,
            application=_APPLICATION,
            version=_VERSION,
            broken=LogError,
            unavailable=LogUnavailable,
            rescue=_RESCUE,
            synchronous="FULL",
            max_bytes=max_bytes,
            busy_seconds=busy_seconds,
        )

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        """See `Log.append`."""
        if not messages:
            return []
        now = self._clock()
        with self._database.write() as connection:
            connection.execute("INSERT OR IGNORE INTO topics VALUES (?, ?, 0, 0)", (topic, uuid.uuid4().hex))
            (end,) = connection.execute("SELECT end_offset FROM topics WHERE topic = ?", (topic,)).fetchone()
            connection.executemany(
                "INSERT INTO records (topic, offset, appended, key, value, headers) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (topic, offset, now, m.key, m.value, msgspec.msgpack.encode(m.headers) if m.headers else None)
                    for offset, m in enumerate(messages, end)
                ),
            )
            connection.execute("UPDATE topics SET end_offset = ? WHERE topic = ?", (end + len(messages), topic))
        return list(range(end, end + len(messages)))

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """See `Log.read`. Returns at once."""
        with self._database.read() as connection:
            begin, end, _ = self._span(connection, topic, partition)
            rows = connection.execute(
                "SELECT offset, key, value, headers FROM records "
                "WHERE topic = ? AND offset >= ? ORDER BY offset LIMIT ?",
                (topic, offset, limit),
            ).fetchall()
        if not begin <= offset <= end:
            raise LogError(
                f"offset {offset} of {topic}/{partition} is outside the log, which holds {begin} to {end}",
                cure="retention has overtaken the worker, or the log was replaced under the store. Restore the log, or "
                "move the store aside: it is then rebuilt from what the log still holds",
            )
        if [row[0] for row in rows] != list(range(offset, min(end, offset + limit))):
            raise LogError(f"records of {topic} are missing from {offset} on: the log is damaged", cure=_RESCUE)
        return [
            Record(topic, partition, at, key, value, _headers.decode(headers) if headers else ())
            for at, key, value, headers in rows
        ]

    def span(self, topic: str, partition: int) -> Span:
        """See `Log.span`."""
        with self._database.read() as connection:
            return self._span(connection, topic, partition)

    def partitions(self, topic: str) -> int:  # noqa: ARG002
        """See `Log.partitions`."""
        return 1

    def retain(self, topic: str, *, records: int | None = None, age_seconds: float | None = None) -> int:
        """Drop what is beyond the newest `records`, or older than `age_seconds`; says how many were dropped.

        A worker that has not read them stops loudly, so keep more than the longest outage that you mean to survive.
        """
        with self._database.write() as connection:
            begin, end, _ = self._span(connection, topic, 0)
            keep_from = begin
            if records is not None:
                keep_from = max(keep_from, end - records)
            if age_seconds is not None:
                # The wall clock may have stepped back in between: the first record young enough ends the search.
                young = connection.execute(
                    "SELECT offset FROM records WHERE topic = ? AND appended >= ? ORDER BY offset LIMIT 1",
                    (topic, self._clock() - age_seconds),
                ).fetchone()
                keep_from = max(keep_from, young[0] if young else end)
            connection.execute("DELETE FROM records WHERE topic = ? AND offset < ?", (topic, keep_from))
            connection.execute("UPDATE topics SET begin_offset = ? WHERE topic = ?", (keep_from, topic))
            return keep_from - begin

    def close(self) -> None:
        """See `Log.close`."""
        self._database.close()

    @staticmethod
    def _span(connection: sqlite3.Connection, topic: str, partition: int) -> Span:
        if partition != 0:
            raise LogError(f"the embedded log has no partition {partition}", cure="use partition 0, or Kafka")
        row = connection.execute(
            "SELECT begin_offset, end_offset, topic_id FROM topics WHERE topic = ?", (topic,)
        ).fetchone()
        return Span(*row) if row else Span(0, 0, "")


class EmbeddedSubscription:
    """A `Subscription` to a topic of the embedded log: its one partition, for as long as it is open.

    Two workers on one log are kept apart by the store, which refuses the one that has fallen behind.
    """

    def __init__(
        self, log: Log, topic: str = PROJECTIONS, *, wait: Callable[[float], object] = time.sleep, step: float = 0.05
    ) -> None:
        """`wait` pauses for so many seconds; `step` is how often it looks for what is new."""
        self._log = log
        self._topic = topic
        self._wait = wait
        self._step = step
        self._offset: int | None = None

    def assigned(self) -> frozenset[int]:
        """See `Subscription.assigned`."""
        return frozenset({0})

    def seek(self, partition: int, offset: int) -> None:  # noqa: ARG002
        """See `Subscription.seek`."""
        self._offset = offset

    def rest(self, partition: int) -> None:  # noqa: ARG002
        """See `Subscription.rest`."""
        self._offset = None

    def poll(self, limit: int, timeout: float) -> list[Batch]:
        """See `Subscription.poll`."""
        while True:
            if self._offset is not None and (records := self._log.read(self._topic, 0, self._offset, limit)):
                self._offset = records[-1].offset + 1
                return [Batch(0, records, self._log.span(self._topic, 0).end)]
            if timeout <= 0:
                return []
            self._wait(min(self._step, timeout))
            timeout -= self._step

    def close(self) -> None:
        """See `Subscription.close`. The log stays open."""
