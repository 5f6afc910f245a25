"""Promises of Kafka as a log: places, groups, what is told when something is wrong, and the server that is away.

They run on both brokers of tests/servers.py, or on an outside one; where a broker can't do what a test is about, the
test says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import structlog
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient
from servers import Outside, Server, fresh, make_topic, tansu
from typer.testing import CliRunner

from monitor import connect
from monitor.__main__ import app
from monitor.errors import ConfigurationError, LogError, LogUnavailable
from monitor.placement import partition_of
from monitor.settings import load_settings
from monitor.stream import open_log, open_subscription
from monitor.stream.kafka import KafkaLog, KafkaSubscription, KafkaTopics, client
from monitor.stream.kafka.subscription import _Membership
from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS, Message, Record
from monitor.stream.options import Compression, KafkaOptions
from monitor.stream.tokens import ClientCredentials, TokenFile
from monitor.stream.topics import Advice, TopicSpec, TopicState, advice, check, create, topic_specs

ROOT = Path(__file__).parent.parent
SECONDS = 60.0
QUICK = KafkaOptions(append_seconds=2.0, answer_seconds=2.0, session_seconds=6.0)


def messages(count: int, start: int = 0) -> list[Message]:
    return [Message(f"key {n}", b"%d" % n) for n in range(start, start + count)]


def everything(log: KafkaLog, topic: str) -> list[Record]:
    found: list[Record] = []
    for partition in range(log.partitions(topic)):
        begin, end, _ = log.span(topic, partition)
        at = begin
        while at < end:
            some = log.read(topic, partition, at, 1000)
            found += some
            at = some[-1].offset + 1
    return found


def eventually(done: Callable[[], bool], what: str = "it did not happen") -> None:
    until = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.01)


@contextlib.contextmanager
def member(address: str, topic: str, group: str) -> Iterator[KafkaSubscription]:
    subscription = KafkaSubscription(address, topic, group, QUICK)
    try:
        yield subscription
    finally:
        subscription.close()


def seek_new(subscription: KafkaSubscription, offsets: dict[int, int]) -> None:
    """As a worker does: it forgets partitions that went, and seeks those that came where the store says."""
    for partition in offsets.keys() - subscription.assigned():
        del offsets[partition]
    for partition in subscription.assigned() - offsets.keys():
        offsets[partition] = 0
        subscription.seek(partition, 0)


def values(subscription: KafkaSubscription, count: int, offsets: dict[int, int]) -> list[int]:
    """The numbers in so many records, as far as they come; the cluster may be away for a while."""
    found: list[int] = []

    def enough() -> bool:
        with contextlib.suppress(LogUnavailable):
            for batch in subscription.poll(500, 0.05):
                found.extend(int(record.value) for record in batch.records)
        seek_new(subscription, offsets)
        return len(found) >= count

    eventually(enough, f"only {len(found)} of {count} came")
    return found


# Places.


def test_a_record_lies_where_every_kafka_client_would_put_it(kafka: Server | Outside) -> None:
    topic = make_topic(kafka.address, partitions=5)
    log = KafkaLog(kafka.address, QUICK)
    sent = [Message(f"conversation-{n}", b"%d" % n) for n in range(200)] + [Message("clé", b"200")]
    offsets = log.append(topic, sent)
    found = {int(record.value): record for record in everything(log, topic)}
    assert len(found) == 201
    for number, message in enumerate(sent):
        assert found[number].partition == partition_of(message.key, 5)
        assert found[number].offset == offsets[number]
    log.close()


def test_a_control_record_goes_into_the_partition_it_names(kafka: Server | Outside) -> None:
    topic = make_topic(kafka.address, partitions=3)
    log = KafkaLog(kafka.address, QUICK)
    assert log.append(topic, [Message("", b"%d" % p, partition=p) for p in range(3)]) == [0, 0, 0]
    assert [(r.partition, r.value, r.key) for r in everything(log, topic)] == [(p, b"%d" % p, "") for p in range(3)]
    with pytest.raises(LogError, match="no partition 3"):
        log.append(topic, [Message("", b"x", partition=3)])
    assert log.append(topic, [Message("", b"x", partition=2)]) == [1]
    log.close()


@pytest.mark.parametrize("compression", ["none", "gzip", "lz4", "zstd"])
def test_compressed_records_come_back_whole(kafka: Server | Outside, compression: Compression) -> None:
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, KafkaOptions(compression=compression))
    sent = [Message(f"k{n}", b"value %d " % n * 100, (("h", b"%d" % n),)) for n in range(50)]
    assert log.append(topic, sent) == list(range(50))
    assert [Message(r.key, r.value, r.headers) for r in everything(log, topic)] == sent
    assert [r.value for r in log.read(topic, 0, 17, 2)] == [sent[17].value, sent[18].value]  # from within a batch
    log.close()


def test_threads_append_side_by_side_and_each_keeps_its_order(kafka: Server | Outside) -> None:
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, QUICK)
    told: dict[str, list[int]] = {}

    def write(name: str) -> None:
        told[name] = [at for n in range(20) for at in log.append(topic, [Message(name, b"%d" % n)])]

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    found = everything(log, topic)
    assert len(found) == 60
    for name in "abc":
        mine = [record for record in found if record.key == name]
        assert [int(record.value) for record in mine] == list(range(20))
        assert [record.offset for record in mine] == told[name]
    log.close()


def test_what_a_foreign_producer_left_out_or_garbled_does_not_stop_the_line(kafka: Server | Outside) -> None:
    from kafka import KafkaProducer

    topic = make_topic(kafka.address)
    producer = KafkaProducer(bootstrap_servers=kafka.address)
    producer.send(topic, value=b"no key")
    producer.send(topic, key=b"\xff\xfe", value=b"no text")
    producer.send(topic, key=b"k", value=None)
    producer.flush()
    producer.close()
    log = KafkaLog(kafka.address, QUICK)
    assert [(r.key, r.value) for r in everything(log, topic)] == [("", b"no key"), ("��", b"no text"), ("k", b"")]
    log.close()


# Groups.


class Running(threading.Thread):
    """A worker as far as a subscription is concerned: it reads on from where the store says, and stores what it read.

    The store refuses a commit whose expected position is not the stored one, as the real ones do.
    """

    def __init__(
        self, address: str, topic: str, group: str, store: dict[int, int], read: list[int], busy: float = 0.0
    ) -> None:
        """`busy` is for how many seconds it does something else between two polls."""
        super().__init__(daemon=True)
        self._busy = busy
        self.subscription = KafkaSubscription(address, topic, group, QUICK)
        self.owned: frozenset[int] = frozenset()
        self._store, self._read = store, read
        self._expected: dict[int, int] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.owned = self.subscription.assigned()
            for partition in self._expected.keys() - self.owned:
                del self._expected[partition]
            for partition in self.owned - self._expected.keys():
                self._expected[partition] = self._store.get(partition, 0)
                self.subscription.seek(partition, self._expected[partition])
            for batch in self.subscription.poll(7, 0.05):
                with STORE:
                    if self._store.get(batch.partition, 0) != self._expected[batch.partition]:
                        self.subscription.rest(batch.partition)
                        del self._expected[batch.partition]
                        continue
                    self._store[batch.partition] = self._expected[batch.partition] = batch.records[-1].offset + 1
                    self._read.extend(int(record.value) for record in batch.records)
            self._ended.wait(self._busy)
        self.subscription.close()

    def end(self) -> None:
        self._ended.set()
        if self.ident is not None:
            self.join(SECONDS)
        assert not self.is_alive()


STORE = threading.Lock()


def test_workers_share_a_topic_and_whoever_leaves_is_followed_at_once(kafka: Server | Outside) -> None:
    topic, group = make_topic(kafka.address, partitions=4), fresh("group")
    log = KafkaLog(kafka.address, QUICK)
    store: dict[int, int] = {}
    read: list[int] = []
    first, second = (Running(kafka.address, topic, group, store, read) for _ in range(2))
    try:
        first.start()
        eventually(lambda: len(first.owned) == 4)
        log.append(topic, messages(100))
        second.start()
        log.append(topic, messages(100, 100))  # while the partitions move
        eventually(lambda: len(first.owned) == len(second.owned) == 2)
        assert not first.owned & second.owned
        log.append(topic, messages(100, 200))
        eventually(lambda: len(read) >= 300)
        second.end()
        log.append(topic, messages(100, 300))
        eventually(lambda: len(first.owned) == 4)
        eventually(lambda: len(read) >= 400)
        assert sorted(read) == list(range(400))  # nothing lost, nothing twice
    finally:
        for each in (first, second):
            each.end()
        log.close()


def test_workers_that_are_busy_between_polls_join_once(kafka: Server | Outside) -> None:
    """A join that is answered meanwhile is thrown away by the library, and then all of them join again, and again."""
    topic, group = make_topic(kafka.address, partitions=4), fresh("group")
    workers = [Running(kafka.address, topic, group, {}, [], busy=1.0) for _ in range(2)]
    try:
        for number, worker in enumerate(workers, 1):
            worker.start()
            eventually(lambda number=number: [len(each.owned) for each in workers[:number]] == [4 // number] * number)
        member = workers[1].subscription._membership
        assert member is not None
        assert member.consumer.group_metadata().generation_id <= 4
    finally:
        for worker in workers:
            worker.end()


def test_partitions_that_come_back_at_any_moment_are_read_on(kafka: Server | Outside) -> None:
    """The library says so from its own thread: between any two lines of ours, also in the middle of a seek."""
    topic, group = make_topic(kafka.address, partitions=4), fresh("group")
    log, subscription = KafkaLog(kafka.address), KafkaSubscription(kafka.address, topic, group)
    places = [TopicPartition(topic, partition) for partition in range(4)]
    read: dict[int, dict[bytes, None]] = {partition: {} for partition in range(4)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def poll() -> None:
        for batch in subscription.poll(100, 0.0):
            # What was read before its place was set again may come twice: a worker sees that, and takes it once.
            read[batch.partition] |= dict.fromkeys(record.value for record in batch.records)

    def come_back(member: _Membership, begun: threading.Event) -> None:
        begun.set()
        for _ in range(50):
            member.arrivals.on_partitions_assigned(set(places))

    try:
        eventually(lambda: poll() or len(subscription.assigned()) == 4)
        for partition in range(4):
            subscription.seek(partition, 0)
        assert subscription._membership is not None
        for number in range(40):
            begun = threading.Event()
            coming = threading.Thread(target=come_back, args=(subscription._membership, begun))
            coming.start()
            begun.wait()
            while coming.is_alive():
                subscription._count_in(subscription._membership)
            log.append(topic, [Message("", b"%d" % number, partition=partition) for partition in range(4)])
            eventually(lambda number=number: poll() or all(b"%d" % number in values for values in read.values()))
        assert read == {p: dict.fromkeys(b"%d" % number for number in range(40)) for p in range(4)}
        assert all(list(values) == sorted(values, key=int) for values in read.values())
    finally:
        sys.setswitchinterval(interval)
        subscription.close()
        log.close()


MEMBER = """
import sys
from monitor.stream.kafka import KafkaSubscription
from monitor.stream.options import KafkaOptions
address, topic, group = sys.argv[1:]
subscription = KafkaSubscription(address, topic, group, KafkaOptions(session_seconds=6.0))
while True:
    subscription.poll(10, 0.1)
    if subscription.assigned():
        print("owns", len(subscription.assigned()), flush=True)
