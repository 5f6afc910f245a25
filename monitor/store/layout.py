"""How a conversation lies in one string of bytes: its session, its state, its trajectory, one behind the other.

It knows no server. Everything is little-endian and without padding::

    label      number of the conversation's deployment, model and axis; the store gives it
    head       how long all of this up to the points is; then `Session` in fixed fields, and the open episode's id
    state      the fold's own bytes, opaque here; where deployment and axis occur in it, they are cut out, for the label
               has them already, and half of a state may be names
    points     `TrajectoryPoint`, 37 bytes each, oldest first

Points are appended and cut by the store without being read. Their numbers are not written: the newest one's is the
session's count of responses. Numbers are single precision, so exact to seven digits, and a number that does not fit is
kept as the nearest one that does; NaN stands for None.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final, get_args

from monitor.errors import StoreError, StoreUnavailable
from monitor.events import Kind, Outcome, Severity
from monitor.store.store import Session, TrajectoryPoint

__all__ = [
    "HEAD",
    "LABEL",
    "POINT",
    "READ_AHEAD",
    "THERE",
    "TOLD",
    "label_of",
    "pack_points",
    "pack_session",
    "pack_state",
    "state_of",
    "unpack_points",
    "unpack_session",
]

LABEL: Final = struct.Struct("<I")
# length, where deployment and axis were cut out of the state, flags, words, responses, turn, time, started, projection,
# z, risk, lowest_z, highest_risk, length of the episode's id
HEAD: Final = struct.Struct("<IHHBBIIddfffffB")
# time, turn, projection, held, z, risk, place, outcome
POINT: Final = struct.Struct("<dIffffffB")
READ_AHEAD: Final = LABEL.size + HEAD.size + 255  # all of a session, however long the episode's id is

THERE: Final = 1  # a session is there: not only duplicates have come
TRUNCATED: Final = 2
TOLD: Final = 4  # there are findings; the store sets it

_FIXED: Final = LABEL.size + HEAD.size
_NOWHERE: Final = 2**16 - 1
_NAN: Final = math.nan
_LARGEST: Final = 3.4028234663852886e38
_LARGEST_COUNT: Final = 2**32 - 1

# Numbers of words are written to disk: add at the end, never reorder.
_OUTCOMES: Final[tuple[Outcome, ...]] = ("folded", "duplicate", "branch", "late", "unjudged", "learning")
_KINDS: Final[tuple[Kind | None, ...]] = (
    None,
    "low_start",
    "sudden_drop",
    "sustained_drop",
    "dip",
    "recovered",
    "fleet_shift",
)
_SEVERITIES: Final[tuple[Severity | None, ...]] = (None, "warning", "critical", "info")
_OUTCOME = {word: number for number, word in enumerate(_OUTCOMES)}
_KIND = {word: number << 3 for number, word in enumerate(_KINDS)}
_SEVERITY = {word: number << 6 for number, word in enumerate(_SEVERITIES)}
assert set(_OUTCOMES) == set(get_args(Outcome))
assert set(_KINDS) == {None, *get_args(Kind)}
assert set(_SEVERITIES) == {None, *get_args(Severity)}


def pack_points(points: Sequence[TrajectoryPoint]) -> bytes:
    """Points of a trajectory, in this order."""
    return b"".join([_pack_point(point) for point in points])


def _pack_point(point: TrajectoryPoint) -> bytes:
    z, risk, place = point.z, point.risk, point.place
    first, second = (_NAN, _NAN) if place is None else place
    fields = (
        point.time,
        point.turn,
        point.projection,
        point.held,
        _NAN if z is None else z,
        _NAN if risk is None else risk,
        first,
        second,
        _OUTCOME[point.outcome],
    )
    try:
        return POINT.pack(*fields)
    except (OverflowError, struct.error):
        return POINT.pack(fields[0], _count(point.turn), *map(_single, fields[2:8]), fields[8])


def pack_session(session: Session, state: bytes) -> bytes:
    """A session without its conversation's id and label, and the state behind it."""
    z, risk, lowest, highest = session.z, session.risk, session.lowest_z, session.highest_risk
    episode = b"" if session.episode_id is None else session.episode_id.encode()[:255]
    deployment_at, state = _cut(state, session.deployment.encode())
    axis_at, state = _cut(state, session.axis_id.encode())
    fields = (
        _FIXED + len(episode) + len(state),
        deployment_at,
        axis_at,
        THERE | TRUNCATED if session.truncated else THERE,
        _OUTCOME[session.outcome] | _KIND[session.kind] | _SEVERITY[session.severity],
        session.responses,
        session.turn,
        session.time,
        session.started,
        session.projection,
        _NAN if z is None else z,
        _NAN if risk is None else risk,
        _NAN if lowest is None else lowest,
        _NAN if highest is None else highest,
        len(episode),
    )
    try:
        return HEAD.pack(*fields) + episode + state
    except (OverflowError, struct.error):
        counts = map(_count, fields[5:7])
        return HEAD.pack(*fields[:5], *counts, *fields[7:9], *map(_single, fields[9:14]), fields[14]) + episode + state


