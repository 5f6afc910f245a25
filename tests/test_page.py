"""Promises of the page over HTTP: nothing is shown or done without a key, no form is taken from elsewhere, what is done
is in the log and on the page at once, every session can be found, and the most important one comes first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from desk import HOSTILE, NOW, Desk, address, drifting, furnish, served, steady
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from servers import Server, redis_url
from service import CONFIG, projection

from monitor.actions import Acknowledgement, Paging, Silence, Verdict
from monitor.api import visit
from monitor.api.auth import ANYBODY, revoke_key
from monitor.api.browser import local
from monitor.api.chart import chart_of, episodes, spark_of, spark_top
from monitor.api.page import PUBLIC, Links, router
from monitor.api.rim import path_of
from monitor.api.views import ago, legible, utc
from monitor.detect.conversation import step
from monitor.events import Finding
from monitor.matchers import Matcher
from monitor.store import open_store
from monitor.store.store import ClosedMinutes, TrajectoryPoint

GUARDED = ("/", "/?status=open", "/sessions?id=falls", "/sessions/falls", "/sessions/nobody", "/sessions")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """With keys; nothing is changed in it."""
    with served(tmp_path_factory.mktemp("house"), keys=True) as desk:
        furnish(desk)
        yield desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with served(tmp_path, keys=True) as made:
        made.fold(drifting("falls") + steady("calm"))
        yield made


def hidden(page: httpx.Response, field: str = "token") -> str:
    found = re.search(rf'name="{field}" value="([^"]*)"', page.text)
    assert found, page.text
    return unescape(found[1])


def order(page: httpx.Response) -> list[str]:
    """The ids of the list, as the links have them."""
    found = []
    for link in re.findall(r'<a href="(/sessions[/?][^"]*)"><bdi>', page.text):
        path = unescape(link)
        found.append(
            unquote(path.removeprefix("/sessions/") if path.startswith("/sessions/") else path.partition("id=")[2])
        )
    return found


# Who may look


def test_every_route_of_the_page_says_whom_it_is_for() -> None:
    for route in router.routes:
        assert isinstance(route, APIRoute) and not route.include_in_schema
        scopes = [getattr(one.call, "scope", None) for one in route.dependant.dependencies]
        wanted = {"GET": "read", "POST": "act"}[next(iter(route.methods))]
        assert (route.path in PUBLIC) == (not any(scopes)), route.path
        assert route.path in PUBLIC or wanted in scopes


def test_without_a_visit_nothing_is_shown(house: Desk) -> None:
    with house.visitor() as stranger:
        for path in GUARDED:
            answer = stranger.get(path)
            assert answer.status_code == 401 and "Show your key" in answer.text, path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert hidden(answer, "next") == path
            assert "drifting" not in answer.text and "calm" not in answer.text
        before = house.acted()
        answer = stranger.post("/act", data={"do": "acknowledge", "alert": "x", "token": "x"})
        assert answer.status_code == 401 and house.acted() == before


def test_a_cookie_that_was_touched_opens_nothing(house: Desk) -> None:
    with house.visitor("read") as client:
        good = client.cookies[visit.COOKIE]
    assert house.tokens["read"].partition(".")[2] not in good
    key, ends, nonce, mac = good.split(".")
    other = house.tokens["act"].partition(".")[0]
    forged = [
        "",
        "anybody",
        f"{other}.{ends}.{nonce}.{mac}",
        f"{key}.{int(ends) + 1}.{nonce}.{mac}",
        f"{key}.{ends}.{nonce[::-1]}.{mac}",
        f"{key}.{ends}.{nonce}.{mac[:-1]}",
        f"{key}.{ends}.{nonce}.{'0' * 64}",
        f"{key}.{ends}.{nonce}",
        visit.begin(b"another installation", ANYBODY, NOW),
        good + ".",
        "é" * 40,
    ]
    for cookie in forged:
        answer = httpx.get(house.url, headers=[(b"cookie", f"{visit.COOKIE}={cookie}".encode())])
        assert answer.status_code == 401, cookie
    assert httpx.get(house.url, headers={"cookie": f"{visit.COOKIE}={good}"}).status_code == 200


def test_a_visit_ends_with_its_shift_and_with_its_key(desk: Desk) -> None:
    with desk.visitor("read") as client:
        desk.now += visit.SECONDS - 1
        assert client.get("/").status_code == 200
        desk.now += 1
        assert client.get("/").status_code == 401
        desk.now = NOW
        assert client.get("/").status_code == 200
        revoke_key(desk.folder / "api-keys.json", desk.tokens["read"].partition(".")[0])
        assert client.get("/").status_code == 401


def test_logging_out_takes_the_cookie_back(desk: Desk) -> None:
    with desk.visitor("read") as client:
        assert client.post("/logout", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert client.get("/").status_code == 200
        assert client.post("/logout").status_code == 303
        assert client.get("/").status_code == 401


def test_a_key_must_be_one_and_must_be_allowed_to_look(desk: Desk) -> None:
    with desk.visitor() as client:
        for key in ("", "no.key", desk.tokens["read"][:-1], "\x00", "é.ü", "x" * 4000):
            answer = client.post("/login", data={"key": key, "next": "/"})
            assert answer.status_code == 401 and "set-cookie" not in answer.headers
            assert key == "" or key not in answer.text
        answer = client.post("/login", data={"key": desk.tokens["ingest"], "next": "/"})
        assert answer.status_code == 403 and "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "next", ["//evil.example", "https://evil.example", "/\\evil.example", "\\/x", "javascript:alert(1)", "", "/\n/x"]
)
def test_nobody_is_led_elsewhere_after_the_login(desk: Desk, next: str) -> None:
    with desk.visitor() as client:
        answer = client.post("/login", data={"key": desk.tokens["read"], "next": next})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/")
        answer = client.post("/login", data={"key": desk.tokens["read"], "next": "/sessions/a%2Fb?x=1"})
        assert answer.headers["Location"] == "/sessions/a%2Fb?x=1"


@given(st.text(st.sampled_from("/\\:.@?#a\t\n é%"), max_size=8))
def test_a_local_place_is_a_path(text: str) -> None:
    place = local(text)
    assert httpx.URL("http://here.example").join(place).host == "here.example"
    assert re.fullmatch(r"/([^/\\].*)?", place)


def test_the_cookie_is_out_of_reach(desk: Desk, tmp_path: Path) -> None:
    def cookie(url: str, **headers: str) -> str:
        answer = httpx.post(f"{url}/login", data={"key": desk.tokens["read"], "next": "/"}, headers=headers)
        return answer.headers["set-cookie"].lower()

    assert all(word in cookie(desk.url) for word in ("httponly", "samesite=strict", "path=/", "max-age=43200"))
    assert "secure" not in cookie(desk.url)
    assert "secure" in cookie(desk.url, **{"X-Forwarded-Proto": "https"})


def test_every_answer_forbids_what_the_page_does_not_need(house: Desk) -> None:
    with house.visitor("act") as client, house.visitor() as stranger:
        answers = [client.get(path) for path in (*GUARDED, "/static/page.js", "/static/nothing", "/login")]
        answers += [stranger.get("/"), stranger.post("/login", data={"key": "x"}), client.post("/act")]
        for answer in answers:
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
            assert "form-action 'self'" in policy and "frame-ancestors 'none'" in policy
            assert "nosniff" in answer.headers["X-Content-Type-Options"]
            assert answer.headers["Referrer-Policy"] == "same-origin"
            assert answer.headers["Cache-Control"] == (
                "no-cache" if "javascript" in answer.headers.get("content-type", "") else "no-store"
            )
            for inline in ("style=", "<style", "onclick", "<script>", "http://", "//cdn"):
                assert inline not in re.sub(r"<bdi>.*?</bdi>|value=\"[^\"]*\"|<title>.*?</title>", "", answer.text)


def test_the_static_files_are_those_and_no_others(house: Desk) -> None:
    for name in ("page.css", "page.js", "icon.svg"):
        assert httpx.get(f"{house.url}/static/{name}").status_code == 200
    for name in ("..%2Fpage.py", "%2e%2e%2fapp.py", "page.css%00", "templates", "layout.html.jinja"):
        assert httpx.get(f"{house.url}/static/{name}").status_code == 404


# What is done


def test_a_key_that_may_look_may_not_act(desk: Desk) -> None:
    with desk.visitor("read") as client:
        page = client.get("/sessions/falls")
        assert "may look only" in page.text and 'action="/act"' not in page.text
        token = visit.token(b"the same in every replica", client.cookies[visit.COOKIE])
        answer = client.post("/act", data={"do": "acknowledge", "alert": "x", "token": token})
        assert answer.status_code == 403 and not desk.acted()


def test_a_form_from_elsewhere_does_nothing(desk: Desk) -> None:
    with desk.visitor("act") as client, desk.visitor("act") as other:
        form = {"do": "drifting", "conversation": "falls"}
        token, others = hidden(client.get("/sessions/falls")), hidden(other.get("/sessions/falls"))
        for sent, headers, status in (
            (form, {}, 403),
            (form | {"token": ""}, {}, 403),
            (form | {"token": "é"}, {}, 403),
            (form | {"token": others}, {}, 403),
            (form | {"token": token}, {"Sec-Fetch-Site": "cross-site"}, 403),
            (form | {"token": token}, {"Sec-Fetch-Site": "same-site"}, 403),
        ):
            answer = client.post("/act", data=sent, headers=headers)
            assert answer.status_code == status, sent
            assert answer.headers["content-type"].startswith("text/html")
        assert client.post("/act", json=form | {"token": token}).status_code == 415
        assert client.post("/act", data=form | {"token": token, "note": "x" * 20_000}).status_code == 413
        many = "&".join(["a=1"] * 30)
        urlencoded = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post("/act", content=many, headers=urlencoded).status_code == 400
        assert client.post("/act", content=b"a=%ff", headers=urlencoded).status_code == 400
        assert not desk.acted()
        assert client.post("/act", data=form | {"token": token}).status_code == 303


def test_without_keys_a_form_needs_its_visit_all_the_same(tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client, desk.visitor() as other:
        desk.fold(drifting("falls"))
        form = {"do": "unsure", "conversation": "falls"}
        assert client.post("/act", data=form | {"token": "x"}).status_code == 403
        token = hidden(client.get("/sessions/falls"))
        assert other.post("/act", data=form | {"token": token}).status_code == 403
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
        assert client.post("/act", data=form | {"token": token}).status_code == 303
        assert desk.acted() == {"verdict/falls": Verdict("unsure")}


def test_what_is_done_is_in_the_log_and_on_the_page(desk: Desk) -> None:
    episode = desk.session("falls").episode_id or ""
    key = "act's key"
    with desk.visitor("act") as client:

        def do(what: str, **fields: str) -> str:
            token = hidden(client.get("/sessions/falls"))
            fields = {"do": what, "conversation": "falls", "token": token} | fields
            answer = client.post("/act", data=fields, follow_redirects=True)
            assert answer.status_code == 200, answer.text
            assert answer.history[0].status_code == 303 and answer.url.path == "/sessions/falls"
            return unescape(answer.text)

        assert f"Seen by <bdi>{key}</bdi>" in do("acknowledge", alert=episode, note="on it\r\n– Ana")
        assert desk.acted()[f"acknowledge/{episode}"] == Acknowledgement("on it\n– Ana")
        assert "Nobody has seen" not in client.get("/").text and f"seen by {key}" in unescape(client.get("/").text)
        assert "Seen by" not in do("unacknowledge", alert=episode)
        assert "Nobody has seen it yet" in client.get("/").text
        assert "A false alarm" in do("healthy", note="a poem")
        assert desk.acted() == {"verdict/falls": Verdict("healthy", None, "a poem")}
        assert "A true alarm: it drifts from turn 3" in do("drifting", turn="3")
        assert "A true alarm" not in do("unjudge")
        assert "over: resolved by hand" in do("resolve", alert=episode)
        assert "No conversation is drifting now" in client.get("/").text
        assert desk.acted() == {f"resolve/{episode}": Acknowledgement()}
        assert "Silent already: conversation falls" in do("silence", about="conversation", hours="4")
        do("silence", about="kind", hours="1", deployment="shop", kind="sustained_drop")
        do("silence", about="deployment", hours="72", deployment="shop")
        made = [body for body in desk.acted().values() if isinstance(body, Silence)]
        assert sorted((one.until, one.conversation_id, one.deployment, one.kind) for one in made) == [
            ("2026-01-01T01:10:00Z", None, "shop", "sustained_drop"),
            ("2026-01-01T04:10:00Z", "falls", None, None),
            ("2026-01-04T00:10:00Z", None, "shop", None),
        ]
        page = client.get("/")
        assert "3 silences" in page.text
        for name in re.findall(r'name="silence" value="(\w+)"', page.text):
            client.post("/act", data={"do": "unsilence", "silence": name, "token": hidden(page)})
        assert "silence" not in client.get("/").text.lower().replace("silence:", "")


def test_a_form_that_makes_no_sense_is_told_so(desk: Desk) -> None:
    with desk.visitor("act") as client:
        token = hidden(client.get("/sessions/falls"))
        for form in (
            {},
            {"do": "forget", "conversation": "falls"},
            {"do": "acknowledge"},
            {"do": "acknowledge", "alert": ""},
            {"do": "acknowledge", "alert": "x" * 601},
            {"do": "resolve", "alert": "a", "note": "x" * 1001},
            {"do": "resolve", "alert": "a", "note": "\x1b[31m"},
            {"do": "drifting", "conversation": "falls", "turn": "-1"},
            {"do": "drifting", "conversation": "falls", "turn": "٣"},
            {"do": "silence", "about": "everything", "hours": "4"},
            {"do": "silence", "about": "deployment", "hours": "4"},
            {"do": "silence", "about": "kind", "kind": "anything", "deployment": "shop", "hours": "4"},
            {"do": "silence", "about": "conversation", "conversation": "falls", "hours": "1000"},
            {"do": "silence", "about": "conversation", "conversation": "x" * 257, "hours": "4"},
        ):
            answer = client.post("/act", data=form | {"token": token})
            assert answer.status_code == 422, form
            assert "What helps" in answer.text
        assert not desk.acted()


# What is shown


def test_what_is_drifting_comes_first_and_the_rest_by_risk(house: Desk) -> None:
    with house.visitor("read") as client:
        first, second = client.get("/"), client.get("/?page=2")
    shown = order(first) + order(second)
    sessions = house.store.sessions(100)
    assert sorted(shown) == sorted(one.conversation_id for one in sessions)
    open_now = {one.conversation_id for one in sessions if one.episode_id} - {"resolved"}
    count = len(open_now)
    assert set(shown[:count]) == open_now and "falls-far" in shown[:3]
    for part in (shown[:count], shown[count:]):
        risks = [house.session(name).risk for name in part]
        assert risks == sorted(risks, key=lambda risk: -1.0 if risk is None else risk, reverse=True)
    text = unescape(first.text)
    assert f"{count} conversations are drifting now" in text
    assert f"Nobody has seen {count - 1} of them yet" in text
    assert "<bdi>ghost</bdi>, <bdi>hermit</bdi>" in text and "leviathan" not in text
    assert "1 silence</a> in force" in text and "Shadow mode" in text
    assert "seen by ana" in text and "over: resolved by hand" in unescape(second.text) + text


def test_filters_leave_out_what_they_say(house: Desk) -> None:
    with house.visitor("read") as client:
        assert order(client.get("/?deployment=new")) == ["learning"]
        assert order(client.get("/", params={"model": HOSTILE[6]})) == ["hostile deployment"]
        assert set(order(client.get("/?status=inside&deployment=shop"))) == {"calm", "close"}
        critical = order(client.get("/?status=critical"))
        assert critical and all(house.session(name).severity == "critical" for name in critical)
        assert "resolved" not in order(client.get("/?status=open"))
        assert order(client.get("/?deployment=nowhere")) == []
        everything = order(client.get("/"))
        for nonsense in (
            "status=x",
            "since=x",
            "page=0",
            "page=-1",
            "page=x",
            "page=٣",
            "page=999999999",
            "x=y",
            "page=",
        ):
            assert client.get(f"/?{nonsense}").status_code == 200
        assert order(client.get("/?status=%3Cb%3E&since=%00&page=1&page=")) == everything


def test_the_list_says_when_an_empty_one_means_little(tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client:
        desk.fold(drifting("falls") + steady("calm"))
        assert "1 conversation is drifting now" in client.get("/").text
        desk.now = NOW + 3 * 3600
        text = client.get("/").text
        assert "Nothing is being heard" in text and "The newest reply is from 3 h ago" in text
        assert "it fell silent" not in text  # nobody has said so: that is the dispatcher's to say
        desk.now = NOW + 3 * 86_400
        assert "No session fits" in client.get("/").text
        assert order(client.get("/?since=any")) == ["falls", "calm"]


def test_a_fleet_shift_stands_above_everything_until_somebody_has_it_or_a_day_is_over(tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client:
        desk.fold(drifting("falls"))
        shift = replace(
            findings_of("x")[0],
            id="shift",
            episode_id="shift",
            conversation_id="",
            kind="fleet_shift",
            severity="warning",
        )
        shift = replace(shift, deployment=HOSTILE[1], time="2026-01-01T00:05:00Z")
        desk.store.close_minutes(None, ClosedMinutes(1, [], {}), [shift])
        page = client.get("/")
        assert "&lt;img src=x onerror=alert(1)&gt;</bdi> has shifted</b>, 5 min ago" in page.text
        assert page.text.index("has shifted") < page.text.index("<h1")
        token = hidden(page)
        client.post("/act", data={"do": "acknowledge", "alert": "shift", "token": token})
        page = client.get("/")
        assert "has shifted" in page.text and "Seen by <bdi>no key</bdi>" in page.text
        desk.now = NOW + 86_400
        assert "has shifted" not in client.get("/").text
        desk.now = NOW
        assert client.post("/act", data={"do": "resolve", "alert": "shift", "token": token}).status_code == 403
        token = hidden(client.get("/"))  # of the visit that began a day later
        client.post("/act", data={"do": "resolve", "alert": "shift", "token": token})
        assert "has shifted" not in client.get("/").text


def test_a_session_names_the_silences_that_are_about_it(tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client:
        desk.fold(drifting("falls"))
        until = "2026-01-02T00:00:00Z"
        desk.act("silence", "yes", Silence(until, matchers=(Matcher("deployment", "=~", "sh.*"),)))
        desk.act("silence", "no", Silence(until, matchers=(Matcher("severity", "!=", "critical"),)))
        desk.act("silence", "over", Silence("2026-01-01T00:01:00Z", note="over"))
        text = unescape(client.get("/sessions/falls").text)
        assert desk.session("falls").severity == "critical"
        assert 'Silent already: deployment=~"sh.*", until' in text and "severity!=" not in text
        assert "2 silences" in client.get("/").text


def test_an_empty_installation_says_what_is_missing(tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client:
        text = client.get("/").text
        assert "Nothing is being heard" in text and "anchorwatch doctor" in text
        desk.act("paging", "mode", Paging("live"))
        assert "Shadow mode" not in client.get("/").text


def test_live_alerts_say_who_was_told(house: Desk, tmp_path: Path) -> None:
    with served(tmp_path, keys=False) as desk, desk.visitor() as client:
        desk.fold(drifting("falls"))
        desk.act("paging", "mode", Paging("live"))
        assert "no alert yet" in client.get("/").text
        episode = desk.session("falls").episode_id or ""
        for changes, says in (
            ({}, "unseen, nobody told yet"),
            ({"told": {"ops/slack[0]": "critical"}}, "unseen</span>"),
            ({"acknowledged_by": "Bo\u202e"}, r"seen by Bo\u{202e}"),
            ({"ends_at": "2026-01-01T00:05:00Z", "resolution": "ended"}, "over: it fell silent"),
        ):
            desk.act("alert", episode, desk.alert("falls", **changes))
            assert says in client.get("/").text
            assert says in client.get("/sessions/falls").text
        desk.act("alert", episode, desk.alert("falls", story="It fell, and <fell>."))
        assert "It fell, and &lt;fell&gt;." in client.get("/sessions/falls").text


def test_every_session_is_behind_its_link_whatever_its_name(house: Desk) -> None:
    with house.visitor("act") as client:
        for name in HOSTILE:
            for path in (address(name), f"/sessions?{httpx.QueryParams(id=name)}"):
                answer = client.get(path)
                assert answer.status_code == 200, name
                if name.strip() == name:
                    assert unescape(hidden(answer, "conversation")) == name.replace("\r", "")
                assert f"<bdi>{legible(name)}</bdi></h1>" in unescape(answer.text).replace("&#39;", "'")
                for letter in "\u202e\x07\x1b\u200b\u2028\x00":
                    assert letter not in re.sub(r'value="[^"]*"', "", answer.text)
        missing = client.get("/sessions/no%2Fbody%3Cb%3E")
        assert missing.status_code == 404 and "no/body&lt;b&gt;" in missing.text


@given(st.text(min_size=1, max_size=20))
def test_an_address_leads_back_to_its_id(name: str) -> None:
    path = address(name)
    assert path.isascii() and not path.startswith("//")
    if path.startswith("/sessions/"):
        segment = path_of(path.encode()).removeprefix("/sessions/")
        assert "/" not in segment and unquote(segment) == name
        assert httpx.URL("http://h.example").join(path).raw_path == path.encode()  # no browser takes it for a folder
    else:
        assert name in (".", "..")


def test_a_session_shows_where_else_to_look(house: Desk) -> None:
    with house.visitor("read") as client:
        text = client.get(address("a/b/../c")).text
        assert 'href="https://logs.example/c/a%2Fb%2F..%2Fc"' in text
        assert re.search(r'href="https://runbooks.example/(sustained|sudden)_drop"', text)
        calm = client.get("/sessions/calm").text
        assert "runbooks.example" not in calm and "Within bounds" in calm and "None: no reply" in calm
        learning = client.get("/sessions/learning").text
        assert "still learning" in learning and "nothing to draw" in learning


def test_the_page_is_the_same_from_both_stores_and_says_when_one_is_away(tmp_path: Path, own_redis: Server) -> None:
    # A slope that leaves no number halfway between two of those that are shown: Redis keeps seven digits.
    events = drifting("falls", slope=-0.7713) + drifting(HOSTILE[0], 5, slope=-0.8817) + steady("calm")
    events += steady("learning", deployment="new")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        served(tmp_path / "a", keys=False) as one,
        served(tmp_path / "b", keys=False, store=open_store(redis_url(own_redis))) as two,
        one.visitor() as first,
        two.visitor() as second,
    ):
        for desk in (one, two):
            desk.fold(events)
            desk.act("acknowledge", desk.session("falls").episode_id or "", Acknowledgement("mine"))
        for path in ("/", "/sessions/falls", address(HOSTILE[0]), "/sessions/learning", "/sessions/none"):
            part = re.compile(r'name="token" value="\w+"|<svg class="(chart|spark).*?</svg>', re.S)
            pages = [part.sub("", client.get(path).text) for client in (first, second)]
            assert pages[0] == pages[1], path
        token = hidden(second.get("/sessions/falls"))
        own_redis.kill()
        for path in ("/", "/sessions/falls"):
            answer = second.get(path)
            assert answer.status_code == 503 and "That did not work" in answer.text
            assert answer.headers["content-type"].startswith("text/html")
        answer = second.post("/act", data={"do": "unsure", "conversation": "falls", "token": token})
        assert answer.headers["Location"] == "/sessions/falls?done=written"
        assert two.acted()["verdict/falls"] == Verdict("unsure")
        own_redis.start()
        assert second.get("/login").status_code == 200


# Pure


def test_words_for_times() -> None:
    said = {0.0: "just now", -50.0: "just now", 40.0: "40 s ago", 61.0: "1 min ago", 7300.0: "2 h ago", 3e5: "3 d ago"}
    assert {seconds: ago(seconds) for seconds in said} == said
    assert utc(0.0) == "1970-01-01 00:00:00 UTC" and utc(1e30) == utc(float("nan")) == "no time that a calendar has"


@given(st.text(max_size=40))
def test_what_is_legible_is_printable_and_one_of_a_kind(text: str) -> None:
    shown = legible(text)
    assert all(letter.isprintable() or letter in "\u200c\u200d" for letter in shown)
    if text.isprintable():
        assert shown == text


numbers = st.floats(-30, 30)
points = st.lists(
    st.tuples(st.integers(0, 40), st.none() | numbers, st.none() | st.floats(0, 40), st.booleans()), max_size=60
).map(
    lambda rows: [
        TrajectoryPoint(
            number=i,
            time=0.0,
            turn=turn,
            projection=0.0,
            held=0.0,
            outcome="folded" if folded else "branch",
            z=z,
            risk=risk,
            place=None,
        )
        for i, (turn, z, risk, folded) in enumerate(rows, 1)
    ]
)


@given(points, st.sampled_from([350.0, 900.0]))
def test_pictures_stay_on_their_canvas(shown: list[TrajectoryPoint], width: float) -> None:
    found = findings_of("falls")
    chart = chart_of(shown, found, width)
    judged = [one for one in shown if one.z is not None and one.risk is not None]
    assert (chart is None) == (not judged)
    if chart is not None:
        assert len(chart.dots) == len(chart.bars) == len(judged)
        for dot in chart.dots:
            assert chart.left <= dot.x <= chart.right and chart.top <= dot.y <= chart.bottom
        for bar in chart.bars:
            assert bar.x >= 0 and bar.x + bar.width <= width and chart.ceiling <= bar.y <= chart.floor
        for span in chart.spans:
            assert chart.left - 1 <= span.x and span.x + span.width <= chart.right + 1
        for one, bar in zip(judged, chart.bars, strict=True):
            assert (bar.sort == "inside") == ((one.risk or 0.0) < 1.0)
            assert (bar.y <= chart.boundary) == ((one.risk or 0.0) >= 1.0) or abs(bar.y - chart.boundary) <= 1.0
    spark = spark_of(shown, spark_top([shown]))
    if spark is not None:
        for place in spark.line.split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= spark.width and 0 <= y <= spark.height


def findings_of(name: str) -> list[Finding]:
    """Of a conversation that falls, recovers, and falls again; newest first."""
    state, found = None, []
    for turn, value in enumerate([0, -1, -3, -5, -5] + [1] * 12 + [-6, -6]):
        done = step(state, replace(projection(name, turn, float(value))), CONFIG)
        state = done.state
        found += done.findings
    return found[::-1]


def test_an_episode_is_shaded_from_its_first_turn_to_its_recovery() -> None:
    found = findings_of("c")
    recovered = [one.turn for one in found if one.kind == "recovered"]
    assert recovered
    spans = episodes(found)
    assert len(spans) == 2 and spans[0][1] == recovered[-1] and spans[1][1] is None
    assert {sort for _, _, sort in spans} <= {"warning", "critical"}
    assert spans[0][0] == min(one.turn for one in found)


def test_links_are_optional(tmp_path: Path) -> None:
    with served(tmp_path, keys=False, links=Links()) as desk, desk.visitor() as client:
        desk.fold(drifting("falls"))
        text = client.get("/sessions/falls").text
        assert "Read the conversation" not in text and "Runbook" not in text and "https://" not in text
