"""Promises of the store on Redis that no other store makes: the server away, wiped, full, another one, one of many.

Every server here is real, and the faults are done to it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from redis import Redis
from redis.exceptions import RedisError
from servers import Server, free_port, fresh, redis, redis_url
from service import projection
from test_store import NOTHING, START, TOPIC, Writer, drifting, everything, parts

from monitor.address import RedisAddress, redis_address
from monitor.errors import CommitRefused, ConfigurationError, StoreError, StoreUnavailable
from monitor.placement import partition_of
from monitor.store import open_store
from monitor.store.layout import READ_AHEAD, pack_points, pack_session, state_of, unpack_points, unpack_session
from monitor.store.redis import RedisStore
from monitor.store.store import ClosedMinutes, MinuteSums, Position, Session, TrajectoryPoint

Connect = Callable[..., RedisStore]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open stores that wait half a second for an answer; closed at the end."""
    opened: list[RedisStore] = []

    def make(server: Server | str, **options: Any) -> RedisStore:
        url = server if isinstance(server, str) else redis_url(server)
        opened.append(RedisStore(url, **{"timeout_seconds": 0.5, **options}))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def client(server: Server) -> Any:
    return Redis(server.host, server.port)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def works(store: RedisStore) -> bool:
    try:
        store.position(TOPIC, 0)
    except StoreUnavailable:
        return False
    return True


def keys(server: Server) -> dict[bytes, bytes]:
    """Everything that the server holds, byte for byte."""
    redis = client(server)
    return {key: redis.dump(key) for key in redis.scan_iter(count=1000)}


# The server is away.


@pytest.mark.parametrize("end", [Server.kill, Server.stop])
def test_a_server_that_is_gone_is_unavailable_and_back_it_has_every_commit(
    own_redis: Server, connect: Connect, end: Callable[[Server], None]
) -> None:
    """With appendfsync always, as the fixture has it, even after SIGKILL."""
    store = connect(own_redis)
    writer = Writer(store)
    writer.commit(*drifting("a"))
    before = everything(store)
    end(own_redis)
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as caught:
            store.position(TOPIC, 0)
        assert caught.value.retry and "can't be reached" in caught.value.problem
    own_redis.start()
    until(lambda: works(store))
    assert everything(store) == before
    writer.commit(projection("a", 6))


def test_a_frozen_server_is_given_up_in_time_and_the_unanswered_commit_counts_once(
    own_redis: Server, connect: Connect
) -> None:
    store = connect(own_redis)
    writer = Writer(store)
    writer.commit(*drifting("a"))
    batch = writer.batch(projection("a", 6))
    own_redis.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.5 s"):
            store.commit(batch)
        assert time.monotonic() - began < 10
    finally:
        own_redis.thaw()
    until(lambda: works(store))
    until(lambda: store.position(TOPIC, 0) == Position(7))  # it lay in the server's socket all the while
    with pytest.raises(CommitRefused):
        store.commit(batch)
    assert store.counts() == {"folded": 7}
    assert [p.number for p in store.trajectory("a")] == list(range(1, 8))


def test_a_server_that_comes_back_empty_is_a_store_without_positions(tmp_path: Path, connect: Connect) -> None:
    server = redis(tmp_path / "redis", "--appendonly", "no")
    try:
        store = connect(server.start())
        writer = Writer(store)
        writer.commit(*drifting("a"))
        stale = writer.batch(projection("a", 6))
        server.kill()
        server.start()
        until(lambda: works(store))
        assert everything(store) == NOTHING
        with pytest.raises(CommitRefused):
            store.commit(stale)
        assert everything(store) == NOTHING
        again = Writer(store)
        again.commit(*drifting("a"))
        assert (store.session("a"), len(store.findings(9))) != (None, 0)
    finally:
        server.kill()


def test_a_wipe_under_a_running_worker_refuses_it_and_what_is_folded_anew_is_the_same(
    own_redis: Server, connect: Connect
) -> None:
    store = connect(own_redis)
    Writer(store).commit(projection("first", 0, deployment="another label"), *drifting("a"))
    before = everything(store)
    client(own_redis).flushall()
    with pytest.raises(CommitRefused):
        store.commit(replace(Writer(store).batch(projection("a", 6)), expected=Position(7)))
    assert everything(store) == NOTHING
    Writer(store).commit(projection("first", 0, deployment="another label"), *drifting("a"))
    after = everything(store)
    assert [p.finding for p in after[7]] == [p.finding for p in before[7]]  # type: ignore[attr-defined]
    assert after[:7] + after[8:] == before[:7] + before[8:]


