"""Promises of the worker: nothing lost and nothing twice, whoever is killed; poison never stops the line."""

from __future__ import annotations

import hashlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import service
from msgspec.structs import replace
from service import CONFIG, POISON, Oracle, message, projection, traffic

from monitor import telemetry
from monitor.actions import first_calibrations
from monitor.control import calibration_message
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, encode_state, step
from monitor.errors import LogError, LogUnavailable, StoreError, StoreUnavailable
from monitor.events import Projection, encode
from monitor.placement import partition_of
from monitor.replay import replay
from monitor.store.sqlite import SqliteStore
from monitor.store.store import Commit, Position
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, Batch, EmbeddedLog, Message, Record, Span
from monitor.worker import Worker

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
    """One of each key: a crash may write a letter twice, and its key says that it is the same."""
    begin, end, _ = log.span(DEAD_LETTERS, 0)
    return list({record.key: record for record in log.read(DEAD_LETTERS, 0, begin, end - begin)}.values())


def metric(name: str, **labels: str) -> float:
    return telemetry.REGISTRY.get_sample_value(name, labels) or 0.0


def assert_same(log: EmbeddedLog, store: SqliteStore) -> Oracle:
    """Everything in the store and the dead letters is what the pure fold makes of the log."""
    oracle = Oracle(log)
    by_id = sorted(oracle.findings, key=lambda one: one.id)
    assert store.findings(1_000_000) == sorted(by_id, key=lambda one: one.time, reverse=True)
    assert [waiting.finding for waiting in store.pending(1_000_000)] == oracle.findings
    assert store.load(PROJECTIONS, 0, list(oracle.states)) == oracle.encoded_states()
    assert store.counts() == dict(sorted(oracle.counts.items()))
    assert sorted(record.key for record in dead_letters(log)) == sorted(oracle.dead)
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


def until_idle(worker: Worker, *then: object) -> Waits:
    """Run until nothing is new; returns how long it waited in between, without having waited."""
    waits = Waits(*then, *[lambda: None] * 1000)
    worker._subscription._wait = lambda seconds: waits.set()  # type: ignore[attr-defined]
    worker.run(waits, jitter=lambda: 0.0)
    return waits


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
    assert store.load(PROJECTIONS, 0, ["a"]) == {"a": encode_state(fresh)}
    assert len(store.trajectory("a")) == 1


# Poison.


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_some_poison_never_stops_the_line(log: EmbeddedLog, store: SqliteStore, share: float) -> None:
    log.append(PROJECTIONS, traffic(30, 30, poison=share))
    worker = Worker(log, store, CONFIG, batch_size=50)
    drain(worker)
    assert not worker.paused
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


def test_a_dead_letter_fits_where_the_record_did_and_says_what_it_was(log: EmbeddedLog, store: SqliteStore) -> None:
    huge = b"{" + bytes(1024 * 1024 - 100)
    log.append(PROJECTIONS, [Message("k" * 5000, huge), message(projection("a", 0))])
    drain(Worker(log, store, CONFIG))
    (letter,) = dead_letters(log)
    headers = dict(letter.headers)
    assert huge.startswith(letter.value) and len(letter.value) + len(headers["key"]) < 1024 * 1024 - 4096
    assert headers["length"] == b"%d" % len(huge)
    assert headers["sha256"] == hashlib.sha256(huge).hexdigest().encode()
    assert store.counts() == {"dead_letter": 1, "folded": 1}


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
    assert "20 of the last 20 records" in worker.paused[0]
    assert DEAD_LETTERS in caught.value.cure and not caught.value.retry
    assert len(dead_letters(log)) == 20, "it stops shovelling"
    assert metric("anchorwatch_worker_paused", partition="0") == 1
    assert worker.run_once() == 0
    position = store.position(PROJECTIONS, 0)
    assert position and position.offset == 20, "the rest stays in the log, unread"


def test_good_records_before_the_flood_count(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, [message(projection(f"c{n}", 0)) for n in range(200)])
    log.append(PROJECTIONS, [Message("k", POISON)] * 300)
    worker = Worker(log, store, CONFIG)
    drain(worker)
    assert worker.paused and len(dead_letters(log)) == 101


