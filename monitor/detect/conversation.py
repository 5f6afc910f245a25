"""The fold: one conversation's state, one response, the next state and what there is to say about it.

It knows a few plain numbers per conversation and one frozen `DetectorConfig`. It does not know where events come from,
what time it is (only event time), or who is told. The same events in the same order give the same findings, live or
offline.

Each response is read as z, its standard deviations above the deployment's healthy mean; low is drift. Four statistics
follow z, all positive when drifting: `level` is -EWMA, `drop` how far the EWMA lies below its own start in this
segment, `cusum` the one-sided sum max(0, S - z - slack) (Page 1954), `dip` -z of the response's lowest 16-token window.
`risk` is the largest of them over its warning boundary; at 1 an *episode* opens.

Order. Records are taken in log order. An id among the last 32 is a `duplicate`; the same turn with a new id is a
`branch`; a turn 32 or more behind is `late`: none of them is folded. A turn that is behind by less and was never folded
is folded like any other, where it stands in the log: to sort it in would need a history that the state does not keep.

Segments. A silence longer than the session gap, measured from the last folded response, or a changed axis starts a new
segment: statistics and turn numbers restart, ids are kept. It is looked at before the turn, so that a caller who starts
again at turn 0 under an old conversation id is watched, not `late`. An open episode is closed without a finding and
counted in `lapsed`: `recovered` would claim what nobody measured, and the dispatcher resolves episodes that fall
silent. A changed deployment starts no segment: each z is already in the units of its own baseline.

Blocks. An alarm budget holds for a block of so many responses (`Boundaries.block_turns`); without an end to it, every
conversation would warn if it only went on for long enough. So after that many responses the statistics start anew,
unless an episode is open: then they go on until it has ended.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from typing import NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig
from monitor.errors import EventError
from monitor.events import Finding, Kind, Outcome, Projection, Severity, episode_id

__all__ = ["ConversationState", "Episode", "Statistics", "Step", "decode_state", "encode_state", "step"]

REMEMBERED = 32  # ids, and turns behind the last one
HASH_LENGTH = 8  # base64 characters: 48 bits, so that one event in 10^13 is mistaken for a duplicate


class Episode(Struct, frozen=True, array_like=True, gc=False):
    """An excursion that has been told and is not over.

    Attributes:
        id: hash of conversation and the response that opened it.
        first_turn: the turn that opened it.
        severity: the worst that has been told, `warning` or `critical`.
        kind: what opened it.
        inside: responses in a row that were back inside.
    """

    id: str
    first_turn: int
    severity: Severity
    kind: Kind
    inside: int = 0


class ConversationState(Struct, frozen=True, array_like=True, gc=False):
    """What is remembered of one conversation: a few hundred bytes, however long it lasts.

    Written as an array to stay small: new fields go at the end, with a default. `gc=False`, here and wherever there are
    many: what can't be part of a cycle the garbage collector need not walk, and a worker holds 100,000 of these.

    Attributes:
        segment: index of the segment, from 0.
        axis_id: axis of the segment; empty until a response has been folded.
        deployment: of the last record.
        first_turn: the segment's first folded turn.
        start: z of that response.
        ewma, cusum: running statistics of z in this segment.
        last_turn: the segment's largest folded turn, -1 before any.
        folded_time: event time of the last folded response, seconds since 1970.
        seen_time: latest event time of any record.
        turns: bit i is set when turn `last_turn - i` has been folded.
        ids: short hashes of the last 32 ids, oldest first, 8 characters each.
        z: of the segment's last folded response; None before any.
        risk: largest statistic over its boundary, after that response.
        outcome: of the last record that was no duplicate.
        episode: the open one.
        folded, duplicates, branches, late, unjudged, learning: records by outcome, over the whole conversation.
        lapsed: episodes that a new segment cut off.
        block: responses folded since the statistics last started anew.
        started: event time of the first record, seconds since 1970.
        truncated: whether that record was not turn 0, so that nobody here has seen how the conversation began.
        lowest_z, highest_risk: over all folded responses, also those whose points a store no longer keeps.
    """

    segment: int = 0
    axis_id: str = ""
    deployment: str = ""
    first_turn: int = 0
    start: float = 0.0
    ewma: float = 0.0
    cusum: float = 0.0
    last_turn: int = -1
    folded_time: float = 0.0
    seen_time: float = 0.0
    turns: int = 0
    ids: str = ""
    z: float | None = None
    risk: float = 0.0
    outcome: Outcome = "folded"
    episode: Episode | None = None
    folded: int = 0
    duplicates: int = 0
    branches: int = 0
    late: int = 0
    unjudged: int = 0
    learning: int = 0
    lapsed: int = 0
    block: int = 0
    started: float = 0.0
    truncated: bool = False
    lowest_z: float | None = None
    highest_risk: float | None = None


_state_encoder = msgspec.msgpack.Encoder()
_state_decoder = msgspec.msgpack.Decoder(ConversationState)


def encode_state(state: ConversationState) -> bytes:
    """A state as a store keeps it: MessagePack, a third smaller than JSON. Equal states are equal bytes."""
    return _state_encoder.encode(state)


def decode_state(data: bytes) -> ConversationState:
    """Read what `encode_state` wrote.

    Raises:
        msgspec.MsgspecError: it is something else, or of a release to come.
    """
    return _state_decoder.decode(data)


class Statistics(NamedTuple):
    """How far a conversation has drifted, four ways; positive is drift, in standard deviations of z."""

    level: float
    drop: float
    cusum: float
    dip: float


class Step(NamedTuple):
    """What one record did. `z`, `risk` and `statistics` are None unless it was folded."""

    state: ConversationState
    findings: list[Finding]
    outcome: Outcome
    z: float | None
    risk: float | None
    statistics: Statistics | None = None


class _Worst(NamedTuple):
    """The statistic that lies highest over its boundary, and how high."""

    statistic: str
    value: float
    boundary: float
    risk: float


def step(state: ConversationState | None, projection: Projection, config: DetectorConfig) -> Step:
    """Fold one record into a conversation. `state` is None at its first record, and never changed.

    To calibrate, fold with boundaries that nothing reaches: an episode's end restarts the statistics, and the CUSUM
    stops at its critical boundary.

    Raises:
        EventError: the record lacks a coordinate of the readout, or its time is no date.
    """
    before = ConversationState() if state is None else state
    known = _id_hash(projection.id)
    if known in before.ids and known in _split(before.ids):  # the first is cheap and nearly always enough
        return Step(replace(before, duplicates=before.duplicates + 1), [], "duplicate", None, None)
    time = _seconds(projection)
    now = replace(
        before,
        ids=(before.ids + known)[-REMEMBERED * HASH_LENGTH :],
        deployment=projection.deployment,
        seen_time=max(before.seen_time, time),
        started=time if state is None else before.started,
        truncated=projection.turn > 0 if state is None else before.truncated,
    )
    if projection.axis_id != config.axis_id:
        return Step(replace(now, outcome="unjudged", unjudged=now.unjudged + 1), [], "unjudged", None, None)
    baseline = config.baselines.get(projection.deployment)
    if baseline is None:
        return Step(replace(now, outcome="learning", learning=now.learning + 1), [], "learning", None, None)
    if now.axis_id and (now.axis_id != projection.axis_id or time - now.folded_time > config.session_gap_seconds):
        now = _new_segment(now)
    behind = now.last_turn - projection.turn
    if behind >= REMEMBERED:
        return Step(replace(now, outcome="late", late=now.late + 1), [], "late", None, None)
    if behind >= 0 and now.turns >> behind & 1:
        return Step(replace(now, outcome="branch", branches=now.branches + 1), [], "branch", None, None)
    return _fold(now, projection, config, baseline, time)


def _fold(
    now: ConversationState, projection: Projection, config: DetectorConfig, baseline: Baseline, time: float
) -> Step:
    """Move the statistics by one response, and open, worsen or end an episode."""
    boundaries = config.boundaries_of(projection.deployment)
    z = baseline.z(config.readout.value(projection.coordinates, projection.prompt))
    dip = -baseline.window_z(config.readout.value(projection.windows.lowest, projection.prompt))
    first = not now.turns
    full = boundaries.block_turns is not None and now.block >= boundaries.block_turns and now.episode is None
    anew = first or full
    start = z if anew else now.start
    ewma = z if anew else config.ewma_weight * z + (1.0 - config.ewma_weight) * now.ewma
    # A CUSUM without a ceiling ranks conversations by their age and, after a long excursion, takes as long again to
    # come down. Past critical there is nothing more to tell, so it stops there.
    past = 0.0 if anew else now.cusum
    cusum = min(max(0.0, past - z - config.cusum_slack), boundaries.critical_factor * boundaries.cusum)
    statistics = Statistics(-ewma, start - ewma, cusum, dip)
    worst = _worst(statistics, boundaries)
    findings: list[Finding] = []
    episode = now.episode
    if episode is None:
        if worst.risk >= 1.0:
            episode = Episode(
                id=episode_id(projection.conversation_id, projection.id),
                first_turn=projection.turn,
                severity=_severity(statistics, boundaries),
                kind=_kind(worst.statistic, first),
            )
            findings.append(_finding(projection, config, episode, episode.kind, episode.severity, worst))
    else:
        if episode.severity == "warning" and _severity(statistics, boundaries) == "critical":
            episode = replace(episode, severity="critical")
            findings.append(_finding(projection, config, episode, episode.kind, "critical", worst))
        # Recovery asks where the conversation is now, not where it was: the response's own z, without the memory of
        # EWMA and CUSUM. A CUSUM over its release counts only while the response still adds to it, else it would hold
        # the episode open long after the excursion; yet a slow drift, whose every z is harmless, must not pass.
        adding = cusum if -z > config.cusum_slack else 0.0
        back = _worst(Statistics(-z, start - z, adding, dip), boundaries).risk <= config.release_fraction
        if projection.held == 0.0:  # of a held response nobody knows what it would have been
            episode = replace(episode, inside=episode.inside + 1 if back else 0)
        if episode.inside >= config.release_turns:
            # The excursion has been told. What remains of it in EWMA and CUSUM must not open a second episode.
            ewma, cusum = z, 0.0
            statistics = Statistics(-ewma, start - ewma, cusum, dip)
            worst = _worst(statistics, boundaries)
            findings.append(_finding(projection, config, episode, "recovered", "info", worst))
            episode = None
    after = replace(
        now,
        axis_id=projection.axis_id,
        first_turn=projection.turn if first else now.first_turn,
        start=start,
        ewma=ewma,
        cusum=cusum,
        last_turn=max(now.last_turn, projection.turn),
        folded_time=time,
        turns=_with_turn(now.turns, now.last_turn, projection.turn),
        z=z,
        risk=worst.risk,
        outcome="folded",
        episode=episode,
        folded=now.folded + 1,
        block=1 if anew else now.block + 1,
        lowest_z=z if now.lowest_z is None else min(z, now.lowest_z),
        highest_risk=worst.risk if now.highest_risk is None else max(worst.risk, now.highest_risk),
    )
    return Step(after, findings, "folded", z, worst.risk, statistics)


def _worst(statistics: Statistics, boundaries: Boundaries) -> _Worst:
    """The statistic with the largest ratio; among equals the first of level, drop, cusum, dip."""
    level, drop, cusum, dip = statistics
    worst = _Worst("level", level, boundaries.level, level / boundaries.level)
    if (risk := drop / boundaries.drop) > worst.risk:
        worst = _Worst("drop", drop, boundaries.drop, risk)
    if (risk := cusum / boundaries.cusum) > worst.risk:
        worst = _Worst("cusum", cusum, boundaries.cusum, risk)
    if (risk := dip / boundaries.dip) > worst.risk:
        worst = _Worst("dip", dip, boundaries.dip, risk)
    return worst


def _severity(statistics: Statistics, boundaries: Boundaries) -> Severity:
    # By product, not by ratio: a CUSUM at its ceiling equals factor x boundary exactly, their quotient may not.
    limits = (boundaries.level, boundaries.drop, boundaries.cusum, boundaries.dip)
    reached = (v >= boundaries.critical_factor * limit for v, limit in zip(statistics, limits, strict=True))
    return "critical" if any(reached) else "warning"


def _kind(statistic: str, first: bool) -> Kind:
    """What an episode that this statistic opens is called. After one response the CUSUM is the level less the slack."""
    match statistic:
        case "drop":
            return "sudden_drop"
        case "dip":
            return "dip"
        case _:
            return "low_start" if first else "sustained_drop"


def _finding(
    projection: Projection, config: DetectorConfig, episode: Episode, kind: Kind, severity: Severity, worst: _Worst
) -> Finding:
    identity = f"{episode.id}\x1f{kind}\x1f{severity}\x1f{projection.turn}"
    space = config.persona_space
    boundaries = config.boundaries_of(projection.deployment)
    critical = severity == "critical"
    return Finding(
        id=hashlib.sha256(identity.encode()).hexdigest()[:32],
        time=projection.time,
        conversation_id=projection.conversation_id,
        turn=projection.turn,
        deployment=projection.deployment,
        axis_id=projection.axis_id,
        kind=kind,
        severity=severity,
        statistic=worst.statistic,
        value=worst.value,
        boundary=worst.boundary,
        risk=worst.risk,
        budget=boundaries.critical_budget if critical else boundaries.budget,
        certification=boundaries.critical_certification if critical else boundaries.certification,
        config_id=config.config_id,
        episode_id=episode.id,
        nearest_roles=space.nearest(projection.coordinates) if space else [],
        identity=projection.attributes.get("identity", ""),
    )


def _new_segment(state: ConversationState) -> ConversationState:
    """The same conversation with its statistics, turn numbers and episode gone, its ids and counters kept."""
    return ConversationState(
        segment=state.segment + 1,
        deployment=state.deployment,
        seen_time=state.seen_time,
        ids=state.ids,
        folded=state.folded,
        duplicates=state.duplicates,
        branches=state.branches,
        late=state.late,
        unjudged=state.unjudged,
        learning=state.learning,
        lapsed=state.lapsed + (state.episode is not None),
        started=state.started,
        truncated=state.truncated,
        lowest_z=state.lowest_z,
        highest_risk=state.highest_risk,
    )


def _with_turn(turns: int, last_turn: int, turn: int) -> int:
    """The set of folded turns with one more: bit i stands for i turns before the last."""
    ahead = turn - last_turn
    if ahead <= 0:
        return turns | 1 << -ahead
    # Never shift by what a record says: a turn of 10^12 would ask for that many bits.
    return (turns << ahead | 1) & (1 << REMEMBERED) - 1 if ahead < REMEMBERED else 1


def _id_hash(record_id: str) -> str:
    return urlsafe_b64encode(hashlib.sha256(record_id.encode()).digest()[: HASH_LENGTH * 6 // 8]).decode()


def _split(ids: str) -> list[str]:
    return [ids[i : i + HASH_LENGTH] for i in range(0, len(ids), HASH_LENGTH)]


def _seconds(projection: Projection) -> float:
    """Event time in seconds since 1970."""
    try:
        return projection.event_time.timestamp()
    except ValueError as error:  # the wire format lets 2026-02-30 through
        raise EventError(f"time {projection.time!r} is no date: {error}", cure="fix the collector's clock") from error
