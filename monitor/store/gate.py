"""Who may not commit, and what they are told: the same words whatever the backend. It knows no backend."""

from __future__ import annotations

from monitor.errors import CommitRefused, StoreError
from monitor.store.store import Commit

__all__ = ["another_log", "refused"]


def refused(what: str, stored: object, expected: object) -> CommitRefused:
    """Somebody else has moved what this commit would move."""
    return CommitRefused(
        f"{what} stands at {stored}, this worker expected {expected}",
        cure="nothing to do: the worker reads the position again and goes on. If it keeps happening, two workers "
        "serve one partition: stop one of them",
    )


def another_log(batch: Commit, *, topic_id: str, partitions: int) -> StoreError | None:
    """What is wrong where the store was folded from another log than the batch: its topic's id and its number of
    partitions are compared where both sides know them."""
    if topic_id and batch.topic_id and topic_id != batch.topic_id:
        return StoreError(
            f"the store was folded from another log than the one that now holds {batch.topic}",
            cure="point ANCHORWATCH_LOG_URL back at the old log, or move the store aside: it is rebuilt from this log",
        )
    if partitions and batch.partitions and partitions != batch.partitions:
        return StoreError(
            f"{batch.topic} had {partitions} partitions when the store was folded, and has {batch.partitions} now: "
            "conversations would be split between them",
            cure="let the conversations of the old partitions end in the old store, and fold the new ones into a new "
            "store (ANCHORWATCH_STORE_URL): it is rebuilt from the log",
        )
    return None
