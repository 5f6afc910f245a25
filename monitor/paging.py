"""Whether a pending finding becomes part of an alert, waits, or is only kept. Pure: time and all that is known are
passed in.

It knows no channel and no store, and nothing of silences: those are about alerts. A finding is young while it is not
older than `max_age`; only young ones open an alert as they come. An old one means that a worker catches up, after a
wipe or a long stop: it does so only where its episode turns out to be still open at the end, in a conversation that
still goes on. What belongs to an alert that there is, is part of it however old it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from monitor.events import Finding
from monitor.store.store import Pending, Session

__all__ = ["Decision", "Known", "Reason", "decide"]

Reason: TypeAlias = Literal[
    "new",  # take
    "same_episode",  # take
    "still_open",  # take
    "catching_up",  # wait
    "forgetting",  # wait
    "known",  # keep
    "weak_identity",  # keep
    "never_alerted",  # keep
    "over",  # keep
]
_ACTS: dict[Reason, Literal["take", "wait", "keep"]] = {
    "new": "take",
    "same_episode": "take",
    "still_open": "take",
    "catching_up": "wait",
    "forgetting": "wait",
}
UNSURE = {"weak", "unlinked"}


class Decision(NamedTuple):
    """What becomes of one finding, and why in one word. Kept means: in the store, and nobody is told."""

    pending: Pending
    reason: Reason

    @property
    def act(self) -> Literal["take", "wait", "keep"]:
        """What to do with it."""
        return _ACTS.get(self.reason, "keep")


class Known(NamedTuple):
    """What the decision rests on.

    Attributes:
        now: wall clock, seconds since 1970.
        max_age: seconds; a finding that is older by its event time is old.
        taken: whether a finding of this id is part of an alert already.
        episodes: ids of the episodes that have an alert, over or not.
        forgetting: conversations that are about to be deleted.
        behind: whether the partition of a conversation still catches up; for the empty id, whether any does.
        session: a conversation as it is now.
    """

    now: float
    max_age: float
    taken: Callable[[str], bool]
    episodes: Collection[str]
    forgetting: Collection[str]
    behind: Callable[[str], bool]
    session: Callable[[str], Session | None]


def decide(pending: Sequence[Pending], known: Known) -> list[Decision]:
    """One decision for each, in order. Sessions are asked for only where the decision hangs on them.

    Sessions must be read after the pending findings: both are written in one commit, so that an episode which is open
    in the session has no recovery among what was pending.
    """
    decisions = []
    begun: set[str] = set()
    for one in pending:
        decision = Decision(one, _reason(one.finding, known, begun))
        if decision.act == "take":
            begun.add(one.finding.episode_id)
        decisions.append(decision)
    return decisions


def _reason(finding: Finding, known: Known, begun: Collection[str]) -> Reason:
    if finding.conversation_id in known.forgetting:
        return "forgetting"
    if known.taken(finding.id):
        return "known"
    if finding.identity in UNSURE:
        return "weak_identity"
    if finding.episode_id in begun or finding.episode_id in known.episodes:
        # However old: somebody has been called, and waits for the end of it.
        return "same_episode"
    if finding.kind == "recovered":
        return "never_alerted"
    if known.now - _seconds(finding.time) <= known.max_age:
        return "new"
    session = known.session(finding.conversation_id) if finding.conversation_id else None
    if session is None or session.episode_id != finding.episode_id:
        return "over"  # an episode never opens again, so there is nothing to wait for
    if known.behind(finding.conversation_id):
        return "catching_up"
    if known.now - session.time > known.max_age:
        return "over"  # most people whose conversation drifts just leave: such an episode stays open for ever
    return "still_open"


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
