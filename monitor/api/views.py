"""What the page says of sessions, findings and alerts: their data in, words and rows out. Pure, and it knows no HTML.

Everything here may come from strangers, so what is invisible or turns letters around is written out; the templates
escape the rest. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple
from urllib.parse import quote

from monitor.actions import Action, Body, Silence, body_of, decode_action
from monitor.alert import Alert, labels
from monitor.errors import EventError
from monitor.events import Finding
from monitor.store.store import Session

__all__ = [
    "KINDS",
    "STATISTICS",
    "STATUSES",
    "Done",
    "Filters",
    "Quiet",
    "Standing",
    "address",
    "ago",
    "alert_says",
    "conversation_link",
    "done",
    "in_force",
    "labels_of",
    "legible",
    "moment",
    "ordered",
    "seconds_of",
    "standing",
    "story",
    "utc",
]

KINDS = {
    "low_start": "low from the start",
    "sudden_drop": "sudden drop",
    "sustained_drop": "sustained drop",
    "dip": "dip",
    "recovered": "recovered",
    "fleet_shift": "fleet shift",
}
STATISTICS = {
    "level": "how low it stands, smoothed",
    "drop": "how far below its own start",
    "cusum": "what added up below normal",
    "dip": "its lowest 16 tokens",
}
RESOLUTIONS = {
    "recovered": "over: it recovered",
    "ended": "over: it fell silent",
    "resolved": "over: resolved by hand",
    "forgotten": "over: it was deleted",
    "expired": "over: its time is up",
}
# What the list can be narrowed to.
STATUSES = {
    "": "all sessions",
    "open": "drifting now",
    "critical": "critical now",
    "warning": "warning now",
    "inside": "within bounds",
}

# critical, warning: an episode is open, and the conversation goes on. over: it is open in the books only. inside:
# within its boundary. learning, unjudged: nothing judges it, or not yet.
Standing = Literal["critical", "warning", "over", "inside", "learning", "unjudged"]


class Filters(NamedTuple):
    """What the list leaves out. `status` is one of `STATUSES`; `since` in seconds, None is any time."""

    deployment: str = ""
    model: str = ""
    status: str = ""
    since: float | None = None

    def admits(self, session: Session, stands: Standing) -> bool:
        """Whether it is listed; `deployment` and `since` are left to the store."""
        match self.status:
            case "open":
                fits = stands in ("warning", "critical")
            case "":
                fits = True
            case wanted:
                fits = stands == wanted
        return fits and self.model in ("", session.model)


class Done(NamedTuple):
    """An action that somebody took: who, when, and what."""

    by: str
    time: str
    body: Body


class Quiet(NamedTuple):
    """A silence that is in force."""

    name: str
    by: str
    silence: Silence

    @property
    def about(self) -> str:
        """What it keeps quiet."""
        one = self.silence
        parts = [
            f"conversation {legible(one.conversation_id)}" if one.conversation_id else "",
            KINDS.get(one.kind, legible(one.kind)) if one.kind else "",
            f"deployment {legible(one.deployment)}" if one.deployment else "",
            *(legible(each) for each in one.matchers),
        ]
        return ", ".join(part for part in parts if part) or "everything"


# Words


def legible(text: object) -> str:
    """Text that can be shown: what is invisible, or turns letters around, is written out."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\u200c\u200d"  # those join letters of some scripts, and emoji
        else f"\\u{{{ord(letter):x}}}"
        for letter in str(text)
    )


def ago(seconds: float) -> str:
    """How long ago, in one short word or two."""
    if seconds < 5:
        return "just now"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def utc(time: float) -> str:
    """A moment for people."""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "no time that a calendar has"


