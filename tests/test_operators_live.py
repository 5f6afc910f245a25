"""The operators' promises over real servers: a broker that compacts the actions, several partitions, and Redis.

Compaction was seen on noida only: Tansu has none. An outside broker is left alone, for the topics have fixed names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import servers
from service import CONFIG, message, projection
from tiny import environment

from monitor.actions import (
    ActionsFold,
    Verdict,
    activate_calibration,
    append_action,
    body_of,
    due,
    forget,
    read_actions,
    recorded_calibrations,
    withdraw,
)
from monitor.batch import Poison, to_dead_letter
from monitor.deadletters import find_letter, newest_letters, requeue
from monitor.placement import partition_of
from monitor.store.redis import RedisStore
from monitor.stream.kafka import KafkaLog, KafkaSubscription, KafkaTopics
from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS, Record
from monitor.stream.topics import TopicSpec
from monitor.worker import Worker

PARTITIONS = 3
# Each time a consumer joins a group, Tansu takes 15 s to let it in.
only_noida = pytest.mark.parametrize("broker", ["noida"], indirect=True)
EAGER = {
    "cleanup.policy": "compact",
    "segment.ms": "100",
    "segment.bytes": "1024",
    "min.cleanable.dirty.ratio": "0.01",
    "min.compaction.lag.ms": "0",
    "delete.retention.ms": "86400000",
}


@pytest.fixture(params=["noida", "tansu"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[servers.Server]:
    """This test's own, with the three topics."""
    if servers.OUTSIDE_KAFKA:
        pytest.skip("an outside broker may have these topics in use")
    server = servers.broker(request.param, tmp_path / "broker")
    try:
        server.start()
        topics = KafkaTopics(server.address)
        topics.create(
            [
                TopicSpec(name=PROJECTIONS, partitions=PARTITIONS, replication=1, config={}),
                TopicSpec(name=DEAD_LETTERS, partitions=2, replication=1, config={}),
                TopicSpec(name=ACTIONS, partitions=1, replication=1, config=EAGER),
            ]
        )
        topics.close()
        yield server
    finally:
        server.kill()


@pytest.fixture
def log(broker: servers.Server) -> Iterator[KafkaLog]:
    opened = KafkaLog(broker.address)
    yield opened
    opened.close()


@pytest.fixture
def store(shared_redis: str) -> Iterator[RedisStore]:
    opened = RedisStore(shared_redis, prefix=servers.fresh("operators"))
    yield opened
    opened.close()


@pytest.fixture
def anew(shared_redis: str) -> Iterator[RedisStore]:
    """What a wiped store is: one that nothing was folded into."""
    opened = RedisStore(shared_redis, prefix=servers.fresh("wiped"))
    yield opened
    opened.close()


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def work(broker: servers.Server, log: KafkaLog, store: RedisStore, **options: object) -> None:
    """Fold everything that the log holds, in all partitions."""
    subscription = KafkaSubscription(broker.address, PROJECTIONS, servers.fresh("group"))
    worker = Worker(log, store, CONFIG, subscription=subscription, **options)  # type: ignore[arg-type]

    def folded() -> bool:
        worker.run_once(0.2)
        for partition in range(PARTITIONS):
            span, position = log.span(PROJECTIONS, partition), store.position(PROJECTIONS, partition)
            if span.end > span.begin and (position is None or position.offset < span.end):
                return False
        return True

    try:
        until(folded)
    finally:
        subscription.close()


def test_compaction_takes_nothing_that_holds(
    broker: servers.Server, log: KafkaLog, store: RedisStore, anew: RedisStore
) -> None:
    fold = ActionsFold(log, store)
    for number in range(40):
        append_action(log, "verdict", f"c{number % 4}", Verdict("healthy", None, str(number)), by="ann")
        if number == 20:
            assert fold.run_once() == 21
    withdraw(log, "verdict", ["c0"])
    fold.run_once()
    expected = {f"verdict/c{number % 4}": Verdict("healthy", None, str(number)) for number in (37, 38, 39)}
    assert {key: body_of(key, value) for key, value in store.actions("").items()} == expected
    if broker.name == "noida":
        until(lambda: len(log.read(ACTIONS, 0, 0, 99)) < 10)
        assert log.read(ACTIONS, 0, 0, 99)[0].offset > 30
    fresh = ActionsFold(log, anew)
    assert fresh.run_once() <= 41
    assert anew.actions("") == store.actions("") == read_actions(log)
    topic_id = log.span(ACTIONS, 0).topic_id
    assert anew.actions_offset(topic_id) == store.actions_offset(topic_id) == 41
    assert fresh.run_once() == fold.run_once() == 0


