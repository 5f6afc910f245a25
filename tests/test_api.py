"""The HTTP interface as its users meet it: a server process, real sockets, a real log.

What is acknowledged is in the log; what is not, is said to be not. Clients that are slow, too large, too many, without
a key or without manners get a number that says so, and cost the others nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from servers import Server
from service import Oracle, projection
from starlette.routing import Route

from monitor.api import page
from monitor.api.app import PUBLIC, Options, create_app
from monitor.api.auth import SCOPES, Keys, create_key, read_keys, revoke_key
from monitor.api.documents import EXAMPLE
from monitor.api.limits import Allowance, Buckets
from monitor.api.problems import Problem
from monitor.api.server import listen
from monitor.database import sqlite_url
from monitor.envelope import message_of
from monitor.errors import ConfigurationError
from monitor.events import Projection, decode_projection, encode
from monitor.serving import application
from monitor.settings import load_settings
from monitor.store.sqlite import SqliteStore
from monitor.stream import KafkaOptions, open_log, open_topics
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Record
from monitor.stream.topics import TopicSpec

ROOT = Path(__file__).parent.parent
JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}

# Options that no setting has, and deadlines that a test can wait for.
SERVE = """
import sys
from pathlib import Path
import msgspec
from monitor import telemetry
from monitor.api import server
from monitor.api import page
from monitor.api.app import PUBLIC, Options, create_app
from monitor.api.auth import Keys
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import EmbeddedLog

server.HEADER_SECONDS, server.DRAIN_SECONDS = float(sys.argv[3]), int(sys.argv[4])
telemetry.configure_logging("debug", "json")
folder = Path(sys.argv[1])
log = EmbeddedLog(folder / "log.db", busy_seconds=0.2)
store = SqliteStore(folder / "store.db", busy_seconds=0.2)
listener = server.listen("127.0.0.1", 0)
app = create_app(log, store, Keys(folder / "api-keys.json"), msgspec.json.decode(sys.argv[2], type=Options))
place = "http://127.0.0.1:%d" % listener.getsockname()[1]
server.serve(app, listener, ready=lambda: print("Serving", place, "now", file=sys.stderr, flush=True))
"""


class Running:
    """A server process, the keys it knows by scope, its log, and everything it printed."""

    def __init__(self, folder: Path, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.log_path = folder / "log.db"
        self.tokens = {scope: create_key(folder / "api-keys.json", scope, [scope]) for scope in SCOPES}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env={**clean_environment(), **(environment or {})}
            )
        wait_until(lambda: "Serving" in self.printed or self.process.poll() is not None, 60)
        found = re.search(r"Serving (\S+)", self.printed)
        assert found, self.printed
        self.url = found[1]

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def client(self, scope: str = "ingest", **options: Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.tokens[scope]}"}, timeout=60, **options
        )

    def records(self) -> list[Record]:
        return records(self.log_path)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("ANCHORWATCH_")}


def wait_until(met: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up, "never happened"
        time.sleep(0.02)


def records(path: Path) -> list[Record]:
    log = EmbeddedLog(path)
    try:
        begin, end, _ = log.span(PROJECTIONS, 0)
        return log.read(PROJECTIONS, 0, begin, end - begin)
    finally:
        log.close()


def ids(of: Sequence[Record]) -> list[str]:
    return [decode_projection(record.value).id for record in of]


@contextmanager
def serving(folder: Path, header_seconds: float = 10.0, drain_seconds: int = 8, **options: Any) -> Iterator[Running]:
    """The interface with these options and short deadlines."""
    folder.mkdir(exist_ok=True)
    encoded = msgspec.json.encode(Options(**options)).decode()
    running = Running(
        folder, [sys.executable, "-c", SERVE, str(folder), encoded, str(header_seconds), str(drain_seconds)]
    )
    try:
        yield running
    finally:
        running.stop(signal.SIGKILL)


@contextmanager
def anchorwatch_api(folder: Path, **settings: str) -> Iterator[Running]:
    """`anchorwatch api` as an operator starts it."""
    folder.mkdir(exist_ok=True)
    environment = {"ANCHORWATCH_DATA_DIR": str(folder), "ANCHORWATCH_API_PORT": "0"}
    environment |= {f"ANCHORWATCH_{name.upper()}": value for name, value in settings.items()}
    running = Running(folder, [sys.executable, "-m", "monitor", "api"], environment)
    try:
        yield running
    finally:
        running.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), 1.5, items=100, body_bytes=200_000, body_seconds=1.0) as running:
        yield running


def array(*events: Projection) -> bytes:
    return b"[" + b",".join(encode(event) for event in events) + b"]"


def post(client: httpx.Client, *events: Projection) -> httpx.Response:
    return client.post("/v1/projections", content=array(*events), headers=JSON)


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The body of a problem, which must be one as RFC 9457 has it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["type"] == "about:blank" and body["status"] == status
    assert body["title"] and body["detail"] and body["cure"]
    return body  # type: ignore[no-any-return]


@contextmanager
def log_away(path: Path) -> Iterator[Callable[[], None]]:
    """Another writer holds the log's file; gives what releases it."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield lambda: connection.execute("ROLLBACK") and None
    finally:
        connection.close()


