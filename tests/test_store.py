"""Promises of a store, held against every backend; then those of the embedded one, with its file broken for real."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service import CONFIG, projection

from monitor.batch import Folded, to_commit
from monitor.database import sqlite_url
from monitor.detect.conversation import ConversationState, step
from monitor.errors import CommitRefused, ConfigurationError, StoreError, StoreUnavailable
from monitor.events import Finding, Projection
from monitor.store import open_store
from monitor.store.sqlite import SqliteStore
from monitor.store.store import Commit, Outbox, Position, Reader, Store
from monitor.stream.log import EmbeddedLog

TOPIC = "anchorwatch.test"
LOG = "id of the log"


class Backend(Store, Reader, Outbox, Protocol):
    """All three seams."""


BACKENDS: dict[str, Callable[[Path], Backend]] = {
    "sqlite": lambda directory: SqliteStore(directory / "store.db", trajectory_points=5)
}


@pytest.fixture(params=sorted(BACKENDS))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    opened = BACKENDS[request.param](tmp_path)
    yield opened
    opened.close()


def folded(events: list[Projection], states: dict[str, ConversationState], offset: int) -> Folded:
    """The events through the real fold; `states` goes on with them."""
    steps = []
    for event in events:
        done = step(states.get(event.conversation_id), event, CONFIG)
        states[event.conversation_id] = done.state
        steps.append((event, done))
    touched = {event.conversation_id: states[event.conversation_id] for event in events}
    return Folded(offset, steps, [], touched, ())


class Writer:
    """A worker's view of the store: what it knows, and where it stands."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.states: dict[str, ConversationState] = {}

    def commit(self, *events: Projection) -> Commit:
        expected = self.store.position(TOPIC, 0)
        offset = (expected.offset if expected else 0) + len(events)
        batch = to_commit(
            folded(list(events), self.states, offset), topic=TOPIC, partition=0, topic_id=LOG, expected=expected
        )
        self.store.commit(batch)
        return batch


def drifting(conversation: str, turns: int = 6) -> list[Projection]:
    return [projection(conversation, turn, -0.9 * turn) for turn in range(turns)]


def everything(store: Backend) -> tuple[object, ...]:
    sessions = store.sessions(1000)
    return (
        store.position(TOPIC, 0),
        store.counts(),
        sessions,
        [store.trajectory(s.conversation_id) for s in sessions],
        store.findings(1000),
        store.pending(1000),
        store.load([s.conversation_id for s in sessions]),
    )


# Every backend.


def test_a_new_store_knows_nothing(store: Backend) -> None:
    assert store.position(TOPIC, 0) is None
    assert store.load(["a"]) == {}
    assert store.load([]) == {}
    assert store.session("a") is None
    assert store.trajectory("a") == []
    assert everything(store)[1:] == ({}, [], [], [], [], {})


def test_a_commit_writes_state_session_points_findings_outbox_and_position(store: Backend) -> None:
    batch = Writer(store).commit(*drifting("a", 5), projection("b", 0, 0.4))
    assert batch.findings, "the traffic must drift for this test to mean anything"
    assert store.position(TOPIC, 0) == Position(6, 0)
    assert store.load(["a", "b", "nobody"]) == batch.states
    assert store.counts() == {"folded": 6}
    assert store.findings(10) == batch.findings[::-1]
    assert [p.finding for p in store.pending(10)] == batch.findings
    assert [s.conversation_id for s in store.sessions(10)] == ["a", "b"]
    assert [p.turn for p in store.trajectory("a")] == [0, 1, 2, 3, 4]
    a = store.session("a")
    assert a and a == batch.sessions[0]
    assert (a.responses, a.turn, a.episode_id, a.severity) == (
        5,
        4,
        batch.findings[-1].episode_id,
        batch.findings[-1].severity,
    )


def test_a_commit_from_a_stale_position_is_refused_and_writes_nothing(store: Backend) -> None:
    writer = Writer(store)
    stale = writer.commit(*drifting("a"))
    before = everything(store)
    with pytest.raises(CommitRefused) as caught:
        store.commit(stale)
    assert caught.value.retry and "reads the position again" in caught.value.cure
    assert everything(store) == before


def test_a_commit_from_a_position_that_nobody_reached_is_refused(store: Backend) -> None:
    batch = to_commit(folded(drifting("a"), {}, 6), topic=TOPIC, partition=0, topic_id=LOG, expected=Position(12, 0))
    with pytest.raises(CommitRefused):
        store.commit(batch)
    assert store.position(TOPIC, 0) is None


