"""What the OpenAPI document says of bodies and answers, with an example that is a projection. Data, no behaviour."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from monitor.events import Projection, Windows

__all__ = [
    "EXAMPLE",
    "INGEST_BODY",
    "Answers",
    "answer",
    "body",
    "ingest_answers",
    "nothing",
    "plain",
    "problems",
    "schemas",
]

EXAMPLE = Projection(
    id="resp-7f3a-0",
    time="2026-01-02T03:04:05.678901Z",
    source="https://chat.example.com/replica-3",
    conversation_id="c-1842",
    turn=4,
    model="my-model",
    axis_id="0" * 64,
    layer=18,
    deployment="support-bot",
    projection=-1.25,
    coordinates={"persona_axis": -0.5, "creative": 2.0},
    prompt={"persona_axis": 0.25, "creative": 1.0},
    windows=Windows(
        lowest={"persona_axis": -2.0, "creative": 2.5},
        last={"persona_axis": -1.0, "creative": 1.5},
    ),
    tokens=118,
    attributes={"finish_reason": "stop"},
)

_ONE: dict[str, Any] = {"$ref": "#/components/schemas/Projection"}
INGEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"type": "array", "items": _ONE},
            "example": [msgspec.to_builtins(EXAMPLE)],
        },
        "application/x-ndjson": {
            "schema": {"type": "string", "description": "One projection a line."},
            "example": msgspec.json.encode(EXAMPLE).decode() + "\n",
        },
    },
}
_RESULTS: dict[str, Any] = {
    "type": "array",
    "description": "One for each projection, in the order given.",
    "items": {
        "type": "object",
        "required": ["index", "status"],
        "properties": {
            "index": {"type": "integer"},
            "status": {"enum": ["accepted", "rejected"]},
            "reason": {"type": "string", "description": "Why it is rejected; quotes nothing of it."},
        },
    },
}
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457.",
    "required": ["type", "title", "status", "detail", "cure"],
    "properties": {
        "type": {"const": "about:blank"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong."},
        "cure": {"type": "string", "description": "What to do about it."},
        "results": _RESULTS,
    },
}
_MEANINGS = {
    400: "The body is no JSON, or the cursor none of ours.",
    401: "No key, or one that opens nothing.",
    403: "The key lacks the scope.",
    404: "There is no such thing.",
    408: "The body came too slowly.",
    413: "Too many bytes or projections in one request.",
    415: "Another media type, or a compressed body.",
    422: "A value is not what is read here; `detail` says which.",
    429: "The key's rate, or the server's memory, is used up: come again after `Retry-After` seconds.",
    503: "Log or store is away: come again after `Retry-After` seconds.",
}
_INGEST_MEANINGS = {
    400: "The body is no JSON array.",
    422: "None of the projections can be read; `results` says why.",
    503: "The log is away: nothing is acknowledged. Send all of it again after `Retry-After` seconds.",
}
Answers = dict[int | str, dict[str, Any]]


def answer(description: str, example: Struct | list[Any], status: int = 200) -> Answers:
    """A JSON answer of the example's own type."""
    content = {"schema": {"$ref": f"#/components/schemas/{type(example).__name__}"}, "example": plain(example)}
    return {status: {"description": description, "content": {"application/json": content}}}


def body(example: Struct, *, required: bool) -> dict[str, Any]:
    """A request's JSON body of the example's own type, for `openapi_extra`."""
    content = {"schema": {"$ref": f"#/components/schemas/{type(example).__name__}"}, "example": plain(example)}
    return {"requestBody": {"required": required, "content": {"application/json": content}}}


def nothing(description: str) -> Answers:
    """A success that has no more to say."""
    return {204: {"description": description}}


def problems(*statuses: int) -> Answers:
    """Answers that are problems."""
    found: Answers = {}
    for status in statuses:
        found[status] = {
            "description": _MEANINGS[status],
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return found


def plain(example: Any) -> Any:
    """An example as JSON has it."""
    return msgspec.json.decode(msgspec.json.encode(example))


def ingest_answers() -> Answers:
    """Every answer to `POST /v1/projections`."""
    accepted = {
        "type": "object",
        "required": ["accepted", "rejected", "results"],
        "properties": {"accepted": {"type": "integer"}, "rejected": {"type": "integer"}, "results": _RESULTS},
    }
    example = {
        "accepted": 1,
        "rejected": 1,
        "results": [
            {"index": 0, "status": "accepted"},
            {"index": 1, "status": "rejected", "reason": "not a projection: Expected `int` >= 0 - at `$.turn`"},
        ],
    }
    answers: Answers = {
        202: {
            "description": "The log has acknowledged what is accepted.",
            "content": {"application/json": {"schema": accepted, "example": example}},
        }
    }
    answers |= problems(400, 401, 403, 408, 413, 415, 422, 429, 503)
    for status, meaning in _INGEST_MEANINGS.items():
        answers[status]["description"] = meaning
    return answers


def schemas(*types: type[Struct]) -> dict[str, Any]:
    """The schemas that bodies and answers refer to, made from the structs themselves."""
    _, components = msgspec.json.schema_components([Projection, *types], ref_template="#/components/schemas/{name}")
    return {**components, "Problem": _PROBLEM}