@only_noida
def test_conversations_are_forgotten_in_their_own_partition_also_in_a_wiped_store(
    broker: servers.Server, log: KafkaLog, store: RedisStore, anew: RedisStore
) -> None:
    names = [f"c{number}" for number in range(9)]
    assert {partition_of(name, PARTITIONS) for name in names} == set(range(PARTITIONS))
    log.append(PROJECTIONS, [message(projection(name, 0, -9.0)) for name in names])
    work(broker, log, store)
    for name in names[:4]:
        assert forget(log, name, by="ann").partition == partition_of(name, PARTITIONS)
    ActionsFold(log, store).run_once()
    ActionsFold(log, anew).run_once()
    assert due(anew) == set(names[:4]) and not due(store)
    work(broker, log, anew)
    ActionsFold(log, anew).run_once()
    for one in (store, anew):
        assert {session.conversation_id for session in one.sessions(99)} == set(names[4:])
        assert {pending.finding.conversation_id for pending in one.pending(99)} == set(names[4:])
        assert not due(one)


@only_noida
def test_a_calibration_comes_into_force_in_every_partition_and_after_a_wipe_too(
    broker: servers.Server, log: KafkaLog, store: RedisStore, anew: RedisStore
) -> None:
    other = msgspec.structs.replace(CONFIG, release_turns=3)
    log.append(PROJECTIONS, [message(projection(f"c{number}", 0)) for number in range(9)])
    offsets = activate_calibration(log, other, by="ann")
    assert set(offsets) == set(range(PARTITIONS))
    log.append(PROJECTIONS, [message(projection(f"c{number}", 1, -9.0)) for number in range(9)])
    work(broker, log, store)
    assert {finding.config_id for finding in store.findings(99)} == {other.config_id}
    recorded = recorded_calibrations(log)
    for partition, offset in offsets.items():
        assert recorded(partition, offset - 1) is None
        found = recorded(partition, offset + 1)
        assert found is not None and found.config_id == other.config_id
    work(broker, log, anew, recorded=recorded)
    assert sorted(anew.findings(99), key=lambda one: one.id) == sorted(store.findings(99), key=lambda one: one.id)


def test_dead_letters_are_found_by_their_key_and_sent_to_their_own_partition(
    broker: servers.Server, log: KafkaLog
) -> None:
    letters = [
        to_dead_letter(Record(PROJECTIONS, 7, number, f"c{number}", b"\xffbytes"), Poison("undecodable", ""))
        for number in range(12)
    ]
    log.append(DEAD_LETTERS, [*letters, *letters[:3]])
    found = newest_letters(log, 99)
    assert len(found) == 12 and len(newest_letters(log, 5)) == 5
    one = find_letter(log, letters[4].key)
    assert one is not None and one.value == b"\xffbytes"
    gone, refused = requeue(log, found, by="ann")
    assert len(gone) == 12 and not refused
    again = find_letter(log, letters[4].key)
    assert again is not None and again.requeued is not None and again.requeued.by == "ann"
    partition = partition_of("c4", PARTITIONS)
    span = log.span(PROJECTIONS, partition)
    assert ("c4", b"\xffbytes") in [
        (record.key, record.value) for record in log.read(PROJECTIONS, partition, span.begin, 99)
    ]


# The doctor, as a process of its own


def doctor(**settings: str) -> dict[str, list[dict[str, str]]]:
    """Check name → what was said of it."""
    done = subprocess.run(
        [sys.executable, "-m", "monitor", "doctor", "--patience", "0.2", "--json"],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = json.loads(done.stdout)
    assert done.returncode == (1 if told["status"] == "broken" else 0) and "Traceback" not in done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for one in told["checks"]:
        found.setdefault(one["name"], []).append(one)
    return found


def statuses(found: dict[str, list[dict[str, str]]], name: str) -> set[str]:
    return {one["status"] for one in found[name]}


def test_the_doctor_sees_a_broker_without_topics_and_one_with_them(
    own_kafka: servers.Server, own_redis: servers.Server, tmp_path: Path
) -> None:
    settings = {
        "ANCHORWATCH_DATA_DIR": str(tmp_path),
        "ANCHORWATCH_LOG_URL": f"kafka://{own_kafka.address}",
        "ANCHORWATCH_STORE_URL": servers.redis_url(own_redis),
        "ANCHORWATCH_KAFKA_PARTITIONS": "3",
        "ANCHORWATCH_KAFKA_REPLICATION": "1",
    }
    before = doctor(**settings)
    assert any("topics create" in one["cure"] for checks in before.values() for one in checks), before
    made = subprocess.run(
        [sys.executable, "-m", "monitor", "topics", "create"],
        env=environment(**settings),
        capture_output=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    after = doctor(**settings)
    assert statuses(after, "packages") == statuses(after, "log") == {"ok"}
    assert "crc32c" in after["packages"][0]["says"] and "3 partitions" in after["log"][0]["says"]
    assert "broken" not in statuses(after, "topics") | statuses(after, "store")
    assert statuses(after, "clock") == statuses(after, "partitions") == {"ok"}


def test_the_doctor_tells_servers_that_are_away_within_seconds(tmp_path: Path) -> None:
    found = doctor(
        ANCHORWATCH_DATA_DIR=str(tmp_path),
        ANCHORWATCH_LOG_URL=f"kafka://127.0.0.1:{servers.free_port()}",
        ANCHORWATCH_STORE_URL=f"redis://127.0.0.1:{servers.free_port()}/0",
    )
    for name in ("log", "store"):
        (one,) = found[name]
        assert one["status"] == "broken" and one["cure"]
    assert statuses(found, "bundle") == {"ok"}
