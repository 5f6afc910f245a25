"""Promises of operators' actions: each is folded once, a wiped store gets them again, the forgotten stays so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import servers
from hypothesis import given, settings
from hypothesis import strategies as st
from service import CONFIG, message, projection

from monitor.actions import (
    Acknowledgement,
    ActionsFold,
    Activation,
    Silence,
    Verdict,
    activate_calibration,
    append_action,
    append_actions,
    body_of,
    calibration_at,
    decode_action,
    due,
    forget,
    read_actions,
    recorded_calibrations,
    withdraw,
)
from monitor.detect.baseline import DetectorConfig
from monitor.errors import ConfigurationError, EventError, LogError
from monitor.events import Finding
from monitor.matchers import Matcher
from monitor.store import Backend
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import ACTIONS, PROJECTIONS, EmbeddedLog, Message, Record, Span
from monitor.worker import Worker

OTHER = msgspec.structs.replace(CONFIG, release_turns=3)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    opened = EmbeddedLog(tmp_path / "log.db")
    yield opened
    opened.close()


@pytest.fixture(params=["sqlite", "redis"])
def empty_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Backend]]:
    """Makes one after the other, each empty: the first to begin with, the next as after a wipe."""
    made: list[Backend] = []

    def make() -> Backend:
        if request.param == "sqlite":
            made.append(SqliteStore(tmp_path / f"store-{len(made)}.db"))
        else:
            made.append(RedisStore(request.getfixturevalue("shared_redis"), prefix=servers.fresh("actions")))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def store(empty_store: Callable[[], Backend]) -> Backend:
    return empty_store()


def talk(log: EmbeddedLog, conversation: str, turns: Sequence[int], value: float = 0.0) -> None:
    log.append(PROJECTIONS, [message(projection(conversation, turn, value)) for turn in turns])


def work(log: EmbeddedLog, store: Backend, batch_size: int = 100) -> None:
    worker = Worker(log, store, CONFIG, batch_size=batch_size)
    while worker.run_once():
        pass


class Compacted:
    """The embedded log as a compacting broker would leave it: of each key only the newest record, offsets unchanged.

    The last record always stays, as brokers have it, and offsets before the first one kept are still "in" the log.
    """

    def __init__(self, log: EmbeddedLog) -> None:
        self._log = log

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)

    def span(self, topic: str, partition: int) -> Span:
        return self._log.span(topic, partition)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        span = self._log.span(topic, partition)
        records = self._log.read(topic, partition, span.begin, span.end - span.begin)
        newest = {record.key: record.offset for record in records}
        return [one for one in records if one.offset >= offset and newest[one.key] == one.offset][:limit]


# Writing


def test_an_action_is_written_by_whom_and_when_and_read_again(log: EmbeddedLog) -> None:
    append_action(log, "verdict", "c/1", Verdict("drifting", 3, "clearly"), by="ann", at="2026-01-02T03:04:05Z")
    (record,) = log.read(ACTIONS, 0, 0, 9)
    assert record.key == "verdict/c/1"
    assert msgspec.json.decode(record.value) == {
        "by": "ann",
        "time": "2026-01-02T03:04:05Z",
        "body": {"label": "drifting", "turn": 3, "note": "clearly"},
    }
    assert body_of(record.key, record.value) == Verdict("drifting", 3, "clearly")


@pytest.mark.parametrize(
    ("name", "by", "note", "said"),
    [
        ("", "ann", "", "is empty"),
        ("x" * 601, "ann", "", "601 characters"),
        ("\ud800", "ann", "", "not valid Unicode"),
        ("f", "", "", "by"),
        ("f", "a" * 257, "", "by"),
        ("f", "ann", "n" * 1001, "note"),
        ("f", "an\x1b[31mn", "", "by holds control characters"),
        ("f", "ann", "\x00", "note holds control characters"),
        ("f", "ann", "\ud800", "note"),
    ],
)
def test_texts_are_bounded_and_nothing_is_written(log: EmbeddedLog, name: str, by: str, note: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said.replace("(", r"\(")):
        append_action(log, "acknowledge", name, Acknowledgement(note), by=by)
    assert log.span(ACTIONS, 0).end == 0


def test_all_that_is_wrong_is_told_at_once(log: EmbeddedLog) -> None:
    with pytest.raises(ConfigurationError) as caught:
        append_action(log, "acknowledge", "f", Acknowledgement("\x07"), by="\x1b")
    assert "by holds" in str(caught.value) and "note holds" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dance/x", b'{"by":"a","time":"2026-01-01T00:00:00Z","body":{}}'),
        ("due/c", b'{"by":"a","time":"2026-01-01T00:00:00Z","body":{}}'),
        ("acknowledge/", b'{"by":"a","time":"2026-01-01T00:00:00Z","body":{}}'),
        ("acknowledge/f", b"no JSON"),
        ("acknowledge/f", b"\xff"),
        ("acknowledge/f", b'{"by":"a","time":"yesterday","body":{}}'),
        ("verdict/c", b'{"by":"a","time":"2026-01-01T00:00:00Z","body":{"label":"SECRET"}}'),
        ("config/x", b'{"by":"a","time":"2026-01-01T00:00:00Z","body":{"axis_id":""}}'),
    ],
)
def test_what_is_no_action_stops_nothing_and_is_not_quoted(
    log: EmbeddedLog, store: Backend, key: str, value: bytes
) -> None:
    with pytest.raises(EventError) as caught:
        decode_action(key, value)
    assert "SECRET" not in str(caught.value)
    log.append(ACTIONS, [Message(key, value)])
    append_action(log, "acknowledge", "good", Acknowledgement(), by="ann")
    assert ActionsFold(log, store).run_once() == 2
    assert list(store.actions("")) == ["acknowledge/good"]


# The fold


def test_the_newest_value_of_a_key_holds_and_an_empty_one_withdraws(log: EmbeddedLog, store: Backend) -> None:
    fold = ActionsFold(log, store)
    append_action(log, "verdict", "c", Verdict("drifting"), by="ann")
    append_action(log, "verdict", "d", Verdict("drifting"), by="ann")
    assert fold.run_once() == 2
    append_action(log, "verdict", "c", Verdict("healthy"), by="bob")
    withdraw(log, "verdict", ["d", "never"])
    assert fold.run_once() == 3
    assert fold.run_once() == 0
    assert {key: body_of(key, value) for key, value in store.actions("").items()} == {"verdict/c": Verdict("healthy")}
    assert store.actions("") == read_actions(log)


def test_more_than_one_batch_is_folded_in_one_call(log: EmbeddedLog, store: Backend) -> None:
    append_actions(log, [("acknowledge", f"f{i}", Acknowledgement()) for i in range(1201)], by="ann")
    assert ActionsFold(log, store).run_once() == 1201
    assert len(store.actions("acknowledge/")) == 1201


@settings(max_examples=40)
@given(
    writes=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["drifting", "healthy", None])), min_size=1, max_size=12
    ),
    stops=st.lists(st.integers(0, 12), max_size=3),
)
def test_however_it_is_cut_and_compacted_the_store_holds_the_newest(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, str | None]], stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("fold")
    log, store = EmbeddedLog(folder / "log.db"), SqliteStore(folder / "store.db")
    fold = ActionsFold(Compacted(log), store)
    newest: dict[str, object] = {}
    try:
        for number, (name, label) in enumerate(writes):
            if label is None:
                withdraw(log, "verdict", [name])
                newest.pop(f"verdict/{name}", None)
            else:
                append_action(log, "verdict", name, Verdict(label), by="ann")
                newest[f"verdict/{name}"] = Verdict(label)
            if number in stops:
                fold.run_once()
        fold.run_once()
        assert {key: body_of(key, value) for key, value in store.actions("").items()} == newest
        assert fold.run_once() == 0
        whole = SqliteStore(folder / "whole.db")
        assert ActionsFold(Compacted(log), whole).run_once() == len({name for name, _ in writes})
        assert whole.actions("") == store.actions("")
        whole.close()
    finally:
        log.close()
        store.close()


def test_two_folds_at_once_do_no_harm(log: EmbeddedLog, store: Backend) -> None:
    first, second = ActionsFold(log, store), ActionsFold(log, store)
    append_action(log, "verdict", "c", Verdict("drifting"), by="ann")

    class Between:
        """Lets the other one fold after this one has read."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def fold_actions(self, *arguments: object) -> None:
            first.run_once()
            store.fold_actions(*arguments)  # type: ignore[arg-type]

    assert ActionsFold(log, Between()).run_once() == 0
    assert second.run_once() == 0 and store.actions_offset(log.span(ACTIONS, 0).topic_id) == 1


