"""Promises of a store, held against every backend; then those of the embedded one, with its file broken for real."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from servers import fresh
from service import CONFIG, projection

from monitor.batch import Folded, to_commit
from monitor.database import sqlite_url
from monitor.detect.conversation import ConversationState, step
from monitor.errors import CommitRefused, ConfigurationError, StoreError, StoreUnavailable
from monitor.events import Finding, Projection
from monitor.placement import partition_of
from monitor.store import Backend, open_store
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.store.store import (
    ClosedMinutes,
    Commit,
    MinuteSums,
    Position,
    Progress,
    Rank,
    Session,
    Store,
    TrajectoryPoint,
)
from monitor.stream.log import EmbeddedLog

TOPIC = "anchorwatch.test"
LOG = "id of the log"
START = 1767225600.0  # 2026-01-01T00:00:00Z, the time of turn 0; 30 s a turn


BACKENDS: dict[str, Callable[[Path, str], Backend]] = {
    "sqlite": lambda directory, redis: SqliteStore(directory / "store.db", trajectory_points=5),
    "redis": lambda directory, redis: RedisStore(redis, trajectory_points=5, prefix=fresh("store")),
}


@pytest.fixture(params=sorted(BACKENDS))
def store(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str) -> Iterator[Backend]:
    opened = BACKENDS[request.param](tmp_path, shared_redis)
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

    def __init__(self, store: Store, partition: int = 0, topic: str = TOPIC, partitions: int = 1) -> None:
        self.store = store
        self.states: dict[str, ConversationState] = {}
        self.topic, self.partition, self.partitions = topic, partition, partitions

    def batch(self, *events: Projection, **changes: object) -> Commit:
        """What would be committed now."""
        expected = self.store.position(self.topic, self.partition)
        offset = (expected.offset if expected else 0) + max(1, len(events))
        batch = to_commit(
            folded(list(events), self.states, offset),
            topic=self.topic,
            partition=self.partition,
            topic_id=LOG,
            partitions=self.partitions,
            expected=expected,
            end=offset,
            config=None,
            now=time.time(),
        )
        return replace(batch, **changes)

    def commit(self, *events: Projection, **changes: object) -> Commit:
        batch = self.batch(*events, **changes)
        self.store.commit(batch)
        return batch


def drifting(conversation: str, turns: int = 6) -> list[Projection]:
    return [projection(conversation, turn, -0.9 * turn) for turn in range(turns)]


def by_time(findings: list[Finding]) -> list[Finding]:
    """Newest first."""
    return sorted(sorted(findings, key=lambda f: f.id), key=lambda f: f.time, reverse=True)


def close_to(stored: Session | TrajectoryPoint) -> object:
    """Equal to seven digits."""
    fields = msgspec.structs.asdict(stored)
    return pytest.approx({k: v for k, v in fields.items() if isinstance(v, float)}, rel=1e-6), {
        k: v for k, v in fields.items() if not isinstance(v, float) and k != "place"
    }


def parts(stored: Session | TrajectoryPoint) -> object:
    fields = msgspec.structs.asdict(stored)
    return {k: v for k, v in fields.items() if isinstance(v, float)}, {
        k: v for k, v in fields.items() if not isinstance(v, float) and k != "place"
    }


def everything(store: Backend) -> tuple[object, ...]:
    sessions = store.sessions(1000)
    return (
        store.position(TOPIC, 0),
        store.config(TOPIC, 0),
        store.progress(TOPIC),
        store.counts(),
        sessions,
        [store.trajectory(s.conversation_id) for s in sessions],
        store.findings(1000),
        store.pending(1000),
        store.load(TOPIC, 0, [s.conversation_id for s in sessions]),
        store.minutes(0, 2**40),
        store.closed(),
        store.actions_offset("actions"),
        store.actions(""),
    )


NOTHING = (None, None, [], {}, [], [], [], [], {}, [], None, 0, {})


# Every backend.


def test_a_new_store_knows_nothing(store: Backend) -> None:
    assert store.position(TOPIC, 0) is None
    assert store.load(TOPIC, 0, ["a"]) == {}
    assert store.load(TOPIC, 0, []) == {}
    assert store.session("a") is None
    assert store.trajectory("a") == []
    assert everything(store) == NOTHING


def test_a_commit_writes_state_session_points_findings_outbox_and_position(store: Backend) -> None:
    batch = Writer(store).commit(*drifting("a", 5), projection("b", 0, 0.4))
    assert batch.findings, "the traffic must drift for this test to mean anything"
    assert store.position(TOPIC, 0) == Position(6, 0)
    assert store.load(TOPIC, 0, ["a", "b", "nobody"]) == batch.states
    assert store.counts() == {"folded": 6}
    assert store.findings(10) == by_time(batch.findings)
    assert [p.finding for p in store.pending(10)] == batch.findings
    assert [s.conversation_id for s in store.sessions(10)] == ["a", "b"]
    assert [p.turn for p in store.trajectory("a")] == [0, 1, 2, 3, 4]
    assert [parts(p) for p in store.trajectory("a")] == [close_to(p) for p in batch.points["a"]]
    a = store.session("a")
    assert a and parts(a) == close_to(batch.sessions[0])
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
    with pytest.raises(CommitRefused):
        Writer(store).commit(*drifting("a"), expected=Position(12, 0))
    assert store.position(TOPIC, 0) is None


def test_partitions_have_their_own_positions(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0))
    assert store.position(TOPIC, 1) is None
    assert store.position("other", 0) is None


def test_a_store_folded_from_another_log_is_a_loud_stop(store: Backend) -> None:
    Writer(store).commit(projection("a", 0))
    before = everything(store)
    with pytest.raises(StoreError, match="another log") as caught:
        Writer(store).commit(projection("a", 1), topic_id="another")
    assert not caught.value.retry and "move the store aside" in caught.value.cure
    assert everything(store) == before


def test_a_finding_that_is_stored_already_is_neither_stored_nor_sent_again(store: Backend) -> None:
    """As when a position is set back by hand: ids are the last line against a second page."""
    writer = Writer(store)
    first = writer.commit(*drifting("a"))
    store.settle([p.reference for p in store.pending(10)])
    writer.states.clear()
    again = writer.commit(*drifting("a"))
    assert again.findings == first.findings
    assert store.findings(10) == by_time(first.findings)
    assert store.pending(10) == []


def test_the_outbox_gives_until_it_is_settled(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*drifting("a"))
    writer.commit(*drifting("b"))
    waiting = store.pending(10)
    assert len(waiting) >= 2
    assert store.pending(1) == waiting[:1]
    store.settle([waiting[0].reference, "no such", "1000000000", ""])
    assert store.pending(10) == waiting[1:]
    store.settle([])
    store.settle([p.reference for p in waiting])
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


@pytest.mark.parametrize("deployment", [None, "shop", "pirates"])
def test_a_ranking_read_by_the_page_is_the_ranking(store: Backend, deployment: str | None) -> None:
    writer = Writer(store)
    for number in range(23):  # many have the same risk, and many none
        writer.commit(projection(f"c{number}", 0, -1.1 * (number % 4)))
        writer.commit(projection(f"p{number}", 0, -9.0, deployment="pirates"))
    whole = store.sessions(100, deployment=deployment)
    for size in (1, 3, 7, 50):
        read: list[Session] = []
        while page := store.sessions(size, after=rank(read[-1]) if read else None, deployment=deployment):
            read += page
        assert read == whole, size
    for at, last in enumerate(whole):
        assert store.sessions(4, after=rank(last), offset=3, deployment=deployment) == whole[at + 4 : at + 8]
    assert store.sessions(5, after=Rank(1e9, "x"), deployment=deployment) == whole[:5]
    assert store.sessions(5, after=Rank(None, "~"), deployment=deployment) == []


def test_a_page_goes_on_where_the_last_one_ended_also_when_that_session_has_moved_or_is_gone(store: Backend) -> None:
    writer = Writer(store)
    for number in range(6):
        writer.commit(projection(f"c{number}", 0, -3.3 + 0.5 * number))
    first = store.sessions(3)
    writer.commit(projection("c2", 1, -9.0))
    store.forget("c1")
    assert [s.conversation_id for s in store.sessions(9, after=rank(first[2]))] == ["c3", "c4", "c5"]
    assert [s.conversation_id for s in store.sessions(9, after=rank(first[1]))] == ["c3", "c4", "c5"]


def rank(session: Session) -> Rank:
    return Rank(session.risk, session.conversation_id)


def test_sessions_silent_since_before_a_time_are_left_out(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("old", 0, -3.0), projection("young", 20, 0.0))
    assert [s.conversation_id for s in store.sessions(10, since=START + 600)] == ["young"]
    assert len(store.sessions(10, since=START)) == 2


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
    assert store.load(TOPIC, 0, ["a"]) == {}
    assert (store.session("a"), store.trajectory("a"), store.findings(10, conversation_id="a")) == (None, [], [])
    assert {p.finding.conversation_id for p in store.pending(10)} == {"b"}
    assert (store.session("b"), store.trajectory("b"), store.findings(10, conversation_id="b")) == b
    assert not store.forget("a")


def test_a_deletion_refuses_whoever_still_has_the_deleted_state(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*drifting("a"))
    late = writer.batch(projection("a", 6))
    store.forget("a")
    with pytest.raises(CommitRefused):
        store.commit(late)
    assert store.load(TOPIC, 0, ["a"]) == {}


# Ids are whatever the contract lets through: zero bytes, quotes, every script.
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), unique=True, max_size=20))
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_any_conversation_id_is_found_again(shared_redis: str, backend: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = BACKENDS[backend](Path(directory), shared_redis)
        batch = Writer(store).commit(*(projection(name, 0, -5.0) for name in names))
        assert store.load(TOPIC, 0, names) == batch.states
        assert {s.conversation_id for s in store.sessions(100)} == set(names)
        for name in names:
            assert [f.conversation_id for f in store.findings(5, conversation_id=name)] == [name]
        store.close()


def test_more_conversations_than_one_statement_takes(store: Backend) -> None:
    names = [f"c{n}" for n in range(2500)]
    batch = Writer(store).commit(*(projection(name, 0) for name in names))
    assert store.load(TOPIC, 0, names) == batch.states


def test_both_sides_are_compared_where_both_know(store: Backend) -> None:
    Writer(store).commit(projection("a", 0), topic_id="", partitions=0)
    Writer(store).commit(projection("a", 1), topic_id=LOG, partitions=4)
    Writer(store).commit(projection("a", 2), topic_id="", partitions=0)
    before = everything(store)
    with pytest.raises(StoreError, match="another log"):
        Writer(store).commit(projection("a", 3), topic_id="another", partitions=4)
    with pytest.raises(StoreError, match="had 4 partitions") as caught:
        Writer(store).commit(projection("a", 3), partitions=8)
    assert not caught.value.retry
    for changes in ({"partitions": 8}, {"topic_id": "another", "partitions": 4}):
        with pytest.raises(StoreError):
            Writer(store, partition=5).commit(projection("f", 0), **changes)
    assert everything(store) == before


def test_a_position_knows_the_calibration_in_force(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0))
    assert store.config(TOPIC, 0) is None
    writer.commit(projection("a", 1), config=b"\x00\xff first")
    writer.commit(projection("a", 2))
    assert store.config(TOPIC, 0) == b"\x00\xff first"
    writer.commit(projection("a", 3), config=b"second")
    assert store.config(TOPIC, 0) == b"second"
    assert (store.config(TOPIC, 1), store.config("other", 0)) == (None, None)


def test_progress_never_goes_back(store: Backend) -> None:
    late, early = Writer(store, 1, partitions=2), Writer(store, 0, partitions=2)
    late.commit(projection("a", 20), behind=True)
    assert store.progress(TOPIC) == [Progress(1, START + 600, True)]
    late.commit(projection("b", 0))
    early.commit(projection("c", 0))
    assert store.progress(TOPIC) == [Progress(0, START, False), Progress(1, START + 600, False)]
    late.commit(watermark=None)
    assert store.progress(TOPIC)[1] == Progress(1, START + 600, False)
    assert store.progress("other") == []


def test_a_partition_without_any_response_stands_at_the_beginning_of_time(store: Backend) -> None:
    Writer(store).commit(counts={"dead_letter": 1})
    assert store.progress(TOPIC) == [Progress(0, 0.0, False)]
    Writer(store).commit(projection("a", 2))
    assert store.progress(TOPIC) == [Progress(0, START + 60, False)]


def test_every_number_of_a_point_and_a_session_comes_back(store: Backend) -> None:
    point = TrajectoryPoint(
        number=1,
        time=1767225600.123,
        turn=2**31,
        projection=-1234.5678,
        held=0.123456,
        outcome="folded",
        z=-3.1415927,
        risk=1.25,
        place=(-12.345678, 0.000123456),
    )
    odd = replace(point, number=2, time=-1.5, turn=0, held=1.0, outcome="unjudged", z=None, risk=None, place=None)
    session = Session(
        conversation_id="a",
        deployment="d" * 256,
        model="m",
        axis_id="é" * 256,
        turn=2**31,
        projection=-1234.5678,
        outcome="late",
        time=1767225600.123,
        started=1767225599.001,
        responses=2,
        z=-3.1415927,
        risk=1.25,
        lowest_z=-7.5,
        highest_risk=2.5,
        truncated=True,
        episode_id="0123456789abcdef" * 2,
        kind="sustained_drop",
        severity="critical",
    )
    Writer(store).commit(sessions=[session], points={"a": [point, odd]}, states={"a": b"state"})
    assert (found := store.session("a")) and parts(found) == close_to(session)
    assert [parts(p) for p in store.trajectory("a")] == [close_to(point), close_to(odd)]
    places = [p.place for p in store.trajectory("a")]
    assert places[0] == pytest.approx(point.place, rel=1e-6) and places[1] is None
    calm = replace(
        session,
        z=None,
        risk=None,
        lowest_z=None,
        highest_risk=None,
        truncated=False,
        episode_id=None,
        kind=None,
        severity=None,
        responses=3,
        deployment="other",
    )
    Writer(store).commit(sessions=[calm], points={"a": [replace(point, number=3)]}, states={"a": b"state"})
    assert (found := store.session("a")) and parts(found) == close_to(calm)
    assert store.sessions(5, deployment="d" * 256) == []
    assert [s.conversation_id for s in store.sessions(5, deployment="other")] == ["a"]


@pytest.mark.parametrize("outcome", ["folded", "branch", "late", "unjudged", "learning"])
@pytest.mark.parametrize("kind", [None, "low_start", "sudden_drop", "sustained_drop", "dip"])
def test_words_come_back(store: Backend, outcome: str, kind: str | None) -> None:
    batch = Writer(store).batch(projection("a", 0))
    severity = "warning" if kind else None
    session = replace(batch.sessions[0], outcome=outcome, kind=kind, severity=severity)
    points = {"a": [replace(batch.points["a"][0], outcome=outcome)]}
    store.commit(replace(batch, sessions=[session], points=points))
    assert (found := store.session("a")) and (found.outcome, found.kind, found.severity) == (outcome, kind, severity)
    assert store.trajectory("a")[0].outcome == outcome


def test_numbers_beyond_all_sense_stop_nobody(store: Backend) -> None:
    """The contract lets any finite number through."""
    event = replace(projection("a", 0), turn=10**12, projection=1e300, held=1e-300)
    Writer(store).commit(replace(event, coordinates={"assistant_axis": 0.0, "pc1": -1e300, "pc2": 1e300}))
    assert store.session("a") and len(store.trajectory("a")) == 1
    assert store.trajectory("a")[0].projection > 1e37


def test_a_state_that_only_a_duplicate_has_changed_is_kept(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(projection("a", 0))
    session, points = store.session("a"), store.trajectory("a")
    again = writer.commit(projection("a", 0))
    assert again.states and not again.sessions
    assert store.load(TOPIC, 0, ["a"]) == again.states
    assert (store.session("a"), store.trajectory("a")) == (session, points)
    alone = writer.commit(projection("b", 0), projection("b", 0), sessions=[], points={})
    assert store.load(TOPIC, 0, ["b"]) == alone.states
    assert (store.session("b"), store.trajectory("b")) == (None, [])
    assert [s.conversation_id for s in store.sessions(10)] == ["a"]


def test_a_pending_finding_says_when_it_was_committed(store: Backend) -> None:
    before = time.time()
    Writer(store).commit(*drifting("a"))
    after = time.time()
    assert all(before - 1 <= p.committed <= after + 1 for p in store.pending(10))


def test_conversations_on_many_partitions_are_found_ranked_and_forgotten(store: Backend) -> None:
    writers = [Writer(store, p, partitions=4) for p in range(4)]
    names = [f"c{n}" for n in range(40)]
    for n, name in enumerate(names):
        writers[partition_of(name, 4)].commit(projection(name, 0, -0.1 * n))
    assert [s.conversation_id for s in store.sessions(40)] == sorted(names, key=lambda x: -int(x[1:]))
    assert [s.conversation_id for s in store.sessions(5, offset=7)] == [f"c{n}" for n in range(32, 27, -1)]
    assert store.counts() == {"folded": 40}
    findings = store.findings(100)
    assert findings == by_time(findings) and len(findings) > 4
    assert {p.finding.id for p in store.pending(100)} == {f.id for f in findings}
    assert len(store.pending(3)) == 3
    assert len(store.trajectory("c7")) == 1
    assert store.forget("c39") and store.session("c39") is None
    assert store.position(TOPIC, partition_of("c39", 4)).revision == 1
    store.settle([p.reference for p in store.pending(100)])
    assert store.pending(100) == []


def test_equal_risks_come_by_id(store: Backend) -> None:
    writer = Writer(store)
    writer.commit(*(projection(name, 0, -1.0) for name in ("b", "é", "a", "Z", "a\0b")))
    writer.commit(*(projection(name, 0, deployment="unknown") for name in ("u2", "u1")))
    assert [s.conversation_id for s in store.sessions(10)] == ["Z", "a", "a\0b", "b", "é", "u1", "u2"]


def test_a_lease_has_one_holder_until_it_ends(store: Backend) -> None:
    assert store.lease("house", "one", 30.0)
    assert not store.lease("house", "two", 30.0)
    assert store.lease("other", "two", 30.0)
    assert store.lease("house", "one", 0.3)
    store.release("house", "two")
    assert not store.lease("house", "two", 30.0)
    deadline = time.monotonic() + 10
    while not store.lease("house", "two", 30.0):
        assert time.monotonic() < deadline, "it never ended"
        time.sleep(0.05)
    store.release("house", "two")
    assert store.lease("house", "one", 30.0)


def test_minutes_add_up_over_batches_and_partitions(store: Backend) -> None:
    now = int(START // 60)
    one, two = Writer(store, 0, partitions=2), Writer(store, 1, partitions=2)
    one.commit(sums=[MinuteSums(now, "shop", 3, -1500, 1), MinuteSums(now, "bar", 1, 20_000, 0)])
    one.commit(sums=[MinuteSums(now, "shop", 2, -500, 0), MinuteSums(now + 61, "shop", 1, 1, 1)])
    two.commit(sums=[MinuteSums(now, "shop", 5, 2**40, 5), MinuteSums(now - 1, "sh:op\0", 1, 1, 0)])
    assert store.minutes(now - 1, now + 61) == [
        MinuteSums(now - 1, "sh:op\0", 1, 1, 0),
        MinuteSums(now, "bar", 1, 20_000, 0),
        MinuteSums(now, "shop", 10, 2**40 - 2000, 6),
        MinuteSums(now + 61, "shop", 1, 1, 1),
    ]
    assert [s.minute for s in store.minutes(now, now)] == [now, now]
    assert store.minutes(now + 1, now + 60) == []
    assert store.minutes(now + 2, now) == []


def test_minutes_go_two_days_after_the_last_closed_one_and_never_before_they_are_closed(store: Backend) -> None:
    now = int(START // 60)
    writer = Writer(store)
    minutes = [now - 8 * 1440, now - 4 * 1440, now - 1440, now, 2**35]  # the last by a collector's clock gone mad
    for minute in minutes:
        writer.commit(sums=[MinuteSums(minute, "shop", 1, 0, 0)], watermark=minute * 60.0)
    assert [s.minute for s in store.minutes(0, 2**40)] == minutes
    store.close_minutes(None, ClosedMinutes(now - 4 * 1440, [], {}), [])
    assert [s.minute for s in store.minutes(0, 2**40)] == minutes[1:]
    writer.commit(sums=[MinuteSums(now - 1, "shop", 1, 0, 0)])
    store.close_minutes(now - 4 * 1440, ClosedMinutes(now, [], {}), [])
    assert [s.minute for s in store.minutes(0, 2**40)] == [now - 1440, now - 1, now, 2**35]


def fleet_finding(id: str) -> Finding:
    return Finding(
        id=id,
        time="2026-01-01T00:05:00Z",
        conversation_id="",
        turn=0,
        deployment="shop",
        axis_id="axis",
        kind="fleet_shift",
        severity="warning",
        statistic="adwin",
        value=1.0,
        boundary=1.0,
        risk=1.0,
        budget=None,
        certification="uncertified",
        config_id="c",
        episode_id="e",
    )


def test_the_fleets_minutes_are_closed_by_one_reader_at_a_time(store: Backend) -> None:
    first = ClosedMinutes(10, [MinuteSums(10, "shop", 1, 2, 0)], {"shop": 3}, [MinuteSums(0, "shop", 1, 2, 0)])
    store.close_minutes(None, first, [fleet_finding("f1")])
    assert store.closed() == first
    with pytest.raises(CommitRefused):
        store.close_minutes(None, ClosedMinutes(11, [], {}), [fleet_finding("f2")])
    with pytest.raises(CommitRefused):
        store.close_minutes(9, ClosedMinutes(11, [], {}), [fleet_finding("f2")])
    assert store.closed() == first
    second = ClosedMinutes(12, [], {})
    store.close_minutes(10, second, [fleet_finding("f1"), fleet_finding("f3")])
    assert store.closed() == second
    assert [p.finding.id for p in store.pending(10)] == ["f1", "f3"]
    assert store.findings(10) == [fleet_finding("f1"), fleet_finding("f3")]
    assert store.findings(10, conversation_id="") == store.findings(10)
    store.settle([p.reference for p in store.pending(1)])
    assert [p.finding.id for p in store.pending(10)] == ["f3"]


def test_actions_are_the_newest_value_of_each_key(store: Backend) -> None:
    store.fold_actions("topic", 0, 3, {"silence/b": b"1", "silence/a": b"\x00\xff", "verdict/a*": b"3", "sil": b"4"})
    assert store.actions_offset("topic") == 3
    assert list(store.actions("silence/").items()) == [("silence/a", b"\x00\xff"), ("silence/b", b"1")]
    assert store.actions("verdict/a*") == {"verdict/a*": b"3"}
    assert (store.actions("verdict/b"), store.actions("*")) == ({}, {})
    store.fold_actions("topic", 3, 5, {"silence/a": None, "silence/b": b"2", "silence/é": b"5", "none": None})
    assert store.actions("silence/") == {"silence/b": b"2", "silence/é": b"5"}
    assert list(store.actions("")) == ["sil", "silence/b", "silence/é", "verdict/a*"]
    before = everything(store)
    for expected in (0, 3, 6):
        with pytest.raises(CommitRefused):
            store.fold_actions("topic", expected, 9, {"silence/b": None})
    assert everything(store) == before


def test_actions_of_a_topic_made_anew_are_another_history(store: Backend) -> None:
    store.fold_actions("topic", 0, 3, {"silence/a": b"1"})
    assert store.actions_offset("another") == 0
    with pytest.raises(CommitRefused):
        store.fold_actions("another", 3, 4, {})
    store.fold_actions("another", 0, 1, {"silence/b": b"2"})
    assert (store.actions_offset("topic"), store.actions_offset("another")) == (0, 1)
    assert store.actions("") == {"silence/b": b"2"}


def test_many_actions_at_once(store: Backend) -> None:
    changes = {f"verdict/{n:05}": str(n).encode() for n in range(9000)}
    store.fold_actions("topic", 0, 9000, changes)
    assert store.actions("verdict/") == changes
    store.fold_actions("topic", 9000, 18000, dict.fromkeys(changes))
    assert store.actions("") == {}


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
    assert store.expire(START + 600) == 1
    assert [s.conversation_id for s in store.sessions(10)] == ["young"]
    assert (store.load(TOPIC, 0, ["old"]), store.findings(10)) == ({}, [])
    assert [p.finding.conversation_id for p in store.pending(10)] == ["old"], "what nobody has been told stays"


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
    assert store.findings(3) == by_time(made)[:3]


@given(
    st.sets(st.text(st.sampled_from("a/é\ud7ff\ue000\U0010ffff\x00"), min_size=1, max_size=4), max_size=12),
    st.text(st.sampled_from("a/é\ud7ff\ue000\U0010ffff\x00"), max_size=3),
)
def test_actions_that_begin_so_are_a_range_whatever_the_letters(keys: set[str], prefix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "store.db")
        store.fold_actions("topic", 0, 1, {key: key.encode() for key in keys})
        assert list(store.actions(prefix)) == sorted(key for key in keys if key.startswith(prefix))
        store.close()
