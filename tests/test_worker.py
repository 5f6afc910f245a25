"""Promises of the worker: nothing lost and nothing twice, whoever is killed; poison never stops the line."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import service
from service import CONFIG, POISON, Oracle, message, projection, traffic

from monitor import telemetry
from monitor.detect.conversation import ConversationState, Step, step
from monitor.errors import LogError, LogUnavailable, StoreError, StoreUnavailable
from monitor.events import Projection
from monitor.store.sqlite import SqliteStore
from monitor.store.store import Commit
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, EmbeddedLog, Message, Record
from monitor.worker import IDLE_SECONDS, Worker, run_workers

ROOT = Path(__file__).parent.parent


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    opened = EmbeddedLog(tmp_path / "log.db")
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.db", busy_seconds=0.05)
    yield opened
    opened.close()


def drain(worker: Worker) -> None:
    while worker.run_once():
        pass


def dead_letters(log: EmbeddedLog) -> list[Record]:
    begin, end, _ = log.span(DEAD_LETTERS, 0)
    return log.read(DEAD_LETTERS, 0, begin, end - begin)


def metric(name: str, **labels: str) -> float:
    return telemetry.REGISTRY.get_sample_value(name, labels) or 0.0


def assert_same(log: EmbeddedLog, store: SqliteStore) -> Oracle:
    """Everything in the store and the dead letters is what the pure fold makes of the log."""
    oracle = Oracle(log)
    found = [finding.id for finding in store.findings(1_000_000)][::-1]
    assert len(found) == len(set(found))
    assert store.findings(1_000_000)[::-1] == oracle.findings
    assert [waiting.finding for waiting in store.pending(1_000_000)] == oracle.findings
    assert store.load(list(oracle.states)) == oracle.encoded_states()
    assert store.counts() == dict(sorted(oracle.counts.items()))
    assert [record.key for record in dead_letters(log)] == oracle.dead
    position = store.position(PROJECTIONS, 0)
    assert (position.offset if position else 0) == log.span(PROJECTIONS, 0).end
    return oracle


class Waits(threading.Event):
    """A stop event that does not wait but notes for how long it should have; runs `then` at each wait."""

    def __init__(self, *then: object) -> None:
        super().__init__()
        self.seconds: list[float | None] = []
        self._then = list(then)

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        action = self._then.pop(0) if self._then else self.set
        if callable(action):
            action()
        return self.is_set()


class Patient(threading.Event):
    """A stop event that does not wait, and stops when there is nothing to do."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout == IDLE_SECONDS:
            self.set()
        return self.is_set()


# The fold over the log.


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_what_is_stored_is_the_fold_of_the_log(log: EmbeddedLog, store: SqliteStore, batch_size: int) -> None:
    log.append(PROJECTIONS, traffic(20, 12))
    drain(Worker(log, store, CONFIG, batch_size=batch_size))
    oracle = assert_same(log, store)
    assert oracle.findings and oracle.counts["duplicate"]


def test_batch_size_changes_nothing_that_anybody_reads(log: EmbeddedLog, tmp_path: Path) -> None:
    log.append(PROJECTIONS, traffic(10, 12))
    stores = [SqliteStore(tmp_path / f"{size}.db") for size in (1, 13, 10_000)]
    for store, size in zip(stores, (1, 13, 10_000), strict=True):
        drain(Worker(log, store, CONFIG, batch_size=size))
    first, *others = [
        (store.sessions(100), [store.trajectory(f"c{n}") for n in range(10)], store.findings(1000)) for store in stores
    ]
    assert first[0] and all(other == first for other in others)


def test_run_once_says_how_many_and_then_rests(log: EmbeddedLog, store: SqliteStore) -> None:
    worker = Worker(log, store, CONFIG, batch_size=3)
    assert worker.run_once() == 0
    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(4)])
    assert [worker.run_once() for _ in range(3)] == [3, 1, 0]


