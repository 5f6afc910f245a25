"""*Fleet*: is any deployment drifting? It looks at populations, never at one conversation."""

from __future__ import annotations

from alerts.panels import Limit, Panel, Query, heat, lines, number

__all__ = ["DESCRIPTION", "ROWS"]

DESCRIPTION = "Is any deployment drifting away from the Assistant? Populations, not single conversations."

PICKED = 'deployment=~"$deployment"'
# A worker that kept house before still shows what it saw last.
BY_HOUSEKEEPER = "and on (job, instance) anchorwatch_housekeeper == 1"

_glance: list[Panel] = [
    number(
        "Deployments",
        "How many deployments have sent responses since their workers started. The fifty busiest have a name, all "
        "others are one: `other`.",
        "short",
        Query("count(count by (deployment) (anchorwatch_responses_total))"),
    ),
    number(
        "Responses per second",
        "Responses folded and committed, of the deployments picked above.",
        "cps",
        Query(f"sum(rate(anchorwatch_responses_total{{{PICKED}}}[$__rate_interval]))"),
    ),
    number(
        "Lowest mean z, last day",
        "The deployment that stands lowest: its mean z over the last day. 0 is where its baseline stood; a standard "
        "deviation below is far for a whole population.",
        "none",
        Query(f'min(anchorwatch_fleet_z{{{PICKED},span="day"}} {BY_HOUSEKEEPER})'),
    ),
    number(
        "Fleet shifts, last day",
        "How often the fleet's detectors have said that a deployment as a whole has moved: a new release, another "
        "system prompt, other users.",
        "short",
        Query(f'sum(increase(anchorwatch_findings_total{{{PICKED},kind="fleet_shift"}}[1d])) or vector(0)'),
        limits=(Limit(0.5, "red"),),
    ),
    number(
        "Open episodes",
        "Conversations of the last half hour whose persona is away from the Assistant at this moment.",
        "short",
        Query(f"sum(anchorwatch_open_episodes{{{PICKED}}}) or vector(0)"),
    ),
    number(
        "Alarms over budget, worst",
        "Share of conversations that warned in the range shown, over the share that healthy ones may. Above 1 there is "
        "drift, or the baseline no longer fits the traffic.",
        "none",
        Query(
            f"max(sum by (deployment) (increase(anchorwatch_budget_units_warned_total{{{PICKED}}}[$__range]))"
            f" / sum by (deployment) (increase(anchorwatch_budget_units_total{{{PICKED}}}[$__range]))"
            f" / max by (deployment) (anchorwatch_alarm_budget_ratio{{{PICKED}}}))"
        ),
        limits=(Limit(1, "yellow"), Limit(3, "red")),
    ),
]

_stand: list[Panel] = [
    lines(
        "Mean z by deployment, last day",
        "Mean of a day's responses in standard deviations of the deployment's own baseline. Falling is drift; a step "
        "down after a release is what to look for.",
        "none",
        Query(f'anchorwatch_fleet_z{{{PICKED},span="day"}} {BY_HOUSEKEEPER}', "{{deployment}}"),
    ),
    lines(
        "Mean z by deployment, last hour",
        "The same over the last hour or two: sooner, and noisier.",
        "none",
        Query(f'anchorwatch_fleet_z{{{PICKED},span="hour"}} {BY_HOUSEKEEPER}', "{{deployment}}"),
    ),
    lines(
        "Low end and middle of z",
        "The twentieth response from below of a hundred, the fifth, and the median. A low end that falls alone is some "
        "conversations; a median that falls is the deployment.",
        "none",
        *(
            Query(
                f"histogram_quantile({share}, sum by (le, deployment) "
                f"(rate(anchorwatch_z_bucket{{{PICKED}}}[$__rate_interval])))",
                f"{{{{deployment}}}} {says}",
            )
            for share, says in ((0.05, "5 %"), (0.2, "20 %"), (0.5, "median"))
        ),
    ),
    heat(
        "z of all responses",
        "How responses spread over z. A second hump below −3 is a population that behaves in another way.",
        "none",
        Query(f"sum by (le) (rate(anchorwatch_z_bucket{{{PICKED}}}[$__rate_interval]))"),
    ),
    heat(
        "Projection of all responses",
        "The raw projection on the axis, before any baseline. Its scale is the model's own, so pick one deployment.",
        "none",
        Query(f"sum by (le) (rate(anchorwatch_projection_bucket{{{PICKED}}}[$__rate_interval]))"),
    ),
    lines(
        "How sure the daily mean is",
        "Standard error of each deployment's mean of the last day. A difference smaller than twice this is noise.",
        "none",
        Query(f'anchorwatch_fleet_z_error{{{PICKED},span="day"}} {BY_HOUSEKEEPER}', "{{deployment}}"),
    ),
]

