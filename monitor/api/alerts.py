"""`/v1/alerts`: what people are told, and what they answer: seen, or over.

It knows the table of alerts and how an action is written. What becomes of an answer is the dispatcher's business: it
stops to repeat an alert that somebody has seen, and ends one that somebody has called over.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from msgspec import Meta, Struct

from monitor.actions import Acknowledgement
from monitor.alert import Alert
from monitor.api import answers
from monitor.api.access import needs
from monitor.api.acting import Acting
from monitor.api.alert_table import AlertTable
from monitor.api.answers import AlertView
from monitor.api.auth import Key
from monitor.api.bodies import json_response, read_json
from monitor.api.cursors import read_cursor, write_cursor
from monitor.api.documents import answer, body, nothing
from monitor.api.documents import problems as problems_of
from monitor.api.problems import Problem
from monitor.api.silences import silenced_by
from monitor.events import Kind, Severity

__all__ = ["AlertPage", "Remark", "mount_alerts"]


class AlertPage(Struct, frozen=True, kw_only=True):
    """Some alerts: those that fire first, the newest first. `next` goes into `cursor`; null at the end. In `shadow`
    nobody is told of any."""

    alerts: list[AlertView]
    next: str | None
    mode: Literal["shadow", "live"]


class Remark(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What somebody has to say to it. It is kept for ever: no conversation text."""

    note: Annotated[str, Meta(max_length=1000)] = ""


class Answered(Struct, frozen=True, kw_only=True):
    """Who has said what of an alert."""

    alert: str
    action: Literal["acknowledge", "resolve"]
    by: str
    note: str


class Place(NamedTuple):
    """Where an alert stands among others."""

    over: bool
    starts_at: str
    id: str


PAGE_EXAMPLE = AlertPage(alerts=[answers.ALERT_EXAMPLE], next=None, mode="live")
REMARK_EXAMPLE = Remark(note="looking at it")
ANSWERED_EXAMPLE = Answered(alert=answers.ALERT_EXAMPLE.id, action="acknowledge", by="console", note="looking at it")
ONE = "/v1/alerts/{alert_id:id}"


def mount_alerts(app: FastAPI, acting: Acting, table: AlertTable) -> None:
    """Give the routes to the application."""

    @app.get(
        "/v1/alerts",
        summary="Alerts, those that fire first",
        response_class=Response,
        responses=answer("A page of them.", PAGE_EXAMPLE) | problems_of(400, 422, 503),
    )
    def alerts(
        _: Annotated[Key, Depends(needs("read"))],
        status: Annotated[Literal["firing", "resolved"] | None, Query(description="Whether it is over.")] = None,
        severity: Annotated[Severity | None, Query(description="The highest that it has had.")] = None,
        kind: Annotated[Kind | None, Query(description="Of the finding that opened it.")] = None,
        deployment: Annotated[str | None, Query(max_length=256, description="Of this deployment.")] = None,
        conversation_id: Annotated[str | None, Query(max_length=256, description="Of this conversation.")] = None,
        acknowledged: Annotated[bool | None, Query(description="Whether somebody has seen it.")] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="How many, at most.")] = 50,
        cursor: Annotated[str | None, Query(max_length=2048, description="`next` of the page before.")] = None,
    ) -> Response:
        """One alert for each episode, and for each shift of a deployment, as of a moment ago. In shadow mode alerts are
        made and shown here, and nobody is told."""
        place = read_cursor(cursor, Place)
        found: list[Alert] = []
        for alert in table.all():
            if (
                status in (None, "firing" if alert.firing else "resolved")
                and severity in (None, alert.severity)
                and kind in (None, alert.kind)
                and deployment in (None, alert.deployment)
                and conversation_id in (None, alert.conversation_id)
                and acknowledged in (None, bool(alert.acknowledged_by))
                and (place is None or _is_behind(alert, place))
            ):
                found.append(alert)
                if len(found) > limit:
                    break
        shown = found[:limit]
        silences = acting.listed("silence")
        return json_response(
            AlertPage(
                alerts=[answers.alert_view(alert, silenced_by(alert, silences)) for alert in shown],
                next=write_cursor(_place(shown[-1])) if len(found) > limit else None,
                mode=acting.mode(),
            )
        )

    @app.get(
        ONE,
        summary="One alert",
        response_class=Response,
        responses=answer("It.", answers.ALERT_EXAMPLE) | problems_of(404, 503),
    )
    def alert(_: Annotated[Key, Depends(needs("read"))], alert_id: str) -> Response:
        """One alert by its id: the episode's, and of a fleet shift the finding's."""
        found = _there(table, alert_id)
        return json_response(answers.alert_view(found, silenced_by(found, acting.listed("silence"))))

    async def answered(
        request: Request, key: Key, alert_id: str, action: Literal["acknowledge", "resolve"]
    ) -> Response:
        given = await read_json(request, Remark)
        await run_in_threadpool(_there, table, alert_id)
        await run_in_threadpool(acting.write, action, alert_id, Acknowledgement(given.note), key.name)
        table.expire()
        return json_response(Answered(alert=alert_id, action=action, by=key.name, note=given.note))

    accepts = body(REMARK_EXAMPLE, required=False)
    says = answer("It is kept.", ANSWERED_EXAMPLE) | problems_of(400, 404, 408, 413, 415, 422, 503)

    @app.post(
        ONE + "/acknowledge",
        summary="Say that you have seen an alert",
        response_class=Response,
        openapi_extra=accepts,
        responses=says,
    )
    async def acknowledge(request: Request, key: Annotated[Key, Depends(needs("act"))], alert_id: str) -> Response:
        """Under your key's name. It is not repeated then; that it got worse, or is over, is still told."""
        return await answered(request, key, alert_id, "acknowledge")

    @app.delete(
        ONE + "/acknowledge",
        status_code=204,
        summary="Take that back",
        response_class=Response,
        responses=nothing("Nobody has seen it now.") | problems_of(404, 503),
    )
    def take_back(_: Annotated[Key, Depends(needs("act"))], alert_id: str) -> Response:
        """Take back that anybody has seen it, as far as it was said of the alert itself."""
        _there(table, alert_id)
        acting.take_back("acknowledge", alert_id)
        table.expire()
        return Response(status_code=204)

    @app.post(
        ONE + "/resolve",
        summary="Say that an alert is over",
        response_class=Response,
        openapi_extra=accepts,
        responses=says,
    )
    async def resolve(request: Request, key: Annotated[Key, Depends(needs("act"))], alert_id: str) -> Response:
        """Under your key's name. The dispatcher ends it and tells those whom it told of it; a conversation that drifts
        on may open another episode, and so another alert."""
        return await answered(request, key, alert_id, "resolve")


def _there(table: AlertTable, id: str) -> Alert:
    if (found := table.find(id)) is None:
        raise Problem(404, "there is no such alert", "see /v1/alerts")
    return found


def _place(alert: Alert) -> Place:
    return Place(not alert.firing, alert.starts_at, alert.id)


def _is_behind(alert: Alert, place: Place) -> bool:
    over, *newest = _place(alert)
    return over > place.over or (over == place.over and newest < [place.starts_at, place.id])