def test_an_axis_nobody_calibrated_is_stored_unjudged_and_is_no_poison(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, [message(msgspec.structs.replace(projection("a", 0), axis_id="new axis"))])
    drain(Worker(log, store, CONFIG))
    assert store.counts() == {"unjudged": 1}
    assert dead_letters(log) == []
    session = store.session("a")
    assert session and session.risk is None


# Whoever is killed.


def start(tmp_path: Path, batch_size: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, service.__file__, str(tmp_path / "log.db"), str(tmp_path / "store.db"), str(batch_size)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_killed_at_any_moment_nothing_is_lost_and_nothing_twice(tmp_path: Path, log: EmbeddedLog) -> None:
    chance = random.Random(7)
    messages = traffic(60, 100, poison=0.02, seed=3)
    finished = threading.Event()

    def append() -> None:
        for at in range(0, len(messages), 20):
            log.append(PROJECTIONS, messages[at : at + 20])
            finished.wait(0.005)

    appending = threading.Thread(target=append)
    appending.start()
    mid_way = 0
    for round_number in range(12):
        worker = start(tmp_path, chance.choice([1, 3, 10]))
        if round_number % 4:  # else it is killed while it starts
            assert worker.stdout and worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.1))
        worker.send_signal(signal.SIGKILL)
        worker.communicate(timeout=60)
        position = SqliteStore(tmp_path / "store.db").position(PROJECTIONS, 0)
        mid_way += position is not None and position.offset < log.span(PROJECTIONS, 0).end
    finished.set()
    appending.join()
    assert mid_way >= 5, "the kills must fall into the work for this test to mean anything"
    store = SqliteStore(tmp_path / "store.db")
    drain(Worker(log, store, CONFIG))
    oracle = assert_same(log, store)
    assert len(oracle.dead) > 20 and len(oracle.findings) > 20
    # What people read is the same, too, as if nobody had ever been killed.
    calm = SqliteStore(tmp_path / "calm.db")
    drain(Worker(log, calm, CONFIG, batch_size=77))
    assert store.sessions(1000) == calm.sessions(1000)
    assert [store.trajectory(f"c{n}") for n in range(60)] == [calm.trajectory(f"c{n}") for n in range(60)]


def test_sigterm_finishes_the_batch_at_hand_and_leaves(tmp_path: Path, log: EmbeddedLog) -> None:
    log.append(PROJECTIONS, traffic(40, 50))
    worker = start(tmp_path, 5)
    assert worker.stdout and worker.stdout.readline() == "ready\n"
    worker.send_signal(signal.SIGTERM)
    rest, _ = worker.communicate(timeout=10)
    assert (worker.returncode, rest) == (0, "drained\n")
    store = SqliteStore(tmp_path / "store.db")
    drain(Worker(log, store, CONFIG))
    assert_same(log, store)


def test_a_zombie_is_refused_rereads_and_goes_on(log: EmbeddedLog, store: SqliteStore) -> None:
    messages = traffic(5, 12)
    log.append(PROJECTIONS, messages[:20])
    zombie, heir = Worker(log, store, CONFIG, batch_size=10), Worker(log, store, CONFIG, batch_size=10)
    assert zombie.run_once() == 10
    assert heir.run_once() == 10
    before = (store.counts(), store.findings(1000))
    assert zombie.run_once() == 0
    assert (store.counts(), store.findings(1000)) == before
    log.append(PROJECTIONS, messages[20:])
    drain(zombie)
    assert_same(log, store)


def test_two_workers_on_one_partition_stay_correct(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, traffic(10, 20))
    workers = [Worker(log, store, CONFIG, batch_size=size) for size in (3, 5)]
    chance = random.Random(1)
    for _ in range(400):
        chance.choice(workers).run_once()
    drain(workers[0])
    drain(workers[0])
    assert_same(log, store)


