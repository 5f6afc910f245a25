"""`POST /v1/projections`: what collectors send goes into the log, and is acknowledged when the log has it.

It knows limits and an intake, and nothing of what becomes of a projection. Bodies are never logged, and no answer
quotes what it was sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from msgspec import Struct

from monitor import telemetry
from monitor.api.access import needs
from monitor.api.auth import Key
from monitor.api.bodies import JSON, REQUEST_BYTES, BodyLimits, json_response
from monitor.api.documents import INGEST_BODY, ingest_answers
from monitor.api.intake import Intake
from monitor.api.limits import Buckets, no_room, read_body, too_fast
from monitor.api.problems import Problem
from monitor.envelope import message_of
from monitor.errors import EventError, LogError, LogUnavailable
from monitor.events import decode_projection
from monitor.stream.log import Message

__all__ = ["BatchLimits", "mount_ingest"]

# Of one projection: a Kafka broker takes 1 MiB by default, and a projection with all its numbers has 5 KiB.
ITEM_BYTES = 65_536
NDJSON = "application/x-ndjson"

_array = msgspec.json.Decoder(list[msgspec.Raw])


class BatchLimits(Struct, frozen=True, kw_only=True):
    """Of one request: how many projections, and how many bytes."""

    items: int
    body_bytes: int


def mount_ingest(app: FastAPI, limits: BatchLimits) -> None:
    """Give the route to the application, whose state has `intake`, `buckets` and `bodies`."""

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
        buckets: Buckets = request.app.state.buckets
        bodies: BodyLimits = request.app.state.bodies
        split = _splitter(request)
        with bodies.allowance.share() as share:
            if not share.grow(REQUEST_BYTES):
                raise no_room()
            body = await read_body(
                request.stream(),
                request.headers.get("content-length"),
                most=limits.body_bytes,
                seconds=bodies.seconds,
                share=share,
            )
            items = split(body)
            if len(items) > limits.items:
                raise Problem(413, f"the batch has more than {limits.items} projections", "send fewer in one request")
            if wait := buckets.take(key.id, len(items) - 1):
                raise too_fast(wait)
            read = [_read(item) for item in items]
            messages = [message for message in read if isinstance(message, Message)]
            await _write(request.app.state.intake, messages)
        telemetry.HTTP_PROJECTIONS.labels("accepted").inc(len(messages))
        telemetry.HTTP_PROJECTIONS.labels("rejected").inc(len(read) - len(messages))
        return _told(read, len(messages))


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
    return json_response({"accepted": accepted, "rejected": len(read) - accepted, "results": results}, 202)
