"""Promises of a log and of a subscription, held against every backend; then those of the embedded log, with its file
broken for real."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import BROKERS, Outside, Server, fresh, make_topic

from monitor.database import sqlite_url
from monitor.errors import ConfigurationError, LogError, LogUnavailable
from monitor.store.sqlite import SqliteStore
from monitor.stream import open_log, open_subscription
from monitor.stream.log import Batch, EmbeddedLog, Log, Message, Record, Subscription

ROOT = Path(__file__).parent.parent
TOPIC = "anchorwatch.test"
SECONDS = 60.0


class Backend(NamedTuple):
    """A kind of log: its URL, and how a topic of one partition comes to be."""

    url: str
    make_topic: Callable[[], str]


def backend_of(name: str, folder: Path, brokers: Callable[[str], Server | Outside]) -> Backend:
    if name == "embedded":
        return Backend(sqlite_url(folder / "log.db"), lambda: fresh("topic"))
    address = brokers(name).address
    return Backend(f"kafka://{address}", lambda: make_topic(address))


@pytest.fixture(params=["embedded", *BROKERS])
def backend(request: pytest.FixtureRequest, tmp_path: Path, brokers: Callable[[str], Server | Outside]) -> Backend:
    return backend_of(request.param, tmp_path, brokers)


@pytest.fixture
def topic(backend: Backend) -> str:
    return backend.make_topic()


@pytest.fixture
def log(backend: Backend) -> Iterator[Log]:
    opened = open_log(backend.url)
    yield opened
    opened.close()


class Reading(NamedTuple):
    """A subscription that has its partition, which is at rest, and holds records up to `end`."""

    log: Log
    topic: str
    subscription: Subscription
    end: int


@pytest.fixture(scope="module", params=["embedded", *BROKERS])
def joined(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    brokers: Callable[[str], Server | Outside],
) -> Iterator[Reading]:
    """To join a group takes a broker seconds, so all tests of a backend share one stay."""
    backend = backend_of(request.param, tmp_path_factory.mktemp("log"), brokers)
    log, topic = open_log(backend.url), backend.make_topic()
    subscription = open_subscription(backend.url, log, topic, fresh("group"))
    until = time.monotonic() + SECONDS
    while subscription.assigned() != {0}:
        assert time.monotonic() < until, "no partition came"
        assert subscription.poll(10, 0.05) == []
    yield Reading(log, topic, subscription, 0)
    subscription.close()
    log.close()


@pytest.fixture
def reading(joined: Reading) -> Reading:
    joined.subscription.rest(0)
    return joined._replace(end=joined.log.span(joined.topic, 0).end)


def numbered(count: int, start: int = 0) -> list[Message]:
    return [Message(f"key {n % 3}", f"value {n}".encode()) for n in range(start, start + count)]


def polled(subscription: Subscription, count: int, limit: int = 10) -> list[Batch]:
    """Batches that hold so many records, as far as they come."""
    until = time.monotonic() + SECONDS
    batches: list[Batch] = []
    while sum(len(batch.records) for batch in batches) < count:
        assert time.monotonic() < until, f"only these came: {batches}"
        batches += subscription.poll(limit, 0.1)
    return batches


def records(batches: list[Batch]) -> list[Record]:
    return [record for batch in batches for record in batch.records]


# Every log.


def test_a_topic_nobody_wrote_to_is_empty(log: Log, topic: str) -> None:
    assert log.span(topic, 0)[:2] == (0, 0)
    assert log.read(topic, 0, 0, 10) == []
    assert log.partitions(topic) == 1


def test_records_come_back_whole_and_in_order(log: Log, topic: str) -> None:
    messages = [
        Message("clé", b"\x00\xff", (("reason", b"\x00"), ("reason", b"twice"), ("none", b""))),
        Message("k", b""),
        Message("", b"for the partition itself", partition=0),
    ]
    assert log.append(topic, messages) == [0, 1, 2]
    assert log.append(topic, numbered(1)) == [3]
    found = log.read(topic, 0, 0, 10)
    assert [Message(r.key, r.value, r.headers, m.partition) for r, m in zip(found, messages, strict=False)] == messages
    assert [(r.topic, r.partition, r.offset) for r in found] == [(topic, 0, n) for n in range(4)]


def test_reading_goes_on_where_it_stopped(log: Log, topic: str) -> None:
    log.append(topic, numbered(25))
    seen, at = [], 0
    while found := log.read(topic, 0, at, 10):
        assert len(found) <= 10
        seen += found
        at = found[-1].offset + 1
    assert [r.value for r in seen] == [m.value for m in numbered(25)]
    log.append(topic, numbered(1, start=25))
    assert [r.value for r in log.read(topic, 0, at, 10)] == [b"value 25"]
    assert [r.value for r in log.read(topic, 0, 7, 2)] == [b"value 7", b"value 8"]


def test_every_append_is_counted_whatever_its_size(log: Log, topic: str) -> None:
    end = 0
    for size in (1, 5, 1, 100, 3):
        assert log.append(topic, numbered(size, end)) == list(range(end, end + size))
        end += size
        assert log.span(topic, 0)[:2] == (0, end)


def test_topics_are_apart(log: Log, topic: str, backend: Backend) -> None:
    other = backend.make_topic()
    log.append(topic, numbered(2))
    log.append(other, numbered(3))
    one, two = log.span(topic, 0), log.span(other, 0)
    assert (one.end, two.end) == (2, 3)
    # A broker that gives topics no id is told by its giving none at all.
    assert one.topic_id != two.topic_id or one.topic_id == two.topic_id == ""
    assert log.span(topic, 0).topic_id == one.topic_id


def test_appending_nothing_is_nothing(log: Log, topic: str) -> None:
    assert log.append(topic, []) == []
    assert log.span(topic, 0).end == 0


@pytest.mark.parametrize("offset", [-1, 4, 1000])
def test_an_offset_outside_the_log_is_a_loud_stop(log: Log, topic: str, offset: int) -> None:
    log.append(topic, numbered(3))
    with pytest.raises(LogError, match="outside the log") as caught:
        log.read(topic, 0, offset, 10)
    assert caught.value.cure and not caught.value.retry


def test_a_partition_that_is_not_there_is_told(log: Log, topic: str) -> None:
    with pytest.raises(LogError, match="no partition 1"):
        log.read(topic, 1, 0, 1)


def test_what_is_closed_says_so(backend: Backend, topic: str) -> None:
    log = open_log(backend.url)
    log.append(topic, numbered(1))
    log.close()
    with pytest.raises(LogError, match="is closed"):
        log.append(topic, numbered(1))


# Every subscription.


def test_a_partition_is_at_rest_until_it_is_sought(reading: Reading) -> None:
    log, topic, subscription, base = reading
    log.append(topic, numbered(3))
    assert subscription.poll(10, 0.3) == []
    subscription.seek(0, base + 1)
    assert [r.value for r in records(polled(subscription, 2))] == [b"value 1", b"value 2"]
    subscription.rest(0)
    log.append(topic, numbered(1, start=3))
    assert subscription.poll(10, 0.3) == []
    assert subscription.assigned() == {0}
    subscription.seek(0, base)
    assert [r.value for r in records(polled(subscription, 4))] == [m.value for m in numbered(4)]


def test_a_poll_gives_consecutive_records_up_to_its_limit(reading: Reading) -> None:
    log, topic, subscription, base = reading
    log.append(topic, numbered(95))
    subscription.seek(0, base)
    batches = polled(subscription, 95)
    assert [r.offset for r in records(batches)] == list(range(base, base + 95))
    assert all(0 < len(batch.records) <= 10 and batch.partition == 0 for batch in batches)
    assert {batch.end for batch in batches} == {base + 95}
    assert subscription.poll(10, 0.1) == []


def test_what_comes_later_is_given_out_with_all_that_it_holds(reading: Reading) -> None:
    log, topic, subscription, base = reading
    message = Message("clé", b"\x00\xff", (("reason", b"\x00"), ("none", b"")))
    subscription.seek(0, base)
    assert subscription.poll(10, 0.1) == []
    log.append(topic, [message])
    (record,) = records(polled(subscription, 1))
    assert record == Record(topic, 0, base, message.key, message.value, message.headers)


def test_a_position_outside_the_log_is_a_loud_stop(reading: Reading) -> None:
    subscription = reading.subscription
    subscription.seek(0, reading.end + 1000)
    until = time.monotonic() + SECONDS
    with pytest.raises(LogError, match="outside the log") as caught:
        while time.monotonic() < until:
            assert subscription.poll(10, 0.1) == []
    assert caught.value.cure and not caught.value.retry


def test_the_end_of_the_log_is_inside_it(reading: Reading) -> None:
    log, topic, subscription, base = reading
    log.append(topic, numbered(3))
    subscription.seek(0, base + 3)
    for _ in range(30):
        assert subscription.poll(10, 0.1) == []
    log.append(topic, numbered(1, start=3))
    assert [r.value for r in records(polled(subscription, 1))] == [b"value 3"]


# The embedded log.


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=4), max_size=6), st.data())
def test_reading_is_slicing(batches: list[list[tuple[str, bytes]]], data: st.DataObject) -> None:
    everything = [Message(*pair) for batch in batches for pair in batch]
    with tempfile.TemporaryDirectory() as directory:
        log = EmbeddedLog(Path(directory) / "log.db")
        for batch in batches:
            log.append(TOPIC, [Message(*pair) for pair in batch])
        start = data.draw(st.integers(0, len(everything)))
        limit = data.draw(st.integers(1, 10))
        records = log.read(TOPIC, 0, start, limit)
        assert [(r.key, r.value) for r in records] == [(m.key, m.value) for m in everything[start : start + limit]]
        log.close()


def test_it_survives_being_closed_and_opened(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(TOPIC, numbered(3))
    before = log.span(TOPIC, 0)
    log.close()
    again = EmbeddedLog(tmp_path / "log.db")
    assert again.span(TOPIC, 0) == before
    assert len(again.read(TOPIC, 0, 0, 10)) == 3
    with pytest.raises(LogError, match="is closed"):
        log.append(TOPIC, numbered(1))


APPENDER = """
import sys
from pathlib import Path
from monitor.stream.log import EmbeddedLog, Message
log = EmbeddedLog(Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    log.append("anchorwatch.test", [Message(sys.argv[2], b"%d" % i) for i in (2 * n, 2 * n + 1)])
    print(2 * n + 1, flush=True)
"""


def appender(path: Path, key: str, batches: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(path), key, str(batches)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_append_without_gaps_or_losses(tmp_path: Path) -> None:
    processes = [appender(tmp_path / "log.db", key, 100) for key in "ab"]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    log = EmbeddedLog(tmp_path / "log.db")
    records = log.read(TOPIC, 0, 0, 1000)
    assert [r.offset for r in records] == list(range(400))
    for key in "ab":
        assert [int(r.value) for r in records if r.key == key] == list(range(200))


def test_a_killed_appender_loses_nothing_it_was_promised_and_tears_nothing(tmp_path: Path) -> None:
    process = appender(tmp_path / "log.db", "a", 100_000)
    assert process.stdout
    promised = [int(process.stdout.readline()) for _ in range(20)][-1]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    promised = max([promised, *(int(line) for line in rest.split("\n")[:-1])])
    records = EmbeddedLog(tmp_path / "log.db").read(TOPIC, 0, 0, 1_000_000)
    assert [int(r.value) for r in records] == list(range(len(records)))
    assert len(records) > promised
    assert len(records) % 2 == 0  # a batch is whole or absent


def test_retention_by_count_keeps_offsets_and_refuses_what_is_gone(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(TOPIC, numbered(10))
    assert log.retain(TOPIC, records=4) == 6
    assert log.span(TOPIC, 0)[:2] == (6, 10)
    assert [r.value for r in log.read(TOPIC, 0, 6, 1)] == [b"value 6"]
    with pytest.raises(LogError, match="outside the log"):
        log.read(TOPIC, 0, 5, 1)
    assert log.retain(TOPIC, records=0) == 4
    log.append(TOPIC, numbered(1, start=10))
    assert [(r.offset, r.value) for r in log.read(TOPIC, 0, 10, 5)] == [(10, b"value 10")]


def test_retention_by_age_reads_the_given_clock(tmp_path: Path) -> None:
    now = 1000.0
    log = EmbeddedLog(tmp_path / "log.db", clock=lambda: now)
    log.append(TOPIC, numbered(2))
    now = 1060.0
    log.append(TOPIC, numbered(3))
    assert log.retain(TOPIC, age_seconds=60) == 0
    assert log.retain(TOPIC, age_seconds=59) == 2
    now = 2000.0
    assert log.retain(TOPIC, age_seconds=59) == 3
    assert log.span(TOPIC, 0)[:2] == (5, 5)


def test_a_full_disk_refuses_the_batch_whole_and_takes_it_later(tmp_path: Path) -> None:
    small = EmbeddedLog(tmp_path / "log.db", max_bytes=64 * 1024)
    batch = [Message("k", b"x" * 1000)] * 10
    accepted = 0
    with pytest.raises(LogUnavailable, match="is full") as caught:
        for _ in range(100):
            small.append(TOPIC, batch)
            accepted += 10
    assert caught.value.retry and "free space" in caught.value.cure
    assert accepted > 0
    assert small.span(TOPIC, 0).end == accepted == len(small.read(TOPIC, 0, 0, 1000))
    small.close()
    EmbeddedLog(tmp_path / "log.db").append(TOPIC, batch)


def test_a_lock_held_by_another_process_says_so(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db", busy_seconds=0.05)
    log.append(TOPIC, numbered(1))
    other = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogUnavailable, match="locked by another process"):
        log.append(TOPIC, numbered(1))
    assert len(log.read(TOPIC, 0, 0, 10)) == 1  # reading goes on
    other.execute("ROLLBACK")
    log.append(TOPIC, numbered(1))


def written(path: Path) -> Path:
    log = EmbeddedLog(path)
    log.append(TOPIC, [Message("k", b"x" * 1000)] * 200)
    log.close()
    return path


def use(path: Path) -> None:
    log = EmbeddedLog(path)
    log.read(TOPIC, 0, 0, 1000)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_the_cure(tmp_path: Path, share: float) -> None:
    path = written(tmp_path / "log.db")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LogError, match="damaged") as caught:
        use(path)
    assert "Restore the log from a copy" in caught.value.cure and not caught.value.retry


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LogError, match="damaged"):
        use(tmp_path / "log.db")


def test_overwritten_pages_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "log.db")
    damaged = bytearray(path.read_bytes())
    damaged[4096 : len(damaged) // 2] = b"\xa5" * (len(damaged) // 2 - 4096)
    path.write_bytes(damaged)
    with pytest.raises(LogError, match="damaged"):
        use(path)


def test_missing_records_are_told_not_skipped(tmp_path: Path) -> None:
    path = written(tmp_path / "log.db")
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM records WHERE offset = 7")
    connection.commit()
    connection.close()
    with pytest.raises(LogError, match="missing"):
        use(path)


def test_a_store_is_not_taken_for_a_log(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "both.db").close()
    with pytest.raises(LogError, match="not an Anchorwatch log"):
        EmbeddedLog(tmp_path / "both.db")


def test_another_schema_version_is_refused_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "log.db")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.commit()
    connection.close()
    with pytest.raises(LogError, match="schema version 99") as caught:
        EmbeddedLog(path)
    assert "run the Anchorwatch release that wrote it" in caught.value.cure


def test_a_directory_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LogError, match="can't be made"):
        EmbeddedLog(tmp_path / "file" / "log.db")


def test_a_path_that_is_a_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="can't be opened"):
        EmbeddedLog(tmp_path)


def test_a_url_opens_it_whatever_its_path_is_called(tmp_path: Path) -> None:
    path = tmp_path / "a b#c%20d?e" / "log.db"
    log = open_log(sqlite_url(path))
    log.append(TOPIC, numbered(1))
    assert path.exists()


@pytest.mark.parametrize(
    "url",
    ["kafka-typo://x", "log.db", "sqlite://", "sqlite://host/log.db", "sqlite:log.db"],
)
def test_a_url_that_names_no_backend_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_log(url)
    assert "sqlite:///" in caught.value.cure
