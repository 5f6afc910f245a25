"""The history checker: what was produced, what the log holds, what the store holds and what was delivered, compared.

Its oracle is the pure fold over the log's own records, partition by partition, in one go and in memory. It knows
neither worker nor broker nor backend: it reads through `Log` and the store's Protocols only, and never believes a
counter that it can count itself. `examine` is the whole of it; the functions before it are its parts, and pure but for
`look`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from monitor.actions import body_of
from monitor.alert import Alert
from monitor.control import calibration_in, is_control
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, decode_state, step
from monitor.errors import EventError
from monitor.events import Finding, Projection, decode_projection, encode
from monitor.placement import partition_of
from monitor.store.store import Session, TrajectoryPoint
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, Log, Record

__all__ = [
    "Delivery",
    "Expected",
    "Fault",
    "Produced",
    "Report",
    "Seen",
    "Told",
    "alerts_in",
    "compare",
    "examine",
    "expect",
    "look",
    "records",
]

TRAJECTORY_POINTS = 256
LARGEST_Z = 20.0  # of one response in a fleet's sum
FLEET_KEPT_MINUTES = 2 * 24 * 60
LISTED = 20  # faults that an error shows

Kind = Literal["lost", "duplicated", "changed", "extra", "split"]


class Fault(NamedTuple):
    """One thing that is not as it must be."""

    kind: Kind
    what: str


class Told(NamedTuple):
    """What a notification says of one alert: that it fires, and how badly, or that it is over."""

    alert: str
    state: str
    findings: tuple[str, ...] = ()


class Delivery(NamedTuple):
    """One notification that a receiver got. `body` are its bytes, less what differs by design between two of them."""

    id: str
    body: bytes
    told: tuple[Told, ...] = ()


def digest(value: bytes) -> str:
    """Of a record's bytes; what a journal keeps instead of them."""
    return hashlib.sha256(value).hexdigest()[:24]


@dataclass
class Produced:
    """What one collector says: in the order of its calls, what it offered; and what the log has acknowledged.

    Each is (key, digest of the record's bytes).
    """

    offered: list[tuple[str, str]] = field(default_factory=list)
    acknowledged: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Expected:
    """What the pure fold makes of a log."""

    records: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    states: dict[str, ConversationState] = field(default_factory=dict)
    partition: dict[str, int] = field(default_factory=dict)
    last: dict[str, tuple[Projection, Step]] = field(default_factory=dict)
    points: dict[str, deque[TrajectoryPoint]] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    dead: dict[str, bytes] = field(default_factory=dict)
    sums: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def all_findings(self) -> dict[str, Finding]:
        """By id."""
        return {finding.id: finding for found in self.findings.values() for finding in found}


@dataclass
class Seen:
    """What is there after the faults, read through the Protocols. Lists stay lists, so that a double shows."""

    positions: dict[int, int | None] = field(default_factory=dict)
    states: dict[str, bytes] = field(default_factory=dict)
    listed: list[Session] = field(default_factory=list)
    sessions: dict[str, Session | None] = field(default_factory=dict)
    points: dict[str, list[TrajectoryPoint]] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    pending: list[Finding] = field(default_factory=list)
    dead: list[Record] = field(default_factory=list)
    sums: list[Any] = field(default_factory=list)


@dataclass
class Report:
    """What `examine` found."""

    events: int
    findings: int
    deliveries: int
    faults: list[Fault]
    forgotten: int = 0

    @property
    def lost(self) -> int:
        """Whatever should be there and is not, or is there as something else."""
        return sum(fault.kind in ("lost", "changed", "split") for fault in self.faults)

    @property
    def duplicated(self) -> int:
        """Whatever is there once too often, or should not be at all."""
        return sum(fault.kind in ("duplicated", "extra") for fault in self.faults)

    def insist(self) -> Report:
        """Raise AssertionError, with the first faults, where there is any."""
        if self.faults:
            lines = "\n  ".join(f"{fault.kind}: {fault.what}" for fault in self.faults[:LISTED])
            kinds = dict(Counter(fault.kind for fault in self.faults))
            raise AssertionError(f"{len(self.faults)} faults in {self.events} records {kinds}:\n  {lines}")
        return self


# The oracle.


def records(log: Log, topic: str, partition: int, *, begin: int | None = None) -> list[Record]:
    """Everything a partition holds now."""
    span = log.span(topic, partition)
    at, found = span.begin if begin is None else begin, list[Record]()
    while at < span.end:
        more = log.read(topic, partition, at, 1000)
        if not more:
            break
        found += more
        at = more[-1].offset + 1
    return [record for record in found if record.offset < span.end]


