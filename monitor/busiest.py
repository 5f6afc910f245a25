"""Which names have a label of their own: the busiest of late, a bounded number; the others share one. Pure, no clock.

It knows no instrument. A counter must not lose what it has counted, so who has a label is decided when something is
counted, not when it is read; whoever drops out is named, and its series can be taken away.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["OTHER", "Busiest"]

OTHER = "other"
ELECTION = 1_000  # counted between two elections
HALF_LIFE = 100  # elections after which a count weighs half
FACTOR = 2.0  # who comes in must be so much busier than who goes out, or both would flap


class _Seen(NamedTuple):
    """How often a name was seen, and how much of that may have been another's."""

    times: float
    error: float


class Busiest:
    """Gives each name its label. Until there are too many each is its own; then the busiest are.

    Counts are those of a Space-Saving sketch (Metwally, Agrawal and El Abbadi 2005) of four times as many names: memory
    is bounded however many names there are, and a storm of names that come once takes no label from anybody.

    Args:
        most: how many names have a label of their own at once, beside `other`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._shown: set[str] = set()
        self._seen: dict[str, _Seen] = {}
        self._until_election = ELECTION
        self._elections = 0

    def count(self, name: str, times: int = 1) -> str:
        """Note that a name was seen, and say under which label to count it."""
        self._until_election -= times
        self._note(name, times)
        if name not in self._shown:
            if len(self._shown) >= self._most:
                return OTHER
            self._shown.add(name)
        return name

    def label(self, name: str) -> str:
        """The label of a name, without counting it."""
        return name if name in self._shown else OTHER

    def elect(self) -> set[str]:
        """Give labels to those who have become busiest, if it is time to; says who has lost theirs.

        Call it when the series of those can be taken away, before the next `count`.
        """
        if self._until_election > 0:
            return set()
        self._until_election = ELECTION
        self._elections += 1
        if self._elections % HALF_LIFE == 0:
            self._seen = {name: _Seen(seen.times / 2, seen.error / 2) for name, seen in self._seen.items()}
        coming = sorted((name for name in self._seen if name not in self._shown), key=self._sure, reverse=True)
        going = sorted(self._shown, key=self._sure)
        lost = set()
        for new, old in zip(coming, going, strict=False):
            if self._sure(new) <= max(FACTOR * self._sure(old), 1.0):
                break
            self._shown.remove(old)
            self._shown.add(new)
            lost.add(old)
        return lost

    def _note(self, name: str, times: int) -> None:
        seen = self._seen.get(name)
        if seen is not None:
            self._seen[name] = _Seen(seen.times + times, seen.error)
        elif len(self._seen) < 4 * self._most:
            self._seen[name] = _Seen(times, 0.0)
        else:
            least = min(self._seen, key=lambda one: self._seen[one].times)
            error = self._seen.pop(least).times
            self._seen[name] = _Seen(error + times, error)

    def _sure(self, name: str) -> float:
        seen = self._seen.get(name)
        return 0.0 if seen is None else seen.times - seen.error