"""


def owned(process: subprocess.Popen[str]) -> int:
    """How many partitions it says are its own, once there are some."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("owns"):
            return int(line.split()[1])
    raise AssertionError("it has ended")


def test_the_partitions_of_a_worker_that_was_killed_are_taken_over(kafka: Server | Outside) -> None:
    if kafka.name == "noida":
        pytest.skip("noida-db never takes over the partitions of a consumer that crashed")
    topic, group = make_topic(kafka.address, partitions=2), fresh("group")
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBER, kafka.address, topic, group], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owned(process) == 2
        with member(kafka.address, topic, group) as survivor:
            survivor.poll(10, 0.1)
            process.kill()
            eventually(lambda: not survivor.poll(10, 0.05) and survivor.assigned() == {0, 1}, "nobody took over")
    finally:
        process.kill()
        process.wait()


def test_a_worker_that_only_rests_keeps_its_place(kafka: Server | Outside) -> None:
    if kafka.name == "noida":
        pytest.skip("noida-db never takes a place away")
    topic, group = make_topic(kafka.address), fresh("group")
    with member(kafka.address, topic, group) as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        until = time.monotonic() + QUICK.session_seconds + 1.5
        while time.monotonic() < until:
            assert subscription.poll(10, 0.5) == []
            assert subscription.assigned() == {0}


