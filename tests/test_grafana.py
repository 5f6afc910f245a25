"""The dashboards: what is committed is what is built, and is what Grafana's own types say.

There is no Grafana here. The JSON is held against the types that Grafana publishes: its foundation SDK, generated from
the schema of its kinds.
"""

from __future__ import annotations

import copy
import enum
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from alerts.differences import differences
from alerts.grafana import built, files, text

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
