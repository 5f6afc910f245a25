"""One conversation's trajectory in words, and as a line of block letters. Pure: points in, text out.

It knows the points that a store keeps, and no alert. All readings are z: standard deviations above the mean of the
deployment's healthy responses, so 0 is what is usual, and low is drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from monitor.events import Finding
from monitor.store.store import TrajectoryPoint

__all__ = ["signed", "sparkline", "story"]

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24
LOW, HIGH = -4.0, 1.0  # what every sparkline spans at least, so that a calm conversation looks calm
LOWEST, HIGHEST = -12.0, 6.0  # beyond these, it is drawn at the edge
STEADY = 1.0  # less than this, in z, is no fall to speak of
SUDDEN = 0.6  # a step that makes up this share of the fall is the fall
MEASURE = "where 0 is this deployment's healthy mean"


class _Judged(NamedTuple):
    turn: int
    z: float


def story(points: Sequence[TrajectoryPoint], finding: Finding | None = None) -> str:
    """How the conversation came to where it is, in one plain sentence without a name in it.

    Args:
        points: its trajectory, in log order; the part since the last turn 0 is told.
        finding: what there is to be told. A fleet shift has no points, and a dip is not seen in them.
    """
    if finding is not None and finding.kind == "fleet_shift":
        return _fleet(finding.value)
    judged = _judged(points)
    if not judged:
        return "No response of this conversation has been judged."
    first, last = judged[0], judged[-1]
    if len(judged) == 1:
        said = f"The only judged response, turn {last.turn}, reads {signed(last.z)} standard deviations, {MEASURE}"
    else:
        turns = [point.turn for point in judged]
        said = (
            f"Over {len(judged)} judged responses, turns {min(turns)} to {max(turns)}, the reading "
            f"{_course(judged, first, last)}, {MEASURE}"
        )
    if finding is not None and finding.statistic == "dip":
        said += f"; one passage of turn {finding.turn} reads {signed(-finding.value)}"
    held = points[-1].held
    if held >= 0.005:
        said += f"; capping moved {held:.0%} of the last response's tokens".replace("%", " %")
    return f"{said}."


def sparkline(points: Sequence[TrajectoryPoint], width: int = WIDTH) -> str:
    """The same trajectory, a block letter for each response, oldest first; high is healthy. Empty where none is judged.

    Where there are more than `width`, each letter stands for the lowest of a stretch.
    """
    values = [point.z for point in _judged(points)]
    count = min(width, len(values))
    if not count:
        return ""
    edges = [i * len(values) // count for i in range(count + 1)]
    lows = [min(max(min(values[start:end]), LOWEST), HIGHEST) for start, end in pairwise(edges)]
    bottom, top = min(LOW, *lows), max(HIGH, *lows)
    return "".join(BLOCKS[round((low - bottom) / (top - bottom) * (len(BLOCKS) - 1))] for low in lows)


def signed(value: float) -> str:
    """One decimal and a sign, with the minus of print; nothing before a zero."""
    text = f"{value:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def _judged(points: Sequence[TrajectoryPoint]) -> list[_Judged]:
    """The responses that were folded, from the last beginning on."""
    folded = [_Judged(point.turn, point.z) for point in points if point.z is not None]
    begins = max((i for i, point in enumerate(folded) if point.turn == 0), default=0)
    return folded[begins:]


def _course(judged: list[_Judged], first: _Judged, last: _Judged) -> str:
    """The deepest fall, the lowest point and the end, as far as each adds something."""
    low, high = min(judged, key=lambda point: point.z), max(judged, key=lambda point: point.z)
    peaks = list(accumulate(judged, _higher))
    peak, trough = max(zip(peaks, judged, strict=True), key=lambda pair: pair[0].z - pair[1].z)
    fall = peak.z - trough.z
    if fall < STEADY:
        if high.z - low.z < STEADY:
            if signed(low.z) == signed(high.z):
                return f"stayed at {signed(low.z)} standard deviations"
            return f"stayed between {signed(low.z)} and {signed(high.z)} standard deviations"
        return f"rose from {signed(first.z)} to {signed(last.z)} standard deviations"
    start, end = judged.index(peak), judged.index(trough)
    before, after = max(pairwise(judged[start : end + 1]), key=lambda pair: pair[0].z - pair[1].z)
    if before.z - after.z >= SUDDEN * fall:
        said = f"fell from {signed(before.z)} to {signed(after.z)} standard deviations between turns {before.turn} and "
        said += f"{after.turn}"
        reached = after
    else:
        said = f"sank from {signed(peak.z)} to {signed(trough.z)} standard deviations between turns {peak.turn} and "
        said += f"{trough.turn}"
        reached = trough
    if low.z < reached.z and low is not last:
        said += f", was lowest in turn {low.turn} at {signed(low.z)}"
    if last is reached:
        return said
    if last is low:
        return f"{said}, and is lowest now at {signed(last.z)}"
    if last.z - low.z >= max(STEADY, fall / 2.0):
        return f"{said}, and came back to {signed(last.z)}"
    return f"{said}, and stands at {signed(last.z)}"


def _higher(peak: _Judged, point: _Judged) -> _Judged:
    return point if point.z >= peak.z else peak


def _fleet(fall: float) -> str:
    way = "fell" if fall >= 0.0 else "rose"
    return (
        f"The mean of all responses of this deployment {way} by {abs(fall):.1f} standard deviations and stayed there."
    )