def test_the_group_is_told_how_far_it_has_come(kafka: Server | Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.stream.kafka.subscription.TELL_LAG_SECONDS", 0.0)
    topic, group = make_topic(kafka.address), fresh("group")
    log = KafkaLog(kafka.address, QUICK)
    log.append(topic, messages(10))

    def committed() -> int:
        admin = KafkaAdminClient(bootstrap_servers=kafka.address)
        offsets = admin.list_group_offsets(group)
        admin.close()
        found = offsets.get(group, offsets).get(TopicPartition(topic, 0))
        return found.offset if found else -1

    with member(kafka.address, topic, group) as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        subscription.seek(0, 0)
        assert len(values(subscription, 10, {0: 0})) == 10
        eventually(lambda: not subscription.poll(10, 0.05) and committed() == 10)
        log.append(topic, messages(5))
        assert len(values(subscription, 5, {0: 0})) == 5
    assert committed() == 15  # told while it left
    log.close()


# What is told when something is wrong.


def test_a_topic_is_never_made_by_using_it(kafka: Server | Outside) -> None:
    topic = fresh("missing")
    log = KafkaLog(kafka.address, QUICK)
    for use in (
        lambda: log.append(topic, messages(1)),
        lambda: log.read(topic, 0, 0, 1),
        lambda: log.span(topic, 0),
        lambda: log.partitions(topic),
    ):
        with pytest.raises(LogError, match="there is no topic") as caught:
            use()
        assert "anchorwatch topics create" in caught.value.cure and not caught.value.retry
    with (
        member(kafka.address, topic, fresh("group")) as subscription,
        pytest.raises(LogError, match="there is no topic"),
    ):
        eventually(lambda: bool(subscription.poll(10, 0.05)))
    with pytest.raises(LogError, match="there is no topic"):
        log.partitions(topic)
    log.close()


def test_a_record_that_is_too_large_is_refused_and_the_next_one_taken(kafka: Server | Outside) -> None:
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, QUICK)
    with pytest.raises(LogError, match="larger than") as caught:
        log.append(topic, [Message("k", os.urandom(2 << 20))])
    assert not caught.value.retry
    assert log.append(topic, [Message("k", os.urandom(500_000))]) == [0]
    log.close()


def test_retention_that_overtook_the_worker_is_a_loud_stop(kafka: Server | Outside) -> None:
    if kafka.name == "tansu":
        pytest.skip("Tansu deletes no records")
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, QUICK)
    log.append(topic, messages(10))
    admin = KafkaAdminClient(bootstrap_servers=kafka.address)
    admin.delete_records({TopicPartition(topic, 0): 5})
    admin.close()
    assert log.span(topic, 0)[:2] == (5, 10)
    assert [r.offset for r in log.read(topic, 0, 5, 2)] == [5, 6]
    with pytest.raises(LogError, match="holds 5 to 10: retention has overtaken") as caught:
        log.read(topic, 0, 4, 1)
    assert "keep the log longer" in caught.value.cure
    with member(kafka.address, topic, fresh("group")) as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        subscription.seek(0, 4)
        with pytest.raises(LogError, match="holds 5 to 10: retention has overtaken"):
            eventually(lambda: bool(subscription.poll(10, 0.1)))
    log.close()


def test_a_log_that_has_forgotten_is_told_from_one_that_was_cut(kafka: Server | Outside) -> None:
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, QUICK)
    log.append(topic, messages(10))
    with pytest.raises(LogError, match="5 records shorter than it was") as caught:
        log.read(topic, 0, 15, 1)
    assert "lost records that it had acknowledged" in caught.value.cure
    with member(kafka.address, topic, fresh("group")) as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        subscription.seek(0, 15)
        with pytest.raises(LogError, match="5 records shorter than it was"):
            eventually(lambda: bool(subscription.poll(10, 0.1)))
    log.close()


