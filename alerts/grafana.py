"""The dashboards as Grafana reads them: built from `alerts.dashboards`, in Grafana's own types, the same every time.

It knows no server: `alerts.push` brings them to one, and so does provisioning by file. Grafana's foundation SDK gives
the types; they are those of Grafana 11.6, schema version 41, which later releases read too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from alerts.dashboards import fleet, health, sessions
from alerts.panels import SOURCE, Panel

__all__ = ["FOLDER_TITLE", "FOLDER_UID", "PAGE", "TAG", "built", "files", "text"]

FOLDER_UID = "anchorwatch"
FOLDER_TITLE = "Anchorwatch"
# Of our dashboards, and of the annotations that they show.
TAG = "anchorwatch"
# Where the page is on a laptop; a reader may change it at the top of the dashboard.
PAGE = "http://127.0.0.1:8080"


def built() -> dict[str, dict[str, Any]]:
    """Name → dashboard, as plain JSON values."""
    return {
        "fleet": _built("anchorwatch-fleet", "Fleet", fleet.DESCRIPTION, fleet.ROWS, [_source(), _deployment()]),
        "sessions": _built(
            "anchorwatch-sessions",
            "Risky sessions",
            sessions.DESCRIPTION,
            sessions.ROWS,
            [_source(), _deployment(), _page()],
        ),
        "health": _built("anchorwatch-health", "Monitor health", health.DESCRIPTION, health.ROWS, [_source()]),
    }


def text(dashboard: dict[str, Any]) -> str:
    """What is in the file: sorted keys, so that a difference in a file is one in the dashboard."""
    return json.dumps(dashboard, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def files() -> dict[str, Path]:
    """Name → committed file."""
    folder = Path(__file__).parent / "dashboards"
    return {name: folder / f"{name}.json" for name in ("fleet", "sessions", "health")}


def _built(
    uid: str,
    title: str,
    description: str,
    rows: tuple[tuple[str, list[Panel]], ...],
    variables: list[Any],
) -> dict[str, Any]:
    made = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .time("now-6h", "now")
        .timezone("browser")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .variables(variables)
        .annotations([_findings()])
        .links([_others()])
    )
    for heading, panels in rows:
        made.with_row(build.Row(heading))
        for panel in panels:
            made.with_panel(copy.deepcopy(panel))  # it is given its place
    dashboard = made.build()
    # Links and alerts name a panel by its number, so it must not be left to Grafana.
    for number, one in enumerate(dashboard.panels or [], start=1):
        one.id_val = number
    plain: dict[str, Any] = json.loads(json.dumps(dashboard, cls=JSONEncoder))
    return plain


def _source() -> build.DatasourceVariable:
    return build.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _deployment() -> build.QueryVariable:
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return (
        build.QueryVariable("deployment")
        .label("Deployment")
        .datasource(SOURCE)
        .query("label_values(anchorwatch_responses_total, deployment)")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _page() -> build.TextBoxVariable:
    return (
        build.TextBoxVariable("page")
        .label("Page")
        .description("Where Anchorwatch's own page is: a click on a conversation leads there.")
        .default_value(PAGE)
        .current(model.VariableOption(selected=True, text=PAGE, value=PAGE))
    )


def _findings() -> build.AnnotationQuery:
    """What `anchorwatch dashboards push --annotations` writes into Grafana."""
    return (
        build.AnnotationQuery()
        .name("Findings")
        .datasource(model.DataSourceRef(type_val="grafana", uid="-- Grafana --"))
        .enable(True)
        .icon_color("orange")
        .target(build.AnnotationTarget().limit(100).match_any(False).tags([TAG]).type("tags"))
    )


def _others() -> build.DashboardLink:
    return (
        build.DashboardLink("Anchorwatch")
        .type(model.DashboardLinkType.DASHBOARDS)
        .icon("external link")
        .tooltip("The other dashboards")
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
        .target_blank(False)
    )