def test_poison_buried_before_a_crash_is_not_buried_again(log: EmbeddedLog, store: SqliteStore, tmp_path: Path) -> None:
    """The store fails after the dead letters were written: the moment between the two."""
    worker = Worker(log, store, CONFIG)
    worker.run_once()
    log.append(PROJECTIONS, [message(projection("a", 0)), Message("k", POISON), message(projection("a", 1))])
    blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable):
        worker.run_once()
    assert len(dead_letters(log)) == 1 and store.position(PROJECTIONS, 0) == Position(0)
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
    worker = Worker(log, store, CONFIG)
    waits = until_idle(worker, *[lambda: None] * 4, lambda: blocker.execute("ROLLBACK"))
    assert waits.seconds == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert metric("anchorwatch_worker_waiting") == 0
    assert metric("anchorwatch_lag_records", partition="0") == 0


def test_the_lag_grows_while_the_store_is_away(log: EmbeddedLog, store: SqliteStore, tmp_path: Path) -> None:
    worker = Worker(log, store, CONFIG)
    log.append(PROJECTIONS, [message(projection("a", 0))])
    drain(worker)
    blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(1, 8)])
    seen: list[float] = []
    waits = Waits(lambda: seen.append(metric("anchorwatch_lag_records", partition="0")))
    worker.run(waits, jitter=lambda: 0.0)
    blocker.execute("ROLLBACK")
    assert (seen, metric("anchorwatch_worker_waiting")) == ([7.0], 1)
    drain(worker)
    assert metric("anchorwatch_lag_records", partition="0") == 0
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
    until_idle(Worker(log, store, CONFIG, batch_size=20))
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
    assert store.position(PROJECTIONS, 0) == Position(0)
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


def test_who_was_there_before_the_first_record_knows_the_log_again(
    log: EmbeddedLog, store: SqliteStore, tmp_path: Path
) -> None:
    worker = Worker(log, store, CONFIG)
    worker.run_once()
    log.append(PROJECTIONS, [message(projection("a", 0))])
    drain(worker)
    other = EmbeddedLog(tmp_path / "other.db")
    other.append(PROJECTIONS, [message(projection("a", 0))])
    with pytest.raises(StoreError, match="another log"):
        Worker(other, store, CONFIG).run_once()
    other.close()


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
    before = metric("anchorwatch_responses_total", deployment="shop", outcome="folded")
    dead = metric("anchorwatch_dead_letters_total", reason="undecodable")
    log.append(PROJECTIONS, [message(projection("a", turn)) for turn in range(4)] + [Message("k", POISON)])
    worker = Worker(log, store, CONFIG, batch_size=3)
    worker.run_once()
    assert metric("anchorwatch_lag_records", partition="0") == 2
    drain(worker)
    assert metric("anchorwatch_lag_records", partition="0") == 0
    assert metric("anchorwatch_responses_total", deployment="shop", outcome="folded") == before + 4
    assert metric("anchorwatch_dead_letters_total", reason="undecodable") == dead + 1


def test_drift_after_a_conversation_was_deleted_is_news(log: EmbeddedLog, store: SqliteStore) -> None:
    """Who has been told of one episode must be told of the next, though nothing is left of the first."""
    worker = Worker(log, store, CONFIG)
    log.append(PROJECTIONS, [message(projection("a", 0, -9.0))])
    drain(worker)
    (before,) = store.findings(10)
    store.forget("a")
    log.append(PROJECTIONS, [message(projection("a", 0, -9.0, resent="another response"))])
    drain(worker)
    drain(worker)
    (after,) = store.findings(10)
    assert (before.kind, before.turn) == (after.kind, after.turn)
    assert before.id != after.id and before.episode_id != after.episode_id


# Which calibration judges.

OTHER = replace(CONFIG, boundaries=replace(CONFIG.boundaries, level=0.5))


def judged_by(store: SqliteStore) -> set[str]:
    return {finding.config_id for finding in store.findings(1_000_000)}


def test_a_calibration_takes_effect_at_its_own_place_in_the_log_whatever_the_batches(
    log: EmbeddedLog, tmp_path: Path
) -> None:
    log.append(PROJECTIONS, [message(projection("a", 0, -3.0)), message(projection("b", 0, -1.0))])
    log.append(PROJECTIONS, [calibration_message(OTHER, 0)])
    log.append(PROJECTIONS, [message(projection("c", 0, -1.0))])
    found = []
    for size in (1, 2, 3, 100):
        store = SqliteStore(tmp_path / f"{size}.db")
        drain(Worker(log, store, CONFIG, batch_size=size))
        found.append(store.findings(100))
        assert {finding.conversation_id: finding.config_id for finding in found[-1]} == {
            "a": CONFIG.config_id,
            "c": OTHER.config_id,
        }
    assert found[1:] == found[:-1]