def expect(
    partitions: Mapping[int, Sequence[Record]],
    config: DetectorConfig,
    *,
    count: int | None = None,
    through: Mapping[int, int] | None = None,
) -> Expected:
    """Fold all records of a topic, in log order.

    Args:
        partitions: partition → its records.
        config: what is in force before any control record.
        count: how many partitions the topic had when it was made; by default as many as are given.
        through: partition → the offset before which to stop, where a partition is paused there on purpose.
    """
    expected = Expected()
    count = len(partitions) if count is None else count
    for partition, found in sorted(partitions.items()):
        stop = None if through is None else through.get(partition)
        _fold_partition(expected, partition, [r for r in found if stop is None or r.offset < stop], config, count)
        expected.ends[partition] = stop if stop is not None else found[-1].offset + 1 if found else 0
    return expected


def _fold_partition(
    expected: Expected, partition: int, found: Sequence[Record], config: DetectorConfig, count: int
) -> None:
    for record in found:
        expected.records += 1
        if is_control(record):
            try:
                config = calibration_in(record)
            except EventError:
                _bury(expected, record)
            continue
        try:
            event = decode_projection(record.value)
            if event.conversation_id != record.key or partition_of(record.key, count) != partition:
                raise EventError("misplaced")
            done = step(expected.states.get(record.key), event, config)
        except Exception:  # the fold is pure: what it can't take now, it can never take
            _bury(expected, record)
            continue
        _take(expected, partition, event, done)


def _bury(expected: Expected, record: Record) -> None:
    expected.dead[f"{record.topic}/{record.partition}/{record.offset}"] = record.value
    expected.counts["dead_letter"] += 1


def _take(expected: Expected, partition: int, event: Projection, done: Step) -> None:
    key, state = event.conversation_id, done.state
    expected.states[key] = state
    expected.partition[key] = partition
    expected.counts[done.outcome] += 1
    known = {finding.id for finding in expected.findings.get(key, [])} if done.findings else set()
    expected.findings.setdefault(key, []).extend(found for found in done.findings if found.id not in known)
    if done.outcome == "duplicate":
        return
    expected.last[key] = event, done
    expected.points.setdefault(key, deque(maxlen=TRAJECTORY_POINTS)).append(
        TrajectoryPoint(
            number=_responses(state),
            time=event.event_time.timestamp(),
            turn=event.turn,
            projection=event.projection,
            held=event.held,
            outcome=done.outcome,
            z=done.z,
            risk=done.risk,
            place=None,
        )
    )
    if done.outcome == "folded" and done.z is not None and done.risk is not None:
        minute = math.floor(event.event_time.timestamp() / 60)
        row = expected.sums.setdefault((minute, event.deployment), [0, 0, 0])
        row[0] += 1
        row[1] += round(1000 * max(-LARGEST_Z, min(LARGEST_Z, done.z)))
        row[2] += done.risk >= 1.0


def _responses(state: ConversationState) -> int:
    return state.folded + state.branches + state.late + state.unjudged + state.learning


# What is there.


def look(log: Log, store: Any, topic: str, partitions: Iterable[int], conversations: Mapping[str, int]) -> Seen:
    """Read everything back. `store` offers `Store`, `Reader`, `Outbox` and `Fleet`; `conversations` name partitions."""
    seen = Seen()
    by_partition: dict[int, list[str]] = {}
    for key, partition in conversations.items():
        by_partition.setdefault(partition, []).append(key)
    for partition in sorted(partitions):
        position = store.position(topic, partition)
        seen.positions[partition] = None if position is None else position.offset
        seen.states |= store.load(topic, partition, by_partition.get(partition, []))
    listed = 0
    while page := store.sessions(500, offset=listed):
        seen.listed += page
        listed += len(page)
    for key in conversations:
        seen.sessions[key] = store.session(key)
        seen.points[key] = store.trajectory(key)
        seen.findings[key] = store.findings(100_000, conversation_id=key)[::-1]
    seen.counts = store.counts()
    seen.pending = [pending.finding for pending in store.pending(1_000_000)]
    seen.sums = store.minutes(0, 1 << 40)
    for partition in range(log.partitions(DEAD_LETTERS)):
        seen.dead += records(log, DEAD_LETTERS, partition)
    return seen