def test_a_topic_made_anew_is_folded_from_its_beginning(tmp_path: Path, log: EmbeddedLog, store: Backend) -> None:
    append_actions(log, [("acknowledge", f"f{i}", Acknowledgement()) for i in range(5)], by="ann")
    ActionsFold(log, store).run_once()
    other = EmbeddedLog(tmp_path / "other.db")
    append_actions(other, [("acknowledge", f"g{i}", Acknowledgement()) for i in range(9)], by="ann")
    assert ActionsFold(other, store).run_once() == 9
    assert "acknowledge/g0" in store.actions("")
    other.close()


def test_a_topic_that_lost_its_end_is_folded_again(log: EmbeddedLog, store: Backend) -> None:
    append_action(log, "acknowledge", "f", Acknowledgement(), by="ann")
    topic_id = log.span(ACTIONS, 0).topic_id
    store.fold_actions(topic_id, 0, 7, {})  # as if six more had been acknowledged and lost by the broker
    assert ActionsFold(log, store).run_once() == 1
    assert list(store.actions("")) == ["acknowledge/f"] and store.actions_offset(topic_id) == 1


# Forgetting


def kept(store: Backend, conversation: str) -> bool:
    return bool(
        store.session(conversation)
        or store.trajectory(conversation)
        or store.findings(9, conversation_id=conversation)
        or [one for one in store.pending(99) if one.finding.conversation_id == conversation]
        or store.load(PROJECTIONS, 0, [conversation])
    )


