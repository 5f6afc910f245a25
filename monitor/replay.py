"""A replay: every record of a topic folded again from its beginning, to the same findings, byte for byte.

It writes nothing: not to the store, not to the dead letters. The records of a partition are judged by the calibration
that was in force at their place, as the worker that saw them live judged them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from monitor.batch import decode, fold_batch, misplaced
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, step
from monitor.events import Finding, Projection
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["Replayed", "replay"]

BATCH = 2000


class Replayed(NamedTuple):
    """What a stretch of one partition came to. `dead` counts poison by reason; `done` and `total` count offsets."""

    partition: int
    findings: list[Finding]
    outcomes: dict[str, int]
    dead: dict[str, int]
    done: int
    total: int


def replay(
    log: Log,
    config: DetectorConfig,
    *,
    topic: str = PROJECTIONS,
    recorded: Callable[[int, int], DetectorConfig | None] | None = None,
) -> Iterator[Replayed]:
    """Fold each partition from the first record that the log still holds up to where it ends now.

    States of one partition's conversations are held in memory, about 1 KiB each.

    Args:
        log: what is read.
        config: the calibration where neither a control record nor `recorded` says which was in force.
        topic: which topic.
        recorded: given partition and offset, the calibration that operators had put into force there.

    Raises:
        LogUnavailable, LogError: as the log does.
    """
    partitions = log.partitions(topic)
    spans = [log.span(topic, partition) for partition in range(partitions)]
    total, done = sum(span.end - span.begin for span in spans), 0
    for partition, span in enumerate(spans):
        in_force = (recorded(partition, span.begin) if recorded else None) or config
        states: dict[str, ConversationState] = {}
        offset = span.begin
        while offset < span.end and (records := log.read(topic, partition, offset, min(BATCH, span.end - offset))):
            decoded = [(record, decode(record)) for record in records]
            new = {
                event.conversation_id
                for _, event in decoded
                if isinstance(event, Projection) and event.conversation_id not in states
            }
            # Poison pauses a worker so that somebody looks; a replay is somebody looking, and goes on.
            left = decoded
            findings: list[Finding] = []
            outcomes: dict[str, int] = {}
            dead: dict[str, int] = {}
            while left:
                folded = fold_batch(left, states, (), in_force, step, misplaced(new, partition, partitions))
                states.update(folded.states)
                in_force = folded.config or in_force
                findings += [finding for _, result in folded.steps for finding in result.findings]
                for _, result in folded.steps:
                    outcomes[result.outcome] = outcomes.get(result.outcome, 0) + 1
                for _, poison in folded.dead:
                    dead[poison.reason] = dead.get(poison.reason, 0) + 1
                left = [(record, event) for record, event in left if record.offset >= folded.offset]
            done += records[-1].offset + 1 - offset
            offset = records[-1].offset + 1
            yield Replayed(partition, findings, outcomes, dead, done, total)
