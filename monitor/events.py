"""THE contract: what collectors send (`Projection`) and what the detector says (`Finding`), with their wire format.

It knows nothing of models, logs or stores. The wire format is one JSON object a record; unknown fields are ignored on
read, so a newer collector may talk to an older worker; another major `version` is refused. Numbers must be finite.
On Kafka a projection is a CloudEvent too: `headers` says which.

Sign convention: the Assistant Axis points *towards* the Assistant, so a *low* projection is drift.
"""

from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from monitor.errors import EventError

__all__ = [
    "SCHEMA_VERSION",
    "Certification",
    "Finding",
    "Kind",
    "Outcome",
    "Projection",
    "Severity",
    "Windows",
    "decode_finding",
    "decode_projection",
    "encode",
    "episode_id",
    "headers",
    "now_utc",
]

SCHEMA_VERSION = "1.0"
CLOUDEVENTS_TYPE = "anchorwatch.projection.v1"
MAX_COORDINATES = 32
MAX_ATTRIBUTES = 16
_RFC3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")

Kind = Literal["low_start", "sudden_drop", "sustained_drop", "dip", "recovered", "fleet_shift"]
Outcome = Literal["folded", "duplicate", "branch", "late", "unjudged", "learning"]
Severity = Literal["warning", "critical", "info"]
Certification = Literal["certified", "uncertified"]

Identifier = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
AttributeKey = Annotated[str, Meta(min_length=1, max_length=64)]
AttributeValue = Annotated[str, Meta(max_length=256)]
Index = Annotated[int, Meta(ge=0)]
Coordinates = dict[str, float]


class Windows(Struct, frozen=True, gc=False):
    """Coordinates of two 16-token windows of a response; of the whole response when it is shorter than that.

    `lowest` is the window where the bundle's readout is least, `last` the last one.
    """

    lowest: Coordinates
    last: Coordinates


class Projection(Struct, frozen=True, kw_only=True, gc=False):
    """One response, measured. The log's key is `conversation_id`.

    Attributes:
        id: idempotency key, the same on every re-send.
        time: event time, RFC 3339 in UTC with a `Z`; the only clock that the detector sees.
        source: URI reference of the collector.
        conversation_id: from the caller, or derived.
        turn: index of the assistant turn, from 0.
        model: model name, as the collector knows it.
        axis_id: sha256 id of the axis bundle.
        layer: index of the tapped decoder layer, from 0.
        deployment: the population it is judged against.
        projection: mean over response tokens of <h, u>, u the unit Assistant Axis; raw residual units.
        coordinates: the response's mean on every measured direction.
        prompt: the same directions at the last prompt token.
        windows: coordinates of the lowest and the last 16-token window.
        tokens: number of response tokens averaged.
        held: share of those tokens that capping moved; coordinates are taken before the cap.
        attributes: a few short strings.
        version: schema version, `major.minor`.
    """

    id: Identifier
    time: str
    source: Name
    conversation_id: Identifier
    turn: Index
    model: Name
    axis_id: Name
    layer: Index
    deployment: Name
    projection: float
    coordinates: Annotated[Coordinates, Meta(max_length=MAX_COORDINATES)]
    prompt: Annotated[Coordinates, Meta(max_length=MAX_COORDINATES)]
    windows: Windows
    tokens: Annotated[int, Meta(ge=1)]
    held: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    attributes: Annotated[dict[AttributeKey, AttributeValue], Meta(max_length=MAX_ATTRIBUTES)] = {}
    version: str = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.version.split(".", 1)[0] != SCHEMA_VERSION.split(".", 1)[0]:
            # A reason is logged and sent back to whoever posted the event, so it quotes nothing of it.
            raise ValueError(f"the schema version is not {SCHEMA_VERSION.split('.', 1)[0]}.x")
        if not _RFC3339_UTC.fullmatch(self.time):
            raise ValueError("the time is not RFC 3339 in UTC with a Z")
        if not _finite(self.projection, self.coordinates, self.prompt, self.windows.lowest, self.windows.last):
            raise ValueError("a projection or coordinate is not finite")

    @property
    def event_time(self) -> datetime:
        """`time` as an aware datetime."""
        return datetime.fromisoformat(self.time)


