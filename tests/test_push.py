"""A push to Grafana changes only what differs, says so, and tells every failure with a cure.

There is no Grafana here: a recording receiver gives the answers that Grafana documents.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana import PROMETHEUS, TOKEN, DocumentedGrafana
from hypothesis import given
from hypothesis import strategies as st
from receiver import Answer, Receiver
from typer.testing import CliRunner

from alerts.dashboards_command import dashboards_app
from alerts.differences import differences
from alerts.grafana import built, files
from alerts.push import Grafana, annotated, for_page, reach
from monitor.errors import AnchorwatchError, ChannelError, ChannelUnavailable, ConfigurationError
from monitor.events import Finding

# What differs.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_nothing_differs_from_itself(value: object) -> None:
    assert list(differences(value, copy.deepcopy(value))) == []


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), VALUES)
def test_what_theirs_has_beside_ours_is_no_difference(ours: dict[str, Any], more: object) -> None:
    assert list(differences(ours, {**ours, "what only they have": more})) == []


@given(st.dictionaries(st.sampled_from("abcde"), VALUES, min_size=1), st.data())
def test_whatever_is_changed_is_told_where_it_is(ours: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(ours)))
    other = data.draw(VALUES.filter(lambda value: type(value) is not type(ours[key]) and value != ours[key]))
    (line,) = differences(ours, {**ours, key: other})
    assert line.startswith(f"{key}: ") and line.isprintable()


# The push.


@pytest.fixture
def grafana() -> Iterator[DocumentedGrafana]:
    made = DocumentedGrafana()
    yield made
    made.close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return file


def run(*words: object) -> Any:
    """The command as people call it; what it raises is seen as it is."""
    done = CliRunner().invoke(dashboards_app, [str(word) for word in words])
    if isinstance(done.exception, AnchorwatchError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_push_brings_folder_and_dashboards_and_the_second_one_nothing(
    grafana: DocumentedGrafana, token: Path
) -> None:
    page = "https://anchorwatch.example.org"
    push = functools.partial(run, "push", "--url", grafana.url, "--token-file", token, "--page", page)
    first = push()
    assert re.findall(r"(?m)^\w.*$", first.stdout) == [
        "folder Anchorwatch: created",
        "dashboard Fleet: created",
        "dashboard Risky sessions: created",
        "dashboard Monitor health: created",
    ]
    assert grafana.folders["anchorwatch"]["title"] == "Anchorwatch"
    kept = {uid: one["dashboard"] for uid, one in grafana.dashboards.items()}
    assert kept.keys() == {"anchorwatch-fleet", "anchorwatch-sessions", "anchorwatch-health"}
    assert all(one["meta"]["folderUid"] == "anchorwatch" for one in grafana.dashboards.values())
    (variable,) = [one for one in kept["anchorwatch-sessions"]["templating"]["list"] if one["name"] == "page"]
    assert variable["query"] == variable["current"]["value"] == page
    for dashboard in kept.values():
        (source,) = [one for one in dashboard["templating"]["list"] if one["name"] == "datasource"]
        assert source["current"]["value"] == PROMETHEUS["uid"]
    written = len(grafana.writes())
    second = push()
    assert second.stdout.count("unchanged") == 4
    assert len(grafana.writes()) == written


def test_a_dry_run_writes_nothing_and_says_what_it_would(grafana: DocumentedGrafana, token: Path) -> None:
    done = run("push", "--url", grafana.url, "--token-file", token, "--dry-run")
    assert done.stdout.count("would be created") == 4
    assert grafana.writes() == [] and not grafana.dashboards and not grafana.folders


def test_what_somebody_has_changed_is_told_and_put_right(grafana: DocumentedGrafana, token: Path) -> None:
    run("push", "--url", grafana.url, "--token-file", token)
    theirs = grafana.dashboards["anchorwatch-fleet"]["dashboard"]
    theirs["panels"][2]["targets"][0]["expr"] = "vector(42)"
    theirs["panels"].append({"type": "text", "title": "Mine"})
    theirs["description"] = "\x1b[31mtwo\nlines"
    # What Grafana itself adds is no difference.
    theirs["schemaVersion"] = 42
    theirs["preload"] = False
    theirs["panels"][3]["pluginVersion"] = "12.3.1"
    grafana.dashboards["anchorwatch-health"]["meta"]["folderUid"] = ""
    done = run("diff", "--url", grafana.url, "--token-file", token)
    assert done.exit_code == 1
    assert '    panels[Responses per second].targets[A].expr: "vector(42)" → "sum(rate(' in done.stdout
    assert "    panels: 25 of them → 24" in done.stdout
    assert "\x1b" not in done.stdout
    assert '    folder: "" → "anchorwatch"' in done.stdout
    assert "dashboard Risky sessions: unchanged" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("    ")]) == 4
    run("push", "--url", grafana.url, "--token-file", token)
    assert run("diff", "--url", grafana.url, "--token-file", token).exit_code == 0
    assert grafana.dashboards["anchorwatch-fleet"]["dashboard"]["version"] == 2
    assert grafana.dashboards["anchorwatch-sessions"]["dashboard"]["version"] == 1


def test_who_saves_at_the_same_moment_is_not_written_over(grafana: DocumentedGrafana, token: Path) -> None:
    api = reach(grafana.url, token)
    pushing = Grafana(api)
    pushing.folder()
    ours = built()["fleet"]
    pushing.dashboard(ours)
    read = api.dashboard.get_dashboard

    def read_and_lose(uid: str) -> Any:
        found = read(uid)
        grafana.dashboards[uid]["dashboard"]["version"] += 1
        return found

    api.dashboard.get_dashboard = read_and_lose
    with pytest.raises(ChannelError, match="changed by someone else") as caught:
        pushing.dashboard({**ours, "title": "Another"})
    assert "push again" in caught.value.cure
    assert grafana.dashboards[ours["uid"]]["dashboard"]["title"] == "Fleet"


@pytest.mark.parametrize(
    ("sources", "asked", "found"),
    [
        ([], None, "Grafana has no Prometheus"),
        ([{"type": "loki", "uid": "l", "name": "l"}], None, "Grafana has no Prometheus"),
        ([{**PROMETHEUS, "isDefault": False}], None, PROMETHEUS["uid"]),
        ([{**PROMETHEUS, "isDefault": False}, {**PROMETHEUS, "uid": "b"}], None, "b"),
        ([{**PROMETHEUS, "isDefault": False}, {**PROMETHEUS, "uid": "b", "isDefault": False}], None, "not clear which"),
        ([PROMETHEUS, {**PROMETHEUS, "uid": "b", "isDefault": False}], "b", "b"),
        ([PROMETHEUS], "c", "no Prometheus data source 'c'"),
        ([{"type": "loki", "uid": "c", "name": "c"}, PROMETHEUS], "c", "no Prometheus data source 'c'"),
    ],
)
def test_the_data_source_is_the_one_that_is_meant(
    grafana: DocumentedGrafana, token: Path, sources: list[dict[str, Any]], asked: str | None, found: str
) -> None:
    grafana.sources = sources
    pushing = Grafana(reach(grafana.url, token))
    if " " in found:
        with pytest.raises(ConfigurationError, match=found) as caught:
            pushing.data_source(asked)
        assert caught.value.cure
    else:
        assert pushing.data_source(asked) == found


def finding(number: int, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "id": f"{number:032x}",
        "time": f"2026-03-01T12:{number % 60:02d}:00Z",
        "conversation_id": f"c{number}",
        "turn": 3,
        "deployment": "shop",
        "axis_id": "a",
        "kind": "sustained_drop",
        "severity": "warning",
        "statistic": "level",
        "value": -3.0,
        "boundary": -2.0,
        "risk": 1.5,
        "budget": 0.01,
        "certification": "certified",
        "config_id": "k",
        "episode_id": "e",
        "nearest_roles": ["ghost", "hermit", "pirate", "bard"],
    }
    return Finding(**{**fields, **changes})


def test_findings_become_annotations_once(grafana: DocumentedGrafana, token: Path) -> None:
    pushing = Grafana(reach(grafana.url, token))
    assert pushing.annotate([]).how == "unchanged"
    change = pushing.annotate([finding(2), finding(1)], page="https://page.example.org")
    assert change.how == "created" and len(change.lines) == 2
    assert [one["time"] for one in grafana.annotations] == [1772366460000, 1772366520000]
    assert grafana.annotations[0]["tags"] == ["anchorwatch", f"finding:{1:032x}", "sustained_drop", "warning"]
    assert "nearest to ghost, hermit, pirate" in grafana.annotations[0]["text"]
    assert pushing.annotate([finding(1), finding(2)]).how == "unchanged"
    assert pushing.annotate([finding(1), finding(2), finding(3)]).lines == (f"sustained_drop warning finding:{3:032x}",)
    assert len(grafana.annotations) == 3


def test_a_hostile_name_stays_a_name() -> None:
    hostile = '<img src=x onerror=alert(1)>"\u202e/../..&a=b'
    (made,) = annotated([finding(1, conversation_id=hostile, deployment=hostile)], page="https://page.example.org")
    assert "<img" not in made["text"]
    (link,) = re.findall(r'href="([^"]*)"', made["text"])
    assert link.startswith("https://page.example.org/sessions/%3Cimg") and link.count("/") == 4
    assert re.findall(r"<(?!br>|a |/a>)", made["text"]) == []


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (Answer(401, b'{"message": "Invalid API key"}', {"content-type": "application/json"}), ChannelError, "token"),
        (Answer(403, b'{"message": "no"}', {"content-type": "application/json"}), ChannelError, "Editor"),
        (Answer(404, b"nothing", {"content-type": "text/plain"}), ChannelError, "address of Grafana"),
        (Answer(200, b"<html>a proxy</html>", {"content-type": "text/html"}), ChannelError, "address of Grafana"),
        (Answer(200, b"{truncated", {"content-type": "application/json"}), ChannelError, "address of Grafana"),
        (Answer(200, b'{"no": "list"}', {"content-type": "application/json"}), ChannelError, "address of Grafana"),
        (Answer(502, b"bad gateway", {"content-type": "text/plain"}), ChannelUnavailable, "try again"),
        (Answer(302, b"", {"location": "https://elsewhere.example.org/"}), ChannelError, "points to"),
    ],
)
def test_what_grafana_answers_is_told_with_a_cure(
    grafana: DocumentedGrafana, token: Path, answer: Answer, error: type[Exception], says: str
) -> None:
    grafana.fails["GET", "/api/datasources"] = answer
    with pytest.raises(error) as caught:
        Grafana(reach(grafana.url, token)).data_source()
    assert says in str(caught.value)
    assert TOKEN not in str(caught.value) and TOKEN not in repr(caught.value.__cause__)


def test_the_token_does_not_follow_a_redirect(grafana: DocumentedGrafana, token: Path) -> None:
    elsewhere = Receiver()
    try:
        grafana.fails["GET", "/api/health"] = Answer(307, b"", {"location": f"{elsewhere.url}/api/health"})
        with pytest.raises(ChannelError):
            Grafana(reach(grafana.url, token)).version()
        assert elsewhere.received == []
    finally:
        elsewhere.close()


def test_nobody_there_and_somebody_else_there(token: Path) -> None:
    other = Receiver()
    other.answer = lambda request: Answer(200, b'{"hello": "world"}', {"content-type": "application/json"})
    with pytest.raises(ChannelError, match="no Grafana"):
        Grafana(reach(other.url, token)).version()
    other.close()
    with pytest.raises(ChannelUnavailable, match="can't be reached"):
        Grafana(reach(other.url, token)).version()


@pytest.mark.parametrize(
    "url",
    ["grafana", "ftp://grafana", "http://", "https://user:secret@grafana", "http://grafana?x=1", "http://grafana:port"],
)
def test_an_address_that_is_none(url: str, token: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        reach(url, token)
    assert "secret" not in str(caught.value)


def test_grafana_under_a_path(grafana: DocumentedGrafana, token: Path) -> None:
    grafana.fails["GET", "/tools/grafana/api/health"] = Answer(
        200, b'{"database": "ok", "version": "12.3.1"}', {"content-type": "application/json"}
    )
    assert Grafana(reach(f"{grafana.url}/tools/grafana/", token)).version() == "12.3.1"


def test_a_certificate_is_looked_at(tmp_path: Path, token: Path) -> None:
    both = tmp_path / "both.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", both, "-out", tmp_path / "own.pem", *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", both)
    secure = Receiver(context=context)
    secure.script(Answer(200, b'{"database": "ok", "version": "12.3.1"}', {"content-type": "application/json"}))
    try:
        with pytest.raises(ChannelError, match="not trusted"):
            Grafana(reach(secure.url, token)).version()
        assert secure.received == []
        assert Grafana(reach(secure.url, token, ca_file=tmp_path / "own.pem")).version() == "12.3.1"
    finally:
        secure.close()


@pytest.mark.parametrize("content", [b"", b"\n", b"two words\n", b"\xff\xfe", None])
def test_a_token_file_that_holds_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="token"):
        reach("http://127.0.0.1:3000", file)


@pytest.mark.parametrize("page", ["javascript:alert(1)", "https://x/?a=b", "https://x/'", "https://x/", "page"])
def test_a_page_that_is_no_address(tmp_path: Path, page: str) -> None:
    with pytest.raises(ConfigurationError, match="no address of a page"):
        run("build", "--out", tmp_path / "out", "--page", page)
    assert not (tmp_path / "out").exists()


def test_files_for_provisioning(tmp_path: Path) -> None:
    run("build", "--out", tmp_path)
    for name in files():
        assert (tmp_path / f"{name}.json").read_bytes() == files()[name].read_bytes()
    run("build", "--out", tmp_path, "--page", "https://p.example.org", "--data-source", "abc")
    assert json.loads((tmp_path / "sessions.json").read_text()) == for_page(
        built()["sessions"], page="https://p.example.org", data_source="abc"
    )
