"""The few kinds of panel that our dashboards are made of, in Grafana's own types.

It knows how a panel looks, and no metric. Every panel has a description, a unit and its queries; where it stands
follows from the order in which panels are added.
"""

from __future__ import annotations

import string
from typing import NamedTuple

from grafana_foundation_sdk.builders import common as build_common
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery as AnyQuery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

__all__ = ["SOURCE", "Limit", "Panel", "Query", "heat", "lines", "number", "rows"]

Panel = Builder[dashboard.Panel]

# Whichever Prometheus the reader picks at the top of the dashboard.
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN, YELLOW, RED = "green", "yellow", "red"


class Query(NamedTuple):
    """One PromQL expression, and how its series are called: Prometheus's labels in double braces."""

    expr: str
    legend: str = "__auto"


class Limit(NamedTuple):
    """From `value` on, a number is shown in this colour."""

    value: float
    colour: str


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    limits: tuple[Limit, ...] = (),
    words: dict[str, str] | None = None,
    span: int = 4,
) -> Panel:
    """The newest value, large; green below the first limit. `words`: value → what is shown instead of it."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(SOURCE)
        .height(4)
        .span(span)
        .no_value("–")
        .color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(limits))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(build_common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    )
    if words:
        results = {value: dashboard.ValueMappingResult(text=text) for value, text in words.items()}
        panel.mappings([dashboard.ValueMap(options=results)])
    return panel.targets(_targets(queries))


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    limits: tuple[Limit, ...] = (),
    stacked: bool = False,
    span: int = 12,
) -> Panel:
    """Values over time. Limits are drawn as dashed lines."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(SOURCE)
        .height(8)
        .span(span)
        .line_width(1)
        .fill_opacity(30 if stacked else 0)
        .show_points(common.VisibilityMode.AUTO)
        .span_nulls(False)
        .legend(
            build_common.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(
            build_common.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(build_common.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if limits:
        panel.thresholds(_thresholds(limits)).thresholds_style(
            build_common.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    return panel.targets(_targets(queries))


def heat(title: str, description: str, unit: str, query: Query, *, span: int = 12) -> Panel:
    """How the buckets of one classic histogram fill over time. The expression's series carry `le`."""
    target = _target(query, "A").format(PromQueryFormat.HEATMAP).legend_format("{{le}}")
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(8)
        .span(span)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).exponent(0.5))
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
        .show_legend()
        .unit(unit)
        .targets([target])
    )


def rows(
    title: str,
    description: str,
    query: Query,
    *,
    columns: dict[str, str],
    value: str,
    unit: str,
    limits: tuple[Limit, ...] = (),
    link: tuple[str, str, str] | None = None,
    span: int = 24,
) -> Panel:
    """One row a series, highest value first.

    Args:
        columns: label → heading, in order; other labels are left out.
        value: heading of the value.
        link: label, title and address: what a click on that label's cell opens.
    """
    names = [*columns, "Value"]
    headings = {**columns, "Value": value}
    # A query of one instant brings its labels as columns, beside the time and the name of the metric.
    keep = dashboard.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": names}})
    arrange = dashboard.DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": {},
            "indexByName": {name: index for index, name in enumerate(names)},
            "renameByName": headings,
        },
    )
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .unit("none")
        .datasource(SOURCE)
        .height(12)
        .span(span)
        .no_value("–")
        .show_header(True)
        .align(common.FieldTextAlignment.AUTO)
        .inspect(False)
        .targets([_target(query, "A").instant().format(PromQueryFormat.TABLE)])
        .transformations([keep, arrange])
        .sort_by([build_common.TableSortByFieldState().display_name(value).desc(True)])
        .override_by_name(
            value,
            [
                dashboard.DynamicConfigValue("unit", unit),
                dashboard.DynamicConfigValue("decimals", 2),
                dashboard.DynamicConfigValue("thresholds", _thresholds(limits).build()),
                dashboard.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ],
        )
    )
    if link is not None:
        label, says, url = link
        opens = {"title": says, "url": url, "targetBlank": True}
        panel.override_by_name(columns[label], [dashboard.DynamicConfigValue("links", [opens])])
    return panel


def _targets(queries: tuple[Query, ...]) -> list[Builder[AnyQuery]]:
    return [_target(query, letter) for query, letter in zip(queries, string.ascii_uppercase, strict=False)]


def _target(query: Query, letter: str) -> Dataquery:
    return (
        Dataquery()
        .expr(query.expr)
        .legend_format(query.legend)
        .ref_id(letter)
        .range()
        .editor_mode(QueryEditorMode.CODE)
        .datasource(SOURCE)
    )


def _thresholds(limits: tuple[Limit, ...]) -> build.ThresholdsConfig:
    steps = [dashboard.Threshold(value=None, color=GREEN)]
    steps += [dashboard.Threshold(value=limit.value, color=limit.colour) for limit in limits]
    return build.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
