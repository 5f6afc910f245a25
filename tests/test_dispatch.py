"""Promises of the dispatcher: at least once, a repeat is the same bytes, and nobody is told again after a wipe."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import servers
from service import CONFIG, message, projection
from tiny import environment

from alerts.channels import JsonLines
from alerts.dispatch import BATCH, LEASE, NOTED_DAYS, Dispatcher
from monitor.actions import Acknowledgement, Silence, append_action, forget, read_actions, withdraw
from monitor.database import sqlite_url
from monitor.errors import ChannelError, ChannelUnavailable, ConfigurationError, LogUnavailable, StoreUnavailable
from monitor.events import Finding, Projection, encode
from monitor.store import Backend
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import ACTIONS, PROJECTIONS, EmbeddedLog
from monitor.worker import Worker

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = 3600.0


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


class Kept:
    """A channel that keeps what it is given, and fails as it is told to."""

    name = "kept"

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.fails: Callable[[Sequence[Finding]], Exception | None] = lambda findings: None

    def deliver(self, findings: Sequence[Finding]) -> None:
        if error := self.fails(findings):
            raise error
        self.lines += [encode(finding) for finding in findings]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        told = [msgspec.json.decode(line, type=Finding) for line in self.lines]
        return [(one.conversation_id, one.kind) for one in told]


class House:
    """Log, worker, store and dispatcher of one installation, in one folder."""

    def __init__(self, folder: Path, redis: str | None) -> None:
        self.folder = folder
        self.redis = redis
        self.clock, self.ticks = Clock(), Clock()
        self.log = EmbeddedLog(folder / "log.db")
        self.channel = Kept()
        self.open()

    def open(self) -> None:
        self.store: Backend
        if self.redis is None:
            path = self.folder / f"store-{len(list(self.folder.iterdir()))}.db"
            self.store = SqliteStore(path, clock=self.clock, busy_seconds=0.05)
        else:
            self.store = RedisStore(self.redis, prefix=servers.fresh("dispatch"))
        self.worker = Worker(self.log, self.store, CONFIG, batch_size=100)
        self.restart()

    def restart(self) -> None:
        """A new dispatcher, as after a kill; the old one's lease is given back, or the new one would wait for it."""
        self.store.release(LEASE, "one")
        self.dispatcher = Dispatcher(
            self.log, self.store, self.channel, max_age=HOUR, holder="one", clock=self.clock, ticks=self.ticks
        )

    def wipe(self) -> None:
        self.store.close()
        self.open()

    def say(self, conversation: str, values: Sequence[float], *, first: int = 0, age: float = 60.0, **changes: object):
        at = [
            datetime.fromtimestamp(self.clock.now - age, UTC) + timedelta(seconds=number)
            for number in range(len(values))
        ]
        events = [
            msgspec.structs.replace(
                projection(conversation, first + number, value),
                time=at[number].isoformat().replace("+00:00", "Z"),
                **changes,
            )
            for number, value in enumerate(values)
        ]
        self.log.append(PROJECTIONS, [message(event) for event in events])

    def work(self) -> None:
        while self.worker.run_once() or self.worker.run_once():
            pass

    def close(self) -> None:
        self.log.close()
        self.store.close()


