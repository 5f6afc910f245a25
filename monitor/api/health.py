"""Whether the process lives, whether it can work, and its metrics: what a supervisor and Prometheus ask.

It knows a log and a store only as things that answer or do not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Literal

import structlog
from fastapi import Depends, FastAPI, Response
from msgspec import Struct
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from monitor import telemetry
from monitor.api.access import needs
from monitor.api.auth import Key
from monitor.api.bodies import json_response
from monitor.api.documents import answer, problems
from monitor.api.problems import Problem

__all__ = ["Health", "Readiness", "mount_health"]

PROBE_SECONDS = 1.0

_log = structlog.get_logger("anchorwatch.api")


class Health(Struct, frozen=True):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(Struct, frozen=True):
    """The log takes projections. Where the store is away, they are taken all the same, and nothing can be read."""

    status: Literal["ok"] = "ok"
    store: Literal["ok", "away"] = "ok"


def mount_health(app: FastAPI, log: Callable[[], object], store: Callable[[], object]) -> None:
    """Give the routes to the application, whose state has `intake`. Log and store are asked by what is given, in a
    thread; they raise where they do not answer."""

    asked_log, asked_store = _Probe("log", log), _Probe("store", store)

    @app.get("/healthz", summary="Is the process alive?", response_class=Response, responses=answer("It is.", Health()))
    async def healthz() -> Response:
        """Whether this process answers; says nothing of log and store."""
        return json_response(Health())

    @app.get(
        "/readyz",
        summary="Can it take projections now?",
        response_class=Response,
        responses=answer("It can.", Readiness()) | problems(503),
    )
    async def readyz() -> Response:
        """Whether the log answers, and nobody waits for it to take projections. A store that is away is told, and is
        no reason to send collectors elsewhere."""
        log_there, store_there = await asyncio.gather(asked_log.answers(), asked_store.answers())
        if log_there and not app.state.intake.stuck:
            return json_response(Readiness(store="ok" if store_there else "away"))
        raise Problem(503, "the log does not answer", "see the server's log lines", retry_after=1)

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
    )
    async def metrics(_: Annotated[Key, Depends(needs("read"))]) -> Response:
        """Every instrument of this process, as Prometheus reads them."""
        return Response(generate_latest(telemetry.REGISTRY), media_type=CONTENT_TYPE_LATEST)


class _Probe:
    """Whether something answers: asked at most once a second, however many ask."""

    def __init__(self, name: str, ask: Callable[[], object]) -> None:
        self._name = name
        self._question = ask
        self._asking: asyncio.Task[bool] | None = None
        self._asked = float("-inf")

    async def answers(self) -> bool:
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked > PROBE_SECONDS):
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        try:
            return await asyncio.wait_for(asyncio.shield(self._asking), PROBE_SECONDS)
        except TimeoutError:
            return False

    async def _ask(self) -> bool:
        try:
            await asyncio.to_thread(self._question)
        except Exception as error:
            _log.warning(f"the {self._name} does not answer", problem=getattr(error, "problem", type(error).__name__))
            return False
        return True
