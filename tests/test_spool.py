"""The spool: nothing lost, order kept, disk bounded, and a damaged file never in the way.

Faults are real: processes are killed, files are cut and overwritten, disks are full, a broker is killed and comes back.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from servers import Server, fresh
from service import projection

from collectors import spool as spool_module
from collectors.publish import QueuePublisher, open_publisher
from collectors.spool import FILE, Spool
from monitor import telemetry
from monitor.envelope import message_of
from monitor.errors import ConfigurationError, LogError, LogUnavailable
from monitor.events import decode_projection
from monitor.settings import Settings
from monitor.stream import KafkaOptions, open_log, open_topics
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Log, Message
from monitor.stream.topics import TopicSpec

ROOT = Path(__file__).parent.parent
MIB = 2**20
JOURNAL = 12 * MIB  # what SQLite may keep beside the file


def numbered(first: int, count: int, size: int = 0) -> list[Message]:
    return [
        Message(f"c{n % 7}", str(n).encode() + b" " * size, (("ce_id", b"x"),)) for n in range(first, first + count)
    ]


def numbers(messages: Sequence[Message]) -> list[int]:
    return [int(message.value) for message in messages]


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def counted(metric: object) -> float:
    return metric._value.get()  # type: ignore[attr-defined,no-any-return]


def dropped(reason: str) -> float:
    return counted(telemetry.PUBLISHER_DROPPED.labels(reason))


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up, "never happened"
        time.sleep(0.01)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@contextmanager
def opened(directory: Path, max_bytes: int = 64 * MIB) -> Iterator[Spool]:
    spool = Spool(directory, max_bytes)
    try:
        yield spool
    finally:
        spool.close()


# On disk


def test_what_is_put_is_there_in_order_after_reopening_headers_and_all(directory: Path) -> None:
    with opened(directory) as spool:
        spool.put(numbered(0, 700))
        spool.put(numbered(700, 1))
        spool.forget(100)
    with opened(directory) as spool:
        assert spool.records == 601
        assert spool.head(1000) == numbered(100, 601)
        assert numbers(spool.head(3)) == [100, 101, 102]


class SpoolMachine(RuleBasedStateMachine):
    """A spool does what a deque does, whatever is closed, reopened, or killed by losing its memory, in between."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.spool = Spool(Path(self.folder.name), 64 * MIB)
        self.model: deque[int] = deque()
        self.next = 0

    @rule(count=st.integers(1, 40))
    def put(self, count: int) -> None:
        self.spool.put(numbered(self.next, count))
        self.model.extend(range(self.next, self.next + count))
        self.next += count

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.model)))
        self.spool.forget(count)
        for _ in range(count):
            self.model.popleft()

    @rule(limit=st.integers(1, 100))
    def head(self, limit: int) -> None:
        assert numbers(self.spool.head(limit)) == list(self.model)[:limit]

    @rule()
    def reopen(self) -> None:
        self.spool.close()
        self.spool = Spool(Path(self.folder.name), 64 * MIB)

    @invariant()
    def counts(self) -> None:
        assert self.spool.records == len(self.model)

    def teardown(self) -> None:
        self.spool.close()
        self.folder.cleanup()


SpoolMachine.TestCase.settings = hypothesis_settings(max_examples=15, stateful_step_count=20, deadline=None)
TestSpoolIsAQueue = SpoolMachine.TestCase