def test_a_deleted_conversation_is_not_written_back_from_memory(log: EmbeddedLog, store: SqliteStore) -> None:
    worker = Worker(log, store, CONFIG)
    log.append(PROJECTIONS, [message(projection("a", turn, -3.0)) for turn in range(5)])
    drain(worker)
    store.forget("a")
    log.append(PROJECTIONS, [message(projection("a", 5))])
    assert worker.run_once() == 0
    drain(worker)
    fresh = step(None, projection("a", 5), CONFIG).state
    assert store.load(["a"]) == {"a": msgspec.json.encode(fresh)}
    assert len(store.trajectory("a")) == 1


# Poison.


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_some_poison_never_stops_the_line(log: EmbeddedLog, store: SqliteStore, share: float) -> None:
    log.append(PROJECTIONS, traffic(30, 30, poison=share))
    worker = Worker(log, store, CONFIG, batch_size=50)
    drain(worker)
    assert worker.paused is None
    assert assert_same(log, store).dead


def test_a_dead_letter_keeps_the_bytes_the_place_and_the_reason(log: EmbeddedLog, store: SqliteStore) -> None:
    lacks = Projection(**{**msgspec.structs.asdict(projection("b", 0)), "coordinates": {}})
    log.append(PROJECTIONS, [message(projection("a", 0)), Message("k", b"\xff\x00"), message(lacks)])
    log.append(PROJECTIONS, [Message("a", message(projection("b", 1)).value)])
    drain(Worker(log, store, CONFIG))
    letters = dead_letters(log)
    assert [letter.key for letter in letters] == [f"{PROJECTIONS}/0/{offset}" for offset in (1, 2, 3)]
    assert letters[0].value == b"\xff\x00"
    assert [dict(letter.headers)["reason"] for letter in letters] == [b"undecodable", b"unusable", b"wrong_key"]
    assert dict(letters[0].headers)["key"] == b"k"
    assert store.counts() == {"dead_letter": 3, "folded": 1}


def test_an_exception_of_the_fold_is_poison_and_leaves_the_state_alone(log: EmbeddedLog, store: SqliteStore) -> None:
    def fragile(state: ConversationState | None, event: Projection, config: object) -> Step:
        if event.turn == 1:
            raise ZeroDivisionError("a fault of this release")
        return step(state, event, CONFIG)

    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(3)])
    drain(Worker(log, store, CONFIG, fold=fragile))
    assert dict(dead_letters(log)[0].headers)["detail"] == b"ZeroDivisionError: a fault of this release"
    assert [point.turn for point in store.trajectory("a")] == [0, 2]


def test_running_out_of_memory_is_not_the_records_fault(log: EmbeddedLog, store: SqliteStore) -> None:
    def starved(state: ConversationState | None, event: Projection, config: object) -> Step:
        raise MemoryError

    log.append(PROJECTIONS, [message(projection("a", 0))])
    with pytest.raises(MemoryError):
        Worker(log, store, CONFIG, fold=starved).run_once()
    assert dead_letters(log) == []


def test_nothing_but_poison_pauses_the_partition_loudly(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, [Message("k", POISON)] * 300)
    worker = Worker(log, store, CONFIG)
    stop = Waits()
    with pytest.raises(LogError, match="every partition is paused") as caught:
        worker.run(stop)
    assert worker.paused and "20 of the last 20 records" in worker.paused
    assert DEAD_LETTERS in caught.value.cure and not caught.value.retry
    assert len(dead_letters(log)) == 20, "it stops shovelling"
    assert metric("anchorwatch_worker_paused", partition="0", reason="poison") == 1
    assert worker.run_once() == 0
    position = store.position(PROJECTIONS, 0)
    assert position and position.offset == 20, "the rest stays in the log, unread"


def test_good_records_before_the_flood_count(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, [message(projection(f"c{n}", 0)) for n in range(200)])
    log.append(PROJECTIONS, [Message("k", POISON)] * 300)
    worker = Worker(log, store, CONFIG)
    drain(worker)
    assert worker.paused and len(dead_letters(log)) == 101