def test_partitions_have_their_own_positions(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0))
    assert store.position(TOPIC, 1) is None
    assert store.position("other", 0) is None


def test_a_store_folded_from_another_log_is_a_loud_stop(store: Backend) -> None:
    Writer(store).commit(projection("a", 0))
    before = everything(store)
    batch = to_commit(
        folded([projection("a", 1)], {}, 2),
        topic=TOPIC,
        partition=0,
        topic_id="another",
        expected=store.position(TOPIC, 0),
    )
    with pytest.raises(StoreError, match="another log") as caught:
        store.commit(batch)
    assert not caught.value.retry and "move the store aside" in caught.value.cure
    assert everything(store) == before


def test_a_finding_that_is_stored_already_is_neither_stored_nor_sent_again(store: Backend) -> None:
    """As when a position is set back by hand: ids are the last line against a second page."""
    writer = Writer(store)
    first = writer.commit(*drifting("a"))
    store.settle([p.sequence for p in store.pending(10)])
    writer.states.clear()
    again = writer.commit(*drifting("a"))
    assert again.findings == first.findings
    assert store.findings(10) == first.findings[::-1]
    assert store.pending(10) == []


def test_the_outbox_gives_until_it_is_settled(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*drifting("a"))
    writer.commit(*drifting("b"))
    waiting = store.pending(10)
    assert len(waiting) >= 2
    assert store.pending(1) == waiting[:1]
    store.settle([waiting[0].sequence, 10**9])
    assert store.pending(10) == waiting[1:]
    store.settle([])
    store.settle([p.sequence for p in waiting])
    assert store.pending(10) == []
    assert len(store.findings(10)) == len(waiting), "settling forgets no finding"


def test_sessions_come_riskiest_first_and_unjudged_ones_last(store: Backend) -> None:
    writer = Writer(store)
    for name, value in (("calm", 0.5), ("worst", -3.0), ("odd", -1.0)):
        writer.commit(projection(name, 0, value))
    writer.commit(projection("pirate", 0, -9.0, deployment="pirates"))
    names = [s.conversation_id for s in store.sessions(10)]
    assert names == ["worst", "odd", "calm", "pirate"]
    assert [s.conversation_id for s in store.sessions(2, offset=1)] == names[1:3]
    assert [s.conversation_id for s in store.sessions(10, deployment="pirates")] == ["pirate"]
    assert store.sessions(10, deployment="nobody") == []
    pirate = store.session("pirate")
    assert pirate and (pirate.outcome, pirate.risk, pirate.z) == ("learning", None, None)


def test_sessions_silent_since_before_a_time_are_left_out(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("old", 0, -3.0), projection("young", 20, 0.0))
    assert [s.conversation_id for s in store.sessions(10, since="2026-01-01T00:10:00Z")] == ["young"]
    assert len(store.sessions(10, since="2026-01-01T00:00:00Z")) == 2


def test_a_risen_conversation_rises_in_the_ranking(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0, -1.0), projection("b", 0, 0.0))
    writer.commit(projection("b", 1, -4.0))
    assert [s.conversation_id for s in store.sessions(10)] == ["b", "a"]
    assert len(store.sessions(10)) == 2


def test_a_trajectory_keeps_the_newest_points(store: Backend) -> None:
    writer = Writer(store)
    for turn in range(4):
        writer.commit(projection("a", turn))
    writer.commit(*(projection("a", turn) for turn in range(4, 9)))
    kept = store.trajectory("a")
    assert [p.turn for p in kept] == [4, 5, 6, 7, 8]
    assert [p.number for p in kept] == [5, 6, 7, 8, 9]
    assert kept[-1].coordinates == {"assistant_axis": 0.0}


def test_a_duplicate_makes_no_point_and_no_session_row(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0))
    writer.commit(projection("a", 0))
    assert len(store.trajectory("a")) == 1
    assert store.counts() == {"folded": 1, "duplicate": 1}


def test_a_deleted_conversation_leaves_nothing_and_others_stay(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*drifting("a"), *drifting("b"))
    b = (store.session("b"), store.trajectory("b"), store.findings(10, conversation_id="b"))
    assert store.findings(10, conversation_id="a")
    assert store.forget("a")
    assert store.load(["a"]) == {}
    assert (store.session("a"), store.trajectory("a"), store.findings(10, conversation_id="a")) == (None, [], [])
    assert {p.finding.conversation_id for p in store.pending(10)} == {"b"}
    assert (store.session("b"), store.trajectory("b"), store.findings(10, conversation_id="b")) == b
    assert not store.forget("a")