# Who may do what


def protected_routes(folder: Path) -> list[tuple[str, str, str]]:
    """Method, path and scope of every route but the public ones, the page's aside. One without a scope fails here."""
    app = create_app(EmbeddedLog(folder / "routes.db"), SqliteStore(folder / "kept.db"), Keys(folder / "none.json"))
    found = []
    for route in app.routes:
        path, methods = route.path_format, route.methods  # type: ignore[attr-defined]
        if path in PUBLIC:
            continue
        assert isinstance(route, APIRoute), f"{path} is no route of ours"
        scopes = [scope for part in route.dependant.dependencies if (scope := getattr(part.call, "scope", None))]
        assert len(scopes) == 1, f"{path} asks for no scope: depend on needs(...)"
        found += [(method, path, scopes[0]) for method in methods]
    return found


def test_every_route_refuses_a_missing_a_wrong_and_an_under_scoped_key(server: Running, tmp_path: Path) -> None:
    revoked = create_key(server.folder / "api-keys.json", "revoked", ["admin"])
    revoke_key(server.folder / "api-keys.json", revoked.partition(".")[0])
    routes = protected_routes(tmp_path)
    assert len(routes) == 19
    assert {(method, scope) for method, path, scope in routes if path == "/v1/silences"} == {
        ("GET", "read"),
        ("POST", "act"),
    }
    assert {scope for method, _, scope in routes if method in ("POST", "PUT", "DELETE")} == {"act", "ingest"}
    identifier, _, secret = server.tokens["admin"].partition(".")
    wrong = {
        "none": {},
        "empty": {"Authorization": ""},
        "no secret": {"Authorization": f"Bearer {identifier}"},
        "empty secret": {"Authorization": f"Bearer {identifier}."},
        "another's secret": {"Authorization": f"Bearer {identifier}.{server.tokens['read'].partition('.')[2]}"},
        "its hash": {"Authorization": f"Bearer {identifier}.{read_keys(server.folder / 'api-keys.json')[3].sha256}"},
        "the secret alone": {"Authorization": f"Bearer {secret}"},
        "another scheme": {"Authorization": f"Basic {server.tokens['admin']}"},
        "revoked": {"Authorization": f"Bearer {revoked}"},
        "in the query": {},
        "not ASCII": {"Authorization": b"Bearer \xff\xfe.\xff"},
    }
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for method, path, needed in routes:
            for name, headers in wrong.items():
                query = f"?key={server.tokens['admin']}" if name == "in the query" else ""
                refused = client.request(method, path + query, headers=headers)  # type: ignore[arg-type]
                assert problem(refused, 401), (method, path, name)
                assert refused.headers["www-authenticate"] == "Bearer"
            for scope, token in server.tokens.items():
                with client.stream(method, path, headers={"Authorization": f"Bearer {token}"}) as answer:
                    if not path.endswith("/stream"):  # which does not end
                        answer.read()
                if scope in (needed, "admin"):
                    assert answer.status_code not in (401, 403), (method, path, scope)
                else:
                    assert answer.status_code == 403, (method, path, scope)


def test_the_page_and_everything_beside_it_asks_for_a_scope_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path))
    log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
    app = application(load_settings(), log, store, Keys(tmp_path / "none.json"))
    waiting: list[Any] = list(app.routes)
    seen = set()
    while waiting:
        route = waiting.pop()
        if (inside := getattr(route, "original_router", None)) is not None:
            waiting += inside.routes
            continue
        assert isinstance(route, Route), route  # no mount, behind which anything could be
        seen.add(route.path_format)
        parts = route.dependant.dependencies if isinstance(route, APIRoute) else []
        scopes = [part.call for part in parts if hasattr(part.call, "scope")]
        assert bool(scopes) != (route.path_format in {*PUBLIC, *page.PUBLIC}), route.path_format
    assert seen > {"/", "/act", "/sessions/{conversation_id}", "/v1/sessions", "/metrics"}
    log.close()
    store.close()


