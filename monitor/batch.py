"""A batch of records, folded: pure functions between reading and committing.

They know the fold and the shape of a commit, but no log and no store. Poison is a record that can't be decoded, that
lies under another conversation's key, or that the fold can't take: it is set aside with a reason, and never stops the
line unless most records are poison.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step
from monitor.errors import EventError
from monitor.events import Projection, decode_projection
from monitor.store.store import Commit, Position, Session, TrajectoryPoint
from monitor.stream.log import Message, Record

__all__ = [
    "Fold",
    "Folded",
    "Poison",
    "decode",
    "fold_batch",
    "fold_one",
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


class Poison(NamedTuple):
    """Why a record can't be folded: `reason` is one of a few words, `detail` may quote the record's content."""

    reason: str
    detail: str


class Folded(NamedTuple):
    """What a batch came to, before anything of it is written.

    Attributes:
        offset: the next offset to read.
        steps: responses and what they did, in log order.
        dead: poison, in log order.
        states: new state of every conversation that had a response.
        poison: for the last 200 records up to here, whether each was poison.
    """

    offset: int
    steps: list[tuple[Projection, Step]]
    dead: list[tuple[Record, Poison]]
    states: dict[str, ConversationState]
    poison: tuple[bool, ...]


def decode(record: Record) -> Projection | Poison:
    """The response in a record, or why there is none."""
    try:
        projection = decode_projection(record.value)
    except EventError as error:
        return Poison("undecodable", error.problem)
    if projection.conversation_id != record.key:
        # Kafka places a record by its key: under a foreign key a conversation would be split without a word.
        return Poison("wrong_key", "the record's key is not its conversation_id")
    return projection


def mostly_poison(poison: Collection[bool]) -> bool:
    """Whether so much of the last 200 records is poison that the fault is likely ours, or a whole producer's."""
    return len(poison) >= POISON_LEAST and sum(poison) > POISON_SHARE * len(poison)


def fold_batch(
    decoded: Sequence[tuple[Record, Projection | Poison]],
    states: Mapping[str, ConversationState],
    poison: Sequence[bool],
    config: DetectorConfig,
    fold: Fold,
) -> Folded:
    """Fold the records in order, starting from `states`; stop early, behind the record that makes it mostly poison."""
    steps: list[tuple[Projection, Step]] = []
    dead: list[tuple[Record, Poison]] = []
    changed: dict[str, ConversationState] = {}
    recent = deque(poison, maxlen=POISON_WINDOW)
    offset = decoded[0][0].offset
    for record, event in decoded:
        verdict: Step | Poison
        if isinstance(event, Poison):
            verdict = event
        else:
            key = event.conversation_id
            verdict = fold_one(changed[key] if key in changed else states.get(key), event, config, fold)
        offset = record.offset + 1
        recent.append(isinstance(verdict, Poison))
        if isinstance(verdict, Poison):
            dead.append((record, verdict))
            if mostly_poison(recent):
                break
        elif isinstance(event, Projection):
            changed[event.conversation_id] = verdict.state
            steps.append((event, verdict))
    return Folded(offset, steps, dead, changed, tuple(recent))


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


def to_commit(folded: Folded, *, topic: str, partition: int, topic_id: str, expected: Position | None) -> Commit:
    """Everything that a batch came to, for one transaction."""
    sessions: dict[str, Session] = {}
    points: dict[str, list[TrajectoryPoint]] = {}
    for projection, step in folded.steps:
        if step.outcome != "duplicate":
            sessions[projection.conversation_id] = _session(projection, step)
            points.setdefault(projection.conversation_id, []).append(_point(projection, step))
    counts = Counter[str](step.outcome for _, step in folded.steps)
    if folded.dead:
        counts[DEAD_LETTER] = len(folded.dead)
    return Commit(
        topic=topic,
        partition=partition,
        topic_id=topic_id,
        expected=expected,
        offset=folded.offset,
        states={key: msgspec.json.encode(state) for key, state in folded.states.items()},
        sessions=list(sessions.values()),
        points=points,
        findings=[finding for _, step in folded.steps for finding in step.findings],
        counts=dict(counts),
    )


def to_dead_letter(record: Record, poison: Poison) -> Message:
    """The poison as it goes to the dead letters: its bytes untouched, its place as the key, the reason beside it."""
    return Message(
        key=f"{record.topic}/{record.partition}/{record.offset}",
        value=record.value,
        headers=(
            ("reason", poison.reason.encode()),
            ("detail", poison.detail[:_DETAIL_LENGTH].encode(errors="replace")),
            ("key", record.key.encode()),
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
        time=projection.time,
        responses=_responses(state),
        z=state.recent[-1] if state.recent else None,
        risk=state.risk if state.recent else None,
        episode_id=episode.id if episode else None,
        kind=episode.kind if episode else None,
        severity=episode.severity if episode else None,
    )


def _point(projection: Projection, step: Step) -> TrajectoryPoint:
    return TrajectoryPoint(
        number=_responses(step.state),
        projection_id=projection.id,
        time=projection.time,
        turn=projection.turn,
        projection=projection.projection,
        held=projection.held,
        outcome=step.outcome,
        z=step.z,
        risk=step.risk,
        coordinates=projection.coordinates,
    )
