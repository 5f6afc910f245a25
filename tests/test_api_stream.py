"""The live stream of findings, read from real sockets by a reader of server-sent events written after the standard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from interface import STORES, Interface, interface, open_store
from service import message, projection

from monitor.api import server, stream
from monitor.api.auth import create_key, revoke_key
from monitor.api.stream import Hub
from monitor.errors import StoreUnavailable
from monitor.events import Finding, decode_finding
from monitor.store.sqlite import SqliteStore


class Event(NamedTuple):
    name: str
    id: str
    data: str


class Listener:
    """Reads a stream in a thread of its own."""

    def __init__(self, api: Interface, token: str | None = None, **headers: str) -> None:
        self.events: list[Event] = []
        self.comments = 0
        self.status = 0
        self.ended = threading.Event()
        self._token = token or api.tokens["read"]
        self._url = f"{api.url}/v1/findings/stream"
        self._headers = {"Authorization": f"Bearer {self._token}", **headers}
        self._close = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: bool(self.status))

    def _run(self) -> None:
        try:
            with httpx.stream("GET", self._url, headers=self._headers, timeout=30) as answer:
                fields: dict[str, str] = {}
                lines = answer.iter_lines()
                if answer.status_code == 200:
                    assert answer.headers["content-type"].startswith("text/event-stream")
                    assert next(lines) == "retry: 2000"  # what comes from here on is the hub's
                self.status = answer.status_code
                for line in lines:
                    if self._close.is_set():
                        return
                    if line.startswith(":"):
                        self.comments += 1
                    elif line:
                        name, _, value = line.partition(": ")
                        fields[name] = value
                    elif "data" in fields:
                        self.events.append(Event(fields.get("event", ""), fields.get("id", ""), fields["data"]))
                        fields = {}
        except httpx.HTTPError:
            pass
        finally:
            self.status = self.status or -1
            self.ended.set()

    def close(self) -> None:
        self._close.set()

    @property
    def findings(self) -> list[Finding]:
        return [decode_finding(event.data.encode()) for event in self.events if event.name == "finding"]


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up, "never happened"
        time.sleep(0.02)


@pytest.fixture(params=STORES)
def api(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str) -> Iterator[Interface]:
    with interface(tmp_path, open_store(request.param, tmp_path, shared_redis), heartbeat_seconds=0.2) as running:
        yield running


@contextmanager
def alone(folder: Path) -> Iterator[Interface]:
    with interface(folder, SqliteStore(folder / "store.db"), heartbeat_seconds=0.2) as running:
        yield running


def drift(api: Interface, *names: str) -> None:
    """Each of these conversations gives at least one finding."""
    api.fold([message(projection(name, turn, -9.0 * turn)) for name in names for turn in range(2)])


def stored(api: Interface) -> set[str]:
    return {finding.id for finding in api.store.findings(5000)}


def test_what_is_found_comes_to_everybody_and_what_was_found_before_does_not(api: Interface) -> None:
    drift(api, "before")
    old = stored(api)
    listeners = [Listener(api) for _ in range(3)]
    drift(api, "a", "b")
    new = stored(api) - old
    assert new
    for listener in listeners:
        wait_until(lambda: {one.id for one in listener.findings} >= new)  # noqa: B023
        assert {one.id for one in listener.findings} == new
        assert [event.id for event in listener.events] == [one.id for one in listener.findings]
        assert all(one in api.store.findings(5000) for one in listener.findings)
        assert listener.comments  # nothing happens, and it says so


def test_who_comes_again_goes_on_where_it_was(api: Interface) -> None:
    drift(api, "first")
    listener = Listener(api)
    drift(api, "a", "b", "c")
    everything = stored(api)
    wait_until(lambda: len(listener.findings) >= 3)
    last = listener.events[1].id
    listener.close()
    drift(api, "while", "nobody", "listened")
    again = Listener(api, **{"Last-Event-ID": last})
    missed = stored(api) - everything
    wait_until(lambda: {one.id for one in again.findings} >= missed)
    ids = [event.id for event in again.events]
    assert ids[: len(listener.events) - 2] == [event.id for event in listener.events[2:]]
    assert len(ids) == len(set(ids)) and last not in ids
    assert "gap" not in {event.name for event in again.events}


def test_another_process_goes_on_too_and_who_was_too_long_away_is_told(api: Interface, tmp_path: Path) -> None:
    drift(api, "a", "b", "c")
    ordered = api.store.findings(100)
    # This process has never sent anything: what it finds in the store is in order of time.
    listener = Listener(api, **{"Last-Event-ID": ordered[1].id})
    wait_until(lambda: bool(listener.findings))
    assert [event.id for event in listener.events] == [ordered[0].id]
    lost = Listener(api, **{"Last-Event-ID": "nobody-has-sent-this"})
    wait_until(lambda: len(lost.findings) == len(ordered))
    assert lost.events[0].name == "gap" and "GET /v1/findings" in json.loads(lost.events[0].data)["cure"]
    assert {one.id for one in lost.findings} == stored(api)


def test_a_key_that_is_revoked_ends_its_stream_and_nobody_elses(tmp_path: Path) -> None:
    with alone(tmp_path) as api:
        token = create_key(api.keys, "short", ["read"])
        mine, other = Listener(api, token), Listener(api)
        revoke_key(api.keys, token.partition(".")[0])
        assert mine.ended.wait(20)
        drift(api, "after")
        wait_until(lambda: bool(other.findings))
        assert not mine.findings and not other.ended.is_set()
        assert Listener(api, token).status == 401
        assert Listener(api, api.tokens["ingest"]).status == 403


def test_a_server_that_goes_down_lets_its_listeners_go_at_once(tmp_path: Path) -> None:
    with alone(tmp_path) as api:
        listeners = [Listener(api) for _ in range(5)]
        begun = time.monotonic()
    assert all(listener.ended.wait(20) for listener in listeners)
    assert time.monotonic() - begun < server.DRAIN_SECONDS  # nobody had to be cut off


def test_who_does_not_read_what_it_is_sent_is_cut_off_and_who_reads_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_SECONDS", 0.5)
    app = FastAPI()
    sent = 0

    @app.get("/")
    async def much() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1000):
                yield b"x" * 65_536
                sent += 65_536

        return StreamingResponse(chunks())

    listener = server.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with server.serving(app, listener, threading.Event()):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: sent > 0)
            time.sleep(1.5)
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while data := deaf.recv(1 << 20):
                    got += len(data)
        assert got < 60_000_000
        monkeypatch.setattr(server, "UNREAD_SECONDS", 2.0)  # less than all pauses, far more than one
        with httpx.stream("GET", f"http://127.0.0.1:{port}/", timeout=30) as answer:
            read = 0
            for number, chunk in enumerate(answer.iter_bytes()):
                read += len(chunk)
                if number in (10, 100, 200, 300, 400):
                    time.sleep(0.5)  # it pauses, but it reads
        assert read == 65_536_000


def test_there_are_only_so_many_listeners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LISTENERS", 2)
    with alone(tmp_path) as api:
        first, _ = Listener(api), Listener(api)
        assert Listener(api).status == 503
        first.close()
        drift(api, "wakes the first one up")
        wait_until(lambda: first.ended.is_set())
        wait_until(lambda: Listener(api).status == 200)


# The hub by itself, where time and the store are ours


class Shelf:
    """A store of findings, newest first, that can be away."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.away = False
        self.asked: list[int] = []

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.kept.append(finding(number))
        self.kept.sort(key=lambda one: one.time, reverse=True)

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        self.asked.append(limit)
        if self.away:
            raise StoreUnavailable("away")
        return self.kept[:limit]


