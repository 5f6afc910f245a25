"""*Risky sessions*: which conversations to look at, riskiest first, and what people were told of them."""

from __future__ import annotations

from alerts.panels import Limit, Panel, Query, lines, number, rows

__all__ = ["DESCRIPTION", "ROWS"]

DESCRIPTION = "Which conversations to look at, riskiest first, and what people were told of them."

PICKED = 'deployment=~"$deployment"'
RISK = (Limit(0.8, "yellow"), Limit(1, "red"))

_glance: list[Panel] = [
    number(
        "Highest risk",
        "Of all conversations of the last half hour. From 1 on a conversation warns.",
        "none",
        Query(f"max(anchorwatch_session_risk{{{PICKED}}})"),
        limits=RISK,
    ),
    number(
        "Open episodes, critical",
        "Conversations of the last half hour that are far away from the Assistant at this moment.",
        "short",
        Query(f'sum(anchorwatch_open_episodes{{{PICKED},severity="critical"}}) or vector(0)'),
        limits=(Limit(1, "red"),),
    ),
    number(
        "Findings, last hour",
        "What the detector has said, `recovered` left out.",
        "short",
        Query(f'sum(increase(anchorwatch_findings_total{{{PICKED},kind!="recovered"}}[1h])) or vector(0)'),
    ),
    number(
        "Alerts firing",
        "Episodes that people are or would be told of, and that are not over.",
        "short",
        Query("sum(anchorwatch_alerts_firing) or vector(0)"),
    ),
    number(
        "Notifications, last hour",
        "Messages that receivers have taken.",
        "short",
        Query("sum(increase(anchorwatch_notifications_total[1h])) or vector(0)"),
    ),
    number(
        "Alerts go out",
        "In shadow, which is how an installation begins, alerts are made and shown and nobody is told. "
        "`anchorwatch alerts enable` ends it.",
        "none",
        Query("max(anchorwatch_alerts_live and on (job, instance) anchorwatch_dispatcher == 1)"),
        words={"0": "shadow", "1": "live"},
    ),
]

_riskiest: list[Panel] = [
    rows(
        "The riskiest conversations",
        "Twenty at most, of the last half hour. Risk is the largest statistic over its warning boundary: from 1 on it "
        "warns. A click on one opens it in the page named at the top.",
        Query(f"topk(20, max by (conversation_id, deployment) (anchorwatch_session_risk{{{PICKED}}}))"),
        columns={"conversation_id": "Conversation", "deployment": "Deployment"},
        value="Risk",
        unit="none",
        limits=RISK,
        link=("conversation_id", "Open the conversation", "${page}/sessions/${__value.raw:percentencode}"),
    ),
    lines(
        "Their risk over time",
        "The same conversations, while they are among the twenty.",
        "none",
        Query(
            f"topk(20, max by (conversation_id, deployment) (anchorwatch_session_risk{{{PICKED}}}))",
            "{{conversation_id}} ({{deployment}})",
        ),
        limits=(Limit(1, "red"),),
        span=24,
    ),
]

_findings: list[Panel] = [
    lines(
        "Open episodes by severity",
        "Conversations away from the Assistant at each moment.",
        "short",
        Query(f"sum by (severity) (anchorwatch_open_episodes{{{PICKED}}})", "{{severity}}"),
        stacked=True,
    ),
    lines(
        "Findings by kind and severity",
        "Findings an hour. `recovered` has the severity `info`.",
        "short",
        Query(
            f"sum by (kind, severity) (increase(anchorwatch_findings_total{{{PICKED}}}[1h]))", "{{kind}} {{severity}}"
        ),
        stacked=True,
    ),
]

_told: list[Panel] = [
    lines(
        "Alerts firing by severity",
        "Episodes that people are or would be told of, and that are not over.",
        "short",
        Query("sum by (severity) (anchorwatch_alerts_firing)", "{{severity}}"),
        stacked=True,
    ),
    lines(
        "Notifications by reason",
        "Messages an hour that receivers have taken, and why they went out.",
        "short",
        Query("sum by (reason) (increase(anchorwatch_notifications_total[1h]))", "{{reason}}"),
        stacked=True,
    ),
    lines(
        "Held back, by cause",
        "Alerts an hour that a receiver was not told of: silenced, inhibited, in quiet hours, over its cap, or in "
        "shadow. None of them is lost.",
        "short",
        Query("sum by (cause) (increase(anchorwatch_alerts_held_back_total[1h]))", "{{cause}}"),
        stacked=True,
    ),
    lines(
        "Findings that make no alert, by reason",
        "Findings an hour that are kept and nobody is told of: too old, of a weak identity, of a deployment that is "
        "still learning.",
        "short",
        Query("sum by (reason) (increase(anchorwatch_kept_total[1h]))", "{{reason}}"),
        stacked=True,
    ),
]

ROWS: tuple[tuple[str, list[Panel]], ...] = (
    ("At a glance", _glance),
    ("The riskiest", _riskiest),
    ("What the detector says", _findings),
    ("What people are told", _told),
)
