"""`/v1/sessions/{id}/verdict`: what a person found a conversation to be. The truth for `anchorwatch backtest`.

It knows how a verdict is written, and nothing of what is made of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from msgspec import Meta, Struct

from monitor.actions import Verdict
from monitor.api import answers
from monitor.api.access import needs
from monitor.api.acting import Acting
from monitor.api.answers import VerdictView
from monitor.api.auth import Key
from monitor.api.bodies import json_response, read_json
from monitor.api.documents import answer, body, nothing
from monitor.api.documents import problems as problems_of
from monitor.api.problems import Problem
from monitor.store.store import Reader

__all__ = ["Judgement", "mount_verdicts", "verdict_of"]


class Judgement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A verdict as it is sent. drifting: the alarm was true; healthy: it was false. `turn` is where drift began, the
    reply's index from 0. The note is kept for ever: no conversation text."""

    label: Literal["drifting", "healthy", "unsure"]
    turn: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    note: Annotated[str, Meta(max_length=1000)] = ""


EXAMPLE = Judgement(label="drifting", turn=3, note="plays a ghost, unasked")
PATH = "/v1/sessions/{conversation_id:id}/verdict"


def mount_verdicts(app: FastAPI, store: Reader, acting: Acting) -> None:
    """Give the routes to the application."""

    @app.get(
        PATH,
        summary="The verdict on a session",
        response_class=Response,
        responses=answer("It.", answers.VERDICT_EXAMPLE) | problems_of(404, 503),
    )
    def read(_: Annotated[Key, Depends(needs("read"))], conversation_id: str) -> Response:
        """What a person found the conversation to be; also of one that the store has let go."""
        found = verdict_of(acting, conversation_id)
        if found is None:
            raise Problem(404, "nobody has judged this conversation", "PUT a verdict here")
        return json_response(found)

    @app.put(
        PATH,
        summary="Judge a session",
        response_class=Response,
        openapi_extra=body(EXAMPLE, required=True),
        responses=answer("It is kept.", answers.VERDICT_EXAMPLE) | problems_of(400, 404, 408, 413, 415, 422, 503),
    )
    async def judge(request: Request, key: Annotated[Key, Depends(needs("act"))], conversation_id: str) -> Response:
        """Keep what you found it to be, under your key's name; a later verdict takes the place of this one. Of a
        conversation that the store does not keep, `anchorwatch verdict` takes one."""
        given = await read_json(request, Judgement)
        if given.turn is not None and given.label != "drifting":
            raise Problem(422, f"a conversation that is {given.label} began to drift nowhere", "leave the turn out")
        if await run_in_threadpool(store.session, conversation_id) is None:
            raise Problem(404, "the store keeps no such session", "see /v1/sessions, or use `anchorwatch verdict`")
        verdict = Verdict(given.label, given.turn, given.note)
        at = await run_in_threadpool(acting.write, "verdict", conversation_id, verdict, key.name)
        return json_response(_view(verdict, key.name, at))

    @app.delete(
        PATH,
        status_code=204,
        summary="Take a verdict back",
        response_class=Response,
        responses=nothing("There is none now.") | problems_of(404, 503),
    )
    def take_back(_: Annotated[Key, Depends(needs("act"))], conversation_id: str) -> Response:
        """Take back what anybody found it to be."""
        if acting.known("verdict", conversation_id) is None:
            raise Problem(404, "nobody has judged this conversation", "nothing to do")
        acting.take_back("verdict", conversation_id)
        return Response(status_code=204)


def verdict_of(acting: Acting, conversation_id: str) -> VerdictView | None:
    """The verdict that holds. Raises as the store."""
    found = acting.known("verdict", conversation_id)
    if found is None or not isinstance(found.body, Verdict):
        return None
    return _view(found.body, found.action.by, found.action.time)


def _view(verdict: Verdict, by: str, time: str) -> VerdictView:
    return VerdictView(label=verdict.label, turn=verdict.turn, note=verdict.note, by=by, time=time)