def test_what_was_folded_is_forgotten_and_what_comes_later_is_kept(log: EmbeddedLog, store: Backend) -> None:
    fold = ActionsFold(log, store)
    talk(log, "gone", range(3), -5.0)
    talk(log, "stays", range(3), -5.0)
    work(log, store)
    assert kept(store, "gone")
    forget(log, "gone", by="ann")
    fold.run_once()
    assert not kept(store, "gone") and kept(store, "stays") and not due(store)
    talk(log, "gone", range(3, 5))
    work(log, store)
    fold.run_once()
    session = store.session("gone")
    assert session and session.responses == 2 and session.truncated


def test_what_was_logged_but_not_folded_is_forgotten_once_it_is(log: EmbeddedLog, store: Backend) -> None:
    fold = ActionsFold(log, store)
    talk(log, "gone", range(3), -5.0)
    forget(log, "gone", by="ann")
    talk(log, "stays", range(3), -5.0)
    fold.run_once()
    assert due(store) == {"gone"}
    worker = Worker(log, store, CONFIG, batch_size=2)
    worker.run_once()
    fold.run_once()
    assert due(store) == {"gone"} and kept(store, "gone")
    worker.run_once()
    fold.run_once()
    assert not due(store) and not kept(store, "gone")
    while worker.run_once() or worker.run_once():  # refused once: what it had at hand was deleted
        pass
    assert not kept(store, "gone") and kept(store, "stays")