@pytest.fixture(params=["sqlite", "redis"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, request.getfixturevalue("shared_redis") if request.param == "redis" else None)
    yield made
    made.close()


LOW = [0.0, 0.0, -9.0]
BACK = [0.0, 0.0, 0.0, 0.0]


def test_what_is_found_is_told_once_and_the_outbox_is_empty_then(house: House) -> None:
    house.say("c", LOW)
    house.work()
    waiting = [encode(one.finding) for one in house.store.pending(9)]
    assert house.dispatcher.run_once() == 1
    told = list(house.channel.lines)
    assert told == waiting and not house.store.pending(9)
    assert house.dispatcher.run_once() == 0 and house.channel.lines == told
    house.say("c", BACK, first=3)
    house.work()
    house.dispatcher.run_once()
    assert house.channel.kinds == [("c", "dip"), ("c", "recovered")]


def test_a_wiped_store_tells_nobody_again_and_the_end_of_what_was_told(house: House) -> None:
    house.say("c", LOW)
    house.say("d", LOW)
    house.work()
    house.dispatcher.run_once()
    first = list(house.channel.lines)
    assert len(first) == 2
    house.wipe()
    house.work()
    assert len(house.store.pending(9)) == 2
    house.dispatcher.run_once()
    assert house.channel.lines == first and not house.store.pending(9)
    house.say("c", BACK, first=3)
    house.work()
    house.dispatcher.run_once()
    assert house.channel.kinds[2:] == [("c", "recovered")]


def test_catching_up_pages_for_what_is_young_or_still_open_at_the_end(house: House) -> None:
    house.say("over", [*LOW, *BACK], age=3 * HOUR)
    house.say("left", LOW, age=3 * HOUR)
    house.say("open", LOW, age=2 * HOUR)
    house.say("heals", LOW, age=2 * HOUR)
    house.say("young", LOW)
    house.say("open", [-9.0], first=3)
    house.say("heals", BACK, first=3)
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=18)
    house.worker.run_once()
    assert house.store.progress(PROJECTIONS)[0].behind
    house.dispatcher.run_once()
    assert house.channel.kinds == []
    assert {one.finding.conversation_id for one in house.store.pending(9)} == {"left", "open", "heals"}
    house.work()
    house.dispatcher.run_once()
    assert sorted({conversation for conversation, _ in house.channel.kinds}) == ["open", "young"]
    assert not house.store.pending(9)


def test_what_waits_does_not_hold_up_what_comes_behind_it(house: House) -> None:
    many = 6 * BATCH
    append_action(house.log, "silence", "s", Silence("2026-06-01T13:00:00Z", deployment="shop", kind="dip"), by="ann")
    for number in range(many):
        house.say(f"c{number}", LOW)
    house.say("loud", [-9.0])
    house.work()
    for _ in range(4):
        house.dispatcher.run_once()
    assert house.channel.kinds == [("loud", "low_start")]
    assert len(house.store.pending(2 * many)) == many
    withdraw(house.log, "silence", ["s"])
    while house.dispatcher.run_once():
        pass
    assert len(house.channel.lines) == many + 1 and not house.store.pending(9)


def test_a_silence_ends_by_itself(house: House) -> None:
    append_action(house.log, "silence", "s", Silence("2026-06-01T12:10:00Z"), by="ann")
    house.say("c", LOW)
    house.work()
    house.dispatcher.run_once()
    assert house.channel.lines == []
    house.clock.now += 601
    house.dispatcher.run_once()
    assert house.channel.kinds == [("c", "dip")]


def test_what_was_acknowledged_is_not_told(house: House) -> None:
    house.say("c", LOW)
    house.work()
    (one,) = house.store.pending(9)
    append_action(house.log, "acknowledge", one.finding.id, Acknowledgement(), by="ann")
    house.dispatcher.run_once()
    assert house.channel.lines == [] and not house.store.pending(9)


def test_a_weak_identity_pages_nobody(house: House) -> None:
    house.say("c", LOW, attributes={"identity": "weak"})
    house.work()
    house.dispatcher.run_once()
    assert house.store.findings(9) and house.channel.lines == [] and not house.store.pending(9)


def test_nobody_is_told_of_a_conversation_that_is_forgotten_also_after_a_wipe(house: House) -> None:
    house.say("gone", LOW)
    house.say("stays", LOW)
    forget(house.log, "gone", by="ann")
    house.work()
    house.wipe()
    house.worker = Worker(house.log, house.store, CONFIG, batch_size=4)
    house.worker.run_once()
    house.dispatcher.run_once()
    house.work()
    house.dispatcher.run_once()
    house.dispatcher.run_once()
    assert house.channel.kinds == [("stays", "dip")]
    assert not house.store.findings(9, conversation_id="gone") and not house.store.pending(9)


# Failures


def test_a_crash_after_the_delivery_delivers_the_same_bytes_again(house: House) -> None:
    house.say("c", LOW)
    house.work()
    settle = house.store.settle

    class Crash(Exception):
        pass

    def crash(references: list[str]) -> None:
        raise Crash

    house.store.settle = crash  # type: ignore[method-assign]
    append = house.log.append

    def lost(*arguments: object) -> list[int]:
        raise Crash

    house.log.append = lost  # type: ignore[method-assign]
    with pytest.raises(Crash):
        house.dispatcher.run_once()
    house.store.settle, house.log.append = settle, append  # type: ignore[method-assign]
    house.restart()
    house.dispatcher.run_once()
    first, second = house.channel.lines
    assert first == second and not house.store.pending(9)


