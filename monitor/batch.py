"""A batch of records, folded: pure functions between reading and committing.

They know the fold and the shape of a commit, but no log and no store. Poison is a record that can't be decoded, that
lies under another conversation's key or in another partition than that key's, or that the fold can't take: it is set
aside with a reason, and never stops the line unless most records are poison. A control record changes the calibration
from its place on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from monitor.control import calibration_in, is_control
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, encode_state
from monitor.errors import EventError
from monitor.events import Projection, decode_projection
from monitor.placement import partition_of
from monitor.store.store import Commit, Position, Session, TrajectoryPoint
from monitor.stream.log import Message, Record
from monitor.sums import minute_sums, watermark

__all__ = [
    "Decoded",
    "Fold",
    "Folded",
    "Poison",
    "decode",
    "fold_batch",
    "fold_one",
    "misplaced",
    "mostly_poison",
    "to_commit",
    "to_dead_letter",
]

Fold: TypeAlias = Callable[[ConversationState | None, Projection, DetectorConfig], Step]

DEAD_LETTER = "dead_letter"  # beside the fold's outcomes in a commit's counts
POISON_WINDOW = 200
POISON_LEAST = 20
POISON_SHARE = 0.5
_DETAIL_LENGTH = 500
_KEY_LENGTH = 4096
LARGEST_LETTER = 900 * 1024  # with its key and headers it still fits where the record itself did


class Poison(NamedTuple):
    """Why a record can't be folded: `reason` is one of a few words, `detail` may quote the record's content."""

    reason: str
    detail: str


_MISPLACED = Poison("wrong_partition", "the record lies in another partition than murmur2 of its key gives")
Decoded: TypeAlias = Projection | DetectorConfig | Poison


class Folded(NamedTuple):
    """What a batch came to, before anything of it is written.

    Attributes:
        offset: the next offset to read.
        steps: responses and what they did, in log order.
        dead: poison, in log order.
        states: new state of every conversation that had a response.
        poison: for the last 200 records up to here, whether each was poison.
        config: the calibration that a control record put into force; None when none did.
    """

    offset: int
    steps: list[tuple[Projection, Step]]
    dead: list[tuple[Record, Poison]]
    states: dict[str, ConversationState]
    poison: tuple[bool, ...]
    config: DetectorConfig | None = None


def decode(record: Record) -> Decoded:
    """The response in a record, or the calibration in a control record, or why there is neither."""
    if not record.key and is_control(record):
        try:
            return calibration_in(record)
        except EventError as error:
            return Poison("bad_control", error.problem)
    try:
        projection = decode_projection(record.value)
    except EventError as error:
        return Poison("undecodable", error.problem)
    if projection.conversation_id != record.key:
        # Kafka places a record by its key: under a foreign key a conversation would be split without a word.
        return Poison("wrong_key", "the record's key is not its conversation_id")
    return projection


def misplaced(conversation_ids: Collection[str], partition: int, partitions: int) -> set[str]:
    """Those whose records belong into another partition: a collector places them in a way of its own, or the topic has
    more partitions than it had. Folding them here and others there would split a conversation without a word."""
    if partitions <= 1:
        return set()
    return {key for key in conversation_ids if partition_of(key, partitions) != partition}


def mostly_poison(poison: Collection[bool]) -> bool:
    """Whether so much of the last 200 records is poison that the fault is likely ours, or a whole producer's."""
    return len(poison) >= POISON_LEAST and sum(poison) > POISON_SHARE * len(poison)


def fold_batch(
    decoded: Sequence[tuple[Record, Decoded]],
    states: Mapping[str, ConversationState],
    poison: Sequence[bool],
    config: DetectorConfig,
    fold: Fold,
    misplaced: Collection[str] = (),
) -> Folded:
    """Fold the records in order, starting from `states`; stop early, behind the record that makes it mostly poison.

    Responses of the conversations in `misplaced` are poison.
    """
    steps: list[tuple[Projection, Step]] = []
    dead: list[tuple[Record, Poison]] = []
    changed: dict[str, ConversationState] = {}
    recent = deque(poison, maxlen=POISON_WINDOW)
    offset = decoded[0][0].offset
    config_now = config
    for record, event in decoded:
        offset = record.offset + 1
        if isinstance(event, DetectorConfig):
            config_now = event
            recent.append(False)
            continue
        verdict: Step | Poison
        if isinstance(event, Poison):
            verdict = event
        elif event.conversation_id in misplaced:
            verdict = _MISPLACED
        else:
            key = event.conversation_id
            verdict = fold_one(changed[key] if key in changed else states.get(key), event, config_now, fold)
        if isinstance(verdict, Poison):
            recent.append(True)
            dead.append((record, verdict))
            if mostly_poison(recent):
                break
        else:
            recent.append(False)
            assert isinstance(event, Projection)
            changed[event.conversation_id] = verdict.state
            steps.append((event, verdict))
    return Folded(offset, steps, dead, changed, tuple(recent), None if config_now is config else config_now)


