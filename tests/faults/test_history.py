"""The history checker catches what it is there for: each planted fault is found, and a sound history has none."""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from service import CONFIG, POISON, message, projection, traffic

from alerts.table import Table
from faults.history import (
    Delivery,
    Expected,
    Produced,
    Seen,
    Told,
    _session,
    compare,
    compare_delivered,
    compare_produced,
    digest,
    examine,
    expect,
)
from monitor.alert import Alert, state
from monitor.control import calibration_message
from monitor.detect.conversation import encode_state
from monitor.placement import partition_of
from monitor.store.sqlite import SqliteStore
from monitor.store.store import MinuteSums
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, EmbeddedLog, Message, Record
from monitor.worker import Worker

STRICTER = replace(CONFIG, boundaries=replace(CONFIG.boundaries, level=1.0))


def on_partitions(messages: list[Message], count: int) -> dict[int, list[Record]]:
    """As a broker would lay them down, with a gap in the offsets now and then, as Kafka may have it."""
    found: dict[int, list[Record]] = {partition: [] for partition in range(count)}
    for number, m in enumerate(messages):
        partition = partition_of(m.key, count) if m.partition is None else m.partition
        offset = found[partition][-1].offset + 1 + (number % 17 == 0) if found[partition] else 0
        found[partition].append(Record(PROJECTIONS, partition, offset, m.key, m.value, m.headers))
    return found


def sound(expected: Expected) -> Seen:
    """What a store would hold that has made no mistake."""
    sessions = {key: _session(expected.states[key], *last) for key, last in expected.last.items()}
    return Seen(
        positions=dict(expected.ends),
        states={key: encode_state(state) for key, state in expected.states.items()},
        listed=list(sessions.values()),
        sessions=dict(sessions),
        points={key: list(points) for key, points in expected.points.items()},
        findings={key: list(found) for key, found in expected.findings.items()},
        counts=dict(expected.counts),
        pending=list(expected.all_findings().values()),
        dead=[Record(DEAD_LETTERS, 0, n, key, value) for n, (key, value) in enumerate(expected.dead.items())],
        sums=[MinuteSums(minute, name, *row) for (minute, name), row in expected.sums.items()],
    )


@pytest.fixture(scope="module")
def history() -> dict[int, list[Record]]:
    messages = traffic(12, 10, poison=0.02, seed=5)
    messages[60:60] = [calibration_message(STRICTER, partition) for partition in range(3)]
    return on_partitions(messages, 3)


@pytest.fixture
def expected(history: dict[int, list[Record]]) -> Expected:
    return expect(history, CONFIG)


@pytest.fixture
def seen(expected: Expected) -> Seen:
    return copy.deepcopy(sound(expected))


def a_drifter(expected: Expected) -> str:
    return next(key for key, found in expected.findings.items() if len(found) > 1)


def test_a_sound_history_has_no_fault_and_is_not_empty(expected: Expected, seen: Seen) -> None:
    assert compare(expected, seen) == []
    assert expected.dead and expected.all_findings() and expected.counts["duplicate"] and expected.sums
    assert {finding.config_id for finding in expected.all_findings().values()} == {
        CONFIG.config_id,
        STRICTER.config_id,
    }


def behind(expected: Expected, seen: Seen) -> None:
    seen.positions[1] = (seen.positions[1] or 0) - 1


def state_gone(expected: Expected, seen: Seen) -> None:
    del seen.states["c3"]


def folded_twice(expected: Expected, seen: Seen) -> None:
    state = expected.states["c3"]
    seen.states["c3"] = encode_state(replace(state, duplicates=state.duplicates + 1))


def last_record_lost(expected: Expected, seen: Seen) -> None:
    state = expected.states["c3"]
    seen.states["c3"] = encode_state(replace(state, folded=state.folded - 1, ewma=state.ewma + 0.1))


def listed_twice(expected: Expected, seen: Seen) -> None:
    seen.listed.append(seen.listed[0])


def session_stale(expected: Expected, seen: Seen) -> None:
    session = seen.sessions["c3"]
    assert session is not None
    seen.sessions["c3"] = replace(session, projection=session.projection + 1e-4)


def point_twice(expected: Expected, seen: Seen) -> None:
    seen.points["c3"].append(seen.points["c3"][-1])


def point_gone(expected: Expected, seen: Seen) -> None:
    del seen.points["c3"][4]


def point_wrong(expected: Expected, seen: Seen) -> None:
    seen.points["c3"][4] = replace(seen.points["c3"][4], risk=0.123)


def finding_gone(expected: Expected, seen: Seen) -> None:
    seen.findings[a_drifter(expected)].pop()


