"""The HTTP interface: `POST /v1/projections` for collectors that speak no Kafka, and what an operator's tools ask for.

It knows keys, limits and a log, but no settings and no server. A response of 202 says that the log has acknowledged
what is accepted. Bodies and keys are never logged, and no answer quotes what it was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from msgspec import Struct
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from monitor import telemetry
from monitor.api.auth import Key, Keys, Scope
from monitor.api.documents import INGEST_BODY, ingest_answers, schemas
from monitor.api.intake import Intake
from monitor.api.limits import Allowance, Buckets, no_room, read_body, too_fast
from monitor.api.problems import Problem, problem_response
from monitor.envelope import message_of
from monitor.errors import EventError, LogError, LogUnavailable
from monitor.events import decode_projection
from monitor.stream.log import PROJECTIONS, Log, Message

__all__ = ["Options", "create_app", "needs"]

# Of one projection: a Kafka broker takes 1 MiB by default, and a projection with all its numbers has 5 KiB.
ITEM_BYTES = 65_536
# What a request costs beside its body, taken before any of it is read.
REQUEST_BYTES = 1_024
PROBE_SECONDS = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")

JSON, NDJSON = "application/json", "application/x-ndjson"

_log = structlog.get_logger("anchorwatch.api")
_array = msgspec.json.Decoder(list[msgspec.Raw])
_bearer = HTTPBearer(auto_error=False, description="A key as `anchorwatch keys create` prints it: `id.secret`.")


class Options(Struct, frozen=True, kw_only=True):
    """The limits of the interface.

    Attributes:
        items: projections in one request, at most.
        body_bytes: bytes of one request's body, at most.
        body_seconds: within which a body must be here.
        queue_bytes: bytes of all requests under way, at most.
        rate: projections a second that one key may send, over time; `items`, or one second's worth, at once.
        patience_seconds: how long a request waits for the log, at most.
    """

    items: int = 1_000
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    queue_bytes: int = 64 * 2**20
    rate: float = 5_000.0
    patience_seconds: float = 10.0


def needs(scope: Scope) -> Callable[..., Awaitable[Key]]:
    """What a route depends on to be for keys with this scope only; gives the key."""

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Key:
        keys: Keys = request.app.state.keys
        key = keys.find(given.credentials if given else None)
        if key is None:
            raise Problem(
                401,
                "this needs a key" if given is None else "the key opens nothing",
                "send Authorization: Bearer id.secret, with a key of `anchorwatch keys create`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not key.may(scope):
            raise Problem(
                403,
                f"the key lacks the scope {scope}",
                f"anchorwatch keys create --scope {scope}",
                headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
            )
        return key

    check.scope = scope  # type: ignore[attr-defined]  # for whoever walks the routes
    return check


def create_app(log: Log, keys: Keys, options: Options = Options()) -> FastAPI:  # noqa: B008  # frozen
    """The application. It writes to `log` from a thread of its own and leaves it open.

    An open `keys` lets everybody in who names this machine by a loopback name: for loopback only.
    """
    allowance = Allowance(options.queue_bytes, telemetry.HTTP_QUEUE_BYTES.set)
    buckets = Buckets(options.rate, max(options.rate, float(options.items)))

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        app.state.intake = intake = Intake(log, patience=options.patience_seconds)
        try:
            yield
        finally:
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
    app.add_exception_handler(Problem, _answer)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_allowed)
    app.add_middleware(_Rim, keys=keys)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]

    @app.post(
        "/v1/projections",
        status_code=202,
        summary="Hand in projections",
        response_class=Response,
        openapi_extra={"requestBody": INGEST_BODY},
        responses=ingest_answers(),
    )
    async def ingest(request: Request, key: Annotated[Key, Depends(needs("ingest"))]) -> Response:
        """Hand in a batch: a JSON array of projections, or one a line (NDJSON).

        202 says that the log has acknowledged every projection whose result is `accepted`, in the order given. What is
        `rejected` says why, and is not written; the others are. Any other status says that nothing of the request has
        been acknowledged: send all of it again. A projection's `id` makes that safe: one that comes twice is counted
        once.
        """
        if wait := buckets.take(key.id, 1):
            raise too_fast(wait)
        split = _splitter(request)
        with allowance.share() as share:
            if not share.grow(REQUEST_BYTES):
                raise no_room()
            body = await read_body(
                request.stream(),
                request.headers.get("content-length"),
                most=options.body_bytes,
                seconds=options.body_seconds,
                share=share,
            )
            items = split(body)
            if len(items) > options.items:
                raise Problem(413, f"the batch has more than {options.items} projections", "send fewer in one request")
            if wait := buckets.take(key.id, len(items) - 1):
                raise too_fast(wait)
            read = [_read(item) for item in items]
            messages = [message for message in read if isinstance(message, Message)]
            await _write(request.app.state.intake, messages)
        telemetry.HTTP_PROJECTIONS.labels("accepted").inc(len(messages))
        telemetry.HTTP_PROJECTIONS.labels("rejected").inc(len(read) - len(messages))
        return _told(read, len(messages))

    @app.get(
        "/healthz", summary="Is the process alive?", response_class=Response, responses={200: {"description": "It is."}}
    )
    async def healthz() -> Response:
        """Whether this process answers; says nothing of the log."""
        return _json({"status": "ok"})

    probe = _Probe(log)

    @app.get(
        "/readyz",
        summary="Can it take projections now?",
        response_class=Response,
        responses={200: {"description": "It can."}, 503: {"description": "The log is away."}},
    )
    async def readyz() -> Response:
        """Whether the log answers, and nobody waits for it to take projections."""
        if await probe.answers() and not app.state.intake.stuck:
            return _json({"status": "ok"})
        raise Problem(503, "the log does not answer", "see the server's log lines", retry_after=1)

    @app.get(
        "/metrics", summary="Prometheus metrics", response_class=Response, responses={200: {"description": "Text."}}
    )
    async def metrics(_: Annotated[Key, Depends(needs("read"))]) -> Response:
        """Every instrument of this process, as Prometheus reads them."""
        return Response(generate_latest(telemetry.REGISTRY), media_type=CONTENT_TYPE_LATEST)

    return app


# One batch


def _splitter(request: Request) -> Callable[[bytes], list[msgspec.Raw | bytes]]:
    """How the body falls into items, by its media type."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "the body is compressed", "send it plain")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    match kind:
        case "application/json":
            return _items_of_array
        case "application/x-ndjson":
            return lambda body: [line for line in body.split(b"\n") if line.strip()]
        case _:
            raise Problem(415, "the media type is none of those that are read here", f"send {JSON} or {NDJSON}")