def test_a_crash_between_note_and_settlement_delivers_nothing_again(house: House) -> None:
    house.say("c", LOW)
    house.work()
    settle = house.store.settle

    class Crash(Exception):
        pass

    def crash(references: list[str]) -> None:
        raise Crash

    house.store.settle = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        house.dispatcher.run_once()
    house.store.settle = settle  # type: ignore[method-assign]
    house.restart()
    house.dispatcher.run_once()
    assert len(house.channel.lines) == 1 and not house.store.pending(9)


def test_while_the_log_is_away_findings_are_told_once_and_noted_later(house: House) -> None:
    house.say("c", LOW)
    house.work()
    real = house.log

    class Away:
        def __getattr__(self, name: str) -> object:
            def fails(*arguments: object) -> None:
                raise LogUnavailable("the log is away", cure="wait")

            return fails

    house.dispatcher._log = house.dispatcher._fold._log = Away()  # type: ignore[assignment]
    for _ in range(3):
        assert house.dispatcher.run_once() == 0
    assert len(house.channel.lines) == 1 and len(house.store.pending(9)) == 1
    house.dispatcher._log = house.dispatcher._fold._log = real
    house.dispatcher.run_once()
    assert len(house.channel.lines) == 1 and not house.store.pending(9)
    assert [key for key in read_actions(real) if key.startswith("told/")]


def test_a_channel_that_is_away_loses_nothing_and_keeps_the_order(house: House) -> None:
    house.channel.fails = lambda findings: ChannelUnavailable("away", cure="wait")
    house.say("c", LOW)
    house.say("c", BACK, first=3)
    house.work()
    for _ in range(3):
        with pytest.raises(ChannelUnavailable):
            house.dispatcher.run_once()
    assert len(house.store.pending(9)) == 2
    house.channel.fails = lambda findings: None
    house.dispatcher.run_once()
    assert house.channel.kinds == [("c", "dip"), ("c", "recovered")]


