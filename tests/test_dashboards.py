"""Every panel of every dashboard shows something: its expressions run on a real Prometheus that watches a real run.

`ANCHORWATCH_WRITE_DASHBOARDS=1` writes what they returned into docs/dashboards.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from grafana import TOKEN, DocumentedGrafana
from tiny import environment

from alerts.grafana import files
from monitor.telemetry import REGISTRY

if TYPE_CHECKING:
    from observed import Observed

pytest_plugins = ["miniature", "observed"]

PAGE = Path(__file__).parent.parent / "docs" / "dashboards.md"
BEGIN, END = "<!-- what follows is generated -->\n", "<!-- what is generated ends here -->\n"
WAIT_SECONDS = 180.0
# As Grafana would fill them in, for a run that is a minute old and is scraped every second.
MEANT = {"$__rate_interval": "10s", "$__range": "15m", "$deployment": ".*"}
# There while a partition is paused, and gone when it is read again.
SELDOM = {"anchorwatch_worker_paused"}


class Asked(NamedTuple):
    """One query of one panel."""

    dashboard: str
    panel: str
    expr: str
    instant: bool

    def run(self, observed: Observed) -> list[dict[str, Any]]:
        """The newest value of each series, as Prometheus gives it for the panel."""
        expr = self.expr
        for variable, value in MEANT.items():
            expr = expr.replace(variable, value)
        if self.instant:
            return observed.query(expr)
        return [
            {"metric": one["metric"], "value": one["values"][-1]}
            for one in observed.query_range(expr, seconds=60, step=5)
        ]


def asked() -> list[Asked]:
    found = []
    for name, file in files().items():
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                found.append(Asked(dashboard["title"], panel["title"], target["expr"], target["instant"]))
        assert len(found) > 10, name
    return found


def metrics(expr: str) -> set[str]:
    return set(re.findall(r"\banchorwatch_\w+", expr))


def test_every_metric_that_a_panel_names_is_one_of_ours() -> None:
    known = {sample for family in REGISTRY.collect() for sample in _samples(family.name, family.type)}
    for one in asked():
        assert metrics(one.expr), one
        assert metrics(one.expr) <= known, one


def _samples(name: str, kind: str) -> list[str]:
    match kind:
        case "counter":
            return [f"{name}_total"]
        case "histogram":
            return [f"{name}_bucket", f"{name}_count", f"{name}_sum"]
    return [name]


@pytest.fixture(scope="module")
def answers(observed: Observed) -> dict[Asked, list[dict[str, Any]]]:
    """What each query returned, once all return something, or when it is time to say which do not."""
    deadline = time.monotonic() + WAIT_SECONDS
    waiting, found = set(asked()), {}
    while waiting and time.monotonic() < deadline and observed.running():
        time.sleep(1.0)
        for one in list(waiting):
            if result := one.run(observed):
                found[one] = result
                waiting.discard(one)
    return found | {one: one.run(observed) for one in found}


@pytest.mark.parametrize("dashboard", ["Fleet", "Risky sessions", "Monitor health"])
def test_every_query_returns_data(
    observed: Observed, answers: dict[Asked, list[dict[str, Any]]], dashboard: str
) -> None:
    wanted = [one for one in asked() if one.dashboard == dashboard]
    assert wanted
    silent = [one for one in wanted if one not in answers]
    assert not silent, f"{silent}\n{observed.said()}"


def test_no_query_returns_something_for_want_of_its_metric(
    observed: Observed, answers: dict[Asked, list[dict[str, Any]]]
) -> None:
    """`or vector(0)` would: so each metric that is named has series, too."""
    for name in sorted(set().union(*(metrics(one.expr) for one in answers)) - SELDOM):
        assert observed.query(f'count({{__name__="{name}"}})'), name


def test_the_table_of_the_riskiest_has_what_its_link_needs(
    observed: Observed, answers: dict[Asked, list[dict[str, Any]]]
) -> None:
    (one,) = [one for one in answers if one.panel == "The riskiest conversations"]
    found = one.run(observed)
    assert 0 < len(found) <= 20
    for row in found:
        assert row["metric"].keys() == {"conversation_id", "deployment"}
        assert float(row["value"][1]) >= 0


def test_the_runs_findings_become_annotations_beside_the_dashboards(
    observed: Observed, answers: dict[Asked, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The command as people call it, on the run's own store; what answers is a recording receiver."""
    grafana = DocumentedGrafana()
    token = tmp_path / "token"
    token.write_text(TOKEN)
    options = ["--url", grafana.url, "--token-file", str(token), "--annotations", "6h", "--json"]
    try:
        for how in ("created", "unchanged"):
            done = subprocess.run(
                [sys.executable, "-m", "monitor", "dashboards", "push", *options],
                env=environment(ANCHORWATCH_DATA_DIR=str(observed.folder)),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            *others, _ = json.loads(done.stdout)["changes"]
            assert {one["how"] for one in others} == {how}
        assert len(grafana.dashboards) == 3
        found = [one["tags"][1] for one in grafana.annotations]
        assert found and len(set(found)) == len(found), "each finding once, also by the second push"
    finally:
        grafana.close()


def test_the_page_tells_every_query(request: pytest.FixtureRequest) -> None:
    if os.environ.get("ANCHORWATCH_WRITE_DASHBOARDS"):
        found = request.getfixturevalue("answers")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(before + BEGIN + generated(found) + END + after, encoding="utf-8")
    told = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"(?m)^\| (.+?) \| `(.+)` \| (.+) \|$", told)
    expected = [(one.panel, one.expr.replace("|", "\\|")) for one in asked()]
    assert [(panel, expr) for panel, expr, _ in rows] == expected, "ANCHORWATCH_WRITE_DASHBOARDS=1 writes it anew"
    assert all(values.strip() for _, _, values in rows)


def generated(found: dict[Asked, list[dict[str, Any]]]) -> str:
    parts = []
    for dashboard in dict.fromkeys(one.dashboard for one in asked()):
        parts.append(f"\n### {dashboard}\n\n| panel | query | values |\n|---|---|---|\n")
        for one in asked():
            if one.dashboard == dashboard:
                expr = one.expr.replace("|", "\\|")
                parts.append(f"| {one.panel} | `{expr}` | {_told(found[one])} |\n")
    return "".join(parts) + "\n"


def _told(series: list[dict[str, Any]], most: int = 2) -> str:
    """The first few series, highest first, those without a number last."""
    inorder = sorted(series, key=lambda one: (one["value"][1] == "NaN", -float(one["value"][1])))
    told = []
    for one in inorder[:most]:
        labels = ", ".join(
            value for name, value in sorted(one["metric"].items()) if name not in ("__name__", "job", "instance")
        )
        number = f"{float(one['value'][1]):.4g}".replace("nan", "NaN")
        told.append(f"{labels}: {number}" if labels else number)
    more = f"; {len(series) - most} more" if len(series) > most else ""
    return "; ".join(told) + more
