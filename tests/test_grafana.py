"""The dashboards: what is committed is what is built, in Grafana's types; and a push changes only what differs.

There is no Grafana here. The JSON is held against the types that Grafana publishes (its foundation SDK, generated from
the schema of its kinds), the push against a recording receiver with the answers that Grafana documents.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana import PROMETHEUS, TOKEN, DocumentedGrafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from hypothesis import given
from hypothesis import strategies as st
from receiver import Answer, Receiver
from typer.testing import CliRunner

from alerts.dashboards_command import dashboards_app
from alerts.differences import differences
from alerts.grafana import built, files, text
from alerts.push import Grafana, annotated, for_page, reach
from monitor.errors import AnchorwatchError, ChannelError, ChannelUnavailable, ConfigurationError
from monitor.events import Finding

NAMES = ("fleet", "sessions", "health")


def committed(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(files()[name].read_text(encoding="utf-8"))
    return read


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in dashboard["panels"] if one["type"] != "row"]


# What is committed.


def test_the_committed_files_are_what_is_built() -> None:
    made = built()
    assert tuple(made) == NAMES
    for name, dashboard in made.items():
        assert files()[name].read_text(encoding="utf-8") == text(dashboard), (
            f"{name}.json is old: anchorwatch dashboards build --out alerts/dashboards"
        )


def test_building_twice_makes_the_same() -> None:
    assert built() == built()


def read_as_grafana(plain: dict[str, Any]) -> Dashboard:
    register_default_plugins()
    return Dashboard.from_json(copy.deepcopy(plain))


def unlike_its_types(value: object, hint: Any, at: str, module: dict[str, Any]) -> Iterator[str]:
    """Where a value is not what Grafana's own annotations say it is."""
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    if isinstance(hint, str):
        hint = eval(hint, module)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is object or hint is Any:
        return
    if origin in (typing.Union, types.UnionType):
        found = [list(unlike_its_types(value, one, at, module)) for one in arguments]
        if all(found):
            yield min(found, key=len)[0]
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{at}: {value!r}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{at}: {value!r}"
            return
        for index, one in enumerate(value):
            yield from unlike_its_types(one, arguments[0], f"{at}[{index}]", module)
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{at}: {value!r}"
            return
        for key, one in value.items():
            yield from unlike_its_types(one, arguments[1], f"{at}.{key}", module)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in [one.value for one in hint]:
            yield f"{at}: {value!r}"
    elif hint in (int, float, str, bool):
        allowed: Any = (int, float) if hint is float else hint
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
            yield f"{at}: {value!r} is no {hint.__name__}"
    elif hint is types.NoneType:
        if value is not None:
            yield f"{at}: {value!r}"
    elif isinstance(value, dict) and hasattr(hint, "from_json"):  # one that it leaves as it is
        read = hint.from_json(value)
        yield from differences(value, json.loads(json.dumps(read, cls=JSONEncoder)), at)
        yield from unlike_its_class(read, at)
    elif not isinstance(value, hint):
        yield f"{at}: {value!r} is no {hint.__name__}"
    else:
        yield from unlike_its_class(value, at)


def unlike_its_class(value: object, at: str) -> Iterator[str]:
    module = vars(sys.modules[type(value).__module__])
    for kind in reversed(type(value).__mro__):
        for name, hint in vars(kind).get("__annotations__", {}).items():
            yield from unlike_its_types(getattr(value, name), hint, f"{at}.{name}", module)


def complaints(plain: dict[str, Any]) -> list[str]:
    """What Grafana's types have against a dashboard: fields that they don't know, and values of another type."""
    try:
        read = read_as_grafana(plain)
        again = json.loads(json.dumps(read, cls=JSONEncoder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [repr(error)]
    lost = list(differences(plain, again))
    found = list(unlike_its_class(read, "dashboard"))
    for panel in read.panels or []:
        for part in (getattr(panel, "options", None), getattr(getattr(panel, "field_config", None), "defaults", None)):
            found += unlike_its_class(part, panel.title) if hasattr(type(part), "__annotations__") else []
            custom = getattr(part, "custom", None)
            found += unlike_its_class(custom, panel.title) if hasattr(type(custom), "__annotations__") else []
        for target in getattr(panel, "targets", None) or []:
            found += unlike_its_class(target, panel.title)
    return lost + found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_grafanas_own_types_say(name: str) -> None:
    assert complaints(committed(name)) == []


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(dashboard: dict[str, Any]) -> None:
        *way, last = path.split(".")
        at: Any = dashboard
        for key in way:
            at = at[int(key) if key.isdigit() else key]
        at[last] = value

    return change


@pytest.mark.parametrize(
    "mistake",
    [
        _set("titel", "Fleet"),
        _set("title", 7),
        _set("refresh", 30),
        _set("graphTooltip", 9),
        _set("panels.1.datasourse", {}),
        _set("panels.1.gridPos.w", "4"),
        _set("panels.1.options.colourMode", "value"),
        _set("panels.1.options.colorMode", "loud"),
        _set("panels.1.options.reduceOptions.calcs", "last"),
        _set("panels.1.fieldConfig.defaults.unti", "s"),
        _set("panels.1.fieldConfig.defaults.thresholds.mode", "relative"),
        _set("panels.1.targets.0.exprs", "up"),
        _set("panels.1.targets.0.format", "tabel"),
        _set("panels.8.fieldConfig.defaults.custom.lineWidth", "1"),
        _set("templating.list.0.type", "sourcedata"),
        _set("annotations.list.0.target.tags", "anchorwatch"),
        _set("panels.1.transformations", [{"id": "organize", "option": {}}]),
    ],
)
def test_the_types_would_find_a_mistake(mistake: Callable[[dict[str, Any]], None]) -> None:
    dashboard = committed("fleet")
    mistake(dashboard)
    assert complaints(dashboard)


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_of_a_good_dashboard(name: str) -> None:
    """Those of Grafana's dashboard linter that fit; not those on job and instance, which our names make needless."""
    dashboard = committed(name)
    assert dashboard["editable"] is False
    assert re.fullmatch(r"[a-zA-Z0-9_-]{8,40}", dashboard["uid"])
    assert dashboard["tags"] == ["anchorwatch"]
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for variable in variables.values():
        assert variable["label"]
        if variable["type"] == "query":
            assert variable["refresh"] == 2 and variable["datasource"]["uid"] == "${datasource}"
    numbers = [one["id"] for one in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [one["title"] for one in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            for variable in re.findall(r"\$(?!__)\{?(\w+)", target["expr"]):
                assert variable in variables, f"{panel['title']}: ${variable}"
            for span in re.findall(r"rate\([^)]*?\[([^]]+)\]", target["expr"]):
                assert span == "$__rate_interval", f"{panel['title']}: a fixed span loses points when zoomed out"


@pytest.mark.parametrize("name", NAMES)
def test_panels_stand_beside_each_other(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in committed(name)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
            taken[x, y] = panel["title"]


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
    for name in NAMES:
        assert (tmp_path / f"{name}.json").read_bytes() == files()[name].read_bytes()
    run("build", "--out", tmp_path, "--page", "https://p.example.org", "--data-source", "abc")
    assert json.loads((tmp_path / "sessions.json").read_text()) == for_page(
        committed("sessions"), page="https://p.example.org", data_source="abc"
    )
