"""Kafka as a `Log`: append until acknowledged, read from an offset. It knows no group and no worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from monitor.errors import LogError, LogUnavailable
from monitor.stream.kafka.admin import KafkaTopics
from monitor.stream.kafka.client import discard, milliseconds, open_client
from monitor.stream.kafka.explain import LARGEST_REQUEST_BYTES, closed, explained, no_partition, outside
from monitor.stream.log import Message, Record, Span
from monitor.stream.options import KafkaOptions

__all__ = ["FETCH_BYTES", "FETCH_WAIT_SECONDS", "LARGEST_ANSWER_BYTES", "KafkaLog", "records"]

PRODUCE_BATCH_BYTES = 256 * 1024
FETCH_BYTES = 16 << 20
# A broker that does not heed FETCH_BYTES sends all that it has; to refuse that would stop the worker for good.
LARGEST_ANSWER_BYTES = 2**31 - 1
FETCH_WAIT_SECONDS = 0.1


class KafkaLog:
    """A `Log` on a Kafka cluster. Connects when it is first used, so it can be made while the cluster is away.

    Any number of threads may use it. An append is acknowledged by all replicas in sync; the broker drops what the
    library itself sends twice. Topics are never made by using them: `anchorwatch topics create` does. What a foreign
    producer wrote in a transaction is read whether or not it was committed.
    """

    def __init__(
        self, bootstrap: str, options: KafkaOptions | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`bootstrap` is host:port, or several with commas between; `clock` gives monotonic seconds."""
        self._bootstrap = bootstrap
        self._options = options or KafkaOptions()
        self._clock = clock
        self._topics = KafkaTopics(bootstrap, self._options)
        self._producing = threading.Lock()
        self._producer: KafkaProducer | None = None
        self._known: set[str] = set()
        self._reading = threading.Lock()
        self._reader: KafkaConsumer | None = None
        self._closed = False

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        """See `Log.append`. An empty value is written as null, which is what compaction deletes a key by."""
        if not messages:
            return []
        until = self._clock() + self._options.append_seconds
        if topic not in self._known:
            self._topics.state(topic)  # else a topic that does not exist looks like a broker that does not answer
            self._known.add(topic)
        with explained(self._bootstrap, topic):
            producer = self._open_producer()
            try:
                sent = [
                    producer.send(
                        topic,
                        key=message.key.encode(),
                        value=message.value or None,
                        headers=list(message.headers),
                        partition=message.partition,
                    )
                    for message in messages
                ]
                offsets: list[int] = [future.get(timeout=max(0.0, until - self._clock())).offset for future in sent]
            except ValueError as error:  # the producer finds no partition for one of them
                self._throw_away(producer)
                raise self._misplaced(topic, messages) from error
            except BaseException:
                self._throw_away(producer)
                raise
        if -1 in offsets:
            raise LogUnavailable(
                f"the broker took records for {topic}, but did not say where they lie",
                cure="append them again: readers know an id that comes twice",
            )
        return offsets

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """See `Log.read`. For tools: a worker reads by a `KafkaSubscription`."""
        begin, end, _ = span = self.span(topic, partition)
        if not begin <= offset <= end:
            raise outside(topic, partition, offset, span)
        found: list[Record] = []
        if offset == end:
            return found
        here = TopicPartition(topic, partition)
        with self._reading, explained(self._bootstrap, topic):
            reader = self._open_reader()
            try:
                if here not in reader.assignment():
                    reader.assign([here])
                reader.seek(here, offset)
                until = self._clock() + self._options.answer_seconds
                # Where compaction has cut holes, the position moves on without records.
                while len(found) < limit and (reader.position(here) or 0) < end:
                    for rows in reader.poll(timeout_ms=200, max_records=limit - len(found)).values():
                        found += records(topic, partition, rows)
                        until = self._clock() + self._options.answer_seconds
                    if self._clock() > until:
                        raise kafka_errors.KafkaTimeoutError("no records came")
            except BaseException:
                self._drop_reader()
                raise
        return found

    def span(self, topic: str, partition: int) -> Span:
        """See `Log.span`. A broker older than Kafka 2.8 has no topic ids: then it is empty."""
        span = self._topics.span(topic, partition)
        if span.begin >= span.end:
            return span
        # What a fetch of the newest batch says is the end on every broker.
        here = TopicPartition(topic, partition)
        with self._reading, explained(self._bootstrap, topic):
            reader = self._open_reader()
            try:
                reader.unsubscribe()
                reader.assign([here])
                reader.seek(here, span.end - 1)
                until = self._clock() + self._options.answer_seconds
                while reader.highwater(here) is None:
                    reader.poll(timeout_ms=50, max_records=1)
                    if self._clock() > until:
                        raise kafka_errors.KafkaTimeoutError("the end was not told")
                return span._replace(end=max(span.end, reader.highwater(here)))
            except BaseException:
                self._drop_reader()
                raise

    def partitions(self, topic: str) -> int:
        """See `Log.partitions`."""
        return self._topics.state(topic).partitions

    def close(self) -> None:
        """See `Log.close`."""
        self._closed = True
        with self._producing:
            producer, self._producer = self._producer, None
        if producer is not None:
            discard(producer)
        with self._reading:
            self._drop_reader()
        self._topics.close()

    def _open_producer(self) -> KafkaProducer:
        with self._producing:
            if self._producer is None:
                if self._closed:
                    raise closed()
                options = self._options
                self._producer, _ = open_client(
                    KafkaProducer,
                    self._bootstrap,
                    options,
                    acks="all",
                    enable_idempotence=True,
                    compression_type=None if options.compression == "none" else options.compression,
                    batch_size=PRODUCE_BATCH_BYTES,
                    max_request_size=LARGEST_REQUEST_BYTES,
                    max_block_ms=milliseconds(options.append_seconds),
                    delivery_timeout_ms=milliseconds(options.append_seconds),
                    request_timeout_ms=milliseconds(min(options.answer_seconds, options.append_seconds)),
                )
            return self._producer

    def _misplaced(self, topic: str, messages: Sequence[Message]) -> LogError:
        partitions = self.partitions(topic)
        for message in messages:
            if message.partition is not None and not 0 <= message.partition < partitions:
                return no_partition(topic, message.partition, partitions)
        return LogUnavailable(f"the producer has lost sight of {topic}", cure="append again")

    def _throw_away(self, producer: KafkaProducer) -> None:
        with self._producing:
            if self._producer is producer:
                self._producer = None
                self._known.clear()
        discard(producer)

    def _open_reader(self) -> KafkaConsumer:
        if self._reader is None:
            if self._closed:
                raise closed()
            self._reader, _ = open_client(
                KafkaConsumer,
                self._bootstrap,
                self._options,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                fetch_max_bytes=FETCH_BYTES,
                receive_message_max_bytes=LARGEST_ANSWER_BYTES,
                fetch_max_wait_ms=milliseconds(FETCH_WAIT_SECONDS),
                request_timeout_ms=milliseconds(self._options.answer_seconds),
            )
        return self._reader

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close(autocommit=False, timeout_ms=0)


def records(topic: str, partition: int, rows: Sequence[Any]) -> list[Record]:
    """The library's records as ours."""
    return [
        Record(
            topic,
            partition,
            row.offset,
            row.key.decode(errors="replace") if row.key else "",
            row.value or b"",
            tuple(row.headers),
        )
        for row in rows
    ]
