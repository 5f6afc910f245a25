"""`GET /v1/findings`: what the detector has said, newest first. It knows the store, and nothing is changed here."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, NamedTuple

from fastapi import Depends, FastAPI, Query, Response
from msgspec import Struct

from monitor.api import answers
from monitor.api.access import needs
from monitor.api.auth import Key
from monitor.api.bodies import json_response
from monitor.api.cursors import read_cursor, write_cursor
from monitor.api.documents import answer
from monitor.api.documents import problems as problems_of
from monitor.events import Finding, Kind, Severity
from monitor.store.store import Reader

__all__ = ["FindingPage", "mount_findings"]

# A store may keep no more than a few thousand for those who ask for no conversation.
LOOKED_AT = 5_000


class FindingPage(Struct, frozen=True, kw_only=True):
    """Some findings, newest first. `next` goes into `cursor` for those before them; null at the end."""

    findings: list[Finding]
    next: str | None


class Place(NamedTuple):
    """Where a finding stands among others: newest first, among equals by id."""

    before: float
    id: str


EXAMPLE = FindingPage(findings=[answers.FINDING_EXAMPLE], next=None)


def mount_findings(app: FastAPI, store: Reader) -> None:
    """Give the route to the application."""

    @app.get(
        "/v1/findings",
        summary="Findings, newest first",
        response_class=Response,
        responses=answer("A page of them.", EXAMPLE) | problems_of(400, 422, 503),
    )
    def findings(
        _: Annotated[Key, Depends(needs("read"))],
        conversation_id: Annotated[
            str | None, Query(max_length=256, description="Of this conversation; empty for those of whole deployments.")
        ] = None,
        deployment: Annotated[str | None, Query(max_length=256, description="Of this deployment.")] = None,
        kind: Annotated[Kind | None, Query(description="Of this kind.")] = None,
        severity: Annotated[Severity | None, Query(description="Of this severity.")] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="How many, at most.")] = 50,
        cursor: Annotated[str | None, Query(max_length=2048, description="`next` of the page before.")] = None,
    ) -> Response:
        """By event time, newest first. Looks at the newest 5,000; on Redis, of the newest 2,000 of each partition. All
        of one conversation are had by `conversation_id`. For what comes from now on: `/v1/findings/stream`."""
        place = read_cursor(cursor, Place)
        everything = place is None and deployment is None and kind is None and severity is None
        looked_at = store.findings(limit + 1 if everything else LOOKED_AT, conversation_id=conversation_id)
        found = [
            finding
            for finding in looked_at
            if deployment in (None, finding.deployment)
            and kind in (None, finding.kind)
            and severity in (None, finding.severity)
            and (place is None or (-_seconds(finding), finding.id) > (-place.before, place.id))
        ]
        shown = found[:limit]
        more = Place(_seconds(shown[-1]), shown[-1].id) if len(found) > limit else None
        return json_response(FindingPage(findings=shown, next=None if more is None else write_cursor(more)))


def _seconds(finding: Finding) -> float:
    return datetime.fromisoformat(finding.time).timestamp()
