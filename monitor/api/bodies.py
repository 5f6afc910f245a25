"""Small JSON, in and out: what operators' tools send, read into a struct, and answers. It knows no route."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from msgspec import Struct

from monitor.api.limits import Allowance, no_room, read_body
from monitor.api.problems import Problem

__all__ = ["JSON", "BodyLimits", "json_response", "read_json"]

JSON = "application/json"
BODY_BYTES = 16_384
# What a request costs beside its body, taken before any of it is read.
REQUEST_BYTES = 1_024

T = TypeVar("T", bound=Struct)
_place = re.compile(r" - at `(\$[\w.\[\]]*)`$")


class BodyLimits(Struct, frozen=True):
    """What all bodies are taken from, and how long one may take."""

    allowance: Allowance
    seconds: float


async def read_json(request: Request, type: type[T]) -> T:
    """The request's body as a struct; an empty body is an empty object.

    Raises:
        Problem: it is no JSON (400), too slow (408), too long (413), of another media type (415), not as the struct
            has it (422), or there is no room for it now (429).
    """
    limits: BodyLimits = request.app.state.bodies
    with limits.allowance.share() as share:
        if not share.grow(REQUEST_BYTES):
            raise no_room()
        declared = request.headers.get("content-length")
        body = await read_body(request.stream(), declared, most=BODY_BYTES, seconds=limits.seconds, share=share)
    if not body:
        body = b"{}"
    elif request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise Problem(415, "the media type is none of those that are read here", f"send {JSON}")
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        # What else the message says may quote what was sent.
        place = _place.search(str(error))
        where = f" at {place[1]}" if place else ""
        raise Problem(
            422, f"the body is not what is read here{where}", "see the schema in /openapi.json: names, types and limits"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Problem(400, "the body is no JSON", "send one JSON object") from None


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer, which nobody on the way may keep."""
    kept = {"Cache-Control": "no-store", **(headers or {})}
    return Response(msgspec.json.encode(body), status, media_type=JSON, headers=kept)