def test_what_is_in_force_outlives_the_worker_and_its_arguments(log: EmbeddedLog, store: SqliteStore) -> None:
    log.append(PROJECTIONS, [message(projection("a", 0))])
    drain(Worker(log, store, CONFIG))
    log.append(PROJECTIONS, [message(projection("b", 0, -1.0))])
    drain(Worker(log, store, OTHER))
    assert judged_by(store) == set(), "OTHER would have warned"
    log.append(PROJECTIONS, [calibration_message(OTHER, 0)])
    drain(Worker(log, store, CONFIG))
    log.append(PROJECTIONS, [message(projection("c", 0, -1.0))])
    drain(Worker(log, store, CONFIG))
    assert judged_by(store) == {OTHER.config_id}


def test_a_wiped_store_asks_what_operators_had_put_into_force(log: EmbeddedLog, store: SqliteStore) -> None:
    """The control record itself is gone with the log's head."""
    log.append(PROJECTIONS, [calibration_message(OTHER, 0)] + [message(projection("a", turn, -1.0)) for turn in (0, 1)])
    log.retain(PROJECTIONS, records=2)
    asked: list[tuple[int, int]] = []

    def recorded(partition: int, offset: int) -> DetectorConfig:
        asked.append((partition, offset))
        return OTHER

    drain(Worker(log, store, CONFIG, recorded=recorded))
    assert asked == [(0, 1)]
    assert judged_by(store) == {OTHER.config_id}


def test_what_the_first_worker_was_given_judges_again_when_the_store_is_rebuilt(
    log: EmbeddedLog, tmp_path: Path
) -> None:
    log.append(PROJECTIONS, [message(projection("a", 0, -1.0)), message(projection("b", 0, -3.0))])
    before, after = SqliteStore(tmp_path / "before.db"), SqliteStore(tmp_path / "after.db")
    drain(Worker(log, before, OTHER, recorded=first_calibrations(log, OTHER, by="test")))
    drain(Worker(log, after, CONFIG, recorded=first_calibrations(log, CONFIG, by="test")))
    assert judged_by(before) == {OTHER.config_id}
    assert after.findings(100) == before.findings(100)


def test_a_replay_prints_what_the_worker_found_byte_for_byte(log: EmbeddedLog, store: SqliteStore) -> None:
    messages = traffic(12, 14, poison=0.05)
    log.append(PROJECTIONS, messages[:90])
    log.append(PROJECTIONS, [calibration_message(OTHER, 0)])
    log.append(PROJECTIONS, messages[90:])
    drain(Worker(log, store, CONFIG, batch_size=17))
    letters = log.span(DEAD_LETTERS, 0).end
    parts = list(replay(log, CONFIG))
    replayed = {finding.id: encode(finding) for part in parts for finding in part.findings}
    assert len(judged_by(store)) == 2
    assert replayed == {finding.id: encode(finding) for finding in store.findings(1_000_000)}
    assert sum(sum(part.dead.values()) for part in parts) == store.counts()["dead_letter"]
    assert log.span(DEAD_LETTERS, 0).end == letters, "a replay writes nothing"


# Partitions, as Kafka gives and takes them.


class Shares:
    """A subscription whose partitions a test gives and takes; a log of one partition stands for each."""

    def __init__(self, logs: dict[int, EmbeddedLog], owned: set[int]) -> None:
        self.logs = logs
        self.owned = owned
        self.next_owned: set[int] | None = None
        self.at: dict[int, int] = {}
        self.polls = 0

    def assigned(self) -> frozenset[int]:
        return frozenset(self.owned)

    def seek(self, partition: int, offset: int) -> None:
        assert partition in self.owned, "a worker must not touch what is not its own"
        self.at[partition] = offset

    def rest(self, partition: int) -> None:
        self.at.pop(partition, None)

    def poll(self, limit: int, timeout: float) -> list[Batch]:
        self.polls += 1
        if self.next_owned is not None:
            self.owned, self.next_owned = self.next_owned, None
            self.at = {partition: at for partition, at in self.at.items() if partition in self.owned}
        batches = []
        for partition, at in sorted(self.at.items()):
            records = self.logs[partition].read(PROJECTIONS, 0, at, limit)
            if records:
                self.at[partition] = records[-1].offset + 1
                moved = [msgspec.structs.replace(record, partition=partition) for record in records]
                batches.append(Batch(partition, moved, self.logs[partition].span(PROJECTIONS, 0).end))
        return batches

    def close(self) -> None:
        self.owned = set()