def test_scripts_that_the_server_has_forgotten_are_sent_again(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    writer = Writer(store)
    writer.commit(projection("a", 0))
    client(own_redis).script_flush()
    writer.commit(projection("a", 1))
    assert store.position(TOPIC, 0) == Position(2)
    assert store.lease("house", "one", 10)
    client(own_redis).script_flush()
    assert store.forget("a")


def test_memory_that_is_out_refuses_the_commit_whole_and_takes_it_later(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    writer = Writer(store)
    writer.commit(*drifting("a"))
    server = client(own_redis)
    server.config_set("maxmemory", "1mb")  # less than it uses already
    before = keys(own_redis)
    with pytest.raises(StoreUnavailable, match="out of memory") as caught:
        writer.commit(
            *drifting("b"),
            projection("c", 0, deployment="never seen"),
            sums=[MinuteSums(1, "shop", 1, 1, 1)],
            config=b"config",
        )
    assert "ANCHORWATCH_STORE_TTL_SECONDS" in caught.value.cure
    for ask in (
        lambda: store.close_minutes(None, ClosedMinutes(1, [], {}), []),
        lambda: store.fold_actions("t", 0, 1, {"a": b"1"}),
        lambda: store.lease("house", "one", 10),
    ):
        with pytest.raises((StoreUnavailable, AttributeError)):
            ask()
    assert keys(own_redis) == before
    assert len(everything(store)) == len(NOTHING), "reading goes on"
    assert store.forget("a"), "deleting goes on: it is what frees memory"
    server.config_set("maxmemory", "0")
    Writer(store).commit(*drifting("b"))
    assert store.session("b")


def test_a_server_that_is_away_when_the_store_is_opened_is_looked_at_when_it_comes(
    tmp_path: Path, connect: Connect
) -> None:
    server = redis(tmp_path / "redis", "--maxmemory-policy", "allkeys-lru")
    store = connect(server)
    with pytest.raises(StoreUnavailable):
        store.position(TOPIC, 0)
    try:
        server.start()
        with pytest.raises(StoreError, match="throws keys away") as caught:
            store.position(TOPIC, 0)
        assert "maxmemory-policy noeviction" in caught.value.cure and not caught.value.retry
        client(server).config_set("maxmemory-policy", "noeviction")
        assert store.position(TOPIC, 0) is None
        server.kill()
        assert not works(store)
        server.start()
        with pytest.raises(StoreError, match="throws keys away"):
            store.position(TOPIC, 0)
    finally:
        server.kill()


def test_a_slow_script_of_somebody_else_is_waited_out(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis, timeout_seconds=10)
    server = client(own_redis)
    server.config_set("busy-reply-threshold", 50)

    def loop() -> None:
        with contextlib.suppress(RedisError):
            server.eval("while true do end", 0)

    other = threading.Thread(target=loop)
    other.start()
    until(lambda: not works(store))
    with pytest.raises(StoreUnavailable, match=r"(?i)busy"):
        store.position(TOPIC, 0)
    client(own_redis).script_kill()
    other.join()
    assert works(store)


def test_a_replica_takes_no_commit_and_one_promoted_does(tmp_path: Path, connect: Connect) -> None:
    primary = redis(tmp_path / "primary")
    replica = redis(tmp_path / "replica", "--replicaof", f"127.0.0.1 {primary.port}")
    try:
        primary.start()
        replica.start()
        Writer(connect(primary)).commit(*drifting("a"))
        store = connect(replica)
        until(lambda: store.position(TOPIC, 0) == Position(6))
        with pytest.raises(StoreUnavailable, match="a replica"):
            Writer(store).commit(projection("a", 6))
        client(replica).replicaof("no", "one")
        assert Writer(store).commit(projection("a", 6)).expected == Position(6)
    finally:
        primary.kill()
        replica.kill()


# What a server must be.


def test_a_wrong_password_is_no_outage(tmp_path: Path, connect: Connect) -> None:
    server = redis(tmp_path / "redis", "--requirepass", "right horse")
    try:
        server.start()
        for options in ({}, {"password": "wrong"}):
            with pytest.raises(StoreError, match="refuses this user and password") as caught:
                connect(server, **options)
            assert not caught.value.retry and "wrong" not in str(caught.value)
            assert "ANCHORWATCH_STORE_PASSWORD_FILE" in caught.value.cure
        assert works(connect(server, password="right horse"))
        assert works(connect(f"redis://:right%20horse@{server.address}/0"))
        file = connect(f"redis://:wrong@{server.address}/0", password="right horse")
        assert works(file), "the file goes before the URL"
    finally:
        server.kill()


def test_a_certificate_is_checked(tmp_path: Path, connect: Connect) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl is not installed")
    paths = {name: str(tmp_path / name) for name in ("ca.pem", "ca.key", "redis.pem", "redis.key")}
    short = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    signed = ["-CA", paths["ca.pem"], "-CAkey", paths["ca.key"], "-addext", "subjectAltName=IP:127.0.0.1"]
    for name, more in (("ca", []), ("redis", [*signed, "-addext", "basicConstraints=critical,CA:FALSE"])):
        files = ["-keyout", paths[f"{name}.key"], "-out", paths[f"{name}.pem"], "-subj", f"/CN=anchorwatch {name}"]
        subprocess.run([openssl, "req", *short, *files, *more], check=True, capture_output=True, timeout=60)
    port = free_port()
    server = redis(
        tmp_path / "redis",
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", paths["ca.pem"]),
        *("--tls-cert-file", paths["redis.pem"], "--tls-key-file", paths["redis.key"]),
    )
    try:
        server.start()
        store = connect(f"rediss://127.0.0.1:{port}/0", ca_file=paths["ca.pem"], timeout_seconds=5)
        Writer(store).commit(*drifting("a"))
        assert store.session("a")
        for url, options in (
            (f"rediss://127.0.0.1:{port}/0", {}),  # nobody knows this authority
            (f"rediss://localhost:{port}/0", {"ca_file": paths["ca.pem"]}),  # the certificate names 127.0.0.1
        ):
            with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
                connect(url, timeout_seconds=5, **options).position(TOPIC, 0)
    finally:
        server.kill()


def test_a_user_with_no_more_rights_than_documented_can_do_all(own_redis: Server, connect: Connect) -> None:
    rights = ("~anchorwatch:*", "+@read", "+@write", "+@scripting", "+@connection", "+info")
    server = client(own_redis)
    server.execute_command("ACL", "SETUSER", "watch", "on", ">secret", *rights)
    text = (Path(__file__).parent.parent / "docs" / "redis.md").read_text()
    assert " ".join(rights) in text
    url = f"redis://watch@{own_redis.address}/0"
    store = connect(url, password="secret")
    Writer(store).commit(*drifting("a"))
    everything(store)
    assert store.lease("house", "one", 10)
    store.fold_actions("t", 0, 1, {"a": b"1"})
    store.expire(0.0)
    assert abs(store.now() - time.time()) < 60
    assert store.forget("a")
    server.execute_command("ACL", "SETUSER", "watch", "-@write")
    with pytest.raises(StoreError, match="forbids a command") as caught:
        Writer(store).commit(projection("b", 0))
    assert not caught.value.retry and "ACL SETUSER" in caught.value.cure


def test_a_store_of_another_schema_is_refused_and_left_alone(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    Writer(store).commit(*drifting("a"))
    server = client(own_redis)
    assert server.hget("anchorwatch:{test/0}:position", "schema") == b"2"
    server.hset("anchorwatch:{test/0}:position", "schema", "3")
    before = keys(own_redis)
    with pytest.raises(StoreError, match="schema version 3, this program writes 2"):
        store.position(TOPIC, 0)
    with pytest.raises(StoreError, match="schema version 3"):
        store.commit(
            replace(Writer(connect(own_redis, prefix="other")).batch(projection("b", 0)), expected=Position(6))
        )
    assert keys(own_redis) == before
    server.hset("anchorwatch:store", "schema", "3")
    with pytest.raises(StoreError, match="schema version 3"):
        connect(own_redis)


def test_somebody_elses_key_of_ours_is_told_and_no_content_is(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    Writer(store).commit(*drifting("secret-name"))
    server = client(own_redis)
    server.set("anchorwatch:{test/0}:c:secret-name", b"\x01\x02")
    with pytest.raises(StoreError, match="damaged") as caught:
        store.load(TOPIC, 0, ["secret-name"])
    for ask in (store.session, store.trajectory):
        with pytest.raises(StoreError, match="damaged"):
            ask("secret-name")
    server.delete("anchorwatch:{test/0}:outbox")
    server.set("anchorwatch:{test/0}:outbox", "x")
    with pytest.raises(StoreError, match="does not take a command") as caught:
        store.pending(10)
    assert "secret" not in str(caught.value) and not caught.value.retry


@pytest.mark.parametrize("key", ["c:b", "outbox", "findings", "r:shop", "f:a", "labels", "counts", "hours", "s:0"])
def test_a_commit_that_failed_on_somebody_elses_key_comes_to_the_same_when_done_again(
    own_redis: Server, connect: Connect, key: str
) -> None:
    """Redis undoes nothing of a script that fails in the middle. But the position has not moved."""
    undisturbed = connect(own_redis, prefix="undisturbed")
    store = connect(own_redis, prefix="disturbed")
    server = client(own_redis)
    foreign = f"disturbed:{{/{TOPIC}/0}}:{key}"
    for one in (undisturbed, store):
        writer = Writer(one)
        writer.commit(projection("z", 0))
        batch = writer.batch(*drifting("a"), *drifting("b"), sums=[MinuteSums(1, "shop", 1, 1, 1)])
        if one is store:
            kept = server.dump(foreign)
            server.delete(foreign)
            server.setbit(foreign, 1, 1) if key not in ("c:b",) else server.sadd(foreign, "x")
            with pytest.raises(StoreError, match="does not take a command"):
                store.commit(batch)
            assert store.position(TOPIC, 0) == Position(1)
            server.delete(foreign)
            if kept:
                server.restore(foreign, 0, kept)
        one.commit(batch)
    done, expected = everything(store), everything(undisturbed)
    assert [p.finding for p in done[7]] == [p.finding for p in expected[7]]  # type: ignore[attr-defined]
    assert done[:7] + done[8:] == expected[:7] + expected[8:]


def test_a_store_that_is_emptied_while_it_is_read_is_read_again(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    Writer(store).commit(*drifting("a"))
    client(own_redis).delete("anchorwatch:{test/0}:labels")
    with pytest.raises(StoreUnavailable, match="was emptied"):
        store.load(TOPIC, 0, ["a"])
    assert store.session("a") is None


def test_a_position_knows_its_log_though_the_list_of_partitions_is_lost(own_redis: Server, connect: Connect) -> None:
    writer = Writer(connect(own_redis), partitions=4)
    writer.commit(projection("a", 0))
    writer.commit(projection("a", 1), topic_id="", partitions=0)
    for changes in ({"topic_id": "another"}, {"partitions": 8}):
        client(own_redis).delete("anchorwatch:store")
        with pytest.raises(StoreError, match=r"another log|had 4 partitions") as caught:
            writer.commit(projection("a", 2), **changes)
        assert not caught.value.retry
    client(own_redis).delete("anchorwatch:store")
    writer.commit(projection("a", 2))
    assert connect(own_redis).session("a")


def test_it_says_what_would_make_it_safer(own_redis: Server, tmp_path: Path, connect: Connect) -> None:
    assert [re.match(r"no [\w -]*", line)[0] for line in connect(own_redis).advice()] == ["no maxmemory"]  # type: ignore[index]
    server = client(own_redis)
    server.config_set("appendonly", "no")
    server.config_set("maxmemory", "1gb")
    assert [line[:19] for line in connect(own_redis).advice()] == ["no append-only file"]


def test_a_closed_store_says_so(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.position(TOPIC, 0)
    store.close()


# What it keeps, and how long.


def test_conversations_age_and_leave_nothing_but_what_nobody_was_told(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis, ttl_seconds=2)
    writer = Writer(store)
    writer.commit(*drifting("a"), projection("b", 0, deployment="pirates"))
    told = store.pending(10)
    assert told and store.findings(10, conversation_id="a")
    until(lambda: store.session("a") is None and store.session("b") is None)
    until(lambda: not store.findings(10, conversation_id="a"))
    assert store.trajectory("a") == [] and store.load(TOPIC, 0, ["a"]) == {}
    assert store.findings(10) == []
    assert store.pending(10) == told
    assert store.position(TOPIC, 0) == Position(7)
    server = client(own_redis)
    assert server.zcard("anchorwatch:{test/0}:r:shop") == 1
    assert store.sessions(10) == []
    assert server.zcard("anchorwatch:{test/0}:r:shop") == 0, "who is found gone is swept at once"
    assert store.expire(0.0) == 0
    assert server.smembers("anchorwatch:{test/0}:rankings") == set()
    Writer(store).commit(*drifting("c"))
    assert [s.conversation_id for s in store.sessions(10)] == ["c"]


def test_sweeping_takes_the_gone_and_leaves_the_rest(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    names = [f"c{n}" for n in range(2300)]
    Writer(store).commit(*(projection(name, 0) for name in names))
    server = client(own_redis)
    server.delete(*(f"anchorwatch:{{test/0}}:c:{name}" for name in names[::2]))
    assert store.expire(0.0) == 1150
    assert store.expire(0.0) == 0
    assert {s.conversation_id for s in store.sessions(3000)} == set(names[1::2])


def test_each_response_renews_a_conversation_and_its_findings(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis, ttl_seconds=1000)
    writer = Writer(store)
    writer.commit(*drifting("a"))
    server = client(own_redis)
    ours = ["anchorwatch:{test/0}:c:a", "anchorwatch:{test/0}:f:a"]
    for key in ours:
        server.expire(key, 5)
    writer.commit(projection("a", 6))
    assert all(server.ttl(key) > 900 for key in ours)
    writer.commit(projection("a", 6))  # a duplicate
    assert server.ttl(ours[0]) > 900


def test_nothing_but_conversations_and_their_findings_has_an_end(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    Writer(store).commit(*drifting("a"), sums=[MinuteSums(1, "shop", 1, 1, 1)], config=b"c")
    store.fold_actions("t", 0, 1, {"a": b"1"})
    server = client(own_redis)
    mortal = {key for key in server.scan_iter() if server.ttl(key) >= 0}
    assert mortal == {b"anchorwatch:{test/0}:c:a", b"anchorwatch:{test/0}:f:a"}


def test_old_findings_leave_the_list_and_stay_with_their_conversation(
    own_redis: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.store.redis.KEPT_FINDINGS", 5)
    store = connect(own_redis)
    writer = Writer(store)
    for n in range(8):
        writer.commit(*(projection(f"c{n}", turn, -5.0) for turn in range(n, n + 1)))
    assert len(store.findings(100)) == 5
    assert {f.conversation_id for f in store.findings(100)} == {f"c{n}" for n in range(3, 8)}
    assert len(store.findings(100, conversation_id="c0")) == 1


def test_a_trajectory_whose_numbers_jump_keeps_what_is_certain(own_redis: Server, connect: Connect) -> None:
    """As when a conversation has aged away while its worker still remembered it, or was folded once more."""
    store = connect(own_redis)
    writer = Writer(store)
    writer.commit(*(projection("a", turn) for turn in range(4)))
    client(own_redis).delete("anchorwatch:{test/0}:c:a")
    writer.commit(projection("a", 4))
    assert [(p.number, p.turn) for p in store.trajectory("a")] == [(5, 4)]
    writer.commit(projection("a", 5))
    assert [(p.number, p.turn) for p in store.trajectory("a")] == [(5, 4), (6, 5)]
    batch = writer.batch(projection("a", 6))
    jump = replace(batch.sessions[0], responses=9)
    store.commit(replace(batch, sessions=[jump], points={"a": [replace(batch.points["a"][0], number=9)]}))
    assert [(p.number, p.turn) for p in store.trajectory("a")] == [(9, 6)]


def test_many_conversations_pass_through_the_ranking_by_the_page(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    writers = [Writer(store, p, partitions=3) for p in range(3)]
    names = [f"c{n}" for n in range(3200)]
    for p, writer in enumerate(writers):
        own = [name for name in names if partition_of(name, 3) == p]
        writer.commit(*(projection(n, 40 if n.endswith("7") else 0, -0.0005 * int(n[1:])) for n in own))
    expected = sorted(names, key=lambda n: -int(n[1:]))
    assert [s.conversation_id for s in store.sessions(4000)] == expected
    assert [s.conversation_id for s in store.sessions(50, offset=2100)] == expected[2100:2150]
    young = [n for n in expected if n.endswith("7")]
    assert [s.conversation_id for s in store.sessions(20, since=START + 1000)] == young[:20]
    assert [s.conversation_id for s in store.sessions(20, offset=310, since=START + 1000)] == young[310:]
    assert store.sessions(0) == []


def test_topics_of_one_name_but_for_the_prefix_are_two(own_redis: Server, connect: Connect) -> None:
    store = connect(own_redis)
    Writer(store, topic="anchorwatch.same").commit(projection("a", 0))
    Writer(store, topic="same").commit(projection("b", 0), projection("b", 1))
    assert store.position("anchorwatch.same", 0) == Position(1)
    assert store.position("same", 0) == Position(2)
    assert (store.session("a"), store.session("b")) != (None, None)
    assert {s.conversation_id for s in store.sessions(10)} == {"a", "b"}


def test_two_prefixes_share_nothing(own_redis: Server, connect: Connect) -> None:
    one, two = connect(own_redis, prefix="one"), connect(own_redis, prefix="two")
    Writer(one).commit(*drifting("a"))
    assert everything(two) == NOTHING
    assert one.lease("house", "x", 10) and two.lease("house", "y", 10)
    with pytest.raises(ConfigurationError):
        connect(own_redis, prefix="a{b}")


# How a conversation is written.


@given(
    st.builds(
        Session,
        conversation_id=st.just("a"),
        deployment=st.just("d"),
        model=st.just("m"),
        axis_id=st.just("x"),
        turn=st.integers(0, 2**32 - 1),
        projection=st.floats(width=32, allow_nan=False, allow_infinity=False),
        time=st.floats(-1e11, 1e12),
        started=st.floats(-1e11, 1e12),
        responses=st.integers(1, 2**32 - 1),
        z=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        risk=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        lowest_z=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        highest_risk=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        episode_id=st.none() | st.text(st.characters(codec="ascii"), min_size=1, max_size=40),
    ),
    st.lists(st.binary(max_size=200) | st.sampled_from([b"d", b"x", b"dx", b"xd"]), max_size=6).map(b"".join),
    st.lists(
        st.builds(
            TrajectoryPoint,
            number=st.just(0),
            time=st.floats(-1e11, 1e12),
            turn=st.integers(0, 2**32 - 1),
            projection=st.floats(width=32, allow_nan=False, allow_infinity=False),
            held=st.floats(0, 1, width=32),
            z=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
            risk=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
            place=st.none()
            | st.tuples(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.floats(width=32, allow_nan=False, allow_infinity=False),
            ),
        ),
        max_size=8,
    ),
)
def test_what_is_packed_is_unpacked(session: Session, state: bytes, points: list[TrajectoryPoint]) -> None:
    session = replace(session, responses=max(session.responses, len(points)))
    numbered = [replace(point, number=session.responses - len(points) + at) for at, point in enumerate(points, start=1)]
    value = b"\x07\0\0\0" + pack_session(session, state) + pack_points(numbered)
    assert unpack_session("a", value[:READ_AHEAD], ("d", "m", "x")) == session
    assert state_of(value, ("d", "m", "x")) == state
    assert unpack_points(value) == numbered


# Addresses.


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("", False, (("h", 6379),), "", 0, None, None)),
        ("rediss://u:p%40ss@h:1/3", RedisAddress("", True, (("h", 1),), "", 3, "u", "p@ss")),
        ("redis://:p@[::1]:7", RedisAddress("", False, (("::1", 7),), "", 0, None, "p")),
        (
            "redis+sentinel://u:p@h1,h2:5/main/2",
            RedisAddress("sentinel", False, (("h1", 26379), ("h2", 5)), "main", 2, "u", "p"),
        ),
        ("rediss+cluster://h1:7000,h2", RedisAddress("cluster", True, (("h1", 7000), ("h2", 6379)), "", 0, None, None)),
    ],
)
def test_an_address_is_read(url: str, address: RedisAddress) -> None:
    assert redis_address(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h:port",
        "redis://h:99999",
        "redis://h1,h2",
        "redis://h/name",
        "redis://h/0/1",
        "redis://h?db=1",
        "redis+sentinel://h1,h2",
        "redis+cluster://h/1",
        "redis+sentinel://h1,,h2/main",
        "redis+other://h",
        "valkey://h",
        "sqlite:///x",
    ],
)
def test_a_wrong_address_is_refused_and_its_password_kept(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        redis_address(url.replace("//", "//user:hunter2@"))
    assert "hunter2" not in str(caught.value)


# More than one server.


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three primaries."""
    nodes = [
        redis(
            tmp_path_factory.mktemp("cluster") / str(n),
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--appendfsync", "no"),
        )
        for n in range(3)
    ]
    try:
        for node in nodes:
            node.start()
        command = ["redis-cli", "--cluster", "create", *(node.address for node in nodes), "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        until(lambda: all("cluster_state:ok" in ask_cli(node, "CLUSTER", "INFO") for node in nodes))
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def ask_cli(node: Server, *command: str) -> str:
    done = subprocess.run(
        ["redis-cli", "-p", str(node.port), *command], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


def cluster_url(nodes: list[Server]) -> str:
    return "redis+cluster://" + ",".join(node.address for node in nodes)


def test_on_a_cluster_partitions_spread_and_all_is_found(cluster: list[Server], connect: Connect) -> None:
    prefix = fresh("store")
    store = connect(cluster_url(cluster[:1]), prefix=prefix, timeout_seconds=5)
    writers = [Writer(store, p, partitions=6) for p in range(6)]
    names = [f"c{n}" for n in range(60)]
    for p, writer in enumerate(writers):
        events = [
            event for name in names if partition_of(name, 6) == p for event in drifting(name, 1 + int(name[1:]) % 6)
        ]
        writer.commit(*events, sums=[MinuteSums(100 + p % 2, "shop", 1, 5, 0)])
    used = [node for node in cluster if client(node).keys(f"{prefix}:*:position")]
    assert len(used) > 1, "several servers hold partitions"
    single = {p: store.load(TOPIC, p, names) for p in range(6)}
    assert {name for found in single.values() for name in found} == set(names)
    assert {s.conversation_id for s in store.sessions(100)} == set(names)
    assert all(store.session(name) and store.trajectory(name) for name in names)
    assert store.findings(100) == sorted(store.findings(100), key=lambda f: f.time, reverse=True) != []
    assert store.minutes(100, 101) == [MinuteSums(100, "shop", 3, 15, 0), MinuteSums(101, "shop", 3, 15, 0)]
    assert len(store.progress(TOPIC)) == 6
    store.settle([p.reference for p in store.pending(100)])
    assert store.pending(100) == []
    assert store.lease("house", "one", 10) and not store.lease("house", "two", 10)
    store.fold_actions("t", 0, 1, {"a": b"1"})
    assert store.actions("") == {"a": b"1"}
    assert abs(store.now() - time.time()) < 60
    assert store.forget("c5") and store.session("c5") is None
    assert store.expire(0.0) == 0
    with pytest.raises(CommitRefused):
        writers[0].commit(projection("x", 0), expected=None)


def test_while_a_slot_moves_its_partition_waits_and_loses_nothing(cluster: list[Server], connect: Connect) -> None:
    prefix = fresh("store")
    store = connect(cluster_url(cluster), prefix=prefix, timeout_seconds=5)
    writer = Writer(store)
    writer.commit(*drifting("a"))
    whole = everything(store)
    slot = int(ask_cli(cluster[0], "CLUSTER", "KEYSLOT", f"{prefix}:{{/{TOPIC}/0}}:position"))
    names = [ask_cli(node, "CLUSTER", "MYID").strip() for node in cluster]
    source = next(i for i, node in enumerate(cluster) if client(node).keys(f"{prefix}:*:position"))
    target = (source + 1) % 3
    ask_cli(cluster[target], "CLUSTER", "SETSLOT", str(slot), "IMPORTING", names[source])
    ask_cli(cluster[source], "CLUSTER", "SETSLOT", str(slot), "MIGRATING", names[target])
    first = f"{prefix}:{{/{TOPIC}/0}}:c:a"
    for moved in ([first], ask_cli(cluster[source], "CLUSTER", "GETKEYSINSLOT", str(slot), "1000").split("\n")):
        # Half a partition is here and half is there: a commit must not see it.
        for batch in (writer.batch(projection("b", 0), expected=Position(6)), writer.batch(expected=Position(6))):
            with pytest.raises(StoreUnavailable, match="cluster"):
                store.commit(batch)
        with pytest.raises(StoreUnavailable, match="cluster"):
            store.forget("a")
        for key in filter(None, moved):
            ask_cli(cluster[source], "MIGRATE", "127.0.0.1", str(cluster[target].port), key, "0", "5000")
    for at in (target, source, 3 - source - target):
        ask_cli(cluster[at], "CLUSTER", "SETSLOT", str(slot), "NODE", names[target])
    until(lambda: works(store))
    assert everything(store) == whole
    Writer(store).commit(projection("b", 0))
    assert store.position(TOPIC, 0) == Position(7)


def test_a_cluster_that_lost_a_server_is_unavailable_there_and_comes_back(
    cluster: list[Server], connect: Connect
) -> None:
    prefix = fresh("store")
    store = connect(cluster_url(cluster), prefix=prefix, timeout_seconds=2)
    writers = {p: Writer(store, p, partitions=12) for p in range(12)}
    for writer in writers.values():
        writer.commit(counts={"dead_letter": 1})
    cluster[1].kill()
    failed = set()
    for p, writer in writers.items():
        try:
            writer.commit(counts={"dead_letter": 1})
        except StoreUnavailable:
            failed.add(p)
    assert failed
    cluster[1].start()
    until(lambda: all("cluster_state:ok" in ask_cli(node, "CLUSTER", "INFO") for node in cluster))
    for p, writer in writers.items():
        until(lambda: works(store))
        if p in failed:
            writer.commit(counts={"dead_letter": 1})
    assert store.counts() == {"dead_letter": 24}


def test_with_sentinels_a_failover_is_an_outage_of_seconds(tmp_path: Path, connect: Connect) -> None:
    primary = redis(tmp_path / "primary", "--requirepass", "p", "--masterauth", "p", "--repl-diskless-sync-delay", "0")
    replica = redis(
        tmp_path / "replica",
        *("--replicaof", f"127.0.0.1 {primary.port}", "--requirepass", "p", "--masterauth", "p"),
    )
    sentinels = []
    try:
        primary.start()
        replica.start()
        for n in range(3):
            directory = tmp_path / f"sentinel-{n}"
            directory.mkdir()
            file = directory / "sentinel.conf"
            file.write_text(
                f"sentinel monitor main 127.0.0.1 {primary.port} 2\nsentinel auth-pass main p\n"
                "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\nrequirepass s\n"
                "sentinel sentinel-pass s\n"
            )
            sentinels.append(redis(directory, str(file), "--sentinel").start())
        url = "redis+sentinel://" + ",".join(one.address for one in sentinels) + "/main"
        with pytest.raises(StoreError, match=r"the sentinels .* refuse us"):
            connect(url, password="p")
        store = connect(url, password="p", sentinel_password="s", timeout_seconds=2)
        writer = Writer(store)
        writer.commit(*drifting("a"))
        before = everything(store)
        follower = Redis(replica.host, replica.port, password="p")
        until(lambda: follower.exists("anchorwatch:{test/0}:c:a") == 1)
        asked = [Redis(one.host, one.port, password="s", decode_responses=True) for one in sentinels]
        until(lambda: all(int(one.sentinel_masters()["main"]["num-other-sentinels"]) == 2 for one in asked))
        until(lambda: all(int(one.sentinel_masters()["main"]["num-slaves"]) == 1 for one in asked))
        primary.kill()
        with pytest.raises(StoreUnavailable):
            writer.commit(projection("a", 6))
        until(lambda: works(store))
        assert everything(store) == before
        until(lambda: commits(Writer(store), "b"))
        assert store.session("b")
    finally:
        for server in (primary, replica, *sentinels):
            server.kill()


def commits(writer: Writer, name: str) -> bool:
    try:
        writer.commit(projection(name, 0))
    except StoreUnavailable:
        return False
    return True


def test_sentinels_that_know_no_such_service_are_an_outage(tmp_path: Path, connect: Connect) -> None:
    file = tmp_path / "sentinel.conf"
    file.write_text("")
    sentinel = redis(tmp_path, str(file), "--sentinel")
    try:
        sentinel.start()
        store = connect(f"redis+sentinel://{sentinel.address}/nobody")
        with pytest.raises(StoreUnavailable, match="nobody"):
            store.position(TOPIC, 0)
    finally:
        sentinel.kill()


def test_a_url_opens_it(own_redis: Server) -> None:
    store = open_store(redis_url(own_redis), trajectory_points=3)
    writer = Writer(store)
    writer.commit(*(projection("a", turn) for turn in range(6)))
    assert len(store.trajectory("a")) == 3
    assert parts(store.trajectory("a")[-1])[1]["number"] == 6  # type: ignore[index]
    store.close()
