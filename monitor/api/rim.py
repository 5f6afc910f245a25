"""Around every route: counts answers, keeps a fault's traceback, which may hold content, out of the log lines, and
makes a path of any identifier. It knows no route.

Without keys a web page that somebody on this machine looks at could ask here, under a name that leads to loopback: then
only a loopback name will do, and nothing is changed for a page from elsewhere.

**Identifiers in paths.** A conversation's id may hold any character, slashes and percent signs too. Percent-encoded as
RFC 3986 has it (§2.1), it is one segment of a path, and `{conversation_id:id}` in a route is given it whole. What ASGI
calls the path is decoded already, and can't tell `a%2Fb` from `a/b`; so the path is made anew from what was sent.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import structlog
from fastapi import Request
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect

from monitor import telemetry
from monitor.api.auth import Keys
from monitor.api.problems import Problem, problem_response

__all__ = ["Rim", "path_of"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

_log = structlog.get_logger("anchorwatch.api")


class _Identifier(Convertor[str]):
    """One segment of a path, as `path_of` leaves it."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return value.replace("%", "%25").replace("/", "%2F")


register_url_convertor("id", _Identifier())


def path_of(raw: bytes) -> str:
    """A path as it was sent, decoded but for slashes and percent signs inside its segments: they stay `%2F`, `%25`."""
    segments = (unquote_to_bytes(segment).decode("utf-8", "replace") for segment in raw.split(b"/"))
    return "/".join(segment.replace("%", "%25").replace("/", "%2F") for segment in segments)


class Rim:
    """The outermost middleware."""

    def __init__(self, app: Any, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def counted(event: Any) -> None:
            nonlocal started
            if event["type"] == "http.response.start":
                started = True
                telemetry.HTTP_REQUESTS.labels(str(event["status"])).inc()
                event["headers"] = [*event["headers"], (b"x-content-type-options", b"nosniff")]
            await send(event)

        if self._keys.open and (problem := _foreign(Request(scope))):
            await problem_response(problem)(scope, receive, counted)
            return
        if raw := scope.get("raw_path"):
            scope["path"] = path_of(raw)
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


def _foreign(request: Request) -> Problem | None:
    """Why a request that nobody has to have a key for is none of this machine's own; None where it is."""
    if request.url.hostname not in LOOPBACK:
        return Problem(403, "without keys, only loopback names are served", "anchorwatch keys create")
    origin = request.headers.get("origin")
    if request.method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != request.url.netloc:
        return Problem(403, "without keys, nothing is changed for a web page from elsewhere", "anchorwatch keys create")
    return None