def test_a_topic_made_anew_is_not_taken_for_the_old_one(
    kafka: Server | Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kafka.name == "noida":
        pytest.skip("noida-db gives topics no id")
    monkeypatch.setattr(client, "METADATA_SECONDS", 0.5)
    topic = make_topic(kafka.address)
    log = KafkaLog(kafka.address, QUICK)
    log.append(topic, messages(3))
    before = log.span(topic, 0).topic_id
    with member(kafka.address, topic, fresh("group")) as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        subscription.seek(0, 0)
        assert len(values(subscription, 3, {0: 0})) == 3
        admin = KafkaAdminClient(bootstrap_servers=kafka.address)
        admin.delete_topics([topic])
        make_topic(kafka.address, name=topic)
        admin.close()
        log.append(topic, messages(3))
        with pytest.raises(LogError, match=r"made anew|there is no topic"):
            eventually(lambda: bool(subscription.poll(10, 0.05)))
    assert log.span(topic, 0).topic_id not in (before, "")
    log.close()


def test_nobody_listens_there() -> None:
    with no_thread_stays(), socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        log = KafkaLog(f"127.0.0.1:{port},localhost:{port}", QUICK)
        for use in (lambda: log.append("t", messages(1)), lambda: log.read("t", 0, 0, 1)):
            with pytest.raises(LogUnavailable) as caught:
                use()
            assert "ANCHORWATCH_LOG_URL" in caught.value.cure and caught.value.retry
        with (
            member(f"127.0.0.1:{port}", "t", "g") as subscription,
            pytest.raises(LogUnavailable),
        ):
            subscription.poll(10, 0.1)
        log.close()


@contextlib.contextmanager
def no_thread_stays() -> Iterator[None]:
    """Of a client that could not connect, too."""
    before = set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= before, "threads stay behind")


# The server is away.


def kept_topic(server: Server, *, partitions: int = 1) -> str:
    """A topic that outlives a kill: noida-db writes down a little later what it has made, or when it is stopped."""
    topic = make_topic(server.address, partitions=partitions)
    if server.name == "noida":
        server.stop()
        server.start()
    return topic


def test_it_may_be_made_before_its_server_runs(own_kafka: Server) -> None:
    own_kafka.kill()
    log = KafkaLog(own_kafka.address, QUICK)
    subscription = KafkaSubscription(own_kafka.address, PROJECTIONS, "workers", QUICK)
    for use in (
        lambda: log.append(PROJECTIONS, messages(1)),
        lambda: log.span(PROJECTIONS, 0),
        lambda: subscription.poll(10, 0.1),
    ):
        with pytest.raises(LogUnavailable):
            use()
    own_kafka.start()
    make_topic(own_kafka.address, name=PROJECTIONS)
    assert log.append(PROJECTIONS, messages(3)) == [0, 1, 2]
    assert values(subscription, 3, {}) == [0, 1, 2]
    subscription.close()
    log.close()


def test_an_append_to_a_frozen_server_ends_in_time_and_keeps_nothing(own_kafka: Server) -> None:
    topic = make_topic(own_kafka.address)
    before = set(threading.enumerate())
    log = KafkaLog(own_kafka.address, QUICK)
    log.append(topic, messages(1))
    errors: list[LogUnavailable] = []
    own_kafka.freeze()
    load = [Message("k", os.urandom(5_000))] * 200
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(LogUnavailable) as caught:
            log.append(topic, load)
        errors.append(caught.value)  # whoever keeps an error must not keep the producer alive by it
        assert time.monotonic() - started < 30  # 2 s to append, or 2 s for each of a few questions; and a busy machine
    eventually(lambda: set(threading.enumerate()) <= before, "clients that were given up live on")
    own_kafka.thaw()
    # What was given up may have been written all the same: the server had taken it in before it was frozen.
    eventually(lambda: appended(log, topic, [Message("last", b"1")]))
    assert everything(log, topic)[-1].key == "last"
    log.close()


def appended(log: KafkaLog, topic: str, sent: list[Message]) -> bool:
    try:
        log.append(topic, sent)
    except LogUnavailable:
        return False
    return True


@pytest.mark.parametrize("end", [Server.stop, Server.kill])
def test_what_was_not_acknowledged_is_sent_again_and_what_was_is_there(
    own_kafka: Server, end: Callable[[Server], None]
) -> None:
    if own_kafka.name == "tansu":
        pytest.skip("Tansu forgets everything when it ends")
    topic = kept_topic(own_kafka)
    log = KafkaLog(own_kafka.address, QUICK)
    stop = threading.Event()
    acknowledged: list[float] = []  # when; each stands for ten messages

    def publish() -> None:
        while not stop.is_set():
            try:
                log.append(topic, messages(10, 10 * len(acknowledged)))
            except LogUnavailable:
                time.sleep(0.05)  # and then the same ones again
            else:
                acknowledged.append(time.monotonic())
                time.sleep(0.01)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        eventually(lambda: len(acknowledged) > 10)
        end(own_kafka)
        ended = time.monotonic()
        own_kafka.start()
        seen = len(acknowledged)
        eventually(lambda: len(acknowledged) > seen + 10)
    finally:
        stop.set()
        publisher.join(SECONDS)
    there = {int(record.value) for record in everything(log, topic)}
    for number, when in enumerate(acknowledged):
        # noida-db writes down up to a second late; a broker that is killed has lost what it had not.
        if end is Server.stop or not ended - 3 < when < ended:
            assert set(range(10 * number, 10 * number + 10)) <= there, (
                f"lost what was acknowledged {ended - when} s before"
            )
    log.close()


def test_a_subscription_says_that_its_server_is_away_and_goes_on_where_it_was(own_kafka: Server) -> None:
    topic = kept_topic(own_kafka, partitions=2)
    log = KafkaLog(own_kafka.address, QUICK)
    log.append(topic, messages(50))
    offsets: dict[int, int] = {}
    with member(own_kafka.address, topic, "workers") as subscription:
        assert sorted(values(subscription, 50, offsets)) == list(range(50))

        def away() -> bool:
            try:
                assert subscription.poll(10, 0.05) == []
            except LogUnavailable as error:
                assert error.cure
                return True
            return False

        own_kafka.freeze()
        eventually(away, "it did not say that its server is away")
        assert subscription.assigned() == {0, 1}
        own_kafka.thaw()
        eventually(lambda: appended(log, topic, messages(50, 50)))
        assert set(values(subscription, 50, offsets)) >= set(range(50, 100))

        own_kafka.stop()  # killed, noida-db forgets records, and then there is no going on
        eventually(away, "it did not say that its server is away")
        own_kafka.start()
        if own_kafka.name == "tansu":  # it comes back without the topic, and that must not pass for a quiet night
            with pytest.raises(LogError, match="there is no topic"):
                eventually(lambda: away() and False)
        else:
            eventually(lambda: appended(log, topic, messages(50, 100)))
            seen: set[int] = set()
            eventually(lambda: seen.update(values(subscription, 1, offsets)) or seen >= set(range(100, 150)))
    log.close()


