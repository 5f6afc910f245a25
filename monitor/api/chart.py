"""The geometry of the page's two pictures of one conversation: numbers in, places on a canvas out. Pure.

It knows no page and no colour. A canvas has its origin at the top left, y downwards. Risk is what both have in common:
the largest statistic over its warning boundary, so that the boundary lies at 1 whatever judged the conversation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from monitor.drawing import Scale
from monitor.events import Finding
from monitor.store.store import TrajectoryPoint

__all__ = ["Bar", "Chart", "Dot", "Span", "Spark", "chart_of", "episodes", "spark_of", "spark_top"]

LOWEST, HIGHEST = -12.0, 6.0  # z beyond this is drawn at the edge
MOST_RISK = 6.0
SPARK_POINTS = 60


class Spark(NamedTuple):
    """A small line of risk, the boundary, and where it ends."""

    width: float
    height: float
    line: str
    boundary: float
    last: tuple[float, float]


class Dot(NamedTuple):
    """One response: its place, and the severity of what was found there, or `plain`."""

    x: float
    y: float
    sort: str


class Bar(NamedTuple):
    """One response's risk. `inside` is below the warning boundary; beyond it, what had been found by then."""

    x: float
    y: float
    width: float
    height: float
    sort: str


class Span(NamedTuple):
    """One episode."""

    x: float
    width: float
    sort: str


class Chart(NamedTuple):
    """z above, risk below, one shared axis of turns.

    Attributes:
        left, right, top, bottom: of the upper panel.
        ceiling, floor: of the lower one.
        line: polyline of z.
        zero, band: y of the healthy mean, and of one standard deviation above and below it.
        boundary: y of risk 1.
        z_ticks, turn_ticks: place and label.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    ceiling: float
    floor: float
    line: str
    dots: list[Dot]
    bars: list[Bar]
    spans: list[Span]
    zero: float
    band: tuple[float, float]
    boundary: float
    z_ticks: list[tuple[float, str]]
    turn_ticks: list[tuple[float, str]]


def spark_top(trajectories: Sequence[Sequence[TrajectoryPoint]]) -> float:
    """The risk at the upper edge of all small lines of one page, so that they can be compared."""
    highest = max((point.risk or 0.0 for points in trajectories for point in points), default=0.0)
    return min(MOST_RISK, max(1.6, highest)) * 1.06


def spark_of(points: Sequence[TrajectoryPoint], top: float, width: float = 132.0, height: float = 34.0) -> Spark | None:
    """The newest responses' risk; None where nothing was judged."""
    risks = [point.risk for point in points if point.risk is not None][-SPARK_POINTS:]
    if not risks:
        return None
    across = Scale(0.0, max(len(risks) - 1.0, 1.0), 3.0, width - 5.0)
    rise = Scale(0.0, top, height - 3.0, 3.0)
    places = [(across(i), rise(risk)) for i, risk in enumerate(risks)]
    if len(places) == 1:
        places = [(3.0, places[0][1]), (width - 5.0, places[0][1])]
    return Spark(width, height, _line(places), rise(1.0), places[-1])


def chart_of(
    points: Sequence[TrajectoryPoint], findings: Sequence[Finding], width: float, height: float = 300.0
) -> Chart | None:
    """The picture of a conversation, in so many units; None where nothing of it was judged.

    Args:
        points: in log order.
        findings: newest first, as the store gives them.
    """
    shown = [(point, point.z, point.risk) for point in points if point.z is not None and point.risk is not None]
    if not shown:
        return None
    left, right, top, bottom, ceiling, floor = 34.0, width - 6.0, 20.0, 166.0, 202.0, height - 36.0
    values = [z for _, z, _ in shown]
    low, high = max(LOWEST, min(*values, -2.0) - 0.4), min(HIGHEST, max(*values, 1.6) + 0.4)
    down = Scale(low, high, bottom, top)
    half = (right - left) / (2 * len(shown))
    across = Scale(-0.5, len(shown) - 0.5, left, right)
    highest = min(MOST_RISK, max(1.5, *(risk for _, _, risk in shown))) * 1.08
    rise = Scale(0.0, highest, floor, ceiling)
    found = {finding.turn: finding.severity for finding in reversed(findings)}
    critical = critical_turns(findings)
    dots, bars = [], []
    wide = max(1.0, min(24.0, 1.4 * half))
    for i, (point, z, risk) in enumerate(shown):
        sort = found.get(point.turn, "plain") if point.outcome == "folded" else "plain"
        dots.append(Dot(across(i), down(z), sort))
        y = rise(risk)
        worst = "critical" if any(first <= point.turn <= last for first, last in critical) else "warning"
        over = "inside" if risk < 1.0 else worst
        bars.append(Bar(round(across(i) - wide / 2, 1), y, round(wide, 1), round(max(1.0, floor - y), 1), over))
    turns = [point.turn for point, _, _ in shown]
    spans = []
    for first, last, sort in episodes(findings):
        inside = [i for i, turn in enumerate(turns) if first <= turn and (last is None or turn <= last)]
        if inside:
            start, end = across(inside[0]) - half, across(inside[-1]) + half
            spans.append(Span(round(start, 1), round(end - start, 1), sort))
    step = next(step for step in (1, 2, 4, 8) if (high - low) / step <= 7)
    every = max(1, math.ceil(len(shown) * 34.0 / (right - left)))
    return Chart(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        ceiling=ceiling,
        floor=floor,
        line=_line([(dot.x, dot.y) for dot in dots]),
        dots=dots,
        bars=bars,
        spans=spans,
        zero=down(0.0),
        band=(down(1.0), down(-1.0)),
        boundary=rise(1.0),
        z_ticks=[
            (down(value), f"{value:+d}".replace("+0", "0").replace("-", "−"))
            for value in range(math.ceil(low), math.floor(high) + 1)
            if value % step == 0
        ],
        turn_ticks=[(dots[i].x, str(turns[i])) for i in range(0, len(dots), every)],
    )


def episodes(findings: Sequence[Finding]) -> list[tuple[int, int | None, str]]:
    """First turn, last turn and highest severity of each episode, oldest first; the last turn is None while it is open.

    Args:
        findings: newest first.
    """
    found: dict[str, tuple[int, int | None, str]] = {}
    for finding in reversed(findings):
        if finding.kind == "recovered":
            first, _, sort = found.get(finding.episode_id, (finding.turn, None, "warning"))
            found[finding.episode_id] = first, finding.turn, sort
        elif finding.episode_id not in found:
            found[finding.episode_id] = finding.turn, None, finding.severity
        elif finding.severity == "critical":
            first, last, _ = found[finding.episode_id]
            found[finding.episode_id] = first, last, "critical"
    return list(found.values())


def critical_turns(findings: Sequence[Finding]) -> list[tuple[int, float]]:
    """From which turn to which each episode was critical; without end while it is open. `findings`: newest first."""
    ends = {one.episode_id: float(one.turn) for one in findings if one.kind == "recovered"}
    begins = {one.episode_id: one.turn for one in findings if one.severity == "critical"}
    return [(turn, ends.get(episode, math.inf)) for episode, turn in begins.items()]


def _line(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