def fold_one(state: ConversationState | None, event: Projection, config: DetectorConfig, fold: Fold) -> Step | Poison:
    """One response folded, or why it can't be. An audit uses it too, so that both judge alike."""
    try:
        return fold(state, event, config)
    except EventError as error:
        return Poison("unusable", error.problem)
    except MemoryError:
        raise  # the machine's fault, not the record's
    except Exception as error:  # a fault of the fold: it is pure, so the same record would fail for ever
        return Poison("fold_failed", f"{type(error).__name__}: {error}")


def to_commit(
    folded: Folded,
    *,
    topic: str,
    partition: int,
    topic_id: str,
    partitions: int,
    expected: Position | None,
    end: int,
    config: DetectorConfig | None,
    now: float,
) -> Commit:
    """Everything that a batch came to, for one transaction.

    Args:
        folded: what it came to.
        topic, partition, topic_id, partitions, expected: as `Commit` has them.
        end: the next offset of the partition, to say whether more is waiting.
        config: the calibration to store as the one in force after this batch; None to leave what is stored.
        now: the wall clock, seconds since 1970. It bounds the watermark, and nothing else depends on it.
    """
    sessions: dict[str, tuple[Projection, Step]] = {}
    points: dict[str, list[TrajectoryPoint]] = {}
    for projection, step in folded.steps:
        if step.outcome != "duplicate":
            key = projection.conversation_id
            sessions[key] = projection, step
            point = _point(projection, step)
            if key in points:
                points[key].append(point)
            else:
                points[key] = [point]
    counts = Counter[str]([step.outcome for _, step in folded.steps])
    if folded.dead:
        counts[DEAD_LETTER] = len(folded.dead)
    return Commit(
        topic=topic,
        partition=partition,
        topic_id=topic_id,
        partitions=partitions,
        expected=expected,
        offset=folded.offset,
        states={key: encode_state(state) for key, state in folded.states.items()},
        sessions=[_session(projection, step) for projection, step in sessions.values()],
        points=points,
        findings=[finding for _, step in folded.steps for finding in step.findings],
        counts=dict(counts),
        sums=minute_sums(folded.steps),
        watermark=watermark(folded.steps, now),
        behind=end > folded.offset,
        config=config.to_json() if config is not None else None,
    )


def to_dead_letter(record: Record, poison: Poison) -> Message:
    """The poison as it goes to the dead letters: its bytes untouched, its place as the key, the reason beside it.

    What is so large that the letter would be refused is cut, and says how long it was and its sha256: poison must not
    stop the line by its size. The record itself is in the log as long as that keeps it.
    """
    cut = len(record.value) > LARGEST_LETTER
    whole = (("length", b"%d" % len(record.value)), ("sha256", hashlib.sha256(record.value).hexdigest().encode()))
    return Message(
        key=f"{record.topic}/{record.partition}/{record.offset}",
        value=record.value[:LARGEST_LETTER],
        headers=(
            ("reason", poison.reason.encode()),
            ("detail", poison.detail[:_DETAIL_LENGTH].encode(errors="replace")),
            ("key", record.key[:_KEY_LENGTH].encode()),
            *(whole if cut else ()),
        ),
    )


def _responses(state: ConversationState) -> int:
    return state.folded + state.branches + state.late + state.unjudged + state.learning


def _session(projection: Projection, step: Step) -> Session:
    state, episode = step.state, step.state.episode
    return Session(
        conversation_id=projection.conversation_id,
        deployment=projection.deployment,
        model=projection.model,
        axis_id=projection.axis_id,
        turn=projection.turn,
        projection=projection.projection,
        outcome=step.outcome,
        time=_seconds(projection, state),
        started=state.started,
        responses=_responses(state),
        z=state.z,
        risk=state.risk if state.z is not None else None,
        lowest_z=state.lowest_z,
        highest_risk=state.highest_risk,
        truncated=state.truncated,
        episode_id=episode.id if episode else None,
        kind=episode.kind if episode else None,
        severity=episode.severity if episode else None,
    )


def _point(projection: Projection, step: Step) -> TrajectoryPoint:
    coordinates = projection.coordinates
    first, second = coordinates.get("pc1"), coordinates.get("pc2")
    return TrajectoryPoint(
        number=_responses(step.state),
        time=_seconds(projection, step.state),
        turn=projection.turn,
        projection=projection.projection,
        held=projection.held,
        outcome=step.outcome,
        z=step.z,
        risk=step.risk,
        place=(first, second) if first is not None and second is not None else None,
    )


def _seconds(projection: Projection, state: ConversationState) -> float:
    """The response's event time, without reading it again where the fold has just done so."""
    return state.folded_time if state.outcome == "folded" else projection.event_time.timestamp()