def test_a_worker_that_has_it_at_hand_does_not_write_it_back(log: EmbeddedLog, store: Backend) -> None:
    worker = Worker(log, store, CONFIG)
    talk(log, "gone", range(3))
    worker.run_once()
    forget(log, "gone", by="ann")
    ActionsFold(log, store).run_once()
    talk(log, "gone", [3])
    while worker.run_once() or worker.run_once():
        pass
    session = store.session("gone")
    assert session and session.responses == 1


@pytest.mark.parametrize("folded_first", [True, False])
def test_a_store_folded_anew_forgets_again(
    empty_store: Callable[[], Backend], log: EmbeddedLog, store: Backend, folded_first: bool
) -> None:
    talk(log, "gone", range(3), -5.0)
    work(log, store)
    forget(log, "gone", by="ann")
    ActionsFold(log, store).run_once()
    talk(log, "stays", range(3), -5.0)
    anew = empty_store()
    fold = ActionsFold(log, anew)
    if folded_first:
        fold.run_once()
        assert due(anew) == {"gone"}
    work(log, anew)
    assert kept(anew, "gone")
    fold.run_once()
    assert not kept(anew, "gone") and kept(anew, "stays") and not due(anew)


def test_a_crash_between_deleting_and_noting_it_deletes_again(log: EmbeddedLog, store: Backend) -> None:
    talk(log, "gone", range(3))
    work(log, store)
    forget(log, "gone", by="ann")

    class Crash(Exception):
        pass

    class Crashing:
        """Dies after the deletion."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def forget(self, conversation_id: str) -> bool:
            store.forget(conversation_id)
            raise Crash

    with pytest.raises(Crash):
        ActionsFold(log, Crashing()).run_once()
    assert due(store) == {"gone"}
    ActionsFold(log, store).run_once()
    assert not due(store) and not kept(store, "gone")


def test_who_asks_again_meanwhile_is_not_lost(log: EmbeddedLog, store: Backend) -> None:
    talk(log, "gone", range(2))
    work(log, store)
    forget(log, "gone", by="ann")

    class Asking:
        """Between deletion and note, the conversation goes on, and somebody asks again and is folded."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def forget(self, conversation_id: str) -> bool:
            found = store.forget(conversation_id)
            talk(log, "gone", range(2, 4))
            forget(log, "gone", by="bob")
            ActionsFold(log, store)._fold()
            return found

    ActionsFold(log, Asking()).run_once()
    assert due(store) == {"gone"}
    work(log, store)
    ActionsFold(log, store).run_once()
    assert not due(store) and not kept(store, "gone")


def test_actions_folded_again_do_not_forget_what_came_since(log: EmbeddedLog, store: Backend) -> None:
    talk(log, "gone", range(2))
    work(log, store)
    forget(log, "gone", by="ann")
    fold = ActionsFold(log, store)
    fold.run_once()
    talk(log, "gone", range(2, 4))
    work(log, store)
    store.fold_actions(log.span(ACTIONS, 0).topic_id, 1, 9, {})  # the broker lost what came behind
    assert fold.run_once() == 1
    assert kept(store, "gone")


def test_a_withdrawn_forgetting_is_no_longer_due(log: EmbeddedLog, store: Backend) -> None:
    talk(log, "stays", range(3))
    forget(log, "stays", by="ann")
    ActionsFold(log, store).run_once()
    withdraw(log, "forget", ["stays"])
    ActionsFold(log, store).run_once()
    work(log, store)
    ActionsFold(log, store).run_once()
    assert kept(store, "stays") and not due(store)


def test_a_conversation_of_a_log_that_is_gone_is_not_due_for_ever(
    tmp_path: Path, log: EmbeddedLog, store: Backend
) -> None:
    talk(log, "gone", range(3))
    body = forget(log, "gone", by="ann")
    other = EmbeddedLog(tmp_path / "other.db")
    talk(other, "x", [0])
    append_action(other, "forget", "gone", body, by="ann")
    ActionsFold(other, store).run_once()
    assert not due(store)
    other.close()


