"""`/v1/silences`: nobody is told, for a while, of alerts that match. It knows how a silence is written and read."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from msgspec import Meta, Struct

from monitor.actions import Silence
from monitor.alert import Alert, labels
from monitor.api.access import needs
from monitor.api.acting import Acting, Done
from monitor.api.alert_table import AlertTable
from monitor.api.auth import Key
from monitor.api.bodies import json_response, read_json
from monitor.api.documents import answer, body, nothing
from monitor.api.documents import problems as problems_of
from monitor.api.problems import Problem
from monitor.errors import ConfigurationError
from monitor.events import Kind
from monitor.matchers import parse_matchers

__all__ = ["SilenceAsked", "SilenceList", "SilenceView", "mount_silences", "silenced_by"]

Name = Annotated[str, Meta(min_length=1, max_length=256)]
LONGEST = timedelta(days=366)


class SilenceAsked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A silence as it is sent: until a moment, or for so many seconds; of what matches all that is given. `matchers`
    are Alertmanager's, such as `severity="warning"`, several between commas. `everything` has to be said."""

    until: Annotated[str, Meta(max_length=64)] | None = None
    seconds: Annotated[int, Meta(ge=1, le=int(LONGEST.total_seconds()))] | None = None
    matchers: Annotated[str, Meta(min_length=1, max_length=4000)] | None = None
    deployment: Name | None = None
    conversation_id: Name | None = None
    kind: Kind | None = None
    everything: bool = False
    note: Annotated[str, Meta(max_length=1000)] = ""


class SilenceView(Struct, frozen=True, kw_only=True):
    """One silence, and who made it when. With nothing to match it is of everything."""

    name: str
    until: str
    in_force: bool
    matchers: list[str]
    deployment: str | None
    conversation_id: str | None
    kind: str | None
    note: str
    by: str
    time: str


class SilenceList(Struct, frozen=True, kw_only=True):
    """Silences, by name."""

    silences: list[SilenceView]


ASKED_EXAMPLE = SilenceAsked(seconds=3600, matchers='deployment="support-bot", severity="warning"', note="release 4.2")
VIEW_EXAMPLE = SilenceView(
    name="9f1c2d3e",
    until="2026-01-02T04:04:05Z",
    in_force=True,
    matchers=['deployment="support-bot"', 'severity="warning"'],
    deployment=None,
    conversation_id=None,
    kind=None,
    note="release 4.2",
    by="console",
    time="2026-01-02T03:04:05.000000Z",
)


def mount_silences(app: FastAPI, acting: Acting, table: AlertTable) -> None:
    """Give the routes to the application."""

    @app.get(
        "/v1/silences",
        summary="Silences",
        response_class=Response,
        responses=answer("All of them.", SilenceList(silences=[VIEW_EXAMPLE])) | problems_of(422, 503),
    )
    def silences(
        _: Annotated[Key, Depends(needs("read"))],
        ended: Annotated[bool, Query(description="Those that have run out, too.")] = False,
    ) -> Response:
        """Those that are in force."""
        found = [_view(name, one) for name, one in acting.listed("silence").items()]
        return json_response(SilenceList(silences=[one for one in found if ended or one.in_force]))

    @app.post(
        "/v1/silences",
        status_code=201,
        summary="Tell nobody for a while",
        response_class=Response,
        openapi_extra=body(ASKED_EXAMPLE, required=True),
        responses=answer("It is in force.", VIEW_EXAMPLE, 201) | problems_of(400, 408, 413, 415, 422, 503),
    )
    async def silence(request: Request, key: Annotated[Key, Depends(needs("act"))]) -> Response:
        """Under your key's name. What it matches is kept and shown, and what still fires when it ends is told then."""
        asked = await read_json(request, SilenceAsked)
        made = _made(asked, datetime.now(UTC))
        name = secrets.token_hex(4)
        at = await run_in_threadpool(acting.write, "silence", name, made, key.name)
        table.expire()
        return json_response(_shown(name, made, by=key.name, time=at), 201, {"Location": f"/v1/silences/{name}"})

    @app.get(
        "/v1/silences/{name:id}",
        summary="One silence",
        response_class=Response,
        responses=answer("It.", VIEW_EXAMPLE) | problems_of(404, 503),
    )
    def one(_: Annotated[Key, Depends(needs("read"))], name: str) -> Response:
        """One silence by its name, also one that has run out."""
        return json_response(_view(name, _there(acting, name)))

    @app.delete(
        "/v1/silences/{name:id}",
        status_code=204,
        summary="End a silence",
        response_class=Response,
        responses=nothing("It is over.") | problems_of(404, 503),
    )
    def end(_: Annotated[Key, Depends(needs("act"))], name: str) -> Response:
        """End it now: what still fires is told."""
        _there(acting, name)
        acting.take_back("silence", name)
        table.expire()
        return Response(status_code=204)


def silenced_by(alert: Alert, silences: Mapping[str, Done], now: datetime | None = None) -> list[str]:
    """The names of those in force that match an alert."""
    at, seen = now or datetime.now(UTC), labels(alert)
    return [
        name
        for name, one in silences.items()
        if isinstance(one.body, Silence) and _in_force(one.body, at) and one.body.mutes(seen)
    ]


def _made(asked: SilenceAsked, now: datetime) -> Silence:
    """The silence that is asked for.

    Raises:
        Problem: it is not clear until when, or of what; or a matcher is none (422).
    """
    matching = (asked.matchers, asked.deployment, asked.conversation_id, asked.kind)
    if asked.everything == any(one is not None for one in matching):
        raise Problem(
            422,
            "it is not clear what to silence",
            "give matchers, deployment, conversation_id or kind; or everything and none of them",
        )
    if (asked.until is None) == (asked.seconds is None):
        raise Problem(422, "it is not clear how long", "give until, or seconds")
    try:
        until = now + timedelta(seconds=asked.seconds) if asked.seconds else datetime.fromisoformat(asked.until or "")
        lasts = until - now
    except (ValueError, TypeError, OverflowError):
        raise Problem(422, "until is no moment", "write it as RFC 3339 has it: 2026-01-02T03:04:05Z") from None
    if not timedelta(0) < lasts <= LONGEST:
        raise Problem(422, f"it would end in the past, or in more than {LONGEST.days} days", "give another moment")
    try:
        matchers = parse_matchers(asked.matchers) if asked.matchers is not None else ()
    except ConfigurationError as error:
        raise Problem(422, "the matchers are none", error.cure) from None
    moment = until.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Silence(moment, asked.deployment, asked.conversation_id, asked.kind, asked.note, matchers)


def _there(acting: Acting, name: str) -> Done:
    if (found := acting.known("silence", name)) is None:
        raise Problem(404, "there is no such silence", "see /v1/silences")
    return found


def _in_force(silence: Silence, now: datetime) -> bool:
    return datetime.fromisoformat(silence.until) > now


def _view(name: str, found: Done) -> SilenceView:
    assert isinstance(found.body, Silence)
    return _shown(name, found.body, by=found.action.by, time=found.action.time)


def _shown(name: str, silence: Silence, *, by: str, time: str) -> SilenceView:
    return SilenceView(
        name=name,
        until=silence.until,
        in_force=_in_force(silence, datetime.now(UTC)),
        matchers=[str(matcher) for matcher in silence.matchers],
        deployment=silence.deployment,
        conversation_id=silence.conversation_id,
        kind=silence.kind,
        note=silence.note,
        by=by,
        time=time,
    )