def test_a_finding_that_is_refused_for_ever_holds_up_no_other(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.channel.fails = lambda findings: (
        ChannelError("no", cure="x") if any(one.conversation_id == "bad" for one in findings) else None
    )
    for name in ("a", "bad", "b"):
        house.say(name, LOW)
    house.work()
    house.dispatcher.run_once()
    assert house.channel.kinds == [("a", "dip"), ("b", "dip")]
    assert not house.store.pending(9)


def test_only_who_has_the_lease_tells(house: House) -> None:
    assert house.store.lease(LEASE, "another", 600.0)
    house.say("c", LOW)
    house.work()
    assert house.dispatcher.run_once() == 0 and house.channel.lines == []
    house.store.release(LEASE, "another")
    assert house.dispatcher.run_once() == 0  # it asks once a second only
    house.ticks.now += 1.1
    house.dispatcher.run_once()
    assert len(house.channel.lines) == 1


def test_who_lost_the_lease_stops_telling(house: House) -> None:
    house.dispatcher.run_once()
    house.store.release(LEASE, "one")
    assert house.store.lease(LEASE, "another", 600.0)
    house.ticks.now += 6
    house.say("c", LOW)
    house.work()
    assert house.dispatcher.run_once() == 0 and house.channel.lines == []


def test_run_waits_while_the_store_is_away_and_goes_on(house: House) -> None:
    house.say("c", LOW)
    house.work()
    stop, waits = threading.Event(), []
    lease = house.store.lease

    def away(*arguments: object) -> bool:
        raise StoreUnavailable("away", cure="wait")

    class Stop(threading.Event):
        """Records the waits instead of waiting, and brings the store back after six."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) == 6:
                house.store.lease = lease  # type: ignore[method-assign]
            if house.channel.lines:
                self.set()
            return self.is_set()

    stop = Stop()
    house.store.lease = away  # type: ignore[method-assign]
    house.dispatcher.run(stop, jitter=lambda: 1.0)
    assert len(house.channel.lines) == 1
    assert waits[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    assert house.store.lease(LEASE, "another", 1.0)  # it was given back


def test_old_notes_are_withdrawn(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatcher.run_once()
    assert house.dispatcher.tidy() == 0
    house.clock.now += (NOTED_DAYS + 1) * 86400
    house.say("d", LOW)
    house.work()
    house.dispatcher.run_once()
    assert house.dispatcher.tidy() == 1
    assert len([key for key in read_actions(house.log) if key.startswith("told/")]) == 1


def test_a_note_holds_no_more_than_names(house: House) -> None:
    house.say("c", LOW)
    house.work()
    house.dispatcher.run_once()
    (record,) = house.log.read(ACTIONS, 0, 0, 9)
    value = msgspec.json.decode(record.value)
    assert value["by"] == "dispatch" and set(value["body"]) == {"episode_id", "channel"}
    assert b"conversation" not in record.value


# The file


def finding() -> Finding:
    from test_paging import finding

    return finding("c", 1)


def test_json_lines_are_whole_also_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"torn')
    channel = JsonLines(path)
    channel.deliver([finding(), finding()])
    channel.deliver([finding()])
    torn, *lines = path.read_bytes().splitlines()
    assert torn == b'{"torn' and lines == [encode(finding())] * 3


def test_a_file_that_is_rotated_away_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    channel = JsonLines(path)
    channel.deliver([finding()])
    path.rename(tmp_path / "old.jsonl")
    channel.deliver([finding()])
    assert path.read_bytes() == (tmp_path / "old.jsonl").read_bytes() == encode(finding()) + b"\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    channel = JsonLines(path)
    channel.deliver([finding()])
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        with pytest.raises(ChannelUnavailable) as caught:
            channel.deliver([finding()] * 3)
        assert caught.value.retry and caught.value.cure
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    channel.deliver([finding()])
    assert path.read_bytes() == whole * 2


def test_a_folder_that_is_missing_is_told_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(ChannelUnavailable, match="No such file"):
        JsonLines(tmp_path / "no" / "out.jsonl").deliver([finding()])


def test_standard_output_that_nobody_reads_ends_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(ConfigurationError, match="nobody reads"):
            JsonLines().deliver([finding()])


# Real processes

PROGRAM = "from pathlib import Path; import sys; from alerts.dispatch import run; from monitor.settings import "
PROGRAM += "load_settings; run(load_settings(), Path(sys.argv[1]))"


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    settings = {
        "ANCHORWATCH_LOG_URL": sqlite_url(folder / "log.db"),
        "ANCHORWATCH_STORE_URL": sqlite_url(folder / "store.db"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)],
        env={**environment(), **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_killed_at_any_moment_everything_is_told_with_the_same_bytes_and_sigterm_drains(tmp_path: Path) -> None:
    log, out = EmbeddedLog(tmp_path / "log.db"), tmp_path / "out.jsonl"
    store = SqliteStore(tmp_path / "store.db")
    now = datetime.now(UTC)

    def young(event: Projection, number: int) -> Projection:
        return msgspec.structs.replace(
            event, time=(now + timedelta(milliseconds=number)).isoformat().replace("+00:00", "Z")
        )

    conversations = 900
    worker = Worker(log, store, CONFIG)
    process = start(tmp_path, out)
    try:
        for round_number in range(3):
            first = round_number * conversations // 3
            events = [young(projection(f"c{first + i}", 0, -9.0), i) for i in range(conversations // 3)]
            log.append(PROJECTIONS, [message(event) for event in events])
            while worker.run_once() or worker.run_once():
                pass
            until(lambda first=first: len(lines(out)) > first)  # type: ignore[misc]
            process.kill()
            process.wait()
            store.release(LEASE, next(iter(leases(tmp_path)), ""))  # else the next one waits for it to run out
            process = start(tmp_path, out)
        until(lambda: len(set(lines(out))) >= conversations and not store.pending(1) and bool(leases(tmp_path)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    told = Counter(msgspec.json.decode(line)["id"] for line in lines(out))
    assert told.keys() == {one.id for one in store.findings(2 * conversations)} and len(told) == conversations
    assert len(set(lines(out))) == conversations  # a repeat is the same line
    assert store.lease(LEASE, "another", 1.0)  # given back
    log.close()
    store.close()


def leases(folder: Path) -> list[str]:
    import sqlite3

    with sqlite3.connect(folder / "store.db") as connection:
        return [row[0] for row in connection.execute("SELECT holder FROM leases WHERE name = ?", (LEASE,))]
