"""`GET /v1/findings/stream`: findings as they come, as server-sent events (WHATWG HTML, §9.2).

It knows the store, which is looked at twice a second while anybody listens, whatever their number. The last thousand
events are kept for all, and each listener only has its place among them: what it holds in memory does not grow with
listeners, nor with how slow they are. One that falls off the end is cut off: it comes again with the id of the last
event that it has seen, and is told where something is missing. A finding may come twice, in a different order; its id
says so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Protocol

import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from monitor.api.access import needs
from monitor.api.auth import Key, Keys
from monitor.api.documents import Answers
from monitor.api.documents import problems as problems_of
from monitor.api.problems import Problem
from monitor.errors import AnchorwatchError
from monitor.events import Finding, encode

__all__ = ["Hub", "mount_stream"]

KEPT = 1_000
LOOK_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
HEARTBEAT_SECONDS = 15.0
NEWEST = 200  # findings looked at each time; more while all of these are new
MOST = 5_000
LISTENERS = 500

GAP = b'event: gap\ndata: {"cure":"some findings may be missing here: see GET /v1/findings"}\n\n'

_log = structlog.get_logger("anchorwatch.api")


class Findings(Protocol):
    """What is read of a store."""

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        """See `monitor.store.store.Reader.findings`."""


class Hub:
    """Looks for new findings, and keeps the newest for whoever listens. For one event loop.

    Args:
        store: looked at in a thread.
        kept: events that are kept.
        look_seconds: how often the store is looked at.

    Attributes:
        closing: whether everybody is sent away.
    """

    def __init__(self, store: Findings, *, kept: int = KEPT, look_seconds: float = LOOK_SECONDS) -> None:
        self.closing = False
        self.listeners = 0
        self._store = store
        self._kept = kept
        self._look_seconds = look_seconds
        self._events: OrderedDict[int, tuple[str, bytes]] = OrderedDict()  # number → id, event
        self._numbers: dict[str, int] = {}
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._next = 0
        self._looked = False
        self._came: asyncio.Event = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()

    async def begin(self, last_id: str | None) -> tuple[int, bool]:
        """Where a listener begins, and whether something may be missing before that.

        Raises:
            StoreUnavailable, StoreError: as the store.
        """
        async with self._beginning:
            if self._looking is None or self._looking.done():  # what came while nobody listened is the past
                await self._look()
                self._looking = asyncio.create_task(self._run())
        if last_id is None:
            return self._next, False
        if last_id in self._numbers:
            return self._numbers[last_id] + 1, False
        return min(self._events, default=self._next), True

    async def after(self, number: int, seconds: float) -> list[bytes] | None:
        """Events from this one on, at most 100; none where nothing came for so long; None where they are gone."""
        if number >= self._next and not self.closing:
            try:
                await asyncio.wait_for(self._came.wait(), seconds)
            except TimeoutError:
                return []
        oldest = min(self._events, default=self._next) if number < self._next else number
        if number < oldest:
            return None
        return [self._events[at][1] for at in range(number, min(self._next, number + 100))]

    def close(self) -> None:
        """Send everybody away, for good."""
        self.closing = True
        self._came.set()
        if self._looking is not None:
            self._looking.cancel()

    async def _run(self) -> None:
        """Look while somebody listens."""
        pause = self._look_seconds
        while self.listeners and not self.closing:
            await asyncio.sleep(pause)
            try:
                await self._look()
                pause = self._look_seconds
            except AnchorwatchError as error:
                _log.warning("no findings can be seen now", problem=error.problem)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _look(self) -> None:
        limit = NEWEST if self._looked else self._kept
        while True:
            found = await asyncio.to_thread(self._store.findings, limit)
            if len(found) < limit or found[-1].id in self._seen or limit >= MOST or not self._looked:
                break
            limit = min(5 * limit, MOST)
        for finding in found:
            if finding.id in self._seen:
                self._seen.move_to_end(finding.id)
        new = [finding for finding in reversed(found) if finding.id not in self._seen]
        if self._looked and len(found) >= MOST and found[-1].id not in self._seen:
            self._add("", GAP)
        for finding in new:
            self._add(finding.id, b"id: %s\nevent: finding\ndata: %s\n\n" % (finding.id.encode(), encode(finding)))
            self._seen[finding.id] = None
        while len(self._seen) > 2 * MOST:
            self._seen.popitem(last=False)
        self._looked = True
        if new:
            self._came.set()
            self._came = asyncio.Event()

    def _add(self, id: str, event: bytes) -> None:
        self._events[self._next] = id, event
        if id:
            self._numbers[id] = self._next
        self._next += 1
        while len(self._events) > self._kept:
            _, (old, _) = self._events.popitem(last=False)
            self._numbers.pop(old, None)


_SAYS: Answers = {
    200: {
        "description": "Events without end: `finding`, whose data is a finding, and `gap` where some may be missing.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def mount_stream(app: FastAPI, hub: Hub, heartbeat: float = HEARTBEAT_SECONDS) -> None:
    """Give the route to the application, whose state has `keys`."""

    @app.get(
        "/v1/findings/stream",
        summary="Findings as they come",
        response_class=Response,
        responses=_SAYS | problems_of(503),
        openapi_extra={
            "parameters": [
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "string", "maxLength": 256},
                    "description": "Go on behind this event. Browsers send it by themselves.",
                }
            ]
        },
    )
    async def stream(request: Request, key: Annotated[Key, Depends(needs("read"))]) -> Response:
        """Server-sent events: those committed from now on, or after the one in `Last-Event-ID`. A comment comes every
        15 s while nothing happens. It ends when the key is revoked, when the server goes down, and for a listener that
        is too slow: connect again. What a worker finds while it catches up on days past may be older than all that is
        looked at here: `GET /v1/findings` has it."""
        keys: Keys = request.app.state.keys
        if hub.listeners >= LISTENERS or hub.closing:
            raise Problem(503, f"{hub.listeners} listen already", "listen with fewer", retry_after=30)
        hub.listeners += 1
        try:
            place, missing = await hub.begin(request.headers.get("last-event-id"))
        except BaseException:
            hub.listeners -= 1
            raise

        async def events() -> AsyncIterator[bytes]:
            nonlocal place
            yield b"retry: 2000\n\n" + (GAP if missing else b"")
            while not hub.closing:
                came = await hub.after(place, heartbeat)
                if came is None or not keys.known(key.id):
                    return
                place += len(came)
                yield b"".join(came) or b": still here\n\n"

        return _Stream(events(), lambda: _left(hub))


def _left(hub: Hub) -> None:
    hub.listeners -= 1


class _Stream(StreamingResponse):
    """Events, and what is done when the listener is gone, however it went."""

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._gone = gone

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        try:
            await super().__call__(scope, receive, send)  # type: ignore[arg-type]
        finally:
            self._gone()