def _items_of_array(body: bytes) -> list[msgspec.Raw | bytes]:
    try:
        return [*_array.decode(body)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Problem(
            400, "the body is no JSON array", f"send [{{…}}, …], or {NDJSON}: one projection a line"
        ) from None


def _read(item: msgspec.Raw | bytes) -> Message | str:
    """One item as the log will have it, or why it is none. What the contract does not know goes no further."""
    data = bytes(item)
    if len(data) > ITEM_BYTES:
        return f"it has more than {ITEM_BYTES} bytes"
    try:
        return message_of(decode_projection(data))
    except EventError as error:
        return error.problem
    except (ValueError, RecursionError):
        return "it holds text that is no Unicode, or is nested too deeply"


async def _write(intake: Intake, messages: list[Message]) -> None:
    if not messages:
        return
    again = "send all of it again: an id that comes twice is counted once"
    try:
        await intake.write(messages)
    except LogUnavailable as error:
        raise Problem(503, error.problem, again, retry_after=5) from None
    except LogError:
        raise Problem(
            503, "the log does not take them", f"see the server's log lines; then {again}", retry_after=30
        ) from None


def _told(read: list[Message | str], accepted: int) -> Response:
    results = [
        {"index": index, "status": "accepted"}
        if isinstance(item, Message)
        else {"index": index, "status": "rejected", "reason": item}
        for index, item in enumerate(read)
    ]
    if read and not accepted:
        raise Problem(422, "none of the projections can be read", "see the reasons, and the contract", results=results)
    return _json({"accepted": accepted, "rejected": len(read) - accepted, "results": results}, 202)


# The rim


class _Probe:
    """Whether the log answers: asked at most once a second, however many ask."""

    def __init__(self, log: Log) -> None:
        self._log = log
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
            await asyncio.to_thread(self._log.span, PROJECTIONS, 0)
        except Exception as error:
            _log.warning("the log does not answer", problem=getattr(error, "problem", type(error).__name__))
            return False
        return True


class _Rim:
    """Around everything: counts answers, and keeps a fault's traceback, which may hold content, out of the log lines.

    Without keys a web page that somebody on this machine looks at could post here, under a name that leads to loopback:
    then only a loopback name will do.
    """

    def __init__(self, app: Any, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def counted(event: Any) -> None:
            nonlocal started
            if event["type"] == "http.response.start":
                started = True
                telemetry.HTTP_REQUESTS.labels(str(event["status"])).inc()
            await send(event)

        if self._keys.open and Request(scope).url.hostname not in LOOPBACK:
            problem = Problem(403, "without keys, only loopback names are served", "anchorwatch keys create")
            await problem_response(problem)(scope, receive, counted)
            return
        try:
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            pass  # there is nobody left to tell
        except asyncio.CancelledError:  # the server's grace is over; this ends the task all the same
            if not started:
                again = "send all of it again: nothing of it has been acknowledged"
                problem = Problem(503, "the server is going down", again, retry_after=5)
                await problem_response(problem)(scope, receive, counted)
        except Exception as error:
            _log.error("a request failed", error=type(error).__name__)
            if not started:
                problem = Problem(500, "a fault of this server", "see its log lines, and report it")
                await problem_response(problem)(scope, receive, counted)


async def _answer(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem_response(problem)


async def _not_found(_: Request, __: Exception) -> Response:
    return problem_response(Problem(404, "there is nothing here", "see /openapi.json"))


async def _not_allowed(_: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None)
    return problem_response(Problem(405, "that can't be done here", "see /openapi.json", headers=headers))


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the contract's own schema in it."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        made.setdefault("components", {}).setdefault("schemas", {}).update(schemas())
        app.openapi_schema = made
    return app.openapi_schema