# Calibrations


def test_the_calibration_in_force_at_an_offset_is_the_last_one_before_it(log: EmbeddedLog) -> None:
    talk(log, "c", range(2))
    assert activate_calibration(log, CONFIG, by="ann") == {0: 2}
    talk(log, "c", range(2, 4))
    assert activate_calibration(log, OTHER, by="ann") == {0: 5}
    actions = read_actions(log)
    found = [calibration_at(actions, PROJECTIONS, 0, offset) for offset in range(8)]
    assert found == [None, None, CONFIG, CONFIG, CONFIG, OTHER, OTHER, OTHER]
    assert found[2] and found[2].config_id == CONFIG.config_id
    assert calibration_at(actions, PROJECTIONS, 1, 7) is None
    assert calibration_at(actions, "another", 0, 7) is None


def test_a_wiped_store_with_a_log_cut_short_judges_by_the_calibration_that_was_in_force(
    empty_store: Callable[[], Backend], log: EmbeddedLog, store: Backend
) -> None:
    activate_calibration(log, OTHER, by="ann")
    talk(log, "c", range(4), -5.0)
    work(log, store)
    judged = {finding.config_id for finding in store.findings(9)}
    assert judged == {OTHER.config_id}
    log.retain(PROJECTIONS, records=4)
    anew = empty_store()
    worker = Worker(log, anew, CONFIG, recorded=recorded_calibrations(log))
    while worker.run_once():
        pass
    again: list[Finding] = anew.findings(9)
    assert again == store.findings(9)


def test_calibrations_of_another_topic_of_the_same_name_are_passed_over(log: EmbeddedLog) -> None:
    activate_calibration(log, OTHER, by="ann")
    actions = read_actions(log)
    here = log.span(PROJECTIONS, 0).topic_id
    assert calibration_at(actions, PROJECTIONS, 0, 5, here) == OTHER
    assert calibration_at(actions, PROJECTIONS, 0, 5, "another") is None
    key = f"calibration/{PROJECTIONS}/0/3"
    append_action(log, "calibration", key.removeprefix("calibration/"), Activation("", CONFIG.config_id), by="ann")
    append_action(log, "config", CONFIG.config_id, CONFIG, by="ann")
    assert calibration_at(read_actions(log), PROJECTIONS, 0, 5, "another") == CONFIG


def test_a_calibration_that_is_missing_is_a_loud_error(log: EmbeddedLog) -> None:
    activate_calibration(log, OTHER, by="ann")
    actions = {key: value for key, value in read_actions(log).items() if not key.startswith("config/")}
    with pytest.raises(LogError, match="is missing"):
        calibration_at(actions, PROJECTIONS, 0, 5)


def test_recorded_calibrations_see_what_is_added(log: EmbeddedLog) -> None:
    recorded = recorded_calibrations(log)
    assert recorded(0, 9) is None
    activate_calibration(log, OTHER, by="ann")
    assert isinstance(found := recorded(0, 9), DetectorConfig) and found.config_id == OTHER.config_id


def test_a_silence_mutes_what_has_all_that_it_names() -> None:
    until = "2026-01-01T00:00:00Z"
    one = {"deployment": "shop", "conversation_id": "c", "kind": "dip", "severity": "warning"}
    assert Silence(until).mutes(one) and Silence(until).mutes({})
    assert Silence(until, deployment="shop", conversation_id="c", kind="dip").mutes(one)
    for other in ({"deployment": "x"}, {"conversation_id": "x"}, {"kind": "low_start"}):
        assert not Silence(until, **{"deployment": "shop", **other}).mutes(one)
    warning = Matcher("severity", "=", "warning")
    assert Silence(until, deployment="shop", matchers=(warning,)).mutes(one)
    assert not Silence(until, deployment="shop", matchers=(warning,)).mutes({**one, "severity": "critical"})
    assert not Silence(until, deployment="x", matchers=(warning,)).mutes(one)