def test_a_key_is_asked_for_before_any_of_the_body_is_read(server: Running) -> None:
    with connected(server) as (send, receive):
        send(b"POST /v1/projections HTTP/1.1\r\nHost: x\r\nContent-Length: 150000\r\n\r\n")
        assert receive().startswith(b"HTTP/1.1 401")


def test_keys_work_and_stop_working_while_the_server_runs(server: Running) -> None:
    path = server.folder / "api-keys.json"
    token = create_key(path, "late", ["read"])
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/metrics", headers=headers).status_code == 200
        good = path.read_bytes()
        path.write_bytes(b"{half a file")
        assert client.get("/metrics", headers=headers).status_code == 200  # what was read before stays in force
        assert "keys read before stay in force" in server.printed
        path.write_bytes(good)
        revoke_key(path, token.partition(".")[0])
        assert client.get("/metrics", headers=headers).status_code == 401
        moved = path.rename(path.with_suffix(".away"))
        assert client.get("/metrics", headers={"Authorization": f"Bearer {server.tokens['read']}"}).status_code == 401
        moved.rename(path)
        assert client.get("/metrics", headers={"Authorization": f"Bearer {server.tokens['read']}"}).status_code == 200


def test_the_keys_file_holds_no_secret_is_its_owners_only_and_survives_editors_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda n: create_key(path, f"k{n}", ["ingest", "read"]), range(24)))
    assert len(set(tokens)) == len(read_keys(path)) == 24
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    keys = Keys(path)
    for token in tokens:
        assert token.partition(".")[2] not in text and len(token.partition(".")[2]) == 43
        found = keys.find(token)
        assert found is not None and found.may("ingest") and found.may("read") and not found.may("act")
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="other users can read") as caught:
        Keys(path)
    assert "chmod 600" in caught.value.cure
    path.chmod(0o600)
    path.write_text('{"keys": [{"id": 1}]}')
    with pytest.raises(ConfigurationError, match="is damaged"):
        create_key(path, "one more", ["read"])
    assert path.read_text() == '{"keys": [{"id": 1}]}'
    for name, scopes in [("", ["read"]), ("x" * 65, ["read"]), ("x", []), ("x", ["root"])]:
        with pytest.raises(ConfigurationError, match="a key needs"):
            create_key(tmp_path / "other.json", name, scopes)


def test_an_open_server_closes_with_the_first_key_and_never_opens_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = Keys(path, open_without=True)
    assert keys.find(None) and keys.open
    token = create_key(path, "first", ["read"])
    assert keys.find(None) is None and keys.find(token)
    revoke_key(path, token.partition(".")[0])
    assert keys.find(None) is None and keys.find(token) is None
    path.unlink()
    assert keys.find(None) is None and not keys.open
    assert Keys(path).find(None) is None  # and one that was never meant to be open is not