class Finding(Struct, frozen=True, kw_only=True, gc=False):
    """What the detector says about one conversation at one turn.

    Attributes:
        id: the same on every replay: hash of episode, kind and turn.
        time: event time of the response that made it.
        conversation_id, turn, deployment, axis_id: of that response. What concerns a whole deployment (`fleet_shift`)
            has an empty conversation_id.
        kind: what happened; `recovered` ends an episode.
        severity: `warning`, `critical`, or `info` for `recovered`.
        statistic: name of the statistic that crossed its boundary, or came back inside.
        value: that statistic, in units of the baseline's standard deviation.
        boundary: the boundary it is compared with, same unit.
        risk: largest statistic over its warning boundary.
        budget: share of healthy conversations that may warn, where the boundary has one.
        certification: whether that budget is certified.
        config_id: id of the frozen baseline and detector settings that judged.
        episode_id: hash of conversation and the response that opened the episode.
        nearest_roles: roles nearest to the response in persona space, nearest first.
        identity: how sure the collector was whose conversation it is: `given`, `derived`, `weak`, `unlinked`; empty
            where it did not say. A weak one may be two users' in one: it is shown, and pages nobody.
    """

    id: Identifier
    time: str
    conversation_id: Annotated[str, Meta(max_length=256)]
    turn: Index
    deployment: Name
    axis_id: Name
    kind: Kind
    severity: Severity
    statistic: str
    value: float
    boundary: float
    risk: float
    budget: float | None
    certification: Certification
    config_id: str
    episode_id: str
    nearest_roles: list[str] = []
    identity: AttributeValue = ""
    version: str = SCHEMA_VERSION


def _finite(value: float, a: Coordinates, b: Coordinates, c: Coordinates, d: Coordinates) -> bool:
    # A sum is finite only if its terms are, and is had in a tenth of the time. It may overflow: then look twice.
    if math.isfinite(value + sum(a.values()) + sum(b.values()) + sum(c.values()) + sum(d.values())):
        return True
    return math.isfinite(value) and all(math.isfinite(v) for m in (a, b, c, d) for v in m.values())


_projection_decoder = msgspec.json.Decoder(Projection)
_finding_decoder = msgspec.json.Decoder(Finding)
_encoder = msgspec.json.Encoder(order="sorted")


def encode(event: Projection | Finding) -> bytes:
    """The event as canonical JSON: sorted keys, so that equal events are equal bytes."""
    return _encoder.encode(event)


def headers(projection: Projection) -> tuple[tuple[str, bytes], ...]:
    """What makes the encoded projection a CloudEvent 1.0 on Kafka, in binary mode: the value stays as it is.

    The attributes are those of the CloudEvents specification, 1.0.2, named and encoded as its Kafka protocol binding,
    §3.2, has it: `ce_` before each name, values in UTF-8, the media type of the value as `content-type`.
    """
    return (
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_type", CLOUDEVENTS_TYPE.encode()),
        ("ce_source", projection.source.encode()),
        ("ce_id", projection.id.encode()),
        ("ce_time", projection.time.encode()),
    )


def decode_projection(data: bytes) -> Projection:
    """Read one projection.

    Raises:
        EventError: not JSON, a missing or ill-typed field, another major version, or a number that is not finite.
    """
    try:
        return _projection_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EventError(f"not a projection: {error}", cure="see the contract in docs/design.md") from error


def decode_finding(data: bytes) -> Finding:
    """Read one finding.

    Raises:
        EventError: as `decode_projection`.
    """
    try:
        return _finding_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EventError(f"not a finding: {error}", cure="see the contract in docs/design.md") from error


def episode_id(conversation_id: str, opened_by: str) -> str:
    """Hash of the conversation and of the id of the response that opened the episode: the same on every replay, and no
    other episode's, also when a store has aged out all that came before. 32 hex digits."""
    return hashlib.sha256(f"{conversation_id}\x1f{opened_by}".encode()).hexdigest()[:32]


def now_utc() -> str:
    """The wall clock in the wire format. For collectors only: the detector reads no clock."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
