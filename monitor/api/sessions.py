"""`GET /v1/sessions` and one of them: conversations ranked by risk, and all that is known of one.

It knows the store, and how a reader wants it told; nothing is changed here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query, Response
from msgspec import Struct
from pydantic import AwareDatetime

from monitor.api import answers
from monitor.api.access import needs
from monitor.api.acting import Acting
from monitor.api.alert_table import AlertTable
from monitor.api.answers import AlertView, PointView, SessionView, VerdictView
from monitor.api.auth import Key
from monitor.api.bodies import json_response
from monitor.api.cursors import read_cursor, write_cursor
from monitor.api.documents import answer
from monitor.api.documents import problems as problems_of
from monitor.api.problems import Problem
from monitor.api.ranking import Wanted, page
from monitor.api.verdicts import verdict_of
from monitor.events import Finding
from monitor.store.store import Rank, Reader

__all__ = ["SessionPage", "SessionWhole", "mount_sessions"]

FINDINGS = 500


class SessionPage(Struct, frozen=True, kw_only=True):
    """Some sessions, riskiest first. `next` goes into `cursor` for those behind them; null at the end."""

    sessions: list[SessionView]
    next: str | None


class SessionWhole(Struct, frozen=True, kw_only=True):
    """All that is kept of one conversation: its newest responses in log order, findings newest first, and alerts."""

    session: SessionView
    trajectory: list[PointView]
    findings: list[Finding]
    alerts: list[AlertView]
    verdict: VerdictView | None


PAGE_EXAMPLE = SessionPage(sessions=[answers.SESSION_EXAMPLE], next=None)
WHOLE_EXAMPLE = SessionWhole(
    session=answers.SESSION_EXAMPLE,
    trajectory=[answers.POINT_EXAMPLE],
    findings=[answers.FINDING_EXAMPLE],
    alerts=[answers.ALERT_EXAMPLE],
    verdict=answers.VERDICT_EXAMPLE,
)


def mount_sessions(app: FastAPI, store: Reader, acting: Acting, alerts: AlertTable) -> None:
    """Give the routes to the application."""

    @app.get(
        "/v1/sessions",
        summary="Sessions, riskiest first",
        response_class=Response,
        responses=answer("A page of them.", PAGE_EXAMPLE) | problems_of(400, 422, 503),
    )
    def sessions(
        _: Annotated[Key, Depends(needs("read"))],
        deployment: Annotated[str | None, Query(max_length=256, description="Of this deployment.")] = None,
        model: Annotated[str | None, Query(max_length=256, description="Whose last response was this model's.")] = None,
        severity: Annotated[
            Literal["warning", "critical"] | None, Query(description="Whose open episode is as severe as this.")
        ] = None,
        open: Annotated[bool | None, Query(description="Whether an episode is open.")] = None,
        since: Annotated[
            AwareDatetime | None, Query(description="Not silent since before this moment, RFC 3339.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="How many, at most.")] = 50,
        cursor: Annotated[str | None, Query(max_length=2048, description="`next` of the page before.")] = None,
    ) -> Response:
        """Conversations by `risk`, the largest statistic over its warning boundary: at 1 and above it warns. Those that
        nothing judged come last.

        The ranking moves while it is read: no session comes twice unless its risk has fallen meanwhile. By `model`,
        `severity` and `open` it is searched for a bounded time, so that a page may be short, or empty, and yet have a
        `next`.
        """
        wanted = Wanted(
            deployment=deployment,
            model=model,
            severity=severity,
            open=open,
            since=None if since is None else since.timestamp(),
        )
        found, after = page(store, wanted, limit, read_cursor(cursor, Rank))
        listed = [answers.session_view(session) for session in found]
        return json_response(SessionPage(sessions=listed, next=None if after is None else write_cursor(after)))

    @app.get(
        "/v1/sessions/{conversation_id:id}",
        summary="One session",
        response_class=Response,
        responses=answer("All of it.", WHOLE_EXAMPLE) | problems_of(404, 503),
    )
    def session(_: Annotated[Key, Depends(needs("read"))], conversation_id: str) -> Response:
        """One conversation with its trajectory, findings, alerts and verdict. Its id is one segment of the path,
        percent-encoded, slashes too."""
        found = store.session(conversation_id)
        if found is None:
            raise no_session()
        findings = store.findings(FINDINGS, conversation_id=conversation_id)
        episodes = dict.fromkeys(finding.episode_id for finding in findings)
        told = [alert for id in episodes if (alert := alerts.find(id)) is not None]
        return json_response(
            SessionWhole(
                session=answers.session_view(found),
                trajectory=[answers.point_view(point) for point in store.trajectory(conversation_id)],
                findings=findings,
                alerts=[answers.alert_view(alert) for alert in told],
                verdict=verdict_of(acting, conversation_id),
            )
        )


def no_session() -> Problem:
    """Nothing is kept of such a conversation."""
    return Problem(404, "the store keeps no such session", "see /v1/sessions; silent ones are let go after a while")