def test_a_partition_that_is_paused_does_not_stop_the_others(log: EmbeddedLog, tmp_path: Path) -> None:
    log.append("bad", [Message("k", POISON)] * 30)
    log.append("good", [message(projection("a", turn)) for turn in range(3)])
    store = SqliteStore(tmp_path / "store.db")
    bad, good = (Worker(log, store, CONFIG, topic=topic) for topic in ("bad", "good"))
    run_workers([bad, good], Waits())
    assert bad.paused and not good.paused
    assert store.counts() == {"dead_letter": 20, "folded": 3}


def test_poison_buried_before_a_crash_is_not_buried_again(log: EmbeddedLog, store: SqliteStore, tmp_path: Path) -> None:
    """The store fails after the dead letters were written: the moment between the two."""
    log.append(PROJECTIONS, [message(projection("a", 0)), Message("k", POISON), message(projection("a", 1))])
    blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable):
        Worker(log, store, CONFIG).run_once()
    assert len(dead_letters(log)) == 1 and store.position(PROJECTIONS, 0) is None
    blocker.execute("ROLLBACK")
    drain(Worker(log, store, CONFIG))
    assert_same(log, store)


# Faults around it.


def test_while_the_store_is_away_it_waits_longer_and_longer_then_catches_up(
    log: EmbeddedLog, store: SqliteStore, tmp_path: Path
) -> None:
    log.append(PROJECTIONS, traffic(5, 10))
    blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    nothing = [lambda: None] * 4
    stop = Waits(*nothing, lambda: blocker.execute("ROLLBACK"))
    worker = Worker(log, store, CONFIG)
    run_workers([worker], stop, jitter=lambda: 0.0, idle_seconds=7.0)
    assert stop.seconds == [0.05, 0.1, 0.2, 0.4, 0.8, 7.0]
    assert metric("anchorwatch_worker_paused", partition="0", reason="unavailable") == 0
    assert_same(log, store)


class LosesAnswers(SqliteStore):
    """A store whose every other commit is written, but never answered."""

    answers = True

    def commit(self, batch: Commit) -> None:
        super().commit(batch)
        self.answers = not self.answers
        if not self.answers:
            raise StoreUnavailable("the connection broke", cure="wait")


def test_commits_that_were_written_but_not_answered_count_once(log: EmbeddedLog, tmp_path: Path) -> None:
    log.append(PROJECTIONS, traffic(10, 12, poison=0.05))
    store = LosesAnswers(tmp_path / "store.db")
    run_workers([Worker(log, store, CONFIG, batch_size=20)], Patient())
    assert_same(log, store)