def finding_twice(expected: Expected, seen: Seen) -> None:
    found = seen.findings[a_drifter(expected)]
    found.append(found[0])


def finding_under_another_id(expected: Expected, seen: Seen) -> None:
    found = seen.findings[a_drifter(expected)]
    found.append(replace(found[0], id="0" * 32))


def finding_changed(expected: Expected, seen: Seen) -> None:
    found = seen.findings[a_drifter(expected)]
    found[0] = replace(found[0], config_id="another")


def outbox_twice(expected: Expected, seen: Seen) -> None:
    seen.pending.append(seen.pending[0])


def outbox_changed(expected: Expected, seen: Seen) -> None:
    seen.pending[0] = replace(seen.pending[0], risk=77.0)


def count_short(expected: Expected, seen: Seen) -> None:
    seen.counts["folded"] -= 1


def count_over(expected: Expected, seen: Seen) -> None:
    seen.counts["duplicate"] += 1


def sum_twice(expected: Expected, seen: Seen) -> None:
    row = seen.sums[0]
    seen.sums[0] = replace(row, responses=2 * row.responses, z=2 * row.z)


def sum_gone(expected: Expected, seen: Seen) -> None:
    del seen.sums[0]


def letter_gone(expected: Expected, seen: Seen) -> None:
    seen.dead.pop()


def letter_changed(expected: Expected, seen: Seen) -> None:
    seen.dead[0] = replace(seen.dead[0], value=b"{}")


def letter_of_a_sound_record(expected: Expected, seen: Seen) -> None:
    seen.dead.append(Record(DEAD_LETTERS, 0, 999, f"{PROJECTIONS}/0/0", b"{}"))


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (behind, "lost"),
        (state_gone, "lost"),
        (folded_twice, "duplicated"),
        (last_record_lost, "lost"),
        (listed_twice, "split"),
        (session_stale, "changed"),
        (point_twice, "duplicated"),
        (point_gone, "lost"),
        (point_wrong, "changed"),
        (finding_gone, "lost"),
        (finding_twice, "duplicated"),
        (finding_under_another_id, "extra"),
        (finding_changed, "changed"),
        (outbox_twice, "duplicated"),
        (outbox_changed, "changed"),
        (count_short, "lost"),
        (count_over, "duplicated"),
        (sum_twice, "duplicated"),
        (sum_gone, "lost"),
        (letter_gone, "lost"),
        (letter_changed, "changed"),
        (letter_of_a_sound_record, "extra"),
    ],
)
def test_a_planted_fault_in_the_store_is_found(
    expected: Expected, seen: Seen, plant: Callable[[Expected, Seen], None], kind: str
) -> None:
    plant(expected, seen)
    assert [fault.kind for fault in compare(expected, seen)] == [kind]


def test_a_letter_written_twice_by_a_crash_is_one(expected: Expected, seen: Seen) -> None:
    seen.dead.append(replace(seen.dead[0], offset=999))
    assert compare(expected, seen) == []


def test_a_conversation_laid_into_two_partitions_is_never_folded_in_both() -> None:
    there = partition_of("a", 2)
    messages = [message(projection("a", turn)) for turn in range(4)]
    messages += [replace(message(projection("a", 4)), partition=1 - there)]
    expected = expect(on_partitions(messages, 2), CONFIG)
    assert expected.states["a"].folded == 4
    assert list(expected.dead) == [f"{PROJECTIONS}/{1 - there}/0"]


# What was produced.


def claims(history: dict[int, list[Record]]) -> Produced:
    found = [(r.key, digest(r.value)) for part in history.values() for r in part if r.key]
    return Produced(found, set(found))


def test_what_was_produced_is_there(history: dict[int, list[Record]]) -> None:
    assert compare_produced(history, [claims(history)]) == ([], 0)


def test_an_acknowledged_record_that_is_not_there_is_lost(history: dict[int, list[Record]]) -> None:
    produced = claims(history)
    produced.offered.append(("c3", "nowhere"))
    assert compare_produced(history, [produced]) == ([], 0), "nobody promised it"
    produced.acknowledged.add(("c3", "nowhere"))
    faults, forgotten = compare_produced(history, [produced])
    assert ([fault.kind for fault in faults], forgotten) == (["lost"], 1)
    assert compare_produced(history, [produced], forgetful=True) == ([], 1)


def test_a_record_with_another_body_is_found(history: dict[int, list[Record]]) -> None:
    produced = claims(history)
    damaged = copy.deepcopy(history)
    values = [record.value for record in damaged[0]]
    at = next(n for n, value in enumerate(values) if b"toy" in value and values.count(value) == 1)
    damaged[0][at] = replace(damaged[0][at], value=values[at].replace(b"toy", b"toz"))
    assert {fault.kind for fault in compare_produced(damaged, [produced])[0]} == {"lost", "changed"}


