"""The responses of conversations named on the command line: logs through the witness, or recorded ones as they are.

It knows readers, witness and shards, and nothing of what is made of the responses. Recorded responses need no model, so
torch is imported only where text is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from monitor.batch import Poison
from monitor.events import Projection
from monitor.recorded import read_events

__all__ = ["Measured", "Unread", "logged_responses", "recorded_responses"]

Unread = Callable[[str, int, str], None]


class Measured(NamedTuple):
    """One response: which conversation it belongs to, who held that, and what was measured.

    Attributes:
        conversation: unique also where a log repeats its conversation ids.
        user: where the log says so.
        projection: the response.
    """

    conversation: str
    user: str | None
    projection: Projection


def logged_responses(
    paths: Sequence[str],
    work: Path,
    *,
    model: str,
    bundle: str,
    dtype: str = "float32",
    device: str | None = None,
    deployment: str | None = None,
    unread: Unread = lambda *_: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Measured]:
    """Score logs, in their order; what is in `work` already is not scored again.

    Args:
        unread: told of each record or turn that can't be scored: file, record, reason.
        progress: told of bytes done and bytes in all.

    Raises:
        AnchorwatchError: as `score_logs` does.
    """
    from collectors.logs import log_files
    from collectors.shards import score_logs
    from collectors.witness import load_witness

    witness = functools.partial(load_witness, model, bundle, dtype=dtype, device=device)
    shards = score_logs(
        log_files(paths),
        work,
        witness,
        deployment=deployment,
        progress=lambda so_far: progress(so_far.bytes_read, so_far.bytes_total or so_far.bytes_read),
    )
    seen: dict[str, int] = {}
    for shard in shards:
        for one in shard.skipped:
            unread(one.source, one.record, one.reason)
        projections = iter(shard.projections)
        following = next(projections, None)
        for origin in shard.origins:
            id = origin.conversation_id
            number = seen[id] = seen.get(id, 0) + 1
            last = -1
            # A shard's projections are in the order of its origins; of equal neighbours the turns start again.
            while following is not None and following.conversation_id == id and following.turn > last:
                yield Measured(id if number == 1 else f"{id}#{number}", origin.user, following)
                last, following = following.turn, next(projections, None)


def recorded_responses(
    places: Sequence[str], *, unread: Unread = lambda *_: None, progress: Callable[[int, int], None] = lambda *_: None
) -> Iterator[Measured]:
    """Responses from topics, dumps and folders of audits, in log order.

    Args:
        unread: told of each record that is no projection: place, record, reason.
        progress: told of how much of how much of a place has been read.

    Raises:
        ConfigurationError, LogError: as `read_events` does.
    """
    for place in places:
        for record in read_events(place, progress):
            if isinstance(record.event, Poison):
                unread(record.source, record.record, record.event.detail)
            else:
                yield Measured(record.event.conversation_id, None, record.event)
