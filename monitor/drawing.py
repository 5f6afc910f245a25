"""The geometry of a report's pictures: numbers in, places on a canvas out. Pure, and it knows no file, page or colour.

A canvas has its origin at the top left, y downwards, in units that a picture is free to scale. Every picture is
bounded, however long a conversation is: beyond `MOST_POINTS` responses the lowest of each stretch stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = [
    "Label",
    "Map",
    "Mark",
    "Scale",
    "Spark",
    "Trajectory",
    "map_of",
    "reach_of",
    "spark_of",
    "thinned",
    "trajectory_of",
]

MOST_POINTS = 240
LOWEST, HIGHEST = -12.0, 6.0  # z beyond this is drawn at the edge


class Scale(NamedTuple):
    """A straight line from values to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, clipped to the ends."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


class Spark(NamedTuple):
    """A small line of z, its boundary, and the worst response."""

    width: float
    height: float
    points: str
    zero: float
    boundary: float | None
    worst: tuple[float, float]


class Mark(NamedTuple):
    """One mark: where, what sort, what it is called, and what it says when pointed at."""

    x: float
    y: float
    sort: str
    name: str
    title: str


class Trajectory(NamedTuple):
    """One conversation: z and its smoothed level above, risk below.

    Attributes:
        top, bottom: of the upper panel.
        floor, ceiling: of the lower one.
        z, level: polylines.
        dots: each response.
        spans: episodes: x, width, sort.
        bars: risk: x, y, width, height, sort.
        z_ticks, turn_ticks: place and label.
        zero, band: y of the healthy mean, and of one standard deviation above and below it, in the upper panel.
        warning, critical: y of the level's boundaries there.
        risk_lines: y and label in the lower one.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    ceiling: float
    floor: float
    z: str
    level: str
    dots: list[Mark]
    spans: list[tuple[float, float, str]]
    bars: list[tuple[float, float, float, float, str]]
    z_ticks: list[tuple[float, str]]
    turn_ticks: list[tuple[float, str]]
    zero: float
    band: tuple[float, float]
    warning: float
    critical: float
    risk_lines: list[tuple[float, str]]


class Label(NamedTuple):
    """A role's name beside its dot; the major ones have room even where letters are large."""

    x: float
    y: float
    anchor: str
    text: str
    major: bool


class Map(NamedTuple):
    """Persona space in two dimensions: roles, conversations, and which way the Assistant lies."""

    width: float
    height: float
    centre: tuple[float, float]
    roles: list[Mark]
    marks: list[Mark]
    labels: list[Label]
    arrow: tuple[float, float, float, float] | None
    beyond: int