def test_without_keys_only_loopback_is_served_and_only_under_loopback_names(tmp_path: Path) -> None:
    environment = {**clean_environment(), "ANCHORWATCH_DATA_DIR": str(tmp_path), "ANCHORWATCH_API_PORT": "0"}
    refused = subprocess.run(
        [sys.executable, "-m", "monitor", "api"],
        cwd=ROOT,
        env={**environment, "ANCHORWATCH_API_HOST": "0.0.0.0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert "there are no keys" in refused.stderr and "anchorwatch keys create" in refused.stderr
    assert "ANCHORWATCH_API_HOST=127.0.0.1" in refused.stderr

    async def ask() -> None:
        log, store = EmbeddedLog(tmp_path / "open.db"), SqliteStore(tmp_path / "kept.db")
        app = create_app(log, store, Keys(tmp_path / "none.json", open_without=True))
        transport = httpx.ASGITransport(app)
        for host, status in [("127.0.0.1:8080", 200), ("localhost", 200), ("[::1]:1", 200), ("rebound.example", 403)]:
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                assert (await client.get("/metrics")).status_code == status, host
        log.close()
        store.close()

    asyncio.run(ask())


# What is posted


def test_a_batch_is_in_the_log_in_order_when_it_is_acknowledged(server: Running) -> None:
    events = [projection(f"batch-{n % 3}", n, n / 7) for n in range(100)]
    with server.client() as client:
        answer = post(client, *events)
    assert answer.status_code == 202
    assert answer.json() == {
        "accepted": 100,
        "rejected": 0,
        "results": [{"index": n, "status": "accepted"} for n in range(100)],
    }
    kept = server.records()[-100:]
    assert [decode_projection(record.value) for record in kept] == events
    assert [(record.key, record.value, record.headers) for record in kept] == [
        (message.key, message.value, message.headers) for message in map(message_of, events)
    ]


def test_lines_are_a_batch_too_and_each_item_has_its_own_result(server: Running) -> None:
    before = len(server.records())
    good = [encode(projection("lines", n)) for n in range(3)]
    body = good[0] + b"\r\n\n" + b"{no json\n" + good[1] + b"\n" + b'{"id": "x"}\n' + good[2]
    with server.client() as client:
        answer = client.post("/v1/projections", content=body, headers=NDJSON)
    told = answer.json()
    assert answer.status_code == 202 and (told["accepted"], told["rejected"]) == (3, 2)
    assert [result["status"] for result in told["results"]] == ["accepted", "rejected"] * 2 + ["accepted"]
    assert "malformed" in told["results"][1]["reason"] and "missing required field" in told["results"][3]["reason"]
    assert [record.value for record in server.records()[before:]] == good


@pytest.mark.parametrize(("content", "headers"), [(b"[]", JSON), (b"", NDJSON), (b"\n \n", NDJSON)])
def test_nothing_is_a_batch_too(server: Running, content: bytes, headers: dict[str, str]) -> None:
    with server.client() as client:
        answer = client.post("/v1/projections", content=content, headers=headers)
    assert (answer.status_code, answer.json()) == (202, {"accepted": 0, "rejected": 0, "results": []})


CANARY = "canary-7d1f2a"


def spoilt() -> dict[str, dict[str, Any]]:
    """A projection with one field wrong, for each way to be wrong; the wrong value holds the canary."""
    long = CANARY * 40
    changes: dict[str, dict[str, Any]] = {
        "time": {"time": CANARY},
        "version": {"version": CANARY},
        "turn": {"turn": CANARY},
        "id too long": {"id": long},
        "conversation too long": {"conversation_id": long},
        "empty id": {"id": ""},
        "no number": {"projection": CANARY},
        "coordinates": {"coordinates": {CANARY: CANARY}},
        "too many coordinates": {"coordinates": {f"{CANARY}{n}": 1.0 for n in range(33)}},
        "windows": {"windows": {"lowest": CANARY}},
        "held": {"held": 2.0, "model": CANARY},
        "tokens": {"tokens": 0, "model": CANARY},
        "attribute value": {"attributes": {CANARY: long}},
        "attribute name": {"attributes": {long: CANARY}},
        "attribute kind": {"attributes": {CANARY: [CANARY]}},
        "large": {"attributes": {}, "prompt": {CANARY * 6000: 1.0}},
    }
    return {name: msgspec.to_builtins(projection("spoilt", 0)) | change for name, change in changes.items()}


@pytest.mark.parametrize("name", spoilt())
def test_what_is_rejected_says_why_and_never_quotes_it(server: Running, name: str) -> None:
    good = msgspec.to_builtins(projection(f"beside {name}", 0))
    with server.client() as client:
        answer = client.post("/v1/projections", json=[spoilt()[name], good])
    assert answer.status_code == 202
    bad, fine = answer.json()["results"]
    assert bad["status"] == "rejected" and len(bad["reason"]) > 15 and fine["status"] == "accepted"
    assert CANARY not in answer.text
    assert CANARY not in server.printed


@pytest.mark.parametrize("raw", [rb'"\ud800"', b'"\xff"', b"[" * 50_000, b"1e999", b"NaN", b"{}{}"])
def test_hostile_json_costs_nobody_anything(server: Running, raw: bytes) -> None:
    text = encode(projection("hostile", 0)).replace(b'"toy"', raw)
    with server.client() as client:
        lines = client.post("/v1/projections", content=text + b"\n" + encode(projection("x", 0)), headers=NDJSON)
        assert [result["status"] for result in lines.json()["results"]] == ["rejected", "accepted"]
        whole = client.post("/v1/projections", content=b"[" + text + b"]", headers=JSON)
        assert whole.status_code in (400, 422)
        assert problem(whole, whole.status_code)


def test_what_the_contract_does_not_know_goes_no_further(server: Running) -> None:
    # A collector that sends text, against all advice, does not get it into the log.
    event = msgspec.to_builtins(projection("newer", 0)) | {"version": "1.9", "reply": CANARY, "nested": {"x": CANARY}}
    with server.client() as client:
        assert client.post("/v1/projections", json=[event]).status_code == 202
    assert CANARY.encode() not in server.records()[-1].value
    assert CANARY not in server.printed


def test_the_same_id_posted_twice_is_counted_once(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, server.client() as client:
        for _ in range(2):
            assert post(client, projection("c", 0), projection("c", 1)).status_code == 202
        log = EmbeddedLog(server.log_path)
        assert Oracle(log).counts == {"folded": 2, "duplicate": 2}
        log.close()


def test_every_way_to_be_wrong_has_its_number(server: Running) -> None:
    one = encode(projection("wrong", 0))
    with server.client() as client:
        ask = lambda content, headers: client.post("/v1/projections", content=content, headers=headers)  # noqa: E731
        assert "no JSON array" in problem(ask(one, JSON), 400)["detail"]
        assert problem(ask(b"", JSON), 400)
        assert problem(ask(b"[" + one, JSON), 400)
        assert problem(ask(b"[]", {"Content-Type": "text/plain"}), 415)  # what a web page may send unasked
        assert problem(ask(b"[]", {}), 415)
        assert problem(ask(b"[]", {**JSON, "Content-Encoding": "gzip"}), 415)
        assert ask(b"[" + one + b"]", {"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 202
        told = problem(ask(b'[{"id": 1}, 2]', JSON), 422)
        assert [result["status"] for result in told["results"]] == ["rejected", "rejected"]
        assert "100 projections" in problem(ask(b"[" + b",".join([b"{}"] * 101) + b"]", JSON), 413)["detail"]
        assert problem(client.get("/nowhere"), 404)
        refused = client.get("/v1/projections")
        assert problem(refused, 405) and refused.headers["allow"] == "POST"


# Slow, large, many


@contextmanager
def connected(server: Running) -> Iterator[tuple[Callable[[bytes], None], Callable[[], bytes]]]:
    """A bare socket: what sends, and what gives everything until the server closes or answers."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:

        def receive() -> bytes:
            try:
                return connection.recv(65536)
            except ConnectionResetError:
                return b""

        yield connection.sendall, receive


def head(server: Running, *lines: str) -> bytes:
    first = ["POST /v1/projections HTTP/1.1", "Host: x", f"Authorization: Bearer {server.tokens['ingest']}"]
    return "\r\n".join([*first, "Content-Type: application/json", *lines, "", ""]).encode()


def test_a_body_that_says_it_is_too_long_is_refused_unread(server: Running) -> None:
    with connected(server) as (send, receive):
        send(head(server, "Content-Length: 200001"))
        assert receive().startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("length", ["-1", "1e3", "1, 2", "99999999999999999999999999"])
def test_a_length_that_is_none_is_refused(server: Running, length: str) -> None:
    with connected(server) as (send, receive):
        send(head(server, f"Content-Length: {length}"))
        assert receive()[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def test_a_chunked_body_ends_where_it_gets_too_long(server: Running) -> None:
    before = resident(server)
    with connected(server) as (send, receive):
        send(head(server, "Transfer-Encoding: chunked"))
        give_up = time.monotonic() + 30
        with pytest.raises(OSError):  # the answer is there at once; who goes on all the same is cut off soon
            while time.monotonic() < give_up:
                send(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert receive()[:12] in (b"", b"HTTP/1.1 413")
    assert resident(server) - before < 50 * 2**20


def test_a_chunked_body_in_small_pieces_is_a_body(server: Running) -> None:
    with connected(server) as (send, receive):
        send(head(server, "Transfer-Encoding: chunked"))
        for byte in array(projection("chunked", 0)):
            send(b"1\r\n" + bytes([byte]) + b"\r\n")
        send(b"0\r\n\r\n")
        assert receive().startswith(b"HTTP/1.1 202")


def resident(server: Running) -> int:
    """Bytes of memory that the server has."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_who_sends_a_body_too_slowly_is_told_so(server: Running) -> None:
    with connected(server) as (send, receive):
        send(head(server, "Content-Length: 1000"))
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(0.05):
                try:
                    send(b" ")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        assert receive().startswith(b"HTTP/1.1 408")
        dripping.set()


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_who_sends_headers_too_slowly_is_cut_off(server: Running, before: bytes) -> None:
    with connected(server) as (send, receive):
        if before:  # also on a connection that has behaved so far
            send(before)
            told = receive()
            while not told.endswith(b"}"):
                told += receive()
            assert b"200 OK" in told
        send(b"GET /healthz HTTP/1.1\r\n")
        cut: list[bytes] = []
        reader = threading.Thread(target=lambda: cut.append(receive()), daemon=True)
        reader.start()
        for _ in range(400):
            try:
                send(b"X")
            except OSError:
                break
            reader.join(0.05)
            if not reader.is_alive():
                break
        assert cut == [b""]


def test_a_hundred_slow_clients_do_not_slow_the_others(server: Running) -> None:
    url = httpx.URL(server.url)
    slow = [socket.create_connection((url.host, url.port), timeout=30) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(head(server, "Content-Length: 1000") + b"[")
        with server.client() as client:
            for turn in range(20):
                assert post(client, projection("beside the slow", turn)).status_code == 202
    finally:
        for connection in slow:
            connection.close()


def test_a_rate_is_kept_per_key_and_says_when_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path / "s", items=50, rate=50.0) as server:
        other = create_key(server.folder / "api-keys.json", "other", ["ingest"])
        batch = array(*(projection("c", turn) for turn in range(50)))
        with server.client() as client:
            assert client.post("/v1/projections", content=batch, headers=JSON).status_code == 202
            refused = client.post("/v1/projections", content=batch, headers=JSON)
            assert "rate" in problem(refused, 429)["detail"]
            assert refused.headers["retry-after"] == "1"
            headers = {**JSON, "Authorization": f"Bearer {other}"}
            assert client.post("/v1/projections", content=batch, headers=headers).status_code == 202
            wait_until(lambda: client.post("/v1/projections", content=batch, headers=JSON).status_code == 202)
        assert len(server.records()) == 150


@given(
    rate=st.floats(0.1, 1000),
    burst=st.floats(1, 1000),
    asked=st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 2000)), max_size=50),
)
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(
    rate: float, burst: float, asked: list[tuple[float, float]]
) -> None:
    now = 0.0
    buckets = Buckets(rate, burst, clock=lambda: now)
    given_out = 0.0
    for pause, tokens in asked:
        now += pause
        wait = buckets.take("key", tokens)
        if not wait:
            given_out += min(tokens, burst)
        else:  # and what it says is true
            now += wait + 1e-6
            assert not buckets.take("key", tokens)
            given_out += min(tokens, burst)
        assert given_out <= (burst + rate * now) * (1 + 1e-6) + 1e-3


def test_an_allowance_is_never_exceeded_and_always_given_back() -> None:
    allowance = Allowance(100)
    with pytest.raises(Problem), allowance.share() as first:
        assert first.grow(60)
        with allowance.share() as second:
            assert not second.grow(41) and second.grow(40) and not first.grow(1)
        assert allowance.held == 60
        raise Problem(400, "x", "y")
    assert allowance.held == 0


def test_a_thousand_requests_at_once_are_all_answered_and_all_in_the_log(tmp_path: Path) -> None:
    async def ask(url: str, token: str) -> list[int]:
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {token}", **JSON}
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers) as client:
            posts = [client.post("/v1/projections", content=array(projection(f"c{n}", 0))) for n in range(1000)]
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    with serving(tmp_path / "s") as server:
        answered = asyncio.run(ask(server.url, server.tokens["ingest"]))
        assert answered == [202] * 1000
        assert sorted(ids(server.records())) == sorted(f"c{n}#0" for n in range(1000))


# The log is away


def test_while_the_log_is_away_nothing_is_acknowledged_and_afterwards_everything_can_be(tmp_path: Path) -> None:
    with serving(tmp_path / "s", patience_seconds=0.6) as server, server.client() as client:
        assert post(client, projection("c", 0)).status_code == 202
        with log_away(server.log_path) as release:
            refused = post(client, projection("c", 1))
            assert "send all of it again" in problem(refused, 503)["cure"]
            assert int(refused.headers["retry-after"]) >= 1
            waiting = threading.Thread(target=lambda: post(client, projection("d", 0)))
            waiting.start()
            wait_until(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/healthz").json() == {"status": "ok"}
            waiting.join(20)
            release()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert post(client, projection("c", 1), projection("d", 0)).status_code == 202
        # What was not acknowledged may have been written all the same: it is there twice then, under the same id.
        assert set(ids(server.records())) == {"c#0", "c#1", "d#0"}


def test_memory_is_bounded_while_the_log_is_away(tmp_path: Path) -> None:
    big = array(*(projection("c" * 200, turn) for turn in range(100)))
    with serving(tmp_path / "s", patience_seconds=3.0, queue_bytes=10 * len(big), body_bytes=2 * len(big)) as server:
        with log_away(server.log_path) as release, ThreadPoolExecutor(60) as pool, server.client() as client:

            def ask(_: int) -> httpx.Response:
                return client.post("/v1/projections", content=big, headers=JSON)

            refused = list(pool.map(ask, range(60)))
            numbers = [answer.status_code for answer in refused]
            assert set(numbers) == {429, 503}
            assert numbers.count(503) <= 10
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            release()
        with server.client() as client:
            assert client.post("/v1/projections", content=big, headers=JSON).status_code == 202
            with server.client("read") as reader:
                assert "anchorwatch_http_queue_bytes 0.0" in reader.get("/metrics").text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_acknowledged_survives_the_servers_end_in_the_middle(tmp_path: Path, number: int) -> None:
    acknowledged: list[str] = []
    odd: list[int] = []
    stop = threading.Event()

    def collector(server: Running, name: int) -> None:
        with server.client() as client:
            turn = 0
            while not stop.is_set():
                batch = [projection(f"c{name}", turn + n) for n in range(5)]
                try:
                    answer = post(client, *batch)
                except httpx.TransportError:
                    return
                if answer.status_code != 202:
                    odd.append(answer.status_code)
                    continue
                acknowledged.extend(event.id for event in batch)
                turn += 5

    with serving(tmp_path / "s") as server:
        threads = [threading.Thread(target=collector, args=(server, name)) for name in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(acknowledged) > 300)
        code = server.stop(number)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert set(acknowledged) <= set(ids(server.records()))
        assert not set(odd) - {503}


def test_sigterm_ends_it_soon_also_while_the_log_is_away_and_clients_dawdle(tmp_path: Path) -> None:
    with serving(tmp_path / "s", drain_seconds=2, patience_seconds=60.0) as server, server.client() as client:
        post(client, projection("c", 0))
        with log_away(server.log_path), connected(server) as (send, _):
            send(head(server, "Content-Length: 1000") + b"[")
            answers: list[httpx.Response] = []
            asked = threading.Thread(target=lambda: answers.append(post(client, projection("c", 1))))
            asked.start()
            time.sleep(0.3)
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 25  # two seconds of grace here, five for the log
            asked.join(20)
            assert problem(answers[0], 503)
        assert ids(server.records()) == ["c#0"]


def test_a_fault_of_ours_is_told_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def ask() -> httpx.Response:
        log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
        app = create_app(log, store, Keys(tmp_path / "none.json", open_without=True))
        # Nobody has started the application, so it has nothing to write with.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            answer = await client.post("/v1/projections", content=array(projection(CANARY, 0)), headers=JSON)
        log.close()
        store.close()
        return answer

    assert problem(asyncio.run(ask()), 500)
    printed = "".join(capfd.readouterr())
    assert "AttributeError" in printed and "Traceback" not in printed and CANARY not in printed


def test_no_body_and_no_key_is_ever_printed(server: Running) -> None:
    # At the finest level, after everything that the tests above have done to it.
    with server.client() as client:
        post(client, projection(CANARY, 0))
        client.post("/v1/projections", content=CANARY.encode(), headers=JSON)
    assert CANARY not in server.printed
    for token in server.tokens.values():
        assert token.partition(".")[2] not in server.printed
    assert "Traceback" not in server.printed


# As operators run it


def test_anchorwatch_api_runs_by_its_settings_with_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *made],
        check=True,
        capture_output=True,
    )
    settings = {"api_tls_certificate": str(certificate), "api_tls_key": str(key), "api_max_items": "2"}
    with anchorwatch_api(tmp_path / "s", **settings) as server:
        assert server.url.startswith("https://127.0.0.1:") and "keys are asked for" in server.printed
        with server.client(verify=ssl.create_default_context(cafile=str(certificate))) as client:
            assert post(client, projection("c", 0), projection("c", 1)).status_code == 202
            assert problem(post(client, *(projection("c", turn) for turn in range(3))), 413)
        assert ids(server.records()) == ["c#0", "c#1"]
        assert server.stop() == 0


