"""Which conversations stand worst just now: the open episodes and the riskiest, of the last half hour. Bounded memory.

It knows what one worker has folded, and no store and no instrument: to ask the store, in which a week lies, would cost
more, the more conversations have drifted. After a restart a conversation is missing until its next response.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import NamedTuple

from monitor.detect.conversation import ConversationState
from monitor.events import Severity

__all__ = ["RECENT_SECONDS", "Standing", "Standings"]

RECENT_SECONDS = 1800.0
MOST = 20_000


class Standing(NamedTuple):
    """One conversation after its last judged response.

    Attributes:
        risk: largest statistic over its warning boundary.
        time: event time of that response, seconds since 1970.
        severity: of the open episode; None when none is open.
    """

    partition: int
    conversation_id: str
    deployment: str
    risk: float
    time: float
    severity: Severity | None


class Standings:
    """All of one worker. When there are too many, the calmest half is forgotten; so the worst are always here.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._all: dict[str, Standing] = {}

    def __len__(self) -> int:
        return len(self._all)

    def see(self, partition: int, conversation_id: str, state: ConversationState) -> None:
        """Take in a conversation whose last response was judged."""
        severity = state.episode.severity if state.episode else None
        self._all[conversation_id] = Standing(
            partition, conversation_id, state.deployment, state.risk, state.folded_time, severity
        )
        if len(self._all) > self._most:
            kept = heapq.nlargest(self._most // 2, self._all.values(), key=_badness)
            self._all = {one.conversation_id: one for one in kept}

    def leave(self, partition: int) -> None:
        """Forget what lies in a partition: it is another worker's now."""
        self._all = {key: one for key, one in self._all.items() if one.partition != partition}

    def forget_before(self, time: float) -> None:
        """Forget those that have been silent since before an event time, seconds since 1970."""
        self._all = {key: one for key, one in self._all.items() if one.time >= time}

    def riskiest(self, count: int) -> list[Standing]:
        """The riskiest first; among equals by id."""
        return heapq.nsmallest(count, self._all.values(), key=lambda one: (-one.risk, one.conversation_id))

    def open_episodes(self) -> Counter[tuple[str, Severity]]:
        """How many there are, by deployment and severity."""
        return Counter((one.deployment, one.severity) for one in self._all.values() if one.severity is not None)


def _badness(one: Standing) -> tuple[bool, float]:
    return one.severity is not None, one.risk