_alarms: list[Panel] = [
    lines(
        "Realised alarm rate beside its budget",
        "Share of conversations that warned within the last day, and the share that healthy ones may. A "
        "budget that is not certified is a guess.",
        "percentunit",
        Query(
            f"sum by (deployment) (increase(anchorwatch_budget_units_warned_total{{{PICKED}}}[1d]))"
            f" / sum by (deployment) (increase(anchorwatch_budget_units_total{{{PICKED}}}[1d]))",
            "{{deployment}} realised",
        ),
        Query(
            f"max by (deployment, certification) (anchorwatch_alarm_budget_ratio{{{PICKED}}})",
            "{{deployment}} budget, {{certification}}",
        ),
    ),
    lines(
        "Findings by kind",
        "What the detector says, findings an hour. `recovered` ends an episode.",
        "short",
        Query(f"sum by (kind) (increase(anchorwatch_findings_total{{{PICKED}}}[1h]))", "{{kind}}"),
        stacked=True,
    ),
    lines(
        "Findings by deployment",
        "The same by deployment, `recovered` left out.",
        "short",
        Query(
            f'sum by (deployment) (increase(anchorwatch_findings_total{{{PICKED},kind!="recovered"}}[1h]))',
            "{{deployment}}",
        ),
        stacked=True,
    ),
    lines(
        "Open episodes by deployment",
        "Conversations away from the Assistant at each moment, by severity.",
        "short",
        Query(f"sum by (deployment, severity) (anchorwatch_open_episodes{{{PICKED}}})", "{{deployment}} {{severity}}"),
        stacked=True,
    ),
]

_traffic: list[Panel] = [
    lines(
        "Responses by deployment",
        "Responses folded a second.",
        "cps",
        Query(
            f"sum by (deployment) (rate(anchorwatch_responses_total{{{PICKED}}}[$__rate_interval]))", "{{deployment}}"
        ),
        stacked=True,
    ),
    lines(
        "Tokens by deployment",
        "Response tokens measured a second.",
        "cps",
        Query(f"sum by (deployment) (rate(anchorwatch_tokens_total{{{PICKED}}}[$__rate_interval]))", "{{deployment}}"),
        stacked=True,
    ),
    lines(
        "Responses by what became of them",
        "`folded` are judged. `learning` has no baseline of its own yet, `unjudged` comes from another axis than the "
        "one in force, `late`, `branch` and `duplicate` change no verdict.",
        "cps",
        Query(f"sum by (outcome) (rate(anchorwatch_responses_total{{{PICKED}}}[$__rate_interval]))", "{{outcome}}"),
        stacked=True,
    ),
    lines(
        "Too late for the fleet's sums",
        "Responses of the last day that came after their minute had been closed. They are judged, but the fleet's "
        "means lack them.",
        "short",
        Query(f"anchorwatch_fleet_late_responses{{{PICKED}}} {BY_HOUSEKEEPER}", "{{deployment}}"),
    ),
]

ROWS: tuple[tuple[str, list[Panel]], ...] = (
    ("At a glance", _glance),
    ("Where they stand", _stand),
    ("What the detector says", _alarms),
    ("Traffic", _traffic),
)
