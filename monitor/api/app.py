"""The HTTP interface: `POST /v1/projections` for collectors that speak no Kafka, and what operators' tools ask for.

It joins the routes, and knows keys, limits, a log and a store, but no settings and no server. Every route needs a key
of one scope, those in `PUBLIC` aside. Bodies and keys are never logged, and no answer quotes what it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from msgspec import Struct

from monitor import telemetry
from monitor.api.acting import Acting
from monitor.api.alert_table import AlertTable
from monitor.api.alerts import AlertPage, Answered, Remark, mount_alerts
from monitor.api.auth import Keys
from monitor.api.bodies import BodyLimits
from monitor.api.deployments import DeploymentList, mount_deployments
from monitor.api.documents import problems, schemas
from monitor.api.findings import FindingPage, mount_findings
from monitor.api.health import Health, Readiness, mount_health
from monitor.api.ingest import BatchLimits, mount_ingest
from monitor.api.intake import Intake
from monitor.api.limits import Allowance, Buckets
from monitor.api.problems import Problem, problem_response
from monitor.api.rim import Rim
from monitor.api.sessions import SessionPage, SessionWhole, mount_sessions
from monitor.api.silences import SilenceAsked, SilenceList, SilenceView, mount_silences
from monitor.api.stream import HEARTBEAT_SECONDS, Hub, mount_stream
from monitor.api.verdicts import Judgement, mount_verdicts
from monitor.errors import AnchorwatchError, ConfigurationError
from monitor.store import Backend
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["PUBLIC", "Options", "create_app"]

PUBLIC = ("/healthz", "/readyz", "/openapi.json")
_STRUCTS = (
    AlertPage,
    Answered,
    DeploymentList,
    FindingPage,
    Health,
    Judgement,
    Readiness,
    Remark,
    SessionPage,
    SessionWhole,
    SilenceAsked,
    SilenceList,
    SilenceView,
)

_log = structlog.get_logger("anchorwatch.api")


class Options(Struct, frozen=True, kw_only=True):
    """The limits of the interface.

    Attributes:
        items: projections in one request, at most.
        body_bytes: bytes of one request's body, at most.
        body_seconds: within which a body must be here.
        queue_bytes: bytes of all requests under way, at most.
        rate: requests and projections a second that one key may send, over time; `items`, or one second's worth, at
            once.
        patience_seconds: how long a request waits for the log, at most.
        heartbeat_seconds: how often a stream of findings says that it is still there.
    """

    items: int = 1_000
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    queue_bytes: int = 64 * 2**20
    rate: float = 5_000.0
    patience_seconds: float = 10.0
    heartbeat_seconds: float = HEARTBEAT_SECONDS


def create_app(log: Log, store: Backend, keys: Keys, options: Options = Options()) -> FastAPI:  # noqa: B008  # frozen
    """The application. It writes to `log` from threads of its own, and leaves log and store open.

    An open `keys` lets everybody in who names this machine by a loopback name: for loopback only. `app.state.ending`
    sends those away who listen for findings: call it when the server is about to go down, or they hold it up.
    """
    hub = Hub(store)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        app.state.intake = intake = Intake(log, patience=options.patience_seconds)
        try:
            yield
        finally:
            hub.close()
            await asyncio.to_thread(intake.close)

    # The documentation pages would load scripts from elsewhere; /openapi.json serves any viewer.
    app = FastAPI(
        title="Anchorwatch",
        version=version("anchorwatch"),
        summary="Real-time persona-drift monitoring for language models.",
        docs_url=None,
        redoc_url=None,
        lifespan=running,
        redirect_slashes=False,
    )
    app.state.keys = keys
    app.state.ending = hub.close
    app.state.buckets = Buckets(options.rate, max(options.rate, float(options.items)))
    allowance = Allowance(options.queue_bytes, telemetry.HTTP_QUEUE_BYTES.set)
    app.state.bodies = BodyLimits(allowance, options.body_seconds)
    app.add_exception_handler(Problem, _answer)
    app.add_exception_handler(AnchorwatchError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_allowed)
    app.add_middleware(Rim, keys=keys)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]

    acting, alerts = Acting(log, store), AlertTable(store)
    mount_ingest(app, BatchLimits(items=options.items, body_bytes=options.body_bytes))
    mount_sessions(app, store, acting, alerts)
    mount_verdicts(app, store, acting)
    mount_stream(app, hub, options.heartbeat_seconds)
    mount_findings(app, store)
    mount_alerts(app, acting, alerts)
    mount_silences(app, acting, alerts)
    mount_deployments(app, store)
    mount_health(app, lambda: log.span(PROJECTIONS, 0), store.counts)
    return app


# What goes wrong


async def _answer(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(problem)


async def _failed(_: Request, error: Exception) -> Response:
    """Log or store have failed, or a text in what was asked for won't do."""
    assert isinstance(error, AnchorwatchError)
    if isinstance(error, ConfigurationError):
        return problem_response(Problem(422, error.problem, error.cure))
    if error.retry:
        return problem_response(Problem(503, error.problem, "ask again after a while", retry_after=5))
    _log.error("a request failed", problem=error.problem, cure=error.cure)
    return problem_response(Problem(503, "log or store can't be used", "see the server's log lines", retry_after=30))


async def _invalid(_: Request, error: Exception) -> Response:
    """Which parameters won't do, and why, but not what they were."""
    assert isinstance(error, RequestValidationError)
    wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:10]]
    return problem_response(Problem(422, "; ".join(wrong), "see /openapi.json"))


async def _not_found(_: Request, __: Exception) -> Response:
    return problem_response(Problem(404, "there is nothing here", "see /openapi.json"))


async def _not_allowed(_: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None)
    return problem_response(Problem(405, "that can't be done here", "see /openapi.json", headers=headers))


# What is written about it


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the structs' own schemas in it, and the scope that each route needs."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        made.setdefault("components", {})["schemas"] = schemas(*_STRUCTS)
        for route in app.routes:
            if not isinstance(route, APIRoute) or not route.include_in_schema:
                continue
            scopes = [scope for part in route.dependant.dependencies if (scope := getattr(part.call, "scope", None))]
            for method in route.methods or ():
                operation = made["paths"][route.path_format][method.lower()]
                if "application/json" in operation["responses"].get("422", {}).get("content", ()):
                    del operation["responses"]["422"]  # FastAPI's own guess: a segment of a path is always a text
                # FastAPI leaves out what is null, also in examples, where it is a value like any other.
                for status, response in route.responses.items():
                    operation["responses"][str(status)] |= response
                operation |= {name: one for name, one in (route.openapi_extra or {}).items() if name == "requestBody"}
                for scope in scopes:
                    operation["description"] += f"\n\nNeeds a key with the scope `{scope}`."
                    operation["x-scope"] = scope
                if scopes:
                    refused = {str(status): one for status, one in problems(401, 403, 429).items()}
                    operation["responses"] = dict(sorted((operation["responses"] | refused).items()))
        app.openapi_schema = made
    return app.openapi_schema