def thinned(turns: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> list[Mapping[str, Any]]:
    """The judged responses; of many, the lowest of each of `most` equal stretches."""
    judged = [turn for turn in turns if turn["z"] is not None]
    if len(judged) <= most:
        return judged
    edges = [round(i * len(judged) / most) for i in range(most + 1)]
    return [min(judged[start:end], key=lambda turn: turn["z"]) for start, end in pairwise(edges)]


def spark_of(
    turns: Sequence[Mapping[str, Any]],
    boundary: float | None,
    worst_turn: int | None,
    reach: tuple[float, float],
    width: float = 150.0,
    height: float = 38.0,
) -> Spark | None:
    """A small line of z; None where nothing was judged. All lines of a page share `reach`, to be comparable."""
    shown = thinned(turns, 60)
    if not shown:
        return None
    across = Scale(0.0, max(len(shown) - 1.0, 1.0), 4.0, width - 4.0)
    down = Scale(*reach, height - 4.0, 4.0)
    places = [(across(i if len(shown) > 1 else 0.5), down(turn["z"])) for i, turn in enumerate(shown)]
    lowest = min(range(len(shown)), key=lambda i: (shown[i]["turn"] != worst_turn, shown[i]["z"]))
    return Spark(width, height, _line(places), down(0.0), None if boundary is None else down(-boundary), places[lowest])


def reach_of(turns: Sequence[Mapping[str, Any]], boundaries: Sequence[float]) -> tuple[float, float]:
    """Least and largest z that small lines show: nearly all of them, and every boundary."""
    values = sorted(turn["z"] for turn in turns if turn["z"] is not None)
    if not values:
        return -3.0, 1.0
    low = min(values[len(values) // 100], *(-boundary for boundary in boundaries), -1.0)
    high = max(values[len(values) - 1 - len(values) // 100], 1.0)
    return max(LOWEST, low) - 0.2, min(HIGHEST, high) + 0.2


def trajectory_of(
    turns: Sequence[Mapping[str, Any]],
    episodes: Sequence[Mapping[str, Any]],
    *,
    level_boundary: float,
    critical_factor: float,
    width: float = 520.0,
    height: float = 268.0,
) -> Trajectory | None:
    """The full picture of a conversation; None where nothing of it was judged."""
    shown = thinned(turns)
    if not shown:
        return None
    left, right, top, bottom, ceiling, floor = 34.0, width - 8.0, 8.0, 160.0, 182.0, height - 24.0
    values = [turn["z"] for turn in shown] + [-turn["level"] for turn in shown]
    low = max(LOWEST, min(*values, -level_boundary * critical_factor) - 0.4)
    high = min(HIGHEST, max(*values, 1.5) + 0.3)
    down = Scale(low, high, bottom, top)
    half = (right - left) / (2 * len(shown))
    across = Scale(-0.5, len(shown) - 0.5, left, right)
    highest = max(1.25, min(6.0, max(turn["risk"] for turn in shown)) * 1.05)
    rise = Scale(0.0, highest, floor, ceiling)
    severity = {"warning": "warning", "critical": "critical", "info": "recovered"}
    dots = [
        Mark(
            across(i),
            down(turn["z"]),
            severity.get(turn["severity"] or "", "plain"),
            str(turn["turn"]),
            f"turn {turn['turn']}: z {turn['z']:.2f}, risk {turn['risk']:.2f}"
            + (f", {turn['kind'].replace('_', ' ')}" if turn["kind"] else ""),
        )
        for i, turn in enumerate(shown)
    ]
    spans = []
    for episode in episodes:
        inside = [i for i, turn in enumerate(shown) if episode["first_turn"] <= turn["turn"] <= episode["last_turn"]]
        if inside:
            start, end = across(inside[0]) - half, across(inside[-1]) + half
            spans.append((round(start, 1), round(end - start, 1), str(episode["severity"])))
    bars = []
    for i, turn in enumerate(shown):
        y = rise(turn["risk"])
        sort = "healthy" if turn["risk"] < 1.0 else "warning" if turn["risk"] < critical_factor else "critical"
        wide = max(1.0, min(26.0, 1.5 * half))
        bars.append((round(across(i) - wide / 2, 1), y, round(wide, 1), round(max(0.0, floor - y), 1), sort))
    step = next(step for step in (1, 2, 4, 8) if (high - low) / step <= 7)
    # The uppermost label would lie on the axis's name.
    ticks = [v for v in range(math.ceil(low), math.floor(high) + 1) if v % step == 0 and down(v) > top + 15.0]
    every = max(1, math.ceil(len(shown) / 12))
    return Trajectory(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        ceiling=ceiling,
        floor=floor,
        z=_line([(dot.x, dot.y) for dot in dots]),
        level=_line([(dot.x, down(-turn["level"])) for dot, turn in zip(dots, shown, strict=True)]),
        dots=dots,
        spans=spans,
        bars=bars,
        z_ticks=[(down(value), f"{value:+d}".replace("+0", "0").replace("-", "−")) for value in ticks],
        turn_ticks=[(dots[i].x, dots[i].name) for i in range(0, len(dots), every)],
        zero=down(0.0),
        band=(down(1.0), down(-1.0)),
        warning=down(-level_boundary),
        critical=down(-level_boundary * critical_factor),
        risk_lines=[(rise(1.0), "1" if rise(1.0) > ceiling + 13.0 else "")]
        + ([(rise(critical_factor), "")] if critical_factor < highest else []),
    )


def map_of(
    roles: Mapping[str, tuple[float, float]],
    conversations: Sequence[tuple[float, float, str, str, str]],
    towards: tuple[float, float] | None,
    wanted: Sequence[str] = (),
    width: float = 640.0,
    height: float = 470.0,
) -> Map:
    """Roles as dots, conversations as marks, names where there is room.

    Args:
        roles: places; the origin is the middle of all roles.
        conversations: place, sort, name and title of each, the most important first.
        towards: direction of the Assistant Axis in this plane.
        wanted: roles to be named if they can be, besides the outermost ones.
    """
    outermost = max((max(abs(x), abs(y)) for x, y in roles.values()), default=1.0) or 1.0
    # Single responses scatter more widely than the roles' means; the few farthest must not squeeze the roles.
    edge = 1.7 * outermost
    xs = [x for x, _ in roles.values()] + [min(max(x, -edge), edge) for x, *_ in conversations]
    ys = [y for _, y in roles.values()] + [min(max(y, -edge), edge) for _, y, *_ in conversations]
    left, right, lowest, highest = (
        min(xs, default=-1.0),
        max(xs, default=1.0),
        min(ys, default=-1.0),
        max(ys, default=1.0),
    )
    unit = min((width - 40) / max(right - left, 1e-9), (height - 40) / max(highest - lowest, 1e-9))
    half_x, half_y = (width / 2 - 8) / unit, (height / 2 - 8) / unit
    middle_x, middle_y = (left + right) / 2, (lowest + highest) / 2
    across = Scale(middle_x - half_x, middle_x + half_x, 8.0, width - 8.0)
    down = Scale(middle_y - half_y, middle_y + half_y, height - 8.0, 8.0)
    dots = [Mark(across(x), down(y), "role", role, role) for role, (x, y) in sorted(roles.items())]
    marks = [Mark(across(x), down(y), sort, name, title) for x, y, sort, name, title in conversations]
    beyond = sum(not (across.low <= x <= across.high and down.low <= y <= down.high) for x, y, *_ in conversations)
    centre = (across(0.0), down(0.0))
    arrow = None
    if towards is not None and math.hypot(*towards) > 0.0:
        size = math.hypot(*towards)
        length = min(width, height) * 0.17
        arrow = (
            *centre,
            round(centre[0] + length * towards[0] / size, 1),
            round(centre[1] - length * towards[1] / size, 1),
        )
    return Map(
        width, height, centre, dots, marks, _labels(dots, marks, centre, arrow, wanted, width, height), arrow, beyond
    )


def _labels(
    dots: Sequence[Mark],
    marks: Sequence[Mark],
    centre: tuple[float, float],
    arrow: tuple[float, float, float, float] | None,
    wanted: Sequence[str],
    width: float,
    height: float,
) -> list[Label]:
    """Greedy: the outermost role of each of sixteen directions, then the wanted ones, then outer ones; none overlap."""
    sectors: dict[int, Mark] = {}
    for dot in dots:
        sector = round(math.atan2(dot.y - centre[1], dot.x - centre[0]) / math.tau * 16) % 16
        if sector not in sectors or _far(dot, centre) > _far(sectors[sector], centre):
            sectors[sector] = dot
    outer = sorted(sectors.values(), key=lambda dot: -_far(dot, centre))
    by_name = {dot.name: dot for dot in dots}
    named = [by_name[name] for name in wanted if name in by_name]
    rest = sorted(dots, key=lambda dot: -_far(dot, centre))[:30]
    order = list(dict.fromkeys([*outer, *named, *rest]))
    taken: list[Box] = [(mark.x - 6, mark.y - 6, mark.x + 6, mark.y + 6) for mark in marks[:60]]
    taken += [(mark.x - 8, mark.y - 22, mark.x + 8, mark.y - 4) for mark in marks if mark.name]
    if arrow is not None:  # and the word at its head
        taken.append(
            (min(arrow[0], arrow[2]), min(arrow[1], arrow[3]), max(arrow[0], arrow[2]), max(arrow[1], arrow[3]))
        )
        taken.append((arrow[2] + 4, arrow[3] - 24, arrow[2] + 110, arrow[3] + 2))
    placed: list[Label] = []
    for dot in order:
        major = sum(label.major for label in placed) < 9 and dot in outer
        found = _place(dot, 20.0 if major else 12.0, taken, width, height)
        if found is None and major:
            major, found = False, _place(dot, 12.0, taken, width, height)
        if found is not None:
            box, label = found
            taken.append(box)
            placed.append(Label(*label, dot.name, major))
        if len(placed) >= 28:
            break
    return placed


Box = tuple[float, float, float, float]


def _place(
    dot: Mark, size: float, taken: Sequence[Box], width: float, height: float
) -> tuple[Box, tuple[float, float, str]] | None:
    wide, gap = 0.56 * size * len(dot.name), 5.0
    tries: list[tuple[float, float, str, float]] = [
        (dot.x + gap, dot.y + 0.35 * size, "start", dot.x + gap),
        (dot.x - gap, dot.y + 0.35 * size, "end", dot.x - gap - wide),
        (dot.x, dot.y - gap, "middle", dot.x - wide / 2),
        (dot.x, dot.y + gap + 0.8 * size, "middle", dot.x - wide / 2),
    ]
    for x, y, anchor, left in tries:
        box = (left - 2, y - 0.85 * size, left + wide + 2, y + 0.25 * size)
        inside = box[0] >= 2 and box[2] <= width - 2 and box[1] >= 2 and box[3] <= height - 2
        if inside and not any(_overlap(box, other) for other in taken):
            return box, (round(x, 1), round(y, 1), anchor)
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _far(dot: Mark, centre: tuple[float, float]) -> float:
    return math.hypot(dot.x - centre[0], dot.y - centre[1])


def _line(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