def test_turns_that_changed_places_are_found() -> None:
    messages = [message(projection("a", turn)) for turn in range(3)]
    produced = Produced([(m.key, digest(m.value)) for m in messages])
    again = [messages[0], messages[1], messages[0], messages[2]]  # sent again is not out of order
    assert compare_produced(on_partitions(again, 1), [produced])[0] == []
    faults, _ = compare_produced(on_partitions([messages[0], messages[2], messages[1]], 1), [produced])
    assert [fault.kind for fault in faults] == ["changed"]


# What was delivered.


def alerts(expected: Expected) -> dict[str, Alert]:
    """Those that a dispatcher would make of the findings."""
    table = Table()
    for finding in expected.all_findings().values():
        table.take(finding, None, [], 0.0)
    return table.alerts


def deliveries(expected: Expected) -> list[Delivery]:
    """Each alert once for each state in which it was."""
    found, table = [], Table()
    for finding in expected.all_findings().values():
        alert = table.take(finding, None, [], 0.0)
        told = Told(alert.id, state(alert), alert.finding_ids)
        if told[:2] not in [one.told[0][:2] for one in found]:
            found.append(Delivery(f"n{len(found)}", repr(told).encode(), (told,)))
    return found


def test_delivered_once_or_often_with_one_body(expected: Expected) -> None:
    told = deliveries(expected)
    assert compare_delivered(expected, told, alerts(expected)) == []
    assert compare_delivered(expected, told + told[:3], alerts(expected)) == []


def test_what_is_wrong_with_deliveries_is_found(expected: Expected) -> None:
    told, known = deliveries(expected), alerts(expected)
    last = told[-1]
    kinds = [
        [fault.kind for fault in compare_delivered(expected, broken, known)]
        for broken in (
            told[:-1],
            [*told, last._replace(body=b"{}")],
            [*told, last._replace(id="x")],
            [*told, Delivery("x", b"{}", (Told("unknown", "warning", ()),))],
            [*told, Delivery("x", b"{}", (last.told[0]._replace(state="other", findings=("unknown",)),))],
        )
    ]
    assert kinds == [["lost"], ["changed"], ["duplicated"], ["extra"], ["extra"]]
    less = {id: alert for id, alert in known.items() if id != last.told[0].alert}
    here = [one for one in told if one.told[0].alert != last.told[0].alert]
    missing = [found for found in expected.all_findings().values() if found.episode_id not in less]
    assert {fault.kind for fault in compare_delivered(expected, here, less)} == {"lost"}
    assert compare_delivered(expected, here, less, pending=missing) == [], "they still wait"


# The whole of it, over a real log, worker and store.


@pytest.fixture
def folded(tmp_path: Path) -> tuple[EmbeddedLog, Path]:
    log = EmbeddedLog(tmp_path / "log.db")
    log.append(PROJECTIONS, traffic(10, 10, seed=3))
    log.append(PROJECTIONS, [calibration_message(STRICTER, 0), Message("c0", POISON)])
    log.append(PROJECTIONS, [message(projection("c1", 300)), message(projection("c1", 30, resent="late"))])
    store = SqliteStore(tmp_path / "store.db")
    worker = Worker(log, store, CONFIG, batch_size=7)
    while worker.run_once():
        pass
    store.close()
    return log, tmp_path / "store.db"


def examined(log: EmbeddedLog, path: Path) -> Any:
    store = SqliteStore(path)
    try:
        return examine(log, store, CONFIG)
    finally:
        store.close()


def test_a_real_history_is_sound(folded: tuple[EmbeddedLog, Path]) -> None:
    report = examined(*folded).insist()
    assert report.events > 100 and report.findings and (report.lost, report.duplicated) == (0, 0)


@pytest.mark.parametrize(
    ("damage", "lost", "duplicated"),
    [
        ("DELETE FROM findings WHERE id = (SELECT max(id) FROM findings)", True, False),
        ("UPDATE counts SET count = count + 1 WHERE outcome = 'folded'", False, True),
        ("DELETE FROM states WHERE conversation_id = 'c5'", True, False),
        ("UPDATE positions SET offset = offset - 1", True, False),
    ],
)
def test_damage_in_a_real_store_is_found(
    folded: tuple[EmbeddedLog, Path], damage: str, lost: bool, duplicated: bool
) -> None:
    log, path = folded
    with sqlite3.connect(path) as connection:
        assert connection.execute(damage).rowcount == 1
    report = examined(log, path)
    assert (report.lost > 0, report.duplicated > 0) == (lost, duplicated)
    with pytest.raises(AssertionError, match="faults in"):
        report.insist()