# The comparison.


def compare(expected: Expected, seen: Seen, *, topic: str = PROJECTIONS) -> list[Fault]:
    """Where the store and the dead letters are not the fold of the log."""
    return [
        *_positions(expected, seen),
        *_states(expected, seen),
        *_sessions(expected, seen),
        *_trajectories(expected, seen),
        *_findings(expected, seen),
        *_counts(expected, seen),
        *_sums(expected, seen),
        *_dead(expected, seen, topic),
    ]


def _positions(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for partition, end in expected.ends.items():
        at = seen.positions.get(partition) or 0
        if at < end:
            yield Fault("lost", f"partition {partition} stands at {at}, the log ends at {end}")
        elif at > end:
            yield Fault("extra", f"partition {partition} stands at {at}, beyond the log's end {end}")


def _states(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for key, state in expected.states.items():
        data = seen.states.get(key)
        if data is None:
            yield Fault("lost", f"no state of {key}")
        elif (stored := decode_state(data)) != state:
            more = (stored.folded + stored.duplicates) > (state.folded + state.duplicates)
            yield Fault("duplicated" if more else "lost", f"state of {key}: {_difference(stored, state)}")
    for key in seen.states.keys() - expected.states.keys():
        yield Fault("extra", f"a state of {key}, which the log does not know")


def _sessions(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for key, times in Counter(session.conversation_id for session in seen.listed).items():
        if times > 1:
            yield Fault("split", f"{key} is listed {times} times")
        if key not in expected.last:
            yield Fault("extra", f"a session of {key}, which the log does not know")
    listed = {session.conversation_id: session for session in seen.listed}
    for key, (event, done) in expected.last.items():
        want = _session(expected.states[key], event, done)
        for where, got in (("listed", listed.get(key)), ("single", seen.sessions.get(key))):
            if got is None:
                yield Fault("lost", f"no session of {key} ({where})")
            elif wrong := _unlike(got, want):
                yield Fault("changed", f"session of {key} ({where}): {wrong}")


def _trajectories(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for key, points in expected.points.items():
        got = seen.points.get(key, [])
        numbers = [point.number for point in got]
        if len(set(numbers)) < len(numbers):
            yield Fault("duplicated", f"trajectory of {key} has a number twice: {numbers}")
        elif numbers != [point.number for point in points]:
            short = len(numbers) < len(points)
            yield Fault("lost" if short else "extra", f"trajectory of {key} has {numbers[:1]}..{numbers[-1:]}")
        else:
            for have, want in zip(got, points, strict=True):
                if wrong := _unlike(have, want, but=("place",)):
                    yield Fault("changed", f"point {want.number} of {key}: {wrong}")
                    break


def _findings(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for key in expected.states:
        want = {finding.id: encode(finding) for finding in expected.findings.get(key, [])}
        got = [finding for finding in seen.findings.get(key, []) if finding.kind != "fleet_shift"]
        yield from _same(f"finding of {key}", want, [(finding.id, encode(finding)) for finding in got])
    everything = expected.all_findings()
    for id, times in Counter(finding.id for finding in seen.pending).items():
        if times > 1:
            yield Fault("duplicated", f"finding {id} waits in the outbox {times} times")
    for finding in seen.pending:
        if finding.kind == "fleet_shift":
            continue
        if finding.id not in everything:
            yield Fault("extra", f"finding {finding.id} in the outbox, which the fold does not know")
        elif encode(finding) != encode(everything[finding.id]):
            yield Fault("changed", f"finding {finding.id} in the outbox")


def _counts(expected: Expected, seen: Seen) -> Iterable[Fault]:
    for outcome in sorted(expected.counts.keys() | seen.counts.keys()):
        want, got = expected.counts[outcome], seen.counts.get(outcome, 0)
        if want != got:
            yield Fault("lost" if got < want else "duplicated", f"count of {outcome}: {got}, should be {want}")


def _sums(expected: Expected, seen: Seen) -> Iterable[Fault]:
    got = {(row.minute, row.deployment): [row.responses, row.z, row.warned] for row in seen.sums}
    if len(got) < len(seen.sums):
        yield Fault("duplicated", "a minute of a deployment is given out twice")
    newest = max((minute for minute, _ in expected.sums), default=0)
    for place in sorted(expected.sums.keys() | got.keys()):
        if place[0] <= newest - FLEET_KEPT_MINUTES:
            continue
        want, have = expected.sums.get(place, [0, 0, 0]), got.get(place, [0, 0, 0])
        if want != have:
            yield Fault("lost" if have[0] < want[0] else "duplicated", f"sums of {place}: {have}, should be {want}")


def _dead(expected: Expected, seen: Seen, topic: str) -> Iterable[Fault]:
    # A crash between the letter and the commit may write one twice: its key is what readers go by.
    letters = {record.key: record for record in seen.dead if record.key.rsplit("/", 2)[0] == topic}
    for record in seen.dead:
        if record.key in letters and record.value != letters[record.key].value:
            yield Fault("changed", f"two dead letters of {record.key} differ")
    for key, value in expected.dead.items():
        if key not in letters:
            yield Fault("lost", f"no dead letter of {key}")
        elif letters[key].value != value:
            yield Fault("changed", f"the dead letter of {key} has other bytes than the record")
    for key in letters.keys() - expected.dead.keys():
        yield Fault("extra", f"a dead letter of {key}, which is sound")


def _same(what: str, want: Mapping[str, bytes], got: Sequence[tuple[str, bytes]]) -> Iterable[Fault]:
    """Each once, in order, with the same bytes."""
    for id, times in Counter(id for id, _ in got).items():
        if id not in want:
            yield Fault("extra", f"{what}: {id}, which the fold does not know")
        elif times > 1:
            yield Fault("duplicated", f"{what}: {id} is there {times} times")
    have = dict(got)
    for id, body in want.items():
        if id not in have:
            yield Fault("lost", f"{what}: {id}")
        elif have[id] != body:
            yield Fault("changed", f"{what}: {id} reads {have[id]!r}, should be {body!r}")


def _session(state: ConversationState, event: Projection, done: Step) -> Session:
    episode = state.episode
    return Session(
        conversation_id=event.conversation_id,
        deployment=event.deployment,
        model=event.model,
        axis_id=event.axis_id,
        turn=event.turn,
        projection=event.projection,
        outcome=done.outcome,
        time=event.event_time.timestamp(),
        started=state.started,
        responses=_responses(state),
        z=state.z,
        risk=None if state.z is None else state.risk,
        lowest_z=state.lowest_z,
        highest_risk=state.highest_risk,
        truncated=state.truncated,
        episode_id=episode.id if episode else None,
        kind=episode.kind if episode else None,
        severity=episode.severity if episode else None,
    )


def _unlike(got: Any, want: Any, *, but: tuple[str, ...] = ()) -> str:
    """Which fields differ: by more than a millisecond for times, by more than seven digits for other numbers."""
    wrong = []
    for name in want.__struct_fields__:
        have, should = getattr(got, name), getattr(want, name)
        if name in but or have == should:
            continue
        close = {"rel_tol": 0.0, "abs_tol": 1.01e-3} if name in ("time", "started") else {"rel_tol": 2e-6}
        if not (isinstance(have, float) and isinstance(should, float) and math.isclose(have, should, **close)):
            wrong.append(f"{name} is {have!r}, should be {should!r}")
    return "; ".join(wrong)


def _difference(stored: ConversationState, wanted: ConversationState) -> str:
    names = [n for n in wanted.__struct_fields__ if getattr(stored, n) != getattr(wanted, n)]
    return "; ".join(f"{n} is {getattr(stored, n)!r}, should be {getattr(wanted, n)!r}" for n in names[:4])


def compare_produced(
    partitions: Mapping[int, Sequence[Record]], produced: Sequence[Produced], *, forgetful: bool = False
) -> tuple[list[Fault], int]:
    """Whether the log holds what was acknowledged, nothing that nobody offered, and each conversation in its order.

    `forgetful` says that the broker was killed and is known to lose what it has just acknowledged: what it forgot is
    then counted, and no fault. Returns the faults, and how many acknowledged records the log does not hold.
    """
    faults, forgotten = list[Fault](), 0
    first: dict[tuple[str, str], tuple[int, int]] = {}
    where: dict[str, set[int]] = {}
    for partition, found in partitions.items():
        for record in found:
            if is_control(record):
                continue
            first.setdefault((record.key, digest(record.value)), (partition, record.offset))
            where.setdefault(record.key, set()).add(partition)
    offered = {claim for collector in produced for claim in collector.offered}
    for key, hashed in first.keys() - offered:
        faults.append(Fault("changed", f"the log holds a record of {key} ({hashed}) that nobody offered"))
    for collector in produced:
        for claim in collector.acknowledged - first.keys():
            forgotten += 1
            if not forgetful:
                faults.append(Fault("lost", f"the log does not hold an acknowledged record of {claim[0]}"))
        latest: dict[tuple[str, int], int] = {}
        times = Counter(collector.offered)
        for claim in times:
            # What was offered twice, and forgotten once, rightly stands where it came for the second time.
            if claim not in first or (forgetful and times[claim] > 1):
                continue
            partition, offset = first[claim]
            place = claim[0], partition
            if offset < latest.get(place, -1):
                faults.append(Fault("changed", f"records of {claim[0]} are not in the order in which they were made"))
            latest[place] = max(offset, latest.get(place, -1))
    return faults, forgotten


def compare_delivered(
    expected: Expected,
    deliveries: Sequence[Delivery],
    alerts: Mapping[str, Alert],
    pending: Iterable[Finding] = (),
    *,
    forgetful: bool = False,
) -> list[Fault]:
    """Whether every finding is part of an alert, every alert was delivered at least once in every state in which it was
    left, always under one id and with the same body, and none that the fold never made.

    `alerts` are those that the dispatcher has written down, by id. What was over before its turn came need not be
    delivered. `pending` findings still wait for the dispatcher. Of a `forgetful` broker, one id may become two.
    """
    faults = list[Fault]()
    bodies: dict[str, bytes] = {}
    ids: dict[tuple[str, str], set[str]] = {}
    everything = expected.all_findings()
    for delivery in deliveries:
        if bodies.setdefault(delivery.id, delivery.body) != delivery.body:
            faults.append(Fault("changed", f"notification {delivery.id} was delivered with two bodies"))
        for told in delivery.told:
            ids.setdefault((told.alert, told.state), set()).add(delivery.id)
            for unknown in set(told.findings) - everything.keys():
                faults.append(Fault("extra", f"{unknown} was delivered, which the fold does not know"))
    for (id, state), several in ids.items():
        if id not in alerts:
            faults.append(Fault("extra", f"alert {id} was delivered, and is not written down"))
        if len(several) > 1 and not forgetful:
            faults.append(Fault("duplicated", f"that alert {id} is {state} was delivered under {len(several)} ids"))
    waiting = {finding.id for finding in pending}
    parts = {finding for alert in alerts.values() for finding in alert.finding_ids}
    ended = {finding.episode_id: finding for finding in everything.values() if finding.kind == "recovered"}
    for id, finding in everything.items():
        if id not in parts and id not in waiting:
            faults.append(Fault("lost", f"finding {id} of {finding.conversation_id} is part of no alert"))
    for id, alert in alerts.items():
        if waiting & {found.id for found in everything.values() if found.episode_id == id} or not alert.conversation_id:
            continue
        if id in ended and alert.firing:
            faults.append(Fault("lost", f"alert {id} fires, though its episode is over"))
        never = not any(told == id for told, _ in ids)
        now = alert.severity if alert.firing else "resolved"
        if (id, now) not in ids and (alert.firing or not never):
            faults.append(Fault("lost", f"that alert {id} is {now} was never delivered"))
    return faults


def alerts_in(store: Any) -> dict[str, Alert]:
    """The alerts that a store has folded from the log of actions, by id."""
    bodies = [body_of(key, value) for key, value in store.actions("alert/").items()]
    return {body.id: body for body in bodies if isinstance(body, Alert)}


def examine(
    log: Log,
    store: Any,
    config: DetectorConfig,
    *,
    topic: str = PROJECTIONS,
    produced: Sequence[Produced] = (),
    deliveries: Sequence[Delivery] | None = None,
    count: int | None = None,
    through: Mapping[int, int] | None = None,
    forgetful: bool = False,
) -> Report:
    """Read log and store back, fold the log anew, and compare all there is. See `expect` and `compare_produced`."""
    partitions = {p: records(log, topic, p) for p in range(log.partitions(topic))}
    expected = expect(partitions, config, count=count, through=through)
    seen = look(log, store, topic, partitions, expected.partition)
    faults = compare(expected, seen, topic=topic)
    forgotten = 0
    if produced:
        wrong, forgotten = compare_produced(partitions, produced, forgetful=forgetful)
        faults += wrong
    if deliveries is not None:
        faults += compare_delivered(expected, deliveries, alerts_in(store), seen.pending, forgetful=forgetful)
    return Report(expected.records, len(expected.all_findings()), len(deliveries or ()), faults, forgotten)
