"""A queue in front of a real log: bounded, ordered, never silent about what it lost, and never in generation's way.

The log goes away for real: another process's write lock, a full disk, a directory that is a file, a killed process.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from service import projection

from collectors.publish import QueuePublisher, WhenFull
from monitor import telemetry
from monitor.errors import ConfigurationError, LogUnavailable
from monitor.events import decode_projection
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message

ROOT = Path(__file__).parent.parent


def turns(log: EmbeddedLog) -> list[int]:
    """The turns in the log, in order."""
    begin, end, _ = log.span(PROJECTIONS, 0)
    return [decode_projection(record.value).turn for record in log.read(PROJECTIONS, 0, begin, end - begin)]


def dropped(reason: str) -> float:
    return telemetry.PUBLISHER_DROPPED.labels(reason)._value.get()


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Another writer holds the file; gives what releases it."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield lambda: connection.execute("ROLLBACK") and None
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def log(path: Path) -> Iterator[EmbeddedLog]:
    opened = EmbeddedLog(path, busy_seconds=0.05)
    yield opened
    opened.close()


def wait_until(met: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not met():
        assert time.monotonic() < give_up, "never happened"
        time.sleep(0.01)


def test_everything_arrives_in_order(log: EmbeddedLog) -> None:
    with QueuePublisher(log) as publisher:
        assert all(publisher.publish(projection("c", turn)) for turn in range(1200))  # more than two batches
        assert publisher.flush()
        assert turns(log) == list(range(1200))
        publisher.publish(projection("c", 1200))
    assert turns(log) == list(range(1201))  # closing flushes
    assert publisher.dropped == 0


def test_what_waits_while_the_log_is_away_arrives_in_order_when_it_is_back(path: Path, log: EmbeddedLog) -> None:
    with QueuePublisher(log) as publisher:
        with locked(path) as release:
            for turn in range(50):
                assert publisher.publish(projection("c", turn))
            assert not publisher.flush(timeout=0.3)
            release()
        assert publisher.flush(timeout=20)
        assert turns(log) == list(range(50))
        assert publisher.dropped == 0


@pytest.mark.parametrize(
    ("when_full", "kept"), [("drop_newest", list(range(10))), ("drop_oldest", [0, *range(91, 100)])]
)
def test_memory_is_bounded_and_drops_are_counted(
    path: Path, log: EmbeddedLog, when_full: WhenFull, kept: list[int]
) -> None:
    before = dropped("full")
    with QueuePublisher(log, size=10, when_full=when_full) as publisher:
        with locked(path) as release:
            publisher.publish(projection("c", 0))
            wait_until(lambda: len(publisher._writing) == 1)  # it is with the log now, and can't be dropped any more
            taken = [publisher.publish(projection("c", turn)) for turn in range(1, 100)]
            assert len(publisher._waiting) + len(publisher._writing) == 10
            release()
        assert publisher.flush(timeout=20)
    assert turns(log) == kept
    assert publisher.dropped == 90 == dropped("full") - before
    assert taken == ([True] * 9 + [False] * 90 if when_full == "drop_newest" else [True] * 99)


def test_a_queue_that_is_all_being_written_drops_the_newest(path: Path, log: EmbeddedLog) -> None:
    with QueuePublisher(log, size=1, when_full="drop_oldest") as publisher:
        with locked(path) as release:
            publisher.publish(projection("c", 0))
            wait_until(lambda: len(publisher._writing) == 1)
            assert not publisher.publish(projection("c", 1))
            release()
        assert publisher.flush(timeout=20)
    assert turns(log) == [0]


def test_blocking_waits_for_room_and_loses_nothing(path: Path, log: EmbeddedLog) -> None:
    with QueuePublisher(log, size=5, when_full="block") as publisher:
        with locked(path) as release:
            pusher = threading.Thread(target=lambda: [publisher.publish(projection("c", turn)) for turn in range(100)])
            pusher.start()
            wait_until(lambda: len(publisher._waiting) + len(publisher._writing) == 5)
            assert pusher.is_alive()
            release()
        pusher.join(20)
        assert publisher.flush(timeout=20)
    assert turns(log) == list(range(100))
    assert publisher.dropped == 0


def test_closing_frees_who_is_blocked(path: Path, log: EmbeddedLog) -> None:
    publisher = QueuePublisher(log, size=1, when_full="block")
    results: list[bool] = []
    with locked(path):
        publisher.publish(projection("c", 0))
        pusher = threading.Thread(target=lambda: results.append(publisher.publish(projection("c", 1))))
        pusher.start()
        publisher.close(timeout=0.2)
        pusher.join(20)
    assert results == [False]


def test_closing_while_the_log_is_away_ends_in_time_and_counts_what_it_lost(path: Path, log: EmbeddedLog) -> None:
    before = dropped("closed") + dropped("log")
    publisher = QueuePublisher(log, size=2000)
    with locked(path):
        for turn in range(1200):
            publisher.publish(projection("c", turn))
        begun = time.monotonic()
        publisher.close(timeout=0.5)
        assert time.monotonic() - begun < 5  # no sooner than it must, and not hanging
        wait_until(lambda: publisher.dropped == 1200)
    assert dropped("closed") + dropped("log") - before == 1200
    assert turns(log) == []
    assert not publisher.publish(projection("c", 0))
    publisher.close()  # again: nothing happens


def test_closing_does_not_wait_for_a_log_that_hangs() -> None:
    class Hanging:
        asked = threading.Event()
        answer = threading.Event()

        def append(self, *_: object) -> None:
            self.asked.set()
            self.answer.wait(30)
            raise LogUnavailable("away")

    hanging = Hanging()
    publisher = QueuePublisher(hanging)  # type: ignore[arg-type]
    publisher.publish(projection("c", 0))
    assert hanging.asked.wait(20)
    publisher.publish(projection("c", 1))
    begun = time.monotonic()
    publisher.close(timeout=0.2)
    assert time.monotonic() - begun < 10
    assert publisher.dropped == 1  # the other one is with the log
    hanging.answer.set()
    wait_until(lambda: publisher.dropped == 2)


def test_publishing_never_waits_while_the_log_is_away(path: Path, log: EmbeddedLog) -> None:
    # The thread backs off and closes with the queue's lock released: publishing goes on meanwhile.
    with QueuePublisher(log, size=50) as publisher, locked(path):
        publisher.publish(projection("c", 0))
        closer = threading.Thread(target=publisher.close, args=(3.0,))
        closer.start()
        wait_until(lambda: publisher._closing)
        waits = []
        for turn in range(200):
            begun = time.monotonic()
            publisher.publish(projection("c", turn))
            waits.append(time.monotonic() - begun)
            time.sleep(0.002)
        closer.join(20)
        assert sorted(waits)[-3] < 0.05


def test_a_full_disk_loses_nothing_that_fits_the_queue(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db", max_bytes=64 * 1024)
    with QueuePublisher(log, size=1000) as publisher:
        for turn in range(600):
            publisher.publish(projection("c", turn))
        assert not publisher.flush(timeout=1)
        kept = turns(log)
        assert kept == list(range(len(kept)))
        with log._database.write() as connection:
            connection.execute("PRAGMA max_page_count=100000")  # somebody made room
        assert publisher.flush(timeout=20)
        assert turns(log) == list(range(600))
        assert publisher.dropped == 0
    log.close()


def test_a_log_that_refuses_is_counted_and_does_not_stop_the_line(path: Path, log: EmbeddedLog) -> None:
    before = dropped("log")
    log.close()  # a closed log is broken for good: trying again would not help
    with QueuePublisher(log) as publisher:
        for turn in range(3):
            publisher.publish(projection("c", turn))
            wait_until(lambda turn=turn: publisher.dropped == turn + 1)  # type: ignore[misc]
    assert dropped("log") - before == 3


def test_a_fault_in_the_log_does_not_end_the_thread() -> None:
    class Faulty:
        def __init__(self) -> None:
            self.taken: list[Message] = []

        def append(self, _topic: str, messages: Sequence[Message]) -> None:
            if len(self.taken) < 1:
                self.taken.append(messages[0])
                raise ZeroDivisionError
            self.taken += messages

    faulty = Faulty()
    with QueuePublisher(faulty) as publisher:  # type: ignore[arg-type]
        publisher.publish(projection("c", 0))
        wait_until(lambda: publisher.dropped == 1)
        publisher.publish(projection("c", 1))
        assert publisher.flush()
    assert decode_projection(faulty.taken[-1].value).turn == 1


def test_what_can_not_be_encoded_is_dropped_alone(log: EmbeddedLog) -> None:
    before = dropped("invalid")
    with QueuePublisher(log) as publisher:
        assert publisher.publish(projection("c", 0))
        assert not publisher.publish(projection("half a pair \ud800", 1))
        assert publisher.publish(projection("c", 2))
        assert publisher.flush()
    assert turns(log) == [0, 2]
    assert (publisher.dropped, dropped("invalid") - before) == (1, 1)


def test_a_read_only_log_is_refused_where_it_is_opened(path: Path, log: EmbeddedLog) -> None:
    # Root may write anywhere, so the file is made unwritable by SQLite itself.
    with QueuePublisher(log) as publisher:
        log._database._writer.execute("PRAGMA query_only=1")
        publisher.publish(projection("c", 0))
        wait_until(lambda: publisher.dropped == 1)
    assert turns(log) == []


def test_a_queue_needs_room(log: EmbeddedLog) -> None:
    with pytest.raises(ConfigurationError, match="size is 0"):
        QueuePublisher(log, size=0)


CHILD = """
import sys
from pathlib import Path
from collectors.publish import QueuePublisher
from monitor.stream.log import EmbeddedLog
from service import projection

publisher = QueuePublisher(EmbeddedLog(Path(sys.argv[1])))
for turn in range(int(sys.argv[2])):
    publisher.publish(projection("c", turn))
if sys.argv[3] == "flush":
    print(publisher.flush(), flush=True)
    sys.stdin.read()
"""


def child(path: Path, count: int, how: str) -> subprocess.Popen[str]:
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(count), how],
        env={**os.environ, "PYTHONPATH": places},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_was_flushed_survives_kill_9(path: Path) -> None:
    process = child(path, 700, "flush")
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    log = EmbeddedLog(path)
    assert turns(log) == list(range(700))
    log.close()


def test_an_orderly_end_without_close_loses_nothing(path: Path) -> None:
    process = child(path, 700, "exit")
    assert process.wait(60) == 0
    log = EmbeddedLog(path)
    assert turns(log) == list(range(700))
    log.close()