def test_a_subscription_that_waits_long_is_made_anew(own_kafka: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.stream.kafka.subscription.ANEW_SECONDS", 1.0)
    topic = kept_topic(own_kafka)
    with member(own_kafka.address, topic, "workers") as subscription:
        eventually(lambda: not subscription.poll(10, 0.05) and subscription.assigned() == {0})
        own_kafka.kill()
        tries = []

        def refused() -> bool:
            try:
                subscription.poll(10, 0.05)
            except LogUnavailable as error:
                tries.append(error.problem)
            return any("ECONNREFUSED" in problem for problem in tries)

        eventually(refused)  # a new client has knocked
        assert subscription.assigned() == {0}  # and until it is let in, what was ours counts as ours
        own_kafka.start()
        if own_kafka.name == "tansu":  # which has forgotten the topic
            make_topic(own_kafka.address, name=topic)
            with pytest.raises(LogError, match="was deleted and made anew"):
                values(subscription, 1, {0: 0})
            return
        log = KafkaLog(own_kafka.address, QUICK)
        eventually(lambda: appended(log, topic, messages(3)))
        assert values(subscription, 3, {}) == [0, 1, 2]
        log.close()


def test_leaving_does_not_wait_for_a_server_that_is_away(own_kafka: Server) -> None:
    topic = kept_topic(own_kafka)
    log = KafkaLog(own_kafka.address, QUICK)
    log.append(topic, messages(1))
    subscription = KafkaSubscription(own_kafka.address, topic, "workers", QUICK)
    values(subscription, 1, {})
    own_kafka.freeze()
    started = time.monotonic()
    subscription.close()
    log.close()
    assert time.monotonic() - started < 10
    own_kafka.thaw()


# Who we are.


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A broker that lets nobody in."""
    server = tansu(tmp_path / "tansu", options=("--authentication",))
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"])
def test_who_is_not_let_in_is_told_so_at_once_and_not_that_the_server_is_away(
    guarded: Server, tmp_path: Path, mechanism: str
) -> None:
    (tmp_path / "token").write_text("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.\n")
    options = KafkaOptions(
        security_protocol="sasl_plaintext",
        mechanism=mechanism,  # type: ignore[arg-type]
        username="worker",
        password="canary-password",
        token_file=tmp_path / "token",
    )
    with no_thread_stays():
        log = KafkaLog(guarded.address, options)
        with pytest.raises(LogError, match="refuses who we say we are") as caught:
            log.append("t", messages(1))
        assert not caught.value.retry and "ANCHORWATCH_KAFKA_USERNAME" in caught.value.cure
        assert "canary-password" not in f"{caught.value!r} {caught.value} {options!r} {options}"
        subscription = KafkaSubscription(guarded.address, "t", "g", options)
        with pytest.raises(LogError, match="refuses who we say we are"):
            subscription.poll(10, 0.1)


def test_a_listener_that_wants_a_password_from_who_brings_none_does_not_look_like_nothing(guarded: Server) -> None:
    """It shakes hands with anybody, and then says nothing: that client, too, is given up whole."""
    with no_thread_stays():
        with pytest.raises(LogUnavailable) as caught:
            KafkaLog(guarded.address, QUICK).append("t", messages(1))
        assert "ANCHORWATCH_KAFKA_SECURITY_PROTOCOL" in caught.value.cure
        with member(guarded.address, "t", "g") as subscription, pytest.raises(LogUnavailable):
            eventually(lambda: bool(subscription.poll(1, 0.1)))


class TlsDoor:
    """Takes TLS on one port and hands the plain bytes to another, as a broker's TLS listener would."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.port: int = self._listener.getsockname()[1]
        self.to = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except ssl.SSLError:
                continue
            except OSError:
                if self._listener.fileno() == -1:
                    return
                continue
            server = socket.create_connection(("127.0.0.1", self.to))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(folder: Path) -> Path:
    """A certificate authority, and a certificate of its for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder.mkdir()
    ca, key = folder / "ca.pem", folder / "ca.key"
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2, "-subj", "/CN=authority"),
        *("-keyout", key, "-out", ca, "-addext", "keyUsage=critical,keyCertSign"),
    )
    openssl(
        *("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=broker"),
        *("-keyout", folder / "key.pem", "-out", folder / "request.pem"),
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", folder / "request.pem", "-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", 2),
        *("-extfile", folder / "names", "-out", folder / "cert.pem"),
    )
    return folder


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A TLS listener that wants a certificate of ours, before a broker that knows itself by that door."""
    folder = authority(tmp_path / "authority")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    door = TlsDoor(context)
    server = tansu(tmp_path / "tansu", advertised=door.port)
    door.to = server.port
    try:
        server.start()
        yield door.port, folder
    finally:
        door.close()
        server.kill()


def test_through_tls_everything_works_for_whoever_shows_the_right_certificate(tls: tuple[int, Path]) -> None:
    port, folder = tls
    options = KafkaOptions(
        security_protocol="ssl",
        ca_file=folder / "ca.pem",
        cert_file=folder / "cert.pem",
        key_file=folder / "key.pem",
    )
    address = f"127.0.0.1:{port}"
    topics = KafkaTopics(address, options)
    topics.create([TopicSpec(name="t", partitions=1, replication=1, config={})])
    topics.close()
    log = KafkaLog(address, options)
    assert log.append("t", messages(10)) == list(range(10))
    assert [int(r.value) for r in log.read("t", 0, 0, 10)] == list(range(10))
    subscription = KafkaSubscription(address, "t", "g", options)
    assert values(subscription, 10, {}) == list(range(10))
    subscription.close()
    log.close()


def test_a_certificate_that_nobody_vouches_for_is_refused_by_us(tls: tuple[int, Path], tmp_path: Path) -> None:
    port, _ = tls
    other = authority(tmp_path / "other")
    for address, options in (
        (f"127.0.0.1:{port}", KafkaOptions(security_protocol="ssl")),
        (f"127.0.0.1:{port}", KafkaOptions(security_protocol="ssl", ca_file=other / "ca.pem")),
    ):
        with pytest.raises(LogError, match="a certificate that we do not trust") as caught:
            KafkaLog(address, options).span("t", 0)
        assert "ANCHORWATCH_KAFKA_CA_FILE" in caught.value.cure and not caught.value.retry


def test_a_certificate_of_another_name_is_refused_by_us(tls: tuple[int, Path]) -> None:
    port, folder = tls
    options = KafkaOptions(security_protocol="ssl", ca_file=folder / "ca.pem")
    with pytest.raises(LogError, match="a certificate that we do not trust") as caught:
        KafkaLog(f"localhost:{port}", options).span("t", 0)
    assert "a name in the certificate" in caught.value.cure


def test_without_tls_at_a_tls_listener_nothing_hangs(tls: tuple[int, Path]) -> None:
    port, _ = tls
    with pytest.raises(LogError):
        KafkaLog(f"127.0.0.1:{port}", QUICK).span("t", 0)


def test_tls_files_that_can_not_be_used_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for options in (
        KafkaOptions(security_protocol="ssl", ca_file=tmp_path / "missing.pem"),
        KafkaOptions(security_protocol="ssl", cert_file=tmp_path / "empty.pem", key_file=tmp_path / "empty.pem"),
    ):
        with pytest.raises(LogError, match="TLS files") as caught:
            KafkaLog("127.0.0.1:1", options).span("t", 0)
        assert "ANCHORWATCH_KAFKA_CERT_FILE" in caught.value.cure


# Tokens.


class TokenServer(BaseHTTPRequestHandler):
    status: ClassVar[int] = 200
    answer: ClassVar[bytes] = b""
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        type(self).asked.append((self.headers["Authorization"], body))
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def token_url() -> Iterator[str]:
    TokenServer.status, TokenServer.asked = 200, []
    TokenServer.answer = json.dumps({"access_token": "one", "expires_in": 100, "token_type": "bearer"}).encode()
    server = HTTPServer(("127.0.0.1", 0), TokenServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/token"
    server.shutdown()
    server.server_close()


def test_a_token_is_kept_until_shortly_before_it_ends(token_url: str) -> None:
    now = 1000.0
    source = ClientCredentials(token_url, "worker", "s:cret/ü", "kafka", clock=lambda: now)
    assert [source(), source()] == ["one", "one"]
    now = 1069.0
    assert source() == "one" and len(TokenServer.asked) == 1
    TokenServer.answer = b'{"access_token": "two"}'
    now = 1071.0
    assert source() == "two" and len(TokenServer.asked) == 2
    # "worker:s%3Acret%2F%C3%BC" in base64, by RFC 6749, section 2.3.1.
    assert TokenServer.asked[0] == (
        "Basic d29ya2VyOnMlM0FjcmV0JTJGJUMzJUJD",
        "grant_type=client_credentials&scope=kafka",
    )


@pytest.mark.parametrize(("status", "passing"), [(401, False), (400, False), (302, False), (429, True), (503, True)])
def test_a_refusal_is_told_from_a_server_in_trouble(token_url: str, status: int, passing: bool) -> None:
    TokenServer.status = status
    with pytest.raises(LogError) as caught:
        ClientCredentials(token_url, "worker", "canary-secret")()
    assert caught.value.retry is passing
    assert "canary-secret" not in str(caught.value)
    assert len(TokenServer.asked) == 1  # and a redirect is not followed with the secret in hand


def test_an_answer_that_is_no_token_is_told(token_url: str) -> None:
    TokenServer.answer = b"<html>log in</html>"
    with pytest.raises(LogError, match="is no token") as caught:
        ClientCredentials(token_url, "worker", "secret")()
    assert not caught.value.retry


def test_a_token_server_that_is_away_may_come_back() -> None:
    with pytest.raises(LogUnavailable):
        ClientCredentials("http://127.0.0.1:1/token", "worker", "secret")()
    with pytest.raises(ConfigurationError, match="not https"):
        ClientCredentials("http://tokens.example/token", "worker", "secret")


def test_a_token_file_is_read_anew(tmp_path: Path) -> None:
    source = TokenFile(tmp_path / "token")
    with pytest.raises(LogError, match="can't be read"):
        source()
    (tmp_path / "token").write_text("one\n")
    assert source() == "one"
    (tmp_path / "token").write_text("two")
    assert source() == "two"
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(LogError, match="is empty"):
        source()


# Settings.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    for name in list(os.environ):
        if name.startswith("ANCHORWATCH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path))

    def put(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"ANCHORWATCH_{name.upper()}", str(value))

    yield put
    structlog.reset_defaults()  # the commands have set up logging to an output that is theirs


def test_settings_become_options(environment: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "password").write_text("canary\n")
    environment(
        log_url="kafka://one:9092,two:9093",
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="scram-sha-512",
        kafka_username="worker",
        kafka_password_file=tmp_path / "password",
        kafka_ca_file="/etc/ca.pem",
        kafka_compression="lz4",
    )
    settings = load_settings()
    assert connect.kafka_options(settings) == KafkaOptions(
        security_protocol="sasl_ssl",
        mechanism="SCRAM-SHA-512",
        username="worker",
        password="canary",
        ca_file=Path("/etc/ca.pem"),
        compression="lz4",
    )
    assert "canary" not in repr(connect.kafka_options(settings)) + repr(settings)
    log = connect.log(settings)
    assert isinstance(log, KafkaLog)
    assert isinstance(connect.subscription(settings, log), KafkaSubscription)
    (tmp_path / "password").unlink()
    with pytest.raises(ConfigurationError, match="can't be read"):
        connect.kafka_options(settings)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"security_protocol": "sasl_plaintext", "sasl_mechanism": "PLAIN", "username": "u", "password": "p"},
            "PLAIN sends the password for everybody to read",
        ),
        (
            {"security_protocol": "sasl_plaintext", "sasl_mechanism": "OAUTHBEARER", "token_file": "t"},
            "OAUTHBEARER sends the token for everybody to read",
        ),
        ({"security_protocol": "sasl_ssl"}, "needs ANCHORWATCH_KAFKA_SASL_MECHANISM"),
        (
            {"sasl_mechanism": "SCRAM-SHA-512", "username": "u", "password": "p"},
            "needs ANCHORWATCH_KAFKA_SECURITY_PROTOCOL=sasl",
        ),
        ({"security_protocol": "sasl_ssl", "sasl_mechanism": "SCRAM-SHA-512"}, "needs ANCHORWATCH_KAFKA_USERNAME"),
        (
            {"security_protocol": "sasl_ssl", "sasl_mechanism": "OAUTHBEARER"},
            "- OAUTHBEARER needs ANCHORWATCH_KAFKA_TOKEN_FILE or",
        ),
        (
            {"security_protocol": "sasl_ssl", "sasl_mechanism": "OAUTHBEARER", "token_url": "https://t"},
            "client's id and secret",
        ),
        (
            {
                **{"security_protocol": "sasl_ssl", "sasl_mechanism": "SCRAM-SHA-256", "username": "u"},
                **{"password": "p", "password_file": "f"},
            },
            "one too many",
        ),
        ({"ca_file": "/ca.pem"}, "need TLS"),
        ({"security_protocol": "ssl", "cert_file": "/c.pem"}, "go together"),
        ({"security_protocol": "tls"}, "ANCHORWATCH_KAFKA_SECURITY_PROTOCOL"),
        ({"session_seconds": "5"}, "ANCHORWATCH_KAFKA_SESSION_SECONDS"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    environment: Callable[..., None], variables: dict[str, str], problem: str
) -> None:
    environment(**{f"kafka_{name}": value for name, value in variables.items()})
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert problem in str(caught.value)


def test_plain_is_fine_through_tls(environment: Callable[..., None]) -> None:
    environment(
        kafka_security_protocol="sasl_ssl", kafka_sasl_mechanism="PLAIN", kafka_username="u", kafka_password="canary"
    )
    settings = load_settings()
    assert connect.kafka_options(settings).password == "canary"
    assert "canary" not in repr(settings)


@pytest.mark.parametrize(
    "url", ["kafka://", "kafka://host", "kafka://a:1,b", "kafka://u:canary@host:9092", "kafka:host:9092", "kafka://h:x"]
)
def test_an_address_that_is_none_is_refused_and_not_repeated(environment: Callable[..., None], url: str) -> None:
    environment(log_url=url)
    with pytest.raises(ConfigurationError, match="kafka://host1:9092,host2:9092") as caught:
        load_settings()
    assert "canary" not in str(caught.value)
    for use in (lambda: open_log(url), lambda: open_subscription(url, open_log("kafka://h:1"), "t", "g")):
        if url.startswith("kafka://"):
            with pytest.raises(ConfigurationError) as caught:
                use()
            assert "canary" not in str(caught.value)


def test_a_worker_on_a_file_needs_no_kafka(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['kafka'] = None; sys.modules['crc32c'] = None\n"
        "from monitor import connect\nfrom monitor.settings import Settings\n"
        "settings = Settings()\nlog = connect.log(settings)\nconnect.subscription(settings, log).poll(1, 0)\n"
        "from monitor.stream import open_log\n"
        "try: open_log('kafka://h:1')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "ANCHORWATCH_DATA_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("ConfigurationError Kafka needs kafka")
    assert "pip install 'anchorwatch[kafka]'" in result.stdout


# Topics.

SPECS = topic_specs(partitions=12, replication=3, retention_days=7)
WELL = {
    spec.name: TopicState(
        name=spec.name,
        topic_id="x",
        partitions=spec.partitions,
        replication=3,
        in_sync=3,
        config={**spec.config, "max.message.bytes": "1048588", "retention.bytes": "-1"},
    )
    for spec in SPECS
}


def changed(topic: str, **changes: object) -> dict[str, TopicState]:
    state = WELL[topic]
    config = {**state.config, **{k.replace("_", "."): str(v) for k, v in changes.items() if k not in fields}}
    fixed = {k: v for k, v in changes.items() if k in fields}
    made = {name: getattr(state, name) for name in fields} | {"config": config} | fixed
    return {**WELL, topic: TopicState(name=topic, **made)}  # type: ignore[arg-type]


fields = ("topic_id", "partitions", "replication", "in_sync", "config")


def test_topics_made_as_they_should_be_need_no_advice() -> None:
    assert advice(SPECS, WELL) == []
    assert {spec.name: spec.partitions for spec in SPECS} == {PROJECTIONS: 12, DEAD_LETTERS: 1, ACTIONS: 1}
    assert {spec.name: spec.config["min.insync.replicas"] for spec in SPECS} == dict.fromkeys(WELL, "2")
    for replication in (1, 2):
        for spec in topic_specs(partitions=1, replication=replication, retention_days=7):
            assert spec.config["min.insync.replicas"] == "1"


@pytest.mark.parametrize(
    ("found", "severity", "words"),
    [
        ({name: state for name, state in WELL.items() if name != ACTIONS}, "error", "there is no such topic"),
        (changed(PROJECTIONS, cleanup_policy="compact"), "error", "newest response of each conversation only"),
        (changed(PROJECTIONS, cleanup_policy="compact,delete"), "error", "newest response of each conversation only"),
        (changed(ACTIONS, cleanup_policy="delete"), "error", "forgotten in time"),
        (changed(ACTIONS, partitions=3), "error", "no order"),
        (changed(DEAD_LETTERS, partitions=2), "error", "no order"),
        (changed(PROJECTIONS, partitions=6), "note", "the setting says 12"),
        (changed(PROJECTIONS, retention_ms=3_600_000), "warning", "for 1 hours"),
        (changed(PROJECTIONS, retention_bytes=10**9), "warning", "however young"),
        (changed(PROJECTIONS, replication=1, in_sync=1), "warning", "one copy"),
        (changed(PROJECTIONS, in_sync=2), "warning", "2 of 3 copies in sync"),
        (changed(PROJECTIONS, min_insync_replicas=1), "warning", "only one copy of it exists"),
        (changed(PROJECTIONS, min_insync_replicas=3), "warning", "when one broker is away"),
        (changed(PROJECTIONS, unclean_leader_election_enable="true"), "warning", "may lose records"),
        (changed(PROJECTIONS, max_message_bytes=1000), "warning", "max.message.bytes=1000"),
        (changed(PROJECTIONS, config={}), "note", "does not tell"),
    ],
)
def test_what_is_wrong_with_a_topic_is_told_with_its_cure(
    found: dict[str, TopicState], severity: str, words: str
) -> None:
    (told,) = advice(SPECS, found)
    assert told.severity == severity and words in told.problem
    assert told.cure or severity == "note"


def test_for_ever_is_long_enough() -> None:
    assert advice(SPECS, changed(PROJECTIONS, retention_ms=-1)) == []


def test_topics_are_made_once_and_found_as_they_were_made(kafka: Server | Outside) -> None:
    names = {spec.name: fresh("made") for spec in SPECS}
    specs = [
        TopicSpec(name=names[spec.name], partitions=spec.partitions, replication=1, config=spec.config)
        for spec in topic_specs(partitions=3, replication=1, retention_days=7)
    ]
    topics = KafkaTopics(kafka.address, QUICK)
    assert topics.brokers() >= 1
    assert [each.problem for each in check(topics, specs)] == ["there is no such topic"] * 3
    assert create(topics, specs[1:]) == [spec.name for spec in specs[1:]]
    assert create(topics, specs) == [specs[0].name]
    assert create(topics, specs) == []
    assert {each.severity for each in check(topics, specs)} <= {"warning"}  # one copy
    with pytest.raises(LogError, match="one exists already"):
        topics.create(specs[:1])
    state = topics.states([specs[0].name])[specs[0].name]
    assert (state.partitions, state.replication, state.in_sync) == (3, 1, 1)
    assert state.config["cleanup.policy"] == "delete"
    assert state.config["retention.ms"] == str(7 * 86_400_000)
    topics.close()


def test_a_compacted_topic_forgets_what_is_written_again(kafka: Server | Outside) -> None:
    """Whether and when a broker compacts is its own business: what must hold is the newest value of each key."""
    topic = make_topic(kafka.address, cleanup_policy="compact")
    log = KafkaLog(kafka.address, QUICK)
    for round_ in range(5):
        log.append(topic, [Message(f"k{n}", b"%d" % round_) for n in range(10)])
    log.append(topic, [Message("k0", b"")])
    newest = {record.key: record.value for record in everything(log, topic)}
    assert newest.pop("k0", b"") == b""
    assert newest == {f"k{n}": b"4" for n in range(1, 10)}
    log.close()


def test_the_commands_make_and_check_them(own_kafka: Server, environment: Callable[..., None]) -> None:
    environment(log_url=f"kafka://{own_kafka.address}", kafka_replication=1, kafka_partitions=2)
    runner = CliRunner()
    missing = runner.invoke(app, ["topics", "check", "--json"])
    assert missing.exit_code == 1
    assert [each["severity"] for each in json.loads(missing.stdout)["advice"]] == ["error"] * 3
    made = runner.invoke(app, ["topics", "create", "--json"])
    assert json.loads(made.stdout) == {"made": [PROJECTIONS, DEAD_LETTERS, ACTIONS]}
    assert "all topics are there already" in runner.invoke(app, ["topics", "create"]).stdout
    checked = runner.invoke(app, ["topics", "check"])
    assert checked.exit_code == 0
    assert f"warning: {PROJECTIONS}: it has one copy" in checked.stdout
    environment(kafka_replication=3)
    own_kafka.wipe()
    own_kafka.start()
    refused = runner.invoke(app, ["topics", "create"])
    if own_kafka.name == "tansu":  # takes any number
        assert refused.exit_code == 0
    else:
        assert isinstance(refused.exception, LogError)
        assert "fewer brokers than replicas" in str(refused.exception)


def test_on_a_file_there_are_no_topics_to_make(environment: Callable[..., None]) -> None:
    result = CliRunner().invoke(app, ["topics", "create"])
    assert isinstance(result.exception, ConfigurationError)


def test_advice_reads_as_a_line_and_its_cure() -> None:
    assert str(Advice("error", "t", "it is gone", "make it")) == "error: t: it is gone\n  cure: make it"
