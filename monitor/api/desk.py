"""Reads what the page shows: the list of sessions, and one of them. It knows the store, and no request and no HTML.

All methods block for some reads of the store: at most one for the list, and a few for each session that is drifting or
listed. They may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec import Struct

from monitor.actions import Paging
from monitor.alert import Alert
from monitor.api.chart import chart_of, spark_of, spark_top
from monitor.api.views import (
    Done,
    Filters,
    Standing,
    alert_says,
    conversation_link,
    done,
    in_force,
    labels_of,
    ordered,
    seconds_of,
    standing,
    story,
)
from monitor.events import Finding
from monitor.store import Backend
from monitor.store.store import Session
from monitor.stream.log import PROJECTIONS

__all__ = ["Desk", "Links"]

SCAN = 1000  # the riskiest sessions among which filters look
ROWS = 25
LOOKED_UP = 50  # drifting sessions whose alerts are asked for before the list is put in order
FINDINGS = 200
SHIFTS = 5
CHARTS = {"wide": (900.0, 320.0), "narrow": (350.0, 300.0)}  # one of them is shown, so that its words stay legible
SHIFT_SECONDS = 86_400.0


class Links(Struct, frozen=True, kw_only=True):
    """Where else to look. Empty ones are not shown.

    Attributes:
        conversation_url: template of the operator's own log viewer, with `{conversation_id}` in it.
        runbook_url: template with `{kind}`.
        page_url: where people reach the page; https makes its cookies travel over TLS only.
    """

    conversation_url: str = ""
    runbook_url: str = ""
    page_url: str = ""


class Known(NamedTuple):
    """What has become of an episode: its alert, and what people did about it."""

    alert: Alert | None = None
    seen: Done | None = None
    resolved: Done | None = None

    @property
    def over(self) -> bool:
        """Whether it is, by word of the dispatcher or of somebody."""
        return self.resolved is not None or (self.alert is not None and not self.alert.firing)

    @property
    def seen_by(self) -> str:
        """Who has it; empty where nobody does."""
        return self.seen.by if self.seen else self.alert.acknowledged_by if self.alert else ""


class Desk:
    """See the module.

    Args:
        store: read only.
        idle_after: seconds of silence after which an open episode counts as over; the dispatcher has the same.
        clock: wall clock, seconds since 1970.
    """

    def __init__(self, store: Backend, *, links: Links, idle_after: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._links = links
        self._idle_after = idle_after
        self._clock = clock

    def overview(self, filters: Filters, number: int) -> dict[str, Any]:
        """The list, from its page `number` on, which counts from 1; and what concerns all of them."""
        now = self._clock()
        since = None if filters.since is None else now - filters.since
        sessions = self._store.sessions(SCAN, deployment=filters.deployment or None, since=since)
        known = {}
        for session in ordered(sessions, lambda one: self._stands(one, Known(), now))[:LOOKED_UP]:
            if session.episode_id is not None:
                known[session.conversation_id] = self._known(session.episode_id)

        def stands(session: Session) -> Standing:
            return self._stands(session, known.get(session.conversation_id, Known()), now)

        open_now = [one for one in sessions if stands(one) in ("warning", "critical")]
        listed = [one for one in ordered(sessions, stands) if filters.admits(one, stands(one))]
        pages = max(1, -(-len(listed) // ROWS))
        number = min(max(number, 1), pages)
        shown = listed[(number - 1) * ROWS : number * ROWS]
        trajectories = [self._store.trajectory(one.conversation_id) for one in shown]
        top = spark_top(trajectories)
        shadow = self._shadow()
        rows = []
        for rank, (session, points) in enumerate(zip(shown, trajectories, strict=True), (number - 1) * ROWS + 1):
            fate = known.get(session.conversation_id) or self._known(session.episode_id)
            rows.append(
                {
                    "rank": rank,
                    "session": session,
                    "stands": self._stands(session, fate, now),
                    "ago": now - session.time,
                    "spark": spark_of(points, top),
                    "roles": self._roles(session, fate.alert),
                    "alert": alert_says(session, fate.alert, fate.seen_by, over=fate.over, shadow=shadow),
                    "seen": bool(fate.seen_by),
                }
            )
        progress = self._store.progress(PROJECTIONS)
        newest = max([one.watermark for one in progress] + [one.time for one in sessions], default=None)
        return {
            "now": now,
            "rows": rows,
            "open_now": len(open_now),
            "critical_now": sum(one.severity == "critical" for one in open_now),
            "unseen_now": sum(not known.get(one.conversation_id, Known()).seen_by for one in open_now),
            "listed": len(listed),
            "sessions": len(sessions),
            "scanned_all": len(sessions) < SCAN,
            "page": number,
            "pages": pages,
            "filters": filters,
            "deployments": sorted({one.deployment for one in sessions} | ({filters.deployment} - {""})),
            "models": sorted({one.model for one in sessions} | ({filters.model} - {""})),
            "shadow": shadow,
            "silences": in_force(self._store.actions("silence/"), now),
            "shifts": self._shifts(now),
            "newest_ago": None if not newest else now - newest,
            "quiet_for": self._idle_after,
            "behind": any(one.behind for one in progress),
        }

    def session(self, conversation_id: str) -> dict[str, Any] | None:
        """One of them, whole; None where the store has none of this id."""
        session = self._store.session(conversation_id)
        if session is None:
            return None
        now = self._clock()
        points = self._store.trajectory(conversation_id)
        findings = self._store.findings(FINDINGS, conversation_id=conversation_id)
        episode = session.episode_id or (findings[0].episode_id if findings else None)
        fate = self._known(episode)
        stands = self._stands(session, fate, now)
        shadow = self._shadow()
        key = f"verdict/{conversation_id}"
        opened = next((one for one in reversed(findings) if one.episode_id == episode), None)
        kind = session.kind or (opened.kind if opened else None)
        links = self._links
        seen = labels_of(session, fate.alert, kind)
        quiet = in_force(self._store.actions("silence/"), now)
        return {
            "now": now,
            "session": session,
            "stands": stands,
            "ago": now - session.time,
            "points": points,
            "findings": findings,
            "opened": opened,
            "last": findings[0] if findings else None,
            "story": story(session, findings, stands),
            "budgets": {one.severity: one for one in reversed(findings) if one.severity != "info"},
            "roles_near": self._roles(session, fate.alert),
            "episode": episode,
            "fate": fate,
            "alert": alert_says(session, fate.alert, fate.seen_by, over=fate.over, shadow=shadow),
            "charts": [
                ("wide", chart_of(points, findings, 900.0, 320.0)),
                ("narrow", chart_of(points, findings, 350.0)),
            ],
            "verdict": done(key, self._store.actions(key).get(key)),
            "silences": [one for one in quiet if one.silence.mutes(seen)],
            "kind": kind,
            "shadow": shadow,
            "viewer": conversation_link(links.conversation_url, conversation_id),
            "runbook": links.runbook_url.replace("{kind}", kind) if links.runbook_url and kind else "",
        }

    def _stands(self, session: Session, known: Known, now: float) -> Standing:
        return standing(session, over=known.over or now - session.time > self._idle_after)

    def _known(self, episode_id: str | None) -> Known:
        if episode_id is None:
            return Known()
        key = f"alert/{episode_id}"
        found = done(key, self._store.actions(key).get(key))
        alert = found.body if found is not None and isinstance(found.body, Alert) else None
        seen, resolved = (self._done(f"{kind}/{episode_id}") for kind in ("acknowledge", "resolve"))
        return Known(alert, seen, resolved)

    def _done(self, key: str) -> Done | None:
        return done(key, self._store.actions(key).get(key))

    def _shadow(self) -> bool:
        mode = self._done("paging/mode")
        return mode is None or not isinstance(mode.body, Paging) or mode.body.mode == "shadow"

    def _roles(self, session: Session, alert: Alert | None) -> list[str]:
        """What it is nearest to, of the newest finding; nothing for those that never warned."""
        if alert is not None and alert.nearest_roles:
            return list(alert.nearest_roles[:3])
        if session.episode_id is None and (session.highest_risk or 0.0) < 1.0:
            return []
        return next((one.nearest_roles[:3] for one in self._findings(session) if one.nearest_roles), [])

    def _findings(self, session: Session) -> list[Finding]:
        return self._store.findings(5, conversation_id=session.conversation_id)

    def _shifts(self, now: float) -> list[dict[str, Any]]:
        """Whole deployments that have shifted lately, newest first."""
        found = []
        for finding in self._store.findings(SHIFTS, conversation_id=""):
            fate = self._known(finding.id)
            age = now - seconds_of(finding.time)
            if finding.kind == "fleet_shift" and age < SHIFT_SECONDS and not fate.over:
                found.append({"finding": finding, "fate": fate, "ago": age})
        return found
