"""What the answers hold: structs with a field for everything a reader sees, made from what store and log keep.

It knows no route. Times are RFC 3339 in UTC. Nothing is left out where it is empty, so that a reader need not guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from msgspec import Struct

from monitor.alert import Alert, Resolution, State
from monitor.events import Certification, Finding, Kind, Outcome, Severity
from monitor.store.store import Session, TrajectoryPoint

__all__ = ["AlertView", "PointView", "SessionView", "VerdictView", "alert_view", "moment", "point_view", "session_view"]


class SessionView(Struct, frozen=True, kw_only=True):
    """One conversation, as of its last response; see `monitor.store.store.Session`. `open` is the open episode's id."""

    conversation_id: str
    deployment: str
    model: str
    axis_id: str
    started: str
    time: str
    turn: int
    responses: int
    projection: float
    outcome: Outcome
    z: float | None
    risk: float | None
    lowest_z: float | None
    highest_risk: float | None
    truncated: bool
    episode_id: str | None
    kind: Kind | None
    severity: Severity | None


class PointView(Struct, frozen=True, kw_only=True):
    """One response of a trajectory; see `monitor.store.store.TrajectoryPoint`."""

    number: int
    time: str
    turn: int
    projection: float
    held: float
    outcome: Outcome
    z: float | None
    risk: float | None
    place: tuple[float, float] | None


class VerdictView(Struct, frozen=True, kw_only=True):
    """What a person found a conversation to be. drifting: the alarm was true; healthy: it was false."""

    label: Literal["drifting", "healthy", "unsure"]
    turn: int | None
    note: str
    by: str
    time: str


class AlertView(Struct, frozen=True, kw_only=True):
    """One alert; see `monitor.alert.Alert`. `silenced_by` names the silences in force that match it."""

    id: str
    status: Literal["firing", "resolved"]
    severity: Severity
    kind: Kind
    conversation_id: str
    deployment: str
    model: str
    persona: str
    starts_at: str
    ends_at: str | None
    resolution: Resolution | None
    acknowledged_by: str
    silenced_by: list[str]
    turn: int
    statistic: str
    value: float
    boundary: float
    risk: float
    budget: float | None
    certification: Certification
    nearest_roles: list[str]
    story: str
    sparkline: str
    axis_id: str
    config_id: str
    finding_ids: list[str]
    told: dict[str, State]


def session_view(session: Session) -> SessionView:
    """A session for its reader."""
    return SessionView(**_fields(session, time=moment(session.time), started=moment(session.started)))


def point_view(point: TrajectoryPoint) -> PointView:
    """A point for its reader."""
    return PointView(**_fields(point, time=moment(point.time)))


def alert_view(alert: Alert, silenced_by: Sequence[str] = ()) -> AlertView:
    """An alert for its reader."""
    found = _fields(
        alert,
        status="firing" if alert.firing else "resolved",
        silenced_by=list(silenced_by),
        nearest_roles=list(alert.nearest_roles),
        finding_ids=list(alert.finding_ids),
    )
    return AlertView(**{name: found[name] for name in AlertView.__struct_fields__})


def moment(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339; a time that no calendar has, as the nearest year that it has."""
    try:
        time = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        time = datetime.max.replace(tzinfo=UTC) if seconds > 0 else datetime.min.replace(tzinfo=UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(of: Struct, **changes: Any) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__struct_fields__} | changes


# What the OpenAPI document shows.

_EPISODE = "5b0c6d1f0a6be2f3c6e1d2a7b8c9d0e1"
SESSION_EXAMPLE = SessionView(
    conversation_id="c-1842",
    deployment="support-bot",
    model="my-model",
    axis_id="0" * 64,
    started="2026-01-02T03:00:05.000Z",
    time="2026-01-02T03:04:05.678Z",
    turn=4,
    responses=5,
    projection=-1.25,
    outcome="folded",
    z=-3.5,
    risk=1.375,
    lowest_z=-3.5,
    highest_risk=1.375,
    truncated=False,
    episode_id=_EPISODE,
    kind="sudden_drop",
    severity="warning",
)
POINT_EXAMPLE = PointView(
    number=5,
    time="2026-01-02T03:04:05.678Z",
    turn=4,
    projection=-1.25,
    held=0.0,
    outcome="folded",
    z=-3.5,
    risk=1.375,
    place=(-2.5, 0.75),
)
FINDING_EXAMPLE = Finding(
    id="9f2c4e6a8b0d1f3e5a7c9e1b3d5f7a9c",
    time="2026-01-02T03:04:05.678901Z",
    conversation_id="c-1842",
    turn=4,
    deployment="support-bot",
    axis_id="0" * 64,
    kind="sudden_drop",
    severity="warning",
    statistic="drop",
    value=3.4375,
    boundary=2.5,
    risk=1.375,
    budget=0.01,
    certification="certified",
    config_id="c" * 32,
    episode_id=_EPISODE,
    nearest_roles=["ghost", "bard", "hermit"],
    identity="given",
)
VERDICT_EXAMPLE = VerdictView(
    label="drifting", turn=3, note="plays a ghost, unasked", by="console", time="2026-01-02T03:10:00.000000Z"
)
ALERT_EXAMPLE = AlertView(
    id=_EPISODE,
    status="firing",
    severity="warning",
    kind="sudden_drop",
    conversation_id="c-1842",
    deployment="support-bot",
    model="my-model",
    persona="ghost",
    starts_at="2026-01-02T03:04:05.678901Z",
    ends_at=None,
    resolution=None,
    acknowledged_by="",
    silenced_by=[],
    turn=4,
    statistic="drop",
    value=3.4375,
    boundary=2.5,
    risk=1.375,
    budget=0.01,
    certification="certified",
    nearest_roles=["ghost", "bard", "hermit"],
    story="It fell from the usual range to 3.5 standard deviations below it at its fifth response.",
    sparkline="▇▇▆▇▁",
    axis_id="0" * 64,
    config_id="c" * 32,
    finding_ids=["9f2c4e6a8b0d1f3e5a7c9e1b3d5f7a9c"],
    told={"ops/webhook[0]": "warning"},
)