def finding(number: int) -> Finding:
    return Finding(
        id=f"f{number}",
        time=f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z",
        conversation_id=f"c{number}",
        turn=0,
        deployment="shop",
        axis_id="x",
        kind="dip",
        severity="warning",
        statistic="dip",
        value=1.0,
        boundary=1.0,
        risk=1.0,
        budget=None,
        certification="uncertified",
        config_id="c",
        episode_id=f"e{number}",
    )


def heard(hub: Hub, shelf: Shelf, during: Callable[[], Any], enough: Callable[[list[str]], bool]) -> list[str]:
    """Ids, and `gap`, that one listener hears from its beginning on, while `during` happens."""

    async def listen() -> list[str]:
        hub.listeners += 1
        place, _ = await hub.begin(None)
        during()
        ids: list[str] = []
        give_up = time.monotonic() + 30
        while not enough(ids):
            assert time.monotonic() < give_up, ids
            came = await hub.after(place, 0.1)
            if came is None:
                ids.append("cut off")
                break
            place += len(came)
            ids += [_name(event) for event in came]
        hub.close()
        return ids

    return asyncio.run(listen())


def _name(event: bytes) -> str:
    first = event.split(b"\n")[0]
    return first.removeprefix(b"id: ").decode() if first.startswith(b"id: ") else "gap"