class Partitioned:
    """The log of those two."""

    def __init__(self, logs: dict[int, EmbeddedLog], letters: EmbeddedLog) -> None:
        self.logs = logs
        self.letters = letters
        self.count = len(logs)

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        if topic == PROJECTIONS:
            return [offset for one in messages for offset in self.logs[partition_of(one.key, 2)].append(topic, [one])]
        return self.letters.append(topic, messages)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        return self.logs[partition].read(topic, 0, offset, limit)

    def span(self, topic: str, partition: int) -> Span:
        return self.logs[partition].span(topic, 0)._replace(topic_id="one topic")

    def partitions(self, topic: str) -> int:
        return self.count

    def close(self) -> None: ...


@pytest.fixture
def two(tmp_path: Path, log: EmbeddedLog) -> Iterator[Partitioned]:
    logs = {number: EmbeddedLog(tmp_path / f"partition-{number}.db") for number in (0, 1)}
    yield Partitioned(logs, log)
    for one in logs.values():
        one.close()


def test_partitions_change_hands_and_nothing_is_lost_or_twice(two: Partitioned, store: SqliteStore) -> None:
    two.append(PROJECTIONS, traffic(20, 30))
    shares = [Shares(two.logs, {0}), Shares(two.logs, {1})]
    workers = [Worker(two, store, CONFIG, subscription=share, batch_size=7) for share in shares]
    chance = random.Random(3)
    for _ in range(60):
        if chance.random() < 0.3:
            shares[0].next_owned, shares[1].next_owned = set(shares[1].owned), set(shares[0].owned)
        for worker in workers:
            worker.run_once()
    for worker in workers:
        drain(worker)
        drain(worker)
    want: dict[str, bytes] = {}
    found: set[str] = set()
    for number in (0, 1):
        oracle = Oracle(two.logs[number])
        want |= oracle.encoded_states()
        found |= {finding.id for finding in oracle.findings}
    assert store.load(PROJECTIONS, 0, list(want)) == want
    assert {finding.id for finding in store.findings(1_000_000)} == found


def test_a_partition_that_is_paused_does_not_stop_the_others(two: Partitioned, store: SqliteStore) -> None:
    two.logs[0].append(PROJECTIONS, [Message("k", POISON)] * 30)
    two.append(PROJECTIONS, [message(projection(f"c{n}", 0)) for n in range(30)])
    good = two.logs[1].span(PROJECTIONS, 0).end
    worker = Worker(two, store, CONFIG, subscription=Shares(two.logs, {0, 1}))
    for _ in range(5):
        worker.run_once()
    assert set(worker.paused) == {0}
    assert store.counts() == {"dead_letter": 20, "folded": good}


def test_a_record_in_the_wrong_partition_is_set_aside_and_never_splits_a_conversation(
    two: Partitioned, store: SqliteStore
) -> None:
    two.append(PROJECTIONS, [message(projection(f"c{n}", turn)) for turn in range(3) for n in range(20)])
    stray = next(f"c{n}" for n in range(20) if partition_of(f"c{n}", 2) == 0)
    two.logs[1].append(PROJECTIONS, [message(projection(stray, 3, -9.0))])
    drain(Worker(two, store, CONFIG, subscription=Shares(two.logs, {0, 1})))
    assert store.counts() == {"dead_letter": 1, "folded": 60}
    assert dict(dead_letters(two.letters)[0].headers)["reason"] == b"wrong_partition"
    session = store.session(stray)
    assert session and session.turn == 2 and session.risk is not None and session.risk < 1


def test_a_topic_with_more_partitions_than_the_store_knows_is_a_loud_stop(two: Partitioned, store: SqliteStore) -> None:
    two.append(PROJECTIONS, traffic(4, 4))
    share = Shares(two.logs, {0, 1})
    worker = Worker(two, store, CONFIG, subscription=share)
    drain(worker)
    two.count = 3
    share.next_owned = {0}
    two.append(PROJECTIONS, [message(projection(f"c{n}", 9)) for n in range(9)])
    with pytest.raises(StoreError, match="partitions"):
        for _ in range(3):
            worker.run_once()


def test_while_the_store_is_away_it_goes_on_polling_to_stay_in_its_group(
    two: Partitioned, store: SqliteStore, tmp_path: Path
) -> None:
    two.append(PROJECTIONS, traffic(4, 4))
    share = Shares(two.logs, {0, 1})
    worker = Worker(two, store, CONFIG, subscription=share, batch_size=5)
    worker.run_once()
    blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            worker.run_once()
    assert share.polls == 5
    blocker.execute("ROLLBACK")
    drain(worker)
    assert sum(store.counts().values()) == sum(one.span(PROJECTIONS, 0).end for one in two.logs.values())