def test_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    # Nagle's algorithm would hold back each answer's second packet, which costs 40 ms: too little for a test to time.
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_told_with_the_cure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {
            **clean_environment(),
            "ANCHORWATCH_DATA_DIR": str(tmp_path),
            "ANCHORWATCH_API_PORT": str(taken.getsockname()[1]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "monitor", "api"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2 and "ANCHORWATCH_API_PORT" in done.stderr and "Traceback" not in done.stderr


def test_into_kafka_and_through_a_brokers_death(own_kafka: Server, tmp_path: Path) -> None:
    url = f"kafka://{own_kafka.address}"
    make_topic(url)
    settings = {"log_url": url, "store_url": sqlite_url(tmp_path / "store.db"), "api_patience_seconds": "2"}
    with anchorwatch_api(tmp_path / "s", **settings) as server, server.client() as client:
        assert post(client, *(projection(f"c{n}", 0) for n in range(40))).status_code == 202
        assert sorted(kafka_ids(url)) == sorted(f"c{n}#0" for n in range(40))
        own_kafka.kill()
        assert problem(post(client, projection("c", 1)), 503)
        assert client.get("/readyz").status_code == 503
        own_kafka.start()
        make_topic(url)  # tansu has forgotten it
        wait_until(lambda: post(client, projection("c", 1)).status_code == 202, 60)
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert "c#1" in kafka_ids(url)


def make_topic(url: str) -> None:
    topics = open_topics(url, KafkaOptions())
    assert topics is not None
    try:
        if PROJECTIONS not in topics.states([PROJECTIONS]):
            topics.create([TopicSpec(name=PROJECTIONS, partitions=3, replication=1, config={})])
    finally:
        topics.close()


def kafka_ids(url: str) -> list[str]:
    log = open_log(url, KafkaOptions())
    try:
        found: list[str] = []
        for partition in range(log.partitions(PROJECTIONS)):
            begin, end, _ = log.span(PROJECTIONS, partition)
            found += ids(log.read(PROJECTIONS, partition, begin, end - begin))
        return found
    finally:
        log.close()


# What is written about it


def test_the_openapi_document_has_the_contract_and_a_true_example(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    operation = document["paths"]["/v1/projections"]["post"]
    assert operation["security"] == [{"HTTPBearer": []}]
    assert set(operation["responses"]) == {"202", "400", "401", "403", "408", "413", "415", "422", "429", "503"}
    assert set(document["components"]["schemas"]["Projection"]["properties"]) == set(Projection.__struct_fields__)
    for reference in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    body = operation["requestBody"]["content"]
    with server.client() as client:
        sent = client.post("/v1/projections", json=body["application/json"]["example"])
        assert sent.json()["accepted"] == 1
        sent = client.post("/v1/projections", content=body["application/x-ndjson"]["example"], headers=NDJSON)
        assert sent.json()["accepted"] == 1
    assert decode_projection(server.records()[-1].value) == EXAMPLE
    assert server.url  # the pages that would load scripts from elsewhere are not there
    assert httpx.get(f"{server.url}/docs").status_code == httpx.get(f"{server.url}/redoc").status_code == 404


def test_what_the_page_says_to_type_works(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    page = (ROOT / "docs" / "http.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```\n+```(?:json|text)\n(.*?)```", page, re.S)
    assert len(blocks) >= 4
    with anchorwatch_api(tmp_path / "s") as server:
        port = httpx.URL(server.url).port
        environment = {
            **clean_environment(),
            "ANCHORWATCH_DATA_DIR": str(server.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        script = "set -e\n"
        for number, (commands, _) in enumerate(blocks):
            script += f"echo '== {number}'\n" + commands.replace("localhost:8080", f"localhost:{port}")
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed = re.split(r"== \d+\n", done.stdout)[1:]
        for (commands, expected), got in zip(blocks, printed, strict=True):
            assert shape(got) == shape(expected), commands


def shape(text: str) -> str:
    """A printed answer without the line breaks that the page has for its readers."""
    return re.sub(r",\s+", ",", text).strip()
