"""Alerts, notifications and rules for whoever tells of them: what the tests of the channels share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from alerts.config import AlertsConfig, Route
from monitor.alert import Alert, Notification

RULES = AlertsConfig(
    route=Route(path="0", receiver="ops"),
    receivers=(),
    external_url="https://watch.example",
    conversation_url="https://logs.example/c/{conversation_id}?tab=all",
    runbook_url="https://docs.example/runbooks/{kind}.md",
)

# What no reader is to see made into markup, a mention, a line of its own, an escape sequence, or a turn of direction.
HOSTILE = (
    "<script>alert(1)</script>",
    "<!channel> <@U024BE7LH> <https://evil.example|reset your password>",
    "*bold* _it_ ~s~ `code` ```block``` :skull: @here",
    '"><img src=x onerror=alert(1)>',
    "a\r\nBcc: victim@evil.example\r\n\r\nhello",
    "a\nSeverity:        critical",
    "\x1b[2J\x1b[31mred\x07",
    "\x9b31m\x85",
    "\u202egnp.exe\u202c \u2066x\u2069",
    "line\u2028separator\u2029here",
    "{conversation_id} %s %(x)s {0} ${HOME} {{x}}",
    "../../etc/passwd?x=1#y&z=2;a|b",
    "\U000e0001\U000e0061tag",
    " padded ",
    "\u3164",
    "`",
    "&lt;&amp;",
    "😀" * 256,
    "x" * 256,
    "&" * 256,
    "\U000e0001" * 256,
)
# Names as people have them. They are shown as they are; those written from right to left are isolated.
NAMES = (
    "support-bot",
    "客服机器人",
    "カスタマーサポート",
    "고객지원",
    "поддержка",
    "ฝ่ายสนับสนุน",
    "सहायता",
    "பயனர்",
    "Ünïcödé",
    "ተጠቃሚ",
    "👩‍🔬 lab",
    "می‌خواهم",
    "דוד",
    "مستخدم ١٢٣",
)
# Any text that a record of the log can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256) | st.sampled_from(HOSTILE)


def alert(id: str = "e1", **changes: Any) -> Alert:
    """A critical sudden drop, unless told otherwise."""
    return Alert(
        **{
            "id": id,
            "conversation_id": "c-17",
            "deployment": "support-bot",
            "model": "llama-3-70b",
            "axis_id": "a" * 64,
            "config_id": "k1",
            "kind": "sudden_drop",
            "persona": "pirate",
            "severity": "critical",
            "starts_at": "2026-06-01T11:58:00.250000Z",
            "accepted": 1780315080.5,
            "changed": 1780315080.5,
            "finding_ids": ("f1", "f2"),
            "turn": 11,
            "statistic": "level",
            "value": 4.23,
            "boundary": 3.02,
            "risk": 1.4,
            "budget": 0.01,
            "certification": "certified",
            "nearest_roles": ("pirate", "demon"),
            "story": "Over 12 judged responses, turns 0 to 11, the reading fell from +0.3 to −4.2.",
            "sparkline": "▇▇▇▂▁",
        }
        | changes
    )


def over(id: str = "e1", **changes: Any) -> Alert:
    """The same, recovered."""
    return alert(id, **({"ends_at": "2026-06-01T12:30:00Z", "resolution": "recovered"} | changes))


def notification(*alerts: Alert, **changes: Any) -> Notification:
    """What tells of these alerts, for the first time."""
    return Notification(
        **{
            "id": "n-0001",
            "integration": "ops/log[0]",
            "group": "9f" * 16,
            "labels": {"deployment": "support-bot"},
            "reason": "first",
            "time": "2026-06-01T12:00:00Z",
            "sequence": 0,
            "alerts": alerts,
            "covered": {one.id: one.severity if one.firing else "resolved" for one in alerts},
        }
        | changes
    )


def hostile(name: str) -> Alert:
    """An alert whose every name is this one."""
    return alert(
        conversation_id=name,
        deployment=name,
        model=name,
        persona=name,
        statistic=name,
        nearest_roles=(name,) * 5,
        acknowledged_by=name,
        story=name,
        sparkline=name,
        starts_at=name,
    )