def test_more_than_is_looked_at_is_looked_for() -> None:
    shelf = Shelf()
    shelf.add(*range(50))
    new = range(100, 1600)  # more than one look takes in
    ids = heard(Hub(shelf, kept=5000, look_seconds=0.01), shelf, lambda: shelf.add(*new), lambda ids: len(ids) >= 1500)
    assert ids == [f"f{number}" for number in new]


def test_more_than_can_be_looked_at_is_told_as_a_gap() -> None:
    shelf = Shelf()
    shelf.add(0)
    new = range(1, stream.MOST + 50)
    hub = Hub(shelf, kept=20_000, look_seconds=0.01)
    ids = heard(hub, shelf, lambda: shelf.add(*new), lambda ids: len(ids) > stream.MOST)
    assert ids[0] == "gap" and ids[1:] == [f"f{number}" for number in new][-stream.MOST :]


def test_who_is_too_slow_for_what_is_kept_is_cut_off() -> None:
    shelf = Shelf()
    hub = Hub(shelf, kept=10, look_seconds=0.01)

    async def listen() -> list[bytes] | None:
        hub.listeners += 1
        place, _ = await hub.begin(None)
        shelf.add(*range(100))
        while len(shelf.asked) < 4:
            await asyncio.sleep(0.01)
        came = await hub.after(place, 1.0)
        hub.close()
        return came

    assert asyncio.run(listen()) is None
    assert len(hub._events) == len(hub._numbers) == 10


def test_findings_that_come_late_come_too() -> None:
    shelf = Shelf()
    shelf.add(*range(0, 100, 2))
    ids = heard(Hub(shelf, look_seconds=0.01), shelf, lambda: shelf.add(1, 51, 101), lambda ids: len(ids) >= 3)
    assert ids == ["f1", "f51", "f101"]


def test_a_store_that_is_away_costs_nothing_but_time() -> None:
    shelf = Shelf()

    def away() -> None:
        shelf.away = True
        threading.Timer(0.3, come_back).start()

    def come_back() -> None:
        shelf.add(7)
        shelf.away = False

    assert heard(Hub(shelf, look_seconds=0.01), shelf, away, bool) == ["f7"]


def test_nobody_listens_and_nothing_is_asked() -> None:
    shelf = Shelf()
    hub = Hub(shelf, look_seconds=0.01)

    async def come_and_go() -> int:
        hub.listeners += 1
        await hub.begin(None)
        hub.listeners -= 1
        await asyncio.sleep(0.1)
        asked = len(shelf.asked)
        await asyncio.sleep(0.2)
        return len(shelf.asked) - asked

    assert asyncio.run(come_and_go()) == 0