def test_a_deletion_refuses_whoever_still_has_the_deleted_state(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*drifting("a"))
    expected = store.position(TOPIC, 0)
    late = to_commit(
        folded([projection("a", 6)], writer.states, 7), topic=TOPIC, partition=0, topic_id=LOG, expected=expected
    )
    store.forget("a")
    with pytest.raises(CommitRefused):
        store.commit(late)
    assert store.load(["a"]) == {}


# Ids are whatever the contract lets through: zero bytes, quotes, every script.
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), unique=True, max_size=20))
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_any_conversation_id_is_found_again(backend: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = BACKENDS[backend](Path(directory))
        batch = Writer(store).commit(*(projection(name, 0, -5.0) for name in names))
        assert store.load(names) == batch.states
        assert {s.conversation_id for s in store.sessions(100)} == set(names)
        for name in names:
            assert [f.conversation_id for f in store.findings(5, conversation_id=name)] == [name]
        store.close()


def test_more_conversations_than_one_statement_takes(store: Backend) -> None:
    names = [f"c{n}" for n in range(2500)]
    batch = Writer(store).commit(*(projection(name, 0) for name in names))
    assert store.load(names) == batch.states


# The embedded store.


def test_it_survives_being_closed_and_opened(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    Writer(store).commit(*drifting("a"))
    before = everything(store)
    store.close()
    assert everything(SqliteStore(tmp_path / "store.db")) == before
    with pytest.raises(StoreError, match="is closed"):
        store.position(TOPIC, 0)


def test_expiry_forgets_who_has_been_silent(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    Writer(store).commit(projection("old", 0, -5.0), projection("young", 20))
    assert store.expire("2026-01-01T00:10:00Z") == 1
    assert [s.conversation_id for s in store.sessions(10)] == ["young"]
    assert (store.load(["old"]), store.findings(10), store.pending(10)) == ({}, [], [])


def test_a_full_disk_refuses_the_commit_whole_and_takes_it_later(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db", max_bytes=256 * 1024)
    writer = Writer(store)
    with pytest.raises(StoreUnavailable, match="is full") as caught:
        for n in range(10_000):
            before = everything(store)
            writer.commit(*drifting(f"c{n}"))
    assert caught.value.retry and "free space" in caught.value.cure
    assert before[0] is not None
    assert everything(store) == before
    store.close()
    roomy = SqliteStore(tmp_path / "store.db")
    assert everything(roomy) == before
    writer = Writer(roomy)
    writer.commit(*drifting("later"))
    assert roomy.session("later")


def test_a_lock_held_by_another_process_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db", busy_seconds=0.05)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked by another process"):
        Writer(store).commit(projection("a", 0))
    assert store.position(TOPIC, 0) is None
    other.execute("ROLLBACK")
    Writer(store).commit(projection("a", 0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_the_cure(tmp_path: Path, share: float) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(path)
    Writer(store).commit(*(event for n in range(50) for event in drifting(f"c{n}")))
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(StoreError, match="damaged") as caught:
        everything(SqliteStore(path))
    assert "rebuilds the store from the log" in caught.value.cure and not caught.value.retry


def test_a_log_is_not_taken_for_a_store(tmp_path: Path) -> None:
    EmbeddedLog(tmp_path / "both.db").close()
    with pytest.raises(StoreError, match="not an Anchorwatch store"):
        SqliteStore(tmp_path / "both.db")


def test_somebody_elses_database_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE precious (x)")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="not an Anchorwatch store"):
        SqliteStore(path)
    tables = sqlite3.connect(path).execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("precious",)]


def test_a_url_opens_it(tmp_path: Path) -> None:
    store = open_store(sqlite_url(tmp_path / "new" / "store.db"))
    assert store.counts() == {}
    with pytest.raises(ConfigurationError, match="no store is called 'mongodb'"):
        open_store("mongodb://x")


def test_findings_come_newest_first_and_bounded(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    writer = Writer(store)
    made: list[Finding] = []
    for n in range(4):
        made += writer.commit(*drifting(f"c{n}")).findings
    assert store.findings(3) == made[::-1][:3]