def test_when_the_dead_letters_can_not_be_written_the_position_does_not_move(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.db", max_bytes=96 * 1024)
    store = SqliteStore(tmp_path / "store.db")
    log.append(PROJECTIONS, [message(projection("a", 0)), Message("k", b"{" + b"x" * 20_000)])
    with pytest.raises(LogUnavailable):
        for _ in range(1000):
            log.append("filler", [Message("k", b"x" * 1000)])
    with pytest.raises(LogUnavailable, match="is full"):
        Worker(log, store, CONFIG).run_once()
    assert store.position(PROJECTIONS, 0) is None
    log.close()
    roomy = EmbeddedLog(tmp_path / "log.db")
    drain(Worker(roomy, store, CONFIG))
    assert_same(roomy, store)


def test_a_full_store_disk_loses_nothing(tmp_path: Path, log: EmbeddedLog) -> None:
    log.append(PROJECTIONS, traffic(40, 40))
    small = SqliteStore(tmp_path / "store.db", max_bytes=300 * 1024)
    worker = Worker(log, small, CONFIG, batch_size=20)
    with pytest.raises(StoreUnavailable, match="is full"):
        drain(worker)
    position = small.position(PROJECTIONS, 0)
    assert position and 0 < position.offset < log.span(PROJECTIONS, 0).end
    small.close()
    roomy = SqliteStore(tmp_path / "store.db")
    drain(Worker(log, roomy, CONFIG))
    assert_same(log, roomy)


def test_a_wiped_store_is_rebuilt_with_the_same_ids(log: EmbeddedLog, tmp_path: Path) -> None:
    log.append(PROJECTIONS, traffic(10, 15))
    before, after = (SqliteStore(tmp_path / name) for name in ("before.db", "after.db"))
    drain(Worker(log, before, CONFIG))
    drain(Worker(log, after, CONFIG, batch_size=11))
    assert before.findings(1000) == after.findings(1000)
    assert before.sessions(1000) == after.sessions(1000)


def test_a_position_that_retention_overtook_is_a_loud_stop(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, traffic(5, 10))
    Worker(log, store, CONFIG, batch_size=5).run_once()
    log.retain(PROJECTIONS, records=3)
    with pytest.raises(LogError, match="outside the log") as caught:
        Worker(log, store, CONFIG).run(Waits())
    assert "move the store aside" in caught.value.cure


def test_a_log_begun_anew_under_an_old_store_is_a_loud_stop(tmp_path: Path, store: SqliteStore) -> None:
    for directory, turns in (("old", 5), ("new", 9)):
        log = EmbeddedLog(tmp_path / directory / "log.db")
        log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(turns)])
        if directory == "old":
            drain(Worker(log, store, CONFIG))
    with pytest.raises(StoreError, match="another log"):
        Worker(log, store, CONFIG).run(Waits())


def test_a_state_that_can_not_be_read_is_a_loud_stop_not_poison(
    log: EmbeddedLog, store: SqliteStore, tmp_path: Path
) -> None:
    log.append(PROJECTIONS, [message(projection("a", 0))])
    drain(Worker(log, store, CONFIG))
    connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    connection.execute("UPDATE states SET state = ?", (b'["from", "the", "future"]',))
    log.append(PROJECTIONS, [message(projection("a", 1))])
    with pytest.raises(StoreError, match="can't be read"):
        Worker(log, store, CONFIG).run_once()
    assert dead_letters(log) == []


# Who listens.


def test_listeners_hear_of_every_response_after_its_commit(log: EmbeddedLog, store: SqliteStore) -> None:
    heard: list[tuple[str, str]] = []

    def listen(event: Projection, done: Step) -> None:
        assert store.session(event.conversation_id), "not committed yet"
        heard.append((event.id, done.outcome))

    log.append(PROJECTIONS, [message(projection("a", 0)), Message("k", POISON), message(projection("a", 0))])
    drain(Worker(log, store, CONFIG, on_step=listen))
    assert heard == [("a#0", "folded"), ("a#0", "duplicate")]


def test_a_listener_that_fails_harms_nobody(log: EmbeddedLog, store: SqliteStore) -> None:
    def broken(event: Projection, done: Step) -> None:
        raise OSError("the terminal is gone")

    before = metric("anchorwatch_listener_errors_total")
    log.append(PROJECTIONS, traffic(3, 3))
    drain(Worker(log, store, CONFIG, on_step=broken))
    assert_same(log, store)
    assert metric("anchorwatch_listener_errors_total") > before


def test_metrics_count_what_was_committed(log: EmbeddedLog, store: SqliteStore) -> None:
    before = metric("anchorwatch_responses_total", outcome="folded")
    dead = metric("anchorwatch_dead_letters_total", reason="undecodable")
    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(4)] + [Message("k", POISON)])
    worker = Worker(log, store, CONFIG, batch_size=3)
    worker.run_once()
    assert metric("anchorwatch_lag_records", partition="0") == 2
    drain(worker)
    assert metric("anchorwatch_lag_records", partition="0") == 0
    assert metric("anchorwatch_responses_total", outcome="folded") == before + 4
    assert metric("anchorwatch_dead_letters_total", reason="undecodable") == dead + 1
