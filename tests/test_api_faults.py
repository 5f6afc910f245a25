"""The HTTP interface while the store or the log is away, and when a web page tries to use somebody's open one."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from interface import Interface, interface
from servers import Server, fresh, redis_url
from service import message, projection
from test_api_operators import one, problem
from test_api_stream import Listener, wait_until

from monitor.actions import read_actions
from monitor.api.auth import create_key
from monitor.events import encode
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore

JSON = {"Content-Type": "application/json"}
READS = [
    "/v1/sessions",
    "/v1/sessions/c",
    "/v1/sessions/c/verdict",
    "/v1/findings",
    "/v1/findings/stream",
    "/v1/alerts",
    "/v1/alerts/x",
    "/v1/silences",
    "/v1/silences/x",
    "/v1/deployments",
]


def post(api: Interface, *events: Any) -> httpx.Response:
    with api.client("ingest") as client:
        return client.post("/v1/projections", content=b"[" + b",".join(map(encode, events)) + b"]", headers=JSON)


def test_while_the_store_is_away_collectors_go_on_and_readers_are_told(own_redis: Server, tmp_path: Path) -> None:
    store = RedisStore(redis_url(own_redis), prefix=fresh("api"), timeout_seconds=1.0)
    with interface(tmp_path, store, heartbeat_seconds=0.2) as api, api.client("admin") as client:
        api.fold([message(projection("c", turn, -3.0 * turn)) for turn in range(3)])
        api.alert(one("x"))
        listener = Listener(api)
        assert client.get("/readyz").json() == {"status": "ok", "store": "ok"}
        own_redis.kill()
        for path in READS[:4] + READS[5:]:
            refused = client.get(path)
            assert problem(refused, 503) and int(refused.headers["retry-after"]) >= 1, path
        assert post(api, projection("c", 3)).status_code == 202
        wait_until(lambda: client.get("/readyz").json() == {"status": "ok", "store": "away"})
        # Nobody wants to be told of an outage all night: a silence needs no store.
        silence = client.post("/v1/silences", json={"everything": True, "seconds": 600})
        assert silence.status_code == 201 and f"silence/{silence.json()['name']}" in read_actions(api.log)
        assert problem(client.post("/v1/alerts/x/acknowledge"), 503)
        own_redis.start()
        wait_until(lambda: client.get("/v1/sessions").status_code == 200)
        # The next thing that is done takes in what had to wait.
        assert client.post("/v1/alerts/x/acknowledge").status_code == 200
        assert client.get("/v1/alerts/x").json()["silenced_by"] == [silence.json()["name"]]
        api.fold([message(projection("d", turn, -3.0 * turn)) for turn in range(3)])
        wait_until(lambda: "d" in {finding.conversation_id for finding in listener.findings})


def test_while_the_log_is_away_readers_go_on_and_nothing_is_said_to_be_done(tmp_path: Path) -> None:
    with interface(tmp_path, SqliteStore(tmp_path / "store.db")) as api, api.client("admin") as client:
        api.fold([message(projection("c", turn, -3.0 * turn)) for turn in range(3)])
        api.alert(one("x"))
        before = read_actions(api.log)
        connection = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        for method, path, body in [
            ("POST", "/v1/alerts/x/acknowledge", None),
            ("POST", "/v1/silences", {"everything": True, "seconds": 600}),
            ("PUT", "/v1/sessions/c/verdict", {"label": "healthy"}),
        ]:
            refused = client.request(method, path, json=body)
            assert problem(refused, 503) and refused.headers["retry-after"]
        assert len(client.get("/v1/sessions").json()["sessions"]) == 1
        connection.execute("ROLLBACK")
        connection.close()
        assert read_actions(api.log) == before
        assert client.put("/v1/sessions/c/verdict", json={"label": "healthy"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"Origin": "SELF"}, 201),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
    ],
)
def test_without_keys_no_page_from_elsewhere_changes_anything(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    with interface(tmp_path, SqliteStore(tmp_path / "store.db"), open=True) as api, api.client(None) as client:
        sent = {name: value.replace("SELF", api.url) for name, value in headers.items()}
        answer = client.post("/v1/silences", json={"everything": True, "seconds": 60}, headers=sent)
        assert answer.status_code == status
        assert bool(read_actions(api.log)) == (status == 201)
        create_key(api.keys, "first", ["read"])
        assert client.post("/v1/silences", json={"everything": True, "seconds": 60}).status_code == 401
