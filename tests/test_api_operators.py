"""What operators' tools ask for over HTTP, on a real SQLite and a real Redis: sessions, findings, alerts, silences,
verdicts and deployments. What is done there is in the log, under the key's name, and outlives the store.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interface import STORES, Interface, interface, open_store
from service import CONFIG, Oracle, message, projection, traffic

from monitor.actions import Acknowledgement, Action, Paging, Silence, append_action, read_actions
from monitor.alert import Alert
from monitor.api.acting import Done
from monitor.api.alert_table import AlertTable
from monitor.api.cursors import write_cursor
from monitor.api.rim import path_of
from monitor.api.silences import silenced_by
from monitor.fleet import FleetReader
from monitor.matchers import Matcher
from monitor.store.sqlite import SqliteStore

CANARY = "canary-5e1d"
NAMES = [
    "plain",
    "a/b",
    "a%2Fb",
    "a%252Fb",
    "/",
    "%",
    "../..",
    "a?b#c&d=e",
    "ü 漢字 \u202eabc",
    "line\nbreak\ttab",
    "nul\0inside",
    "<script>alert(1)</script>",
    "x/verdict",
    "stream",
    "+ +",
    "😀" * 64,
]


@pytest.fixture(scope="module", params=STORES)
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_redis: str
) -> Iterator[Interface]:
    """Forty conversations, half of them drifting, and others with names of all sorts."""
    folder = tmp_path_factory.mktemp(request.param)
    with interface(folder, open_store(request.param, folder, shared_redis)) as running:
        running.fold(traffic(40, 12))
        running.fold([message(projection(name, turn, -1.5 * turn)) for name in NAMES for turn in range(4)])
        running.fold([message(projection("lonely", 0, deployment="pirates"))])
        yield running


def one(name: str, *, firing: bool = True, at: int = 0, **changes: Any) -> Alert:
    """An alert."""
    begun = f"2026-01-01T00:{at:02}:00Z"
    made = Alert(
        id=name,
        conversation_id=f"of {name}",
        deployment="shop",
        model="toy",
        axis_id="axis-1",
        config_id="c",
        kind="dip",
        persona="ghost",
        severity="warning",
        starts_at=begun,
        ends_at=None if firing else begun,
        resolution=None if firing else "recovered",
        accepted=0.0,
        changed=0.0,
        finding_ids=(f"f-{name}",),
        turn=1,
        statistic="dip",
        value=3.0,
        boundary=2.0,
        risk=1.5,
        certification="certified",
    )
    return msgspec.structs.replace(made, **changes)


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status and body["title"] and body["detail"] and body["cure"]
    return body  # type: ignore[no-any-return]


def pages(client: httpx.Client, path: str, what: str, **query: Any) -> list[dict[str, Any]]:
    """All of a listing, page by page."""
    found: list[dict[str, Any]] = []
    cursor = None
    for _ in range(1000):
        answer = client.get(path, params=query | ({"cursor": cursor} if cursor else {}))
        assert answer.status_code == 200, answer.text
        found += answer.json()[what]
        cursor = answer.json()["next"]
        if cursor is None:
            return found
    raise AssertionError("it never ends")


# Sessions


def test_sessions_are_ranked_and_read_by_the_page(api: Interface) -> None:
    with api.client() as client:
        whole = client.get("/v1/sessions", params={"limit": 500}).json()
        assert whole["next"] is None
        risks = [one["risk"] for one in whole["sessions"]]
        judged = [risk for risk in risks if risk is not None]
        assert judged == sorted(judged, reverse=True) and len(judged) == len(risks) - 1  # the one in no baseline
        assert {one["conversation_id"] for one in whole["sessions"]} == {
            *(f"c{n}" for n in range(40)),
            *NAMES,
            "lonely",
        }
        for size in (1, 7, 57):
            assert pages(client, "/v1/sessions", "sessions", limit=size) == whole["sessions"]


def test_sessions_are_filtered(api: Interface) -> None:
    with api.client() as client:
        everyone = client.get("/v1/sessions", params={"limit": 500}).json()["sessions"]
        for query, admits in [
            ({"deployment": "pirates"}, lambda one: one["deployment"] == "pirates"),
            ({"model": "toy"}, lambda one: True),
            ({"model": "another"}, lambda one: False),
            ({"severity": "critical"}, lambda one: one["severity"] == "critical"),
            ({"open": "true"}, lambda one: one["episode_id"] is not None),
            ({"open": "false"}, lambda one: one["episode_id"] is None),
            ({"since": "2026-01-01T00:05:00Z"}, lambda one: one["time"] >= "2026-01-01T00:05:00"),
            ({"since": "2026-01-01T02:05:00+02:00"}, lambda one: one["time"] >= "2026-01-01T00:05:00"),
            ({"open": "true", "severity": "warning"}, lambda one: one["severity"] == "warning"),
        ]:
            expected = [one for one in everyone if admits(one)]
            assert pages(client, "/v1/sessions", "sessions", **query, limit=6) == expected, query
        assert {one["severity"] for one in everyone} >= {None, "critical"}


def test_a_search_that_finds_little_ends_and_can_be_gone_on_with(
    api: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.api.ranking.LOOKED_AT", 4)
    monkeypatch.setattr("monitor.api.ranking.AT_ONCE", 2)
    with api.client() as client:
        first = client.get("/v1/sessions", params={"model": "another"}).json()
        assert first["sessions"] == [] and first["next"]
        assert pages(client, "/v1/sessions", "sessions", model="another") == []
        assert len(pages(client, "/v1/sessions", "sessions", model="toy", limit=3)) == 41 + len(NAMES)


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/findings", "/v1/alerts"])
def test_a_cursor_that_is_none_is_refused(api: Interface, path: str) -> None:
    wrong = ["", "x", "!", "é", "aa", "e30", "bnVsbA", "W10", "WzEsMl0", "WzEsMiwzXQ", "//8", write_cursor("[" * 900)]
    with api.client() as client:
        for cursor in wrong:
            assert "cursor" in problem(client.get(path, params={"cursor": cursor}), 400)["detail"], cursor


def test_one_session_has_its_trajectory_findings_alerts_and_verdict(api: Interface) -> None:
    found = api.store.findings(100, conversation_id="c1")
    assert found
    api.alert(one(found[0].episode_id, conversation_id="c1"))
    with api.client() as client:
        whole = client.get("/v1/sessions/c1").json()
    assert whole["session"]["conversation_id"] == "c1" and whole["session"]["responses"] == 12
    assert [point["turn"] for point in whole["trajectory"]] == list(range(12))
    assert whole["trajectory"][0]["time"] == "2026-01-01T00:00:00.000Z"
    assert whole["findings"] == [json.loads(msgspec.json.encode(finding)) for finding in found]
    assert [alert["id"] for alert in whole["alerts"]] == [found[0].episode_id]
    assert whole["verdict"] is None
    oracle = Oracle(api.log)
    assert {one["id"] for one in whole["findings"]} == {
        one.id for one in oracle.findings if one.conversation_id == "c1"
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_identifier_may_hold_any_character(api: Interface, name: str) -> None:
    path = f"/v1/sessions/{quote(name, safe='')}"
    with api.client("admin") as client:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.json()["session"]["conversation_id"] == name
        assert problem(client.get(path + "/verdict"), 404)
        assert client.put(path + "/verdict", json={"label": "unsure"}).status_code == 200
        assert client.get(path).json()["verdict"]["label"] == "unsure"
        assert f"verdict/{name}" in read_actions(api.log)
        assert client.delete(path + "/verdict").status_code == 204
        assert problem(client.delete(path + "/verdict"), 404)


@given(st.lists(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_a_path_keeps_its_segments_apart(names: list[str]) -> None:
    path = path_of("/".join(quote(name, safe="") for name in names).encode())
    segments = path.split("/")
    assert len(segments) == len(names)
    assert [segment.replace("%2F", "/").replace("%25", "%") for segment in segments] == names


def test_a_session_that_is_not_there_is_not_found(api: Interface) -> None:
    with api.client("admin") as client:
        for path in ("/v1/sessions/nobody", "/v1/sessions/" + "x" * 5000, "/v1/sessions/%FF%FE"):
            assert problem(client.get(path), 404)
            assert problem(client.put(path + "/verdict", json={"label": "healthy"}), 404)
        assert problem(client.get("/v1/sessions/c1/nowhere"), 404)
        assert problem(client.get("/v1/sessions/a/b"), 404)  # two segments are no identifier


# Findings


def test_findings_are_listed_newest_first_and_filtered(api: Interface) -> None:
    expected = sorted(Oracle(api.log).findings, key=lambda one: one.id)
    expected.sort(key=lambda one: one.time, reverse=True)
    with api.client() as client:
        got = [one["id"] for one in pages(client, "/v1/findings", "findings", limit=13)]
        assert got == [one.id for one in expected]
        for kind in ("dip", "recovered", "fleet_shift"):
            got = [one["id"] for one in pages(client, "/v1/findings", "findings", kind=kind, limit=5)]
            assert got == [one.id for one in expected if one.kind == kind]
        got = [one["id"] for one in pages(client, "/v1/findings", "findings", conversation_id="a/b", limit=1)]
        assert got == [one.id for one in expected if one.conversation_id == "a/b"] and got
        assert pages(client, "/v1/findings", "findings", deployment="pirates") == []
        assert len(client.get("/v1/findings").json()["findings"]) == 50


# Alerts


def test_alerts_are_listed_those_that_fire_first(api: Interface) -> None:
    api.alert(*(one(f"fires-{n}", at=n) for n in range(5)), *(one(f"over-{n}", at=n, firing=False) for n in range(4)))
    with api.client() as client:
        for size in (1, 2, 500):
            found = [alert for alert in pages(client, "/v1/alerts", "alerts", limit=size) if "-" in alert["id"]]
            listed = [alert["id"] for alert in found if alert["id"].startswith(("fires", "over"))]
            assert listed == [*(f"fires-{n}" for n in (4, 3, 2, 1, 0)), *(f"over-{n}" for n in (3, 2, 1, 0))]
        over = client.get("/v1/alerts/over-1").json()
        assert (over["status"], over["resolution"], over["told"], over["story"]) == ("resolved", "recovered", {}, "")
        assert {alert["status"] for alert in pages(client, "/v1/alerts", "alerts", status="resolved")} == {"resolved"}
        assert [a["id"] for a in pages(client, "/v1/alerts", "alerts", conversation_id="of fires-3")] == ["fires-3"]
        for query in ({"kind": "low_start"}, {"severity": "critical"}, {"deployment": "no"}, {"acknowledged": "true"}):
            assert pages(client, "/v1/alerts", "alerts", **query) == []
        assert problem(client.get("/v1/alerts/nothing"), 404)


def test_an_alert_is_acknowledged_and_resolved_under_the_keys_name(api: Interface) -> None:
    api.alert(one("seen"))
    with api.client("act") as client, api.client() as reader:
        assert client.post("/v1/alerts/seen/acknowledge").json() == {
            "alert": "seen",
            "action": "acknowledge",
            "by": "act-key",
            "note": "",
        }
        assert client.post("/v1/alerts/seen/resolve", json={"note": "a test"}).json()["note"] == "a test"
        for kind, note in (("acknowledge", None), ("resolve", "a test")):
            written = msgspec.json.decode(read_actions(api.log)[f"{kind}/seen"])
            assert (written["by"], written["body"].get("note")) == ("act-key", note)
            assert f"{kind}/seen" in api.store.actions(kind)
        assert reader.get("/v1/alerts/seen").json()["acknowledged_by"] == "act-key"
        assert [a["id"] for a in pages(reader, "/v1/alerts", "alerts", acknowledged="true")] == ["seen"]
        assert client.delete("/v1/alerts/seen/acknowledge").status_code == 204
        assert "acknowledge/seen" not in read_actions(api.log)
        assert pages(reader, "/v1/alerts", "alerts", acknowledged="true") == []
        for verb, path in (("POST", "acknowledge"), ("DELETE", "acknowledge"), ("POST", "resolve")):
            assert problem(client.request(verb, f"/v1/alerts/nothing/{path}"), 404)
        assert not [key for key in read_actions(api.log) if key.endswith("/nothing")]


def test_an_alert_of_which_somebody_has_acknowledged_a_finding_is_acknowledged(api: Interface) -> None:
    append_action(api.log, "acknowledge", "f-by-finding", Acknowledgement(), by="somebody")
    api.alert(one("by-finding"))
    with api.client() as client:
        assert client.get("/v1/alerts/by-finding").json()["acknowledged_by"] == "somebody"


def test_the_mode_is_told_with_the_alerts(api: Interface) -> None:
    with api.client() as client:
        assert client.get("/v1/alerts").json()["mode"] == "shadow"
        append_action(api.log, "paging", "mode", Paging("live"), by="test")
        api.alert(one("mode"))
        assert client.get("/v1/alerts").json()["mode"] == "live"


class Asked:
    """A store that counts how often it is asked, and an own clock."""

    def __init__(self) -> None:
        self.times, self.now, self.slow = 0, 0.0, 0.0
        self.values: dict[str, bytes] = {}

    def actions(self, prefix: str) -> dict[str, bytes]:
        self.times += prefix == "alert/"
        self.now += self.slow
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}


def test_the_table_is_read_at_most_once_a_second_and_less_often_when_that_takes_long() -> None:
    asked = Asked()
    table = AlertTable(asked, clock=lambda: asked.now)
    for _ in range(10):
        table.all()
    assert asked.times == 1
    asked.now = 1.0
    table.all()
    assert asked.times == 2
    asked.slow = 2.0
    asked.now = 10.0
    table.all()  # four seconds for two questions
    asked.now += 35.9
    table.all()
    assert asked.times == 3
    asked.now += 0.2
    table.all()
    assert asked.times == 4
    table.expire()
    asked.values["alert/x"] = b"{no alert of this release"
    assert table.all() == [] and asked.times == 5


def test_nobody_waits_while_the_table_is_read_but_those_who_have_done_something() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Asked):
        def actions(self, prefix: str) -> dict[str, bytes]:
            found = super().actions(prefix)
            if self.times > 1:
                begun.set()
                assert go_on.wait(30)
            return found

    slow = Slow()
    table = AlertTable(slow, clock=lambda: slow.now)
    assert table.all() == []
    slow.now = 2.0
    slow.values["alert/x"] = msgspec.json.encode({"body": one("x")})
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(table.all)
        assert begun.wait(30)
        assert pool.submit(table.all).result(30) == []
        table.expire()  # while it is read: what is read now may be too old
        slow.values["alert/y"] = msgspec.json.encode({"body": one("y")})
        waiting = pool.submit(table.all)
        go_on.set()
        assert [alert.id for alert in reader.result(30)] in (["x"], ["y", "x"])
        assert [alert.id for alert in waiting.result(30)] == ["y", "x"]
    assert slow.times == 3


# Silences


def test_a_silence_is_made_shown_matched_and_ended(api: Interface) -> None:
    api.alert(one("muted", deployment="quiet"), one("loud"))
    with api.client("act") as client, api.client() as reader:
        made = client.post(
            "/v1/silences", json={"seconds": 600, "matchers": 'deployment="quiet",kind=~"dip|low.*"', "note": "release"}
        )
        assert made.status_code == 201
        silence = made.json()
        assert made.headers["location"] == f"/v1/silences/{silence['name']}"
        assert (silence["by"], silence["note"], silence["in_force"]) == ("act-key", "release", True)
        assert silence["matchers"] == ['deployment="quiet"', 'kind=~"dip|low.*"']
        assert reader.get(made.headers["location"]).json() == silence
        assert silence in reader.get("/v1/silences").json()["silences"]
        assert reader.get("/v1/alerts/muted").json()["silenced_by"] == [silence["name"]]
        assert reader.get("/v1/alerts/loud").json()["silenced_by"] == []
        shown = {a["id"]: a["silenced_by"] for a in pages(reader, "/v1/alerts", "alerts")}
        assert shown["muted"] == [silence["name"]] and shown["loud"] == []
        assert f"silence/{silence['name']}" in read_actions(api.log)
        assert client.delete(made.headers["location"]).status_code == 204
        assert problem(client.delete(made.headers["location"]), 404)
        assert problem(reader.get(made.headers["location"]), 404)
        assert reader.get("/v1/alerts/muted").json()["silenced_by"] == []


def test_a_silence_that_has_run_out_is_shown_only_to_those_who_ask(api: Interface) -> None:
    append_action(api.log, "silence", "old", Silence("2020-01-01T00:00:00Z"), by="test")
    api.alert(one("any"))
    with api.client() as client:
        assert "old" not in {one["name"] for one in client.get("/v1/silences").json()["silences"]}
        shown = {one["name"]: one for one in client.get("/v1/silences", params={"ended": True}).json()["silences"]}
        assert shown["old"]["in_force"] is False
        assert client.get("/v1/alerts/any").json()["silenced_by"] == []


def test_matching_goes_by_labels_and_by_the_clock() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    action = Action(by="x", time="2026-01-01T00:00:00Z", body={})
    silences = {
        "mine": Silence("2026-01-02T00:00:00Z", matchers=(Matcher("severity", "=", "warning"),)),
        "over": Silence("2025-12-31T23:59:59Z"),
        "other": Silence("2026-01-02T00:00:00Z", deployment="other"),
        "all": Silence("2026-01-02T00:00:00Z"),
    }
    assert silenced_by(one("x"), {name: Done(action, body) for name, body in silences.items()}, now) == ["mine", "all"]


LATER = (datetime.now(UTC) + timedelta(hours=1)).isoformat()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "not clear what"),
        ({"seconds": 60}, "not clear what"),
        ({"seconds": 60, "everything": True, "kind": "dip"}, "not clear what"),
        ({"kind": "dip"}, "not clear how long"),
        ({"kind": "dip", "seconds": 60, "until": LATER}, "not clear how long"),
        ({"kind": "dip", "until": "tomorrow"}, "no moment"),
        ({"kind": "dip", "until": "2026-01-01T00:00:00"}, "no moment"),
        ({"kind": "dip", "until": "2020-01-01T00:00:00Z"}, "in the past"),
        ({"kind": "dip", "until": "9999-12-31T23:59:59Z"}, "in more than"),
        ({"kind": CANARY, "seconds": 60}, "$.kind"),
        ({"matchers": CANARY, "seconds": 60}, "matchers"),
        ({"matchers": '=~"("', "seconds": 60}, "matchers"),
        ({"matchers": 'kind=~"("', "seconds": 60}, "matchers"),
        ({"seconds": 0, "kind": "dip"}, "$.seconds"),
        ({"seconds": 10**12, "kind": "dip"}, "$.seconds"),
        ({"kind": "dip", "seconds": 60, "util": CANARY}, "not what is read"),
        ({"kind": "dip", "seconds": 60, "note": "x" * 1001}, "$.note"),
        ({"kind": "dip", "seconds": 60, "note": "a\x1b[31mb"}, "control characters"),
    ],
)
def test_a_silence_that_is_not_clear_is_refused_and_nothing_is_quoted(
    api: Interface, body: dict[str, Any], says: str
) -> None:
    before = read_actions(api.log)
    with api.client("act") as client:
        answer = client.post("/v1/silences", json=body)
    assert says in problem(answer, 422)["detail"]
    assert CANARY not in answer.text
    assert read_actions(api.log) == before


# Verdicts


def test_a_verdict_is_kept_replaced_and_taken_back(api: Interface) -> None:
    path = "/v1/sessions/c3/verdict"
    with api.client("act") as client, api.client() as reader:
        kept = client.put(path, json={"label": "drifting", "turn": 3, "note": "a ghost"})
        assert kept.status_code == 200 and kept.json()["by"] == "act-key"
        assert reader.get(path).json() == kept.json() == reader.get("/v1/sessions/c3").json()["verdict"]
        assert client.put(path, json={"label": "healthy"}).json()["turn"] is None
        written = msgspec.json.decode(read_actions(api.log)["verdict/c3"])
        assert written["body"] == {"label": "healthy"} and written["by"] == "act-key"
        assert "nowhere" in problem(client.put(path, json={"label": "healthy", "turn": 1}), 422)["detail"]
        assert client.delete(path).status_code == 204
        assert problem(reader.get(path), 404)
        for wrong in ({}, {"label": CANARY}, {"label": "drifting", "turn": -1}, {"label": "unsure", "x": 1}, [], "x"):
            answer = client.put(path, json=wrong)
            assert problem(answer, 422) and CANARY not in answer.text
        assert problem(client.put(path, content=b"{", headers={"Content-Type": "application/json"}), 400)
        assert problem(client.put(path, content=b'{"label": "unsure"}'), 415)
        assert problem(client.put(path, json={"label": "unsure", "note": "x" * 20_000}), 413)


def test_what_was_done_outlives_the_store(api: Interface, tmp_path: Path) -> None:
    with api.client("act") as client:
        client.put("/v1/sessions/c5/verdict", json={"label": "healthy"})
        silence = client.post("/v1/silences", json={"everything": True, "seconds": 60}).json()["name"]
        with interface(tmp_path / "anew", SqliteStore(tmp_path / "wiped.db"), api.folder / "log.db") as anew:
            anew.alert()
            with anew.client() as reader:
                assert reader.get("/v1/sessions/c5/verdict").json()["label"] == "healthy"
                assert reader.get(f"/v1/silences/{silence}").json()["by"] == "act-key"
        client.delete(f"/v1/silences/{silence}")


# Deployments


def test_deployments_have_their_baseline_and_what_is_learning_says_so(api: Interface) -> None:
    with api.client() as client:
        told = client.get("/v1/deployments").json()
    assert told["calibrations"] == [
        {
            "config_id": CONFIG.config_id,
            "axis_id": CONFIG.axis_id,
            "partitions": [0],
            "deployments": ["shop"],
        }
    ]
    pirates, shop = told["deployments"]
    assert (pirates["deployment"], pirates["learning"], pirates["baseline"]) == ("pirates", True, None)
    assert shop["deployment"] == "shop" and not shop["learning"] and not shop["own_boundaries"]
    assert shop["baseline"]["conversations"] == 100 and shop["boundaries"]["certification"] == "uncertified"
    assert shop["config_id"] == CONFIG.config_id and shop["last_hour"] is None and told["closed_through"] is None


def test_a_deployment_ages(tmp_path: Path) -> None:
    with interface(tmp_path / "i", SqliteStore(tmp_path / "store.db")) as api:
        api.fold([message(projection(f"c{n}", 0, -0.5)) for n in range(10)])
        api.fold([message(projection("pirate", 0, deployment="pirates"))])
        api.fold([message(projection("late", 9, 0.0))])
        FleetReader(api.log, api.store, lateness_seconds=0.0).run_once()
        with api.client() as client:
            told = client.get("/v1/deployments").json()
    assert [(one["deployment"], one["learning"]) for one in told["deployments"]] == [("pirates", True), ("shop", False)]
    shop = told["deployments"][-1]
    assert shop["last_week"]["responses"] == 10 and shop["last_week"]["mean_z"] == pytest.approx(-0.5)
    assert told["closed_through"] == "2026-01-01T00:04:00.000Z"