def test_a_full_spool_takes_nothing_of_a_batch_and_goes_on_when_there_is_room(directory: Path) -> None:
    with opened(directory, 2 * MIB) as spool:
        taken = 0
        with pytest.raises(LogUnavailable, match="full"):
            while True:
                spool.put(numbered(taken, 100, size=1000))
                taken += 100
        assert 500 < taken < 2100
        assert spool.records == taken
        assert on_disk(directory) <= 2 * MIB + JOURNAL
        spool.forget(taken // 2)
        spool.put(numbered(taken, 100, size=1000))
        assert numbers(spool.head(10_000)) == list(range(taken // 2, taken + 100))


def test_filled_and_emptied_over_and_over_it_stays_within_its_bound_and_gives_the_disk_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RENEW_BYTES", MIB)
    with opened(directory, 4 * MIB) as spool:
        first = 0
        for _ in range(10):
            spool.put(numbered(first, 2000, size=1000))
            assert on_disk(directory) <= 4 * MIB + JOURNAL
            for _ in range(4):
                assert numbers(spool.head(500)) == list(range(first, first + 500))
                spool.forget(500)
                first += 500
        assert on_disk(directory) < MIB


def test_two_at_once_are_refused_with_the_cure(directory: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigurationError, match="in use by another collector") as caught:
        Spool(directory, MIB)
    assert "ANCHORWATCH_SPOOL_DIR" in caught.value.cure
    holder.kill()
    holder.wait(20)
    with opened(directory) as spool:  # the lock went with the process
        assert numbers(spool.head(10)) == [0, 1, 2]
        with pytest.raises(ConfigurationError, match="in use"):  # nor twice in one process
            Spool(directory, MIB)
    opened(directory).__enter__().close()


HOLD = """
import sys, tests.test_spool as t
from pathlib import Path
from collectors.spool import Spool
spool = Spool(Path(sys.argv[1]), 2**24)
spool.put(t.numbered(0, 3))
print("held", flush=True)
sys.stdin.read()
""".replace("import sys, tests.test_spool as t", "import sys; sys.path[:0] = ['tests', '.']; import test_spool as t")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE somebody_elses (x)")
    connection.commit()
    connection.close()


def empty_of_tables(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + bytes(4080))


@pytest.mark.parametrize("harm", [cut, garbage, foreign, empty_of_tables])
def test_a_damaged_file_is_moved_aside_loudly_and_never_in_the_way(
    directory: Path, harm: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(directory) as spool:
        spool.put(numbered(0, 500, size=100))
    harm(directory / FILE)
    harmed = (directory / FILE).read_bytes()
    before = counted(telemetry.PUBLISHER_SPOOLS_DAMAGED)
    with opened(directory) as spool:
        assert spool.records == 0
        spool.put(numbered(500, 10))
        assert numbers(spool.head(100)) == list(range(500, 510))
    (aside,) = directory.glob(f"{FILE}.damaged-*")
    assert aside.read_bytes()[100:] == harmed[100:]  # kept for whoever can read it; SQLite may mark the header
    assert counted(telemetry.PUBLISHER_SPOOLS_DAMAGED) - before == 1
    printed = capfd.readouterr()
    assert "moved aside" in printed.out + printed.err


def test_damage_that_shows_while_it_runs_costs_what_is_damaged_and_no_more(directory: Path) -> None:
    with opened(directory) as spool:
        spool.put(numbered(0, 3000, size=300))
    with (directory / FILE).open("r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xff" * 4096 * 40)
    with opened(directory) as spool:
        assert spool.records == 3000
        seen: list[int] = []
        while batch := spool.head(100):
            seen += numbers(batch)
            spool.forget(len(batch))
        assert seen == list(range(len(seen))) and len(seen) < 3000
        spool.put(numbered(3000, 5))
        assert numbers(spool.head(10)) == list(range(3000, 3005))
    assert len(list(directory.glob(f"{FILE}.damaged-*"))) == 1


def test_a_directory_that_can_not_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="can't be made") as caught:
        Spool(tmp_path / "file" / "spool", MIB)
    assert "ANCHORWATCH_SPOOL_DIR" in caught.value.cure


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# In front of a log


class Away:
    """A log that is away until it is told otherwise; then it keeps what it is given."""

    def __init__(self, up: bool = False) -> None:
        self.up = up
        self.taken: list[Message] = []

    def append(self, _topic: str, messages: Sequence[Message]) -> list[int]:
        if not self.up:
            raise LogUnavailable("away")
        self.taken += messages
        return []

    @property
    def turns(self) -> list[int]:
        return [decode_projection(message.value).turn for message in self.taken]


def once(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(items))


def ids(messages: Sequence[Message]) -> list[str]:
    return [decode_projection(message.value).id for message in messages]


@contextmanager
def spooling(log: object, directory: Path, *, size: int = 100, max_bytes: int = 64 * MIB) -> Iterator[QueuePublisher]:
    publisher = QueuePublisher(
        log,  # type: ignore[arg-type]
        size=size,
        when_full="spool",
        spool=directory,
        spool_bytes=max_bytes,
    )
    try:
        yield publisher
    finally:
        publisher.close(timeout=0.2)


def publish_all(publisher: QueuePublisher, first: int, count: int, conversations: int = 1) -> None:
    """Publish, waiting where memory is full for the disk to catch up: what is tested is not how fast that is."""
    for turn in range(first, first + count):
        while len(publisher._waiting) + len(publisher._writing) >= publisher._size:
            time.sleep(0.001)
        assert publisher.publish(projection(f"c{turn % conversations}", turn))


def spooled(publisher: QueuePublisher) -> int:
    assert publisher._resending is not None
    return publisher._resending._spool.records


def test_a_long_outage_costs_disk_and_no_memory_and_everything_arrives_in_order(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Away()
    into, out = counted(telemetry.PUBLISHER_SPOOLED), counted(telemetry.PUBLISHER_RESENT)
    with spooling(log, directory) as publisher:
        publish_all(publisher, 0, 3000)
        wait_until(lambda: spooled(publisher) == 3000)
        assert not publisher.flush(timeout=0.1)
        assert counted(telemetry.PUBLISHER_SPOOL_RECORDS) == 3000
        assert counted(telemetry.PUBLISHER_SPOOL_BYTES) > 3000 * 500
        log.up = True
        publish_all(publisher, 3000, 2000)  # while it empties
        assert publisher.flush(timeout=30)
        assert log.turns == list(range(5000))
        assert publisher.dropped == 0
        assert counted(telemetry.PUBLISHER_SPOOLED) - into == counted(telemetry.PUBLISHER_RESENT) - out >= 3000
        before = counted(telemetry.PUBLISHER_SPOOLED)
        monkeypatch.setattr("collectors.resend.PATIENCE_SECONDS", 60.0)
        publish_all(publisher, 5000, 10)
        assert publisher.flush(timeout=30)
        assert counted(telemetry.PUBLISHER_SPOOLED) == before  # past the disk again
    assert log.turns == list(range(5010))


class Flaky:
    """Goes away and comes back at random; may have written before it says that it has not, whole or in part; may think
    about it for longer than anybody waits.

    Some batches it refuses as a whole, as if too large, but none of their messages.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.taken: list[Message] = []
        self.calm = False

    def append(self, _topic: str, messages: Sequence[Message]) -> list[int]:
        fate = 1.0 if self.calm else self.chance.random()
        if not self.calm and self.chance.random() < 0.3:
            time.sleep(0.01)
        if fate < 0.2:
            self.taken += messages[: self.chance.randrange(len(messages) + 1)]
        if fate < 0.4:
            raise LogUnavailable("away")
        if fate < 0.5 and len(messages) > 1:
            raise LogError("refused")
        self.taken += messages
        return []


@pytest.mark.parametrize("seed", range(4))
def test_order_in_every_conversation_survives_a_log_that_comes_and_goes(
    directory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collectors.resend.FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr("collectors.resend.LONGEST_RETRY_SECONDS", 0.002)
    monkeypatch.setattr("collectors.resend.BATCH", 20)
    monkeypatch.setattr("collectors.resend.PATIENCE_SECONDS", 0.003)
    log = Flaky(seed)
    chance = random.Random(seed + 100)
    sent = 0
    for _ in range(3):  # three processes in a row, as far as the spool can tell
        with spooling(log, directory, size=50) as publisher:
            for _ in range(12):
                count = chance.randrange(60)
                publish_all(publisher, sent, count, conversations=5)
                sent += count
                time.sleep(chance.random() * 0.01)
    log.calm = True
    with spooling(log, directory) as publisher:
        assert publisher.flush(timeout=30)
    assert once(ids(log.taken)) == [f"c{turn % 5}#{turn}" for turn in range(sent)]


class Hanging(Away):
    """Does not answer an append until it is told to; then it has taken what it was given, or has not."""

    def __init__(self, takes: bool) -> None:
        super().__init__(up=takes)
        self.asked = threading.Event()
        self.answer = threading.Event()

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        self.asked.set()
        assert self.answer.wait(600)
        return super().append(topic, messages)


def publish_through(publisher: QueuePublisher, first: int, count: int, conversations: int = 1) -> None:
    """Publish; memory must make room again and again, whatever the log does."""
    for turn in range(first, first + count):
        wait_until(lambda: len(publisher._waiting) + len(publisher._writing) < publisher._size)
        assert publisher.publish(projection(f"c{turn % conversations}", turn))


@pytest.mark.parametrize("takes", [True, False], ids=["taken late", "not taken"])
@pytest.mark.parametrize("patience", [0.01, 60.0], ids=["after a while", "when memory is half full"])
def test_nothing_is_dropped_during_an_append_that_is_not_answered(
    directory: Path, takes: bool, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collectors.resend.PATIENCE_SECONDS", patience)
    log = Hanging(takes)
    with spooling(log, directory, size=50) as publisher:
        publish_through(publisher, 0, 1000)
        log.answer.set()
        if not takes:
            wait_until(lambda: publisher._resending._asked is None)  # type: ignore[union-attr]
            log.up = True
        publish_through(publisher, 1000, 100)
        assert publisher.flush(timeout=30)
        assert publisher.dropped == 0
    assert log.turns == list(range(1100))  # each once: what was taken late is not sent again


def test_during_an_append_that_is_not_answered_the_disk_soon_has_everything(directory: Path) -> None:
    log = Hanging(takes=True)
    with spooling(log, directory, size=10_000) as publisher:  # far from full
        publish_all(publisher, 0, 1)
        assert log.asked.wait(20)
        publish_all(publisher, 1, 9)
        wait_until(lambda: spooled(publisher) == 10)
        log.answer.set()
        assert publisher.flush(timeout=30)
    assert log.turns == list(range(10))


@pytest.mark.parametrize("sent_from", ["memory", "disk"])
def test_a_late_answer_lets_go_of_nothing_but_what_was_taken(directory: Path, sent_from: str) -> None:
    # The spool is lost while the log hangs. Its answer is not for what the new one holds.
    log = Hanging(takes=True)
    if sent_from == "disk":
        with opened(directory / PROJECTIONS) as spool:
            spool.put([message_of(projection("c", 0))])
    with spooling(log, directory) as publisher:
        if sent_from == "memory":
            publish_all(publisher, 0, 1)
        wait_until(lambda: log.asked.is_set() and spooled(publisher) == 1)
        publisher._resending._spool._set_aside(LogError("damaged"))  # type: ignore[union-attr]
        publish_all(publisher, 1, 1)
        wait_until(lambda: spooled(publisher) == 1)
        publish_all(publisher, 2, 4)
        wait_until(lambda: spooled(publisher) == 5)
        log.answer.set()
        assert publisher.flush(timeout=30)
    assert log.turns == list(range(6))


def test_publishing_never_touches_the_disk(directory: Path) -> None:
    # The disk hangs: who waits for it, waits for ever. As many as memory holds are taken at once all the same, and what
    # is too many is dropped at once, counted.
    log = Away()
    before = dropped("full")
    with spooling(log, directory, size=200) as publisher:
        assert publisher._resending is not None
        with publisher._resending._spool._lock:
            finished = threading.Event()
            results: list[bool] = []

            def generate() -> None:
                results.extend(publisher.publish(projection("c", turn)) for turn in range(1000))
                finished.set()

            threading.Thread(target=generate, daemon=True).start()
            assert finished.wait(20)
            assert sum(results) == 200 and results[:200] == [True] * 200
        wait_until(lambda: spooled(publisher) == 200)
    assert publisher.dropped == 800 == dropped("full") - before


def test_a_full_spool_drops_what_comes_then_counted_by_its_own_reason(directory: Path) -> None:
    log = Away()
    before = dropped("spool")
    with spooling(log, directory, max_bytes=MIB) as publisher:
        taken = []
        turn = 0
        while publisher.dropped < 50:
            held = len(publisher._waiting) + len(publisher._writing)
            if held >= 100 and not publisher._resending.full:  # type: ignore[union-attr]
                time.sleep(0.001)
                continue
            if publisher.publish(projection("c", turn)):
                taken.append(turn)
            turn += 1
        assert len(taken) > 300
        assert on_disk(directory) <= MIB + JOURNAL
        log.up = True
        assert publisher.flush(timeout=30)
    assert log.turns == taken  # the oldest, in order
    assert publisher.dropped == 50 == dropped("spool") - before


def test_a_full_disk_drops_counted_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    log = Away()
    before = dropped("spool")
    filler = small_disk / "filler"
    with spooling(log, small_disk / "spool", max_bytes=512 * MIB) as publisher:
        publish_all(publisher, 0, 200)
        wait_until(lambda: spooled(publisher) == 200)
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass
        turn = 200
        while publisher.dropped < 20:
            if len(publisher._waiting) + len(publisher._writing) >= 100 and not publisher._resending.full:  # type: ignore[union-attr]
                time.sleep(0.001)
                continue
            publisher.publish(projection("c", turn))
            turn += 1
        filler.unlink()
        log.up = True
        assert publisher.flush(timeout=30)
        taken = turn - 20
    assert log.turns == list(range(taken))
    assert publisher.dropped == 20 == dropped("spool") - before


def test_a_disk_that_is_full_from_the_start_does_not_stop_a_collector(small_disk: Path) -> None:
    filler = small_disk / "filler"
    (small_disk / "spool" / PROJECTIONS).mkdir(parents=True)
    (small_disk / "spool" / PROJECTIONS / "lock").touch()
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    log = Away(up=True)
    with spooling(log, small_disk / "spool") as publisher:
        publish_all(publisher, 0, 50)
        assert publisher.flush(timeout=20)  # the log is there: no spool is needed
        filler.unlink()
        log.up = False
        publish_all(publisher, 50, 50)
        wait_until(lambda: spooled(publisher) == 50)
        log.up = True
        assert publisher.flush(timeout=20)
    assert log.turns == list(range(100))


class Picky(Away):
    """Refuses one turn for good, or everything for a while."""

    def __init__(self, turn: int) -> None:
        super().__init__(up=True)
        self.turn = turn
        self.refuses_all = False
        self.refusals = 0
        self.asked = 0

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        self.asked += 1
        if self.refusals:
            self.refusals -= 1
            raise LogError("refused for now")
        if self.refuses_all or any(decode_projection(message.value).turn == self.turn for message in messages):
            raise LogError("refused")
        return super().append(topic, messages)


def test_one_that_the_log_refuses_does_not_hold_up_the_others(directory: Path) -> None:
    log = Picky(turn=40)
    before = dropped("log")
    with spooling(log, directory, size=1000) as publisher:
        publish_all(publisher, 0, 100, conversations=3)
        wait_until(lambda: publisher.dropped == 1)
        assert publisher.flush(timeout=30)
        for conversation in range(3):
            sent = [turn for turn in range(100) if turn % 3 == conversation and turn != 40]
            assert [turn for turn in log.turns if turn % 3 == conversation] == sent
        assert dropped("log") - before == 1


def test_a_log_that_stops_refusing_in_the_middle_of_a_doubt_gets_everything_in_order(directory: Path) -> None:
    # As when somebody makes the missing topic just then. It refuses so many times in all, whatever the count.
    for times in range(1, 12):
        log = Picky(turn=-1)
        log.refusals = times
        with spooling(log, directory / str(times), size=1000) as publisher:
            publish_all(publisher, 0, 60, conversations=4)
            assert publisher.flush(timeout=30)
            assert publisher.dropped == 0
        for conversation in range(4):
            sent = [turn for turn in range(60) if turn % 4 == conversation]
            assert [turn for turn in log.turns if turn % 4 == conversation] == sent


def test_a_log_that_refuses_everything_is_at_fault_itself_and_nothing_is_given_up(directory: Path) -> None:
    log = Picky(turn=-1)
    log.refuses_all = True
    with spooling(log, directory, size=1000) as publisher:
        publish_all(publisher, 0, 50)
        wait_until(lambda: log.asked > 6)
        assert publisher.dropped == 0
        log.refuses_all = False  # somebody has put the access list right
        assert publisher.flush(timeout=30)
    assert log.turns == list(range(50))


def test_closing_leaves_on_disk_what_the_log_did_not_take(directory: Path) -> None:
    log = Away()
    publisher = QueuePublisher(log, size=1000, when_full="spool", spool=directory)  # type: ignore[arg-type]
    publish_all(publisher, 0, 700)
    publisher.close(timeout=0.3)
    assert publisher.dropped == 0 and log.taken == []
    assert not publisher.publish(projection("c", 700))
    log.up = True
    with spooling(log, directory) as publisher:  # and the next one sends it, before its own
        publish_all(publisher, 700, 10)
        assert publisher.flush(timeout=30)
    assert log.turns == list(range(710))


def test_closing_while_the_log_hangs_leaves_everything_on_disk_in_order(directory: Path) -> None:
    log = Hanging(takes=False)
    publisher = QueuePublisher(log, size=1000, when_full="spool", spool=directory)  # type: ignore[arg-type]
    publish_all(publisher, 0, 1)
    assert log.asked.wait(20)
    publish_all(publisher, 1, 99)
    begun = time.monotonic()
    publisher.close(timeout=0.2)
    assert time.monotonic() - begun < 10
    log.answer.set()
    publisher._thread.join(20)
    assert publisher.dropped == 0
    with opened(directory / PROJECTIONS) as spool:
        assert numbers_of(spool) == list(range(100))


def numbers_of(spool: Spool) -> list[int]:
    return [decode_projection(message.value).turn for message in spool.head(10_000)]


# A collecting process that is killed

COLLECT = """
import sys; sys.path[:0] = ["tests", "."]
import time
from pathlib import Path
import test_spool as t
from collectors.publish import QueuePublisher
from monitor.stream.log import EmbeddedLog
from monitor.telemetry import configure_logging

configure_logging()
log, spool, first, count, how = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
log = {"away": t.Away, "hangs": lambda: t.Hanging(takes=True), "there": lambda: EmbeddedLog(log)}[how]()
publisher = QueuePublisher(log, size=200, when_full="spool", spool=spool)
t.publish_through(publisher, first, count, conversations=3)
if how != "there":
    t.wait_until(lambda: t.spooled(publisher) >= count)
print("published", flush=True)
sys.stdin.read()
"""


def collecting(log: Path, directory: Path, first: int, count: int, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COLLECT, str(log), str(directory), str(first), str(count), how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_what_came_during_an_append_that_is_not_answered_survives_kill_9(tmp_path: Path, directory: Path) -> None:
    process = collecting(tmp_path / "log.db", directory, 0, 1000, "hangs")
    assert process.stdout is not None and process.stdout.readline() == "published\n"
    process.kill()
    process.wait(20)
    with opened(directory / PROJECTIONS) as spool:
        assert numbers_of(spool) == list(range(1000))


def test_a_full_spool_survives_kill_9_at_any_moment_of_sending_it(tmp_path: Path, directory: Path) -> None:
    process = collecting(tmp_path / "log.db", directory, 0, 4000, "away")
    assert process.stdout is not None and process.stdout.readline() == "published\n"
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    # The log is back. Collectors come and are killed while they send what the first one left.
    log = EmbeddedLog(tmp_path / "log.db")
    chance = random.Random(5)
    for goal in (1, 900, 2100):
        process = collecting(tmp_path / "log.db", directory, 0, 0, "there")
        wait_until(lambda goal=goal: log.span(PROJECTIONS, 0).end >= goal, 60)  # type: ignore[misc]
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.wait(20)
    with spooling(log, directory) as publisher:
        publish_all(publisher, 4000, 100, conversations=3)
        assert publisher.flush(timeout=60)
        assert publisher.dropped == 0
    arrived = [decode_projection(record.value).id for record in log.read(PROJECTIONS, 0, 0, 100_000)]
    assert once(arrived) == [f"c{turn % 3}#{turn}" for turn in range(4100)]
    assert len(arrived) <= 4100 + 3 * 500  # what comes twice is one batch a kill
    log.close()


# A real broker that is killed, or hangs


def test_a_broker_that_is_killed_gets_everything_when_it_is_back(own_kafka: Server, directory: Path) -> None:
    topic = fresh("spool")
    url = f"kafka://{own_kafka.address}"
    options = KafkaOptions(append_seconds=3.0)
    make_topic(url, options, topic)
    log = open_log(url, options)
    publisher = QueuePublisher(log, size=400, when_full="spool", topic=topic, spool=directory)
    try:
        publish_all(publisher, 0, 300, conversations=4)
        assert publisher.flush(timeout=60)
        own_kafka.kill()
        publish_all(publisher, 300, 2000, conversations=4)  # five times what memory holds
        wait_until(lambda: spooled(publisher) >= 1600, 60)
        own_kafka.start()
        make_topic(url, options, topic)  # tansu has forgotten it
        publish_all(publisher, 2300, 100, conversations=4)
        assert publisher.flush(timeout=120)
        assert publisher.dropped == 0
        arrived = arrivals(log, topic)
        for conversation in range(4):
            sent = [f"c{conversation}#{turn}" for turn in range(2400) if turn % 4 == conversation]
            # What the broker acknowledged before it was killed is its to keep: neither of the two keeps all of it.
            unacknowledged = [name for name in sent if int(name.partition("#")[2]) >= 300]
            assert [name for name in once(arrived[conversation]) if name in set(unacknowledged)] == unacknowledged
    finally:
        publisher.close(timeout=5)
        log.close()


def test_a_broker_that_hangs_costs_nothing_however_long(own_kafka: Server, directory: Path) -> None:
    topic = fresh("spool")
    url = f"kafka://{own_kafka.address}"
    options = KafkaOptions(append_seconds=300.0)  # one append is unanswered all the while
    make_topic(url, options, topic)
    log = open_log(url, options)
    publisher = QueuePublisher(log, size=50, when_full="spool", topic=topic, spool=directory)
    try:
        publish_all(publisher, 0, 100, conversations=4)
        assert publisher.flush(timeout=60)
        own_kafka.freeze()
        publish_through(publisher, 100, 1500, conversations=4)
        own_kafka.thaw()
        publish_through(publisher, 1600, 100, conversations=4)
        assert publisher.flush(timeout=120)
        assert publisher.dropped == 0
        arrived = arrivals(log, topic)
        for conversation in range(4):
            sent = [f"c{conversation}#{turn}" for turn in range(1700) if turn % 4 == conversation]
            assert once(arrived[conversation]) == sent
    finally:
        publisher.close(timeout=5)
        log.close()


def arrivals(log: Log, topic: str) -> dict[int, list[str]]:
    """What is in the log, in its order, of each of four conversations."""
    arrived: dict[int, list[str]] = {}
    for partition in range(log.partitions(topic)):
        span = log.span(topic, partition)
        for record in log.read(topic, partition, span.begin, span.end - span.begin):
            event = decode_projection(record.value)
            arrived.setdefault(event.turn % 4, []).append(event.id)
            assert dict(record.headers)["ce_id"] == event.id.encode()
    return arrived


def make_topic(url: str, options: KafkaOptions, topic: str) -> None:
    topics = open_topics(url, options)
    assert topics is not None
    try:
        if topic not in topics.states([topic]):
            topics.create([TopicSpec(name=topic, partitions=3, replication=1, config={})])
    finally:
        topics.close()


# By settings


def test_the_settings_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path, when_full="spool", spool_max_bytes=MIB)
    log = Away()
    with open_publisher(log, settings) as publisher:  # type: ignore[arg-type]
        publish_all(publisher, 0, 10)
        wait_until(lambda: spooled(publisher) == 10)
        assert (tmp_path / "spool" / PROJECTIONS / FILE).exists()
        log.up = True
    assert log.turns == list(range(10))
    with open_publisher(log, Settings(data_dir=tmp_path / "other")) as publisher:  # type: ignore[arg-type]
        assert publisher._resending is None
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigurationError, match="go together"):
        QueuePublisher(log, when_full="spool")  # type: ignore[arg-type]


def test_messages_are_cloudevents() -> None:
    event = projection("c", 3)
    message = message_of(event)
    assert message.key == "c" and decode_projection(message.value) == event
    assert dict(message.headers) == {
        "content-type": b"application/json",
        "ce_specversion": b"1.0",
        "ce_type": b"anchorwatch.projection.v1",
        "ce_source": b"/test",
        "ce_id": b"c#3",
        "ce_time": event.time.encode(),
    }