def pack_state(state: bytes) -> bytes:
    """A state alone: of a conversation that has no session, since only duplicates of it have come."""
    return HEAD.pack(_FIXED + len(state), _NOWHERE, _NOWHERE, *[0] * 12) + state


def label_of(value: bytes) -> int:
    """The number of its label."""
    try:
        number: int = LABEL.unpack_from(value)[0]
    except struct.error as error:
        raise damaged() from error
    return number


def state_of(value: bytes, label: tuple[str, str, str] | None) -> bytes:
    """The state in a conversation's bytes; empty when there is none. `label` is (deployment, model, axis id).

    Raises:
        StoreUnavailable: there is no such label, though there was one when the bytes were written.
    """
    try:
        length, deployment_at, axis_at, *_, episode = HEAD.unpack_from(value, LABEL.size)
    except struct.error as error:
        raise damaged() from error
    state = value[_FIXED + episode : length]
    for at, word in ((axis_at, label and label[2]), (deployment_at, label and label[0])):
        if at != _NOWHERE:
            if word is None:
                raise StoreUnavailable(
                    "the store was emptied while it was read", cure="nothing to do: it is read again"
                )
            state = state[:at] + word.encode() + state[at:]
    return state


def unpack_session(conversation_id: str, value: bytes, label: tuple[str, str, str]) -> Session | None:
    """The session in a conversation's bytes, of which the first `READ_AHEAD` do; None when there is none.

    `label` is (deployment, model, axis id).
    """
    try:
        head = HEAD.unpack_from(value, LABEL.size)
    except struct.error as error:
        raise damaged() from error
    _, _, _, flags, words, responses, turn, time, started, projection, z, risk, lowest, highest, episode = head
    if not flags & THERE:
        return None
    return Session(
        conversation_id=conversation_id,
        deployment=label[0],
        model=label[1],
        axis_id=label[2],
        turn=turn,
        projection=projection,
        outcome=_OUTCOMES[words & 7],
        time=time,
        started=started,
        responses=responses,
        z=_some(z),
        risk=_some(risk),
        lowest_z=_some(lowest),
        highest_risk=_some(highest),
        truncated=bool(flags & TRUNCATED),
        episode_id=value[_FIXED : _FIXED + episode].decode() if episode else None,
        kind=_KINDS[words >> 3 & 7],
        severity=_SEVERITIES[words >> 6],
    )


def unpack_points(value: bytes) -> list[TrajectoryPoint]:
    """The points in all of a conversation's bytes."""
    try:
        begin, _, _, _, _, responses, *_ = HEAD.unpack_from(value, LABEL.size)
    except struct.error as error:
        raise damaged() from error
    count, rest = divmod(len(value) - begin, POINT.size)
    if rest or count < 0:
        raise damaged()
    return [
        TrajectoryPoint(
            number=responses - count + number,
            time=time,
            turn=turn,
            projection=projection,
            held=held,
            outcome=_OUTCOMES[outcome],
            z=_some(z),
            risk=_some(risk),
            place=None if math.isnan(first) else (first, second),
        )
        for number, (time, turn, projection, held, z, risk, first, second, outcome) in enumerate(
            POINT.iter_unpack(value[begin:]), 1
        )
    ]


def damaged() -> StoreError:
    """What is there is not what was written."""
    return StoreError(
        "a conversation in the store is damaged",
        cure="something else writes under Anchorwatch's prefix: find it. Then empty the store: it is rebuilt from the "
        "log, as far as the log reaches",
    )


def _cut(state: bytes, word: bytes) -> tuple[int, bytes]:
    """Where a word first occurs in a state, and the state without it."""
    at = state.find(word)
    if not 0 <= at < _NOWHERE:
        return _NOWHERE, state
    return at, state[:at] + state[at + len(word) :]


def _some(value: float) -> float | None:
    return None if math.isnan(value) else value


def _single(value: float) -> float:
    return value if math.isnan(value) else max(-_LARGEST, min(value, _LARGEST))


def _count(value: int) -> int:
    return min(value, _LARGEST_COUNT)
