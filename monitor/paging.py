"""Whether a pending finding is told to people, waits, or is only kept. Pure: time and all that is known are passed in.

It knows no channel and no store. A finding is young while it is not older than `max_age`; only young ones page as they
come. An old one means that a worker catches up, after a wipe or a long stop: it pages only where its episode turns out
to be still open at the end, in a conversation that still goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from monitor.actions import Silence
from monitor.events import Finding
from monitor.store.store import Pending, Session

__all__ = ["Decision", "Known", "Reason", "decide"]

Reason: TypeAlias = Literal[
    "new",  # tell
    "recovered",  # tell
    "still_open",  # tell
    "catching_up",  # wait
    "forgetting",  # wait
    "silenced",  # wait
    "told",  # keep
    "acknowledged",  # keep
    "weak_identity",  # keep
    "never_told",  # keep
    "over",  # keep
]
_ACTS: dict[Reason, Literal["tell", "wait", "keep"]] = {
    "new": "tell",
    "recovered": "tell",
    "still_open": "tell",
    "catching_up": "wait",
    "forgetting": "wait",
    "silenced": "wait",
}
UNSURE = {"weak", "unlinked"}


class Decision(NamedTuple):
    """What becomes of one finding, and why in one word. Kept means: in the store, and nobody is told."""

    pending: Pending
    reason: Reason

    @property
    def act(self) -> Literal["tell", "wait", "keep"]:
        """What to do with it."""
        return _ACTS.get(self.reason, "keep")


class Known(NamedTuple):
    """What the decision rests on.

    Attributes:
        now: wall clock, seconds since 1970.
        max_age: seconds; a finding that is older by its event time is old.
        told: ids of findings that have been told.
        told_episodes: ids of episodes of which something has been told.
        acknowledged: ids of findings that somebody has seen.
        silences: those that are in force.
        forgetting: conversations that are about to be deleted.
        behind: whether the partition of a conversation still catches up; for the empty id, whether any does.
        session: a conversation as it is now.
    """

    now: float
    max_age: float
    told: Collection[str]
    told_episodes: Collection[str]
    acknowledged: Collection[str]
    silences: Sequence[Silence]
    forgetting: Collection[str]
    behind: Callable[[str], bool]
    session: Callable[[str], Session | None]


def decide(pending: Sequence[Pending], known: Known) -> list[Decision]:
    """One decision for each, in order. Sessions are asked for only where the decision hangs on them.

    Sessions must be read after the pending findings: both are written in one commit, so that an episode which is open
    in the session has no recovery among what was pending.
    """
    decisions = []
    told_episodes = set(known.told_episodes)
    for one in pending:
        decision = Decision(one, _reason(one.finding, known, told_episodes))
        if decision.act == "tell":
            told_episodes.add(one.finding.episode_id)
        decisions.append(decision)
    return decisions


def _reason(finding: Finding, known: Known, told_episodes: Collection[str]) -> Reason:
    if finding.conversation_id in known.forgetting:
        return "forgetting"
    if finding.id in known.told:
        return "told"
    if finding.id in known.acknowledged:
        return "acknowledged"
    if finding.identity in UNSURE:
        return "weak_identity"
    if finding.kind == "recovered":
        # However old: somebody has been called, and waits for the end of it.
        return "recovered" if finding.episode_id in told_episodes else "never_told"
    silenced = any(silence.matches(finding) for silence in known.silences)
    if known.now - _seconds(finding.time) <= known.max_age and not silenced:
        return "new"
    session = known.session(finding.conversation_id) if finding.conversation_id else None
    if session is None or session.episode_id != finding.episode_id:
        return "over"  # an episode never opens again, so there is nothing to wait for
    if known.behind(finding.conversation_id):
        return "catching_up"
    if known.now - session.time > known.max_age:
        return "over"  # most people whose conversation drifts just leave: such an episode stays open for ever
    return "silenced" if silenced else "still_open"


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