def moment(time: float) -> str:
    """The same for machines: RFC 3339."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def seconds_of(time: str) -> float:
    """A moment of the wire format."""
    return datetime.fromisoformat(time).timestamp()


def address(conversation_id: str, **query: str) -> str:
    """The path of a session's page. A browser takes a lone dot for a folder: such ids go into the query."""
    if conversation_id in (".", ".."):
        query = {"id": conversation_id, **query}
        path = "/sessions"
    else:
        path = f"/sessions/{quote(conversation_id, safe='')}"
    return path + ("?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items()) if query else "")


def conversation_link(template: str, conversation_id: str) -> str:
    """The operator's own log viewer; empty where no template is given."""
    return template.replace("{conversation_id}", quote(conversation_id, safe=""))


# What is shown first. Nothing is detected here.


def standing(session: Session, *, over: bool) -> Standing:
    """How a session stands. `over`: its episode, if one is open, counts for nothing any more."""
    if session.episode_id is not None and session.severity in ("warning", "critical"):
        return "over" if over else session.severity
    if session.risk is not None:
        return "inside"
    return "learning" if session.outcome == "learning" else "unjudged"


def labels_of(session: Session, alert: Alert | None, kind: str | None) -> dict[str, str]:
    """What silences see of it: its alert's labels, or those that an alert of it would have, where they are known."""
    if alert is not None:
        return labels(alert)
    found = {
        "alertname": "AnchorwatchPersonaDrift",
        "severity": session.severity or "",
        "kind": kind or "",
        "deployment": session.deployment,
        "model": session.model,
        "conversation_id": session.conversation_id,
        "episode_id": session.episode_id or "",
    }
    return {name: value for name, value in found.items() if value}


def ordered(sessions: Sequence[Session], stands: Callable[[Session], Standing]) -> list[Session]:
    """What is drifting now comes first; each part stays in the order given, which is by risk."""
    return sorted(sessions, key=lambda one: stands(one) not in ("warning", "critical"))


def alert_says(session: Session, alert: Alert | None, seen_by: str, *, over: bool, shadow: bool) -> str:
    """What has become of the alert of its open episode; empty where none is open."""
    if session.episode_id is None:
        return ""
    if alert is not None and alert.resolution is not None:
        return RESOLUTIONS[alert.resolution]
    if over:
        return RESOLUTIONS["resolved"]
    if seen_by:
        return f"seen by {legible(seen_by)}"
    if shadow:
        return ""  # the page says so once
    if alert is None:
        return "no alert yet"
    return "unseen" if alert.told else "unseen, nobody told yet"


def story(session: Session, findings: Sequence[Finding], stands: Standing) -> str:
    """One sentence on how it is, of what the store knows. `findings`: newest first."""
    if stands == "learning":
        return "Its deployment is still learning what is healthy: it is shown, and nobody is told."
    if stands == "unjudged" or session.risk is None:
        return "Nothing has judged it: no calibration in force is for its axis."
    risk = f"{session.risk:.2f} times its warning boundary"
    opened = next((one for one in reversed(findings) if one.episode_id == session.episode_id), None)
    if session.episode_id is not None and session.kind is not None:
        begun = f" since turn {opened.turn}" if opened is not None else ""
        return f"{KINDS[session.kind].capitalize()}{begun}; its last reply stands at {risk}."
    past = " It went beyond it before, and came back." if (session.highest_risk or 0.0) >= 1.0 else ""
    return f"Within bounds: its last reply stands at {risk}.{past}"


# Operators' actions


def done(key: str, value: bytes | None) -> Done | None:
    """An action as the store has it; None where nobody took it, or this release can't read it."""
    if value is None:
        return None
    try:
        action: Action = decode_action(key, value)
        return Done(action.by, action.time, body_of(key, value))
    except EventError:
        return None


def in_force(silences: Mapping[str, bytes], now: float) -> list[Quiet]:
    """The silences that have not ended, the one that ends next first. Keys are as the store has them."""
    found = []
    for key, value in silences.items():
        one = done(key, value)
        if one is not None and isinstance(one.body, Silence) and seconds_of(one.body.until) > now:
            found.append(Quiet(key.partition("/")[2], one.by, one.body))
    return sorted(found, key=lambda one: (one.silence.until, one.name))
