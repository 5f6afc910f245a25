"""Promises of the fleet: sums that no order changes, minutes closed once and in order whatever happens, shifts found
soon, few where there are none, and the same again from a wiped store.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from river.drift import ADWIN, PageHinkley
from servers import fresh
from service import CONFIG, message, projection
from typer.testing import CliRunner

from benchmarks.fleet import RATES, Traffic, delays, false_shifts, minutes, noise, ours, river_defaults
from monitor import telemetry
from monitor.detect import fleet as detectors
from monitor.detect.conversation import ConversationState, Step, step
from monitor.detect.fleet import Sensitivity, Watch, shifts
from monitor.errors import CommitRefused
from monitor.events import Finding, Projection, decode_finding, encode
from monitor.fleet import SETTLING, FleetReader, FleetStore, ages, close, finding_id
from monitor.fleet_report import fleet_command
from monitor.store.redis import RedisStore
from monitor.store.sqlite import SqliteStore
from monitor.store.store import ClosedMinutes, Commit, MinuteSums, Outbox, Position, Reader, Store
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Message, Record, Span
from monitor.sums import minute_sums, watermark
from monitor.worker import Worker

DAY = 1440
TODAY = 29_453_760  # the first minute of 2026-01-01, which is also the first of an hour
NOW = (TODAY + 30 * DAY) * 60.0
TOUCHY = Sensitivity(block=1, threshold=2.0, least_blocks=2, window=2, grace=2)


# Sums.


def folded(count: int, seed: int = 0) -> list[tuple[Projection, Step]]:
    """Responses of a few conversations in two deployments, with duplicates and branches; one is learning."""
    chance = random.Random(seed)
    states: dict[str, ConversationState] = {}
    steps = []
    for _ in range(count):
        number = chance.randrange(8)
        conversation, deployment = f"c{number}", ("shop", "shop", "bar")[number % 3]
        event = projection(conversation, chance.randrange(12), chance.gauss(0, 9), deployment=deployment)
        if chance.random() < 0.2:
            event = replace(event, id=f"{event.id}'")
        done = step(states.get(conversation), event, CONFIG)
        states[conversation] = done.state
        steps.append((event, done))
    return steps


def added(*parts: Sequence[MinuteSums]) -> list[MinuteSums]:
    """What a store makes of them."""
    total: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in (row for part in parts for row in part):
        for place, value in enumerate((row.responses, row.z, row.warned)):
            total[row.minute, row.deployment][place] += value
    return [MinuteSums(*key, *values) for key, values in sorted(total.items())]


def test_sums_hold_what_was_folded_and_nothing_else() -> None:
    steps = folded(400)
    assert {done.outcome for _, done in steps} == {"folded", "duplicate", "branch", "learning"}
    expected = []
    for event, done in steps:
        if done.outcome == "folded":
            assert done.z is not None and done.risk is not None
            minute = int(datetime.fromisoformat(event.time).timestamp() // 60)
            z = round(1000 * max(-20.0, min(20.0, done.z)))
            expected.append([MinuteSums(minute, event.deployment, 1, z, int(done.risk >= 1))])
    assert minute_sums(steps) == added(*expected)
    assert max(row.z // row.responses for rows in expected for row in rows) == 20_000
    assert sum(row.warned for row in minute_sums(steps)) > 0
    assert minute_sums([]) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False))
def test_neither_batches_nor_their_order_change_a_sum(seed: int, cuts: list[int], chance: random.Random) -> None:
    steps = folded(60, seed)
    edges = sorted({0, *cuts, len(steps)})
    parts = [minute_sums(steps[a:b]) for a, b in itertools.pairwise(edges)]
    chance.shuffle(parts)
    assert added(*parts) == minute_sums(steps)


def test_a_response_sent_again_adds_nothing() -> None:
    steps = folded(60)
    state = steps[-1][1].state
    again = [(steps[-1][0], step(state, steps[-1][0], CONFIG))]
    assert again[0][1].outcome == "duplicate"
    assert minute_sums(again) == []
    assert watermark(again, NOW) is None


def dated(*seconds: float) -> list[tuple[Projection, Step]]:
    """One response per moment, each of its own conversation."""
    steps = []
    for number, at in enumerate(seconds):
        time = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
        event = replace(projection(f"d{number}", 0), time=time)
        steps.append((event, step(None, event, CONFIG)))
    return steps


def test_a_watermark_is_the_median_and_never_beyond_the_clock() -> None:
    far = 4_070_908_800.0  # 2099
    assert watermark([], NOW) is None
    assert watermark(dated(100.0, 300.0, 200.0), NOW) == 200.0
    assert watermark(dated(100.0, 101.0, far), NOW) == 101.0
    assert watermark(dated(far), NOW) == NOW
    learning = [(event, done) for event, done in folded(200) if done.outcome == "learning"]
    assert watermark(learning, NOW) is not None


# The detectors.


def rows(
    values: Sequence[float], *, responses: int = 1, first: int = TODAY, deployment: str = "shop"
) -> list[MinuteSums]:
    """One minute per value, the mean z."""
    return [
        MinuteSums(first + i, deployment, responses, round(1000 * value * responses), 0)
        for i, value in enumerate(values)
    ]


def test_a_fall_is_found_with_its_place_and_size_and_so_is_the_rise_after_it() -> None:
    chance = random.Random(3)
    found = shifts(
        rows([chance.gauss(-0.6 if 600 <= i < 900 else 0.1, 0.05) for i in range(1200)], responses=500), Sensitivity()
    )
    assert len(found) == 2
    fall, rise = found
    assert abs(fall.since - TODAY - 600) <= 1 and 0 <= fall.minute - TODAY - 600 < 10
    assert fall.before == pytest.approx(0.1, abs=0.02) and fall.fall == pytest.approx(0.7, abs=0.15)
    assert abs(rise.since - TODAY - 900) <= 1 and 0 <= rise.minute - TODAY - 900 < 10
    assert rise.fall == pytest.approx(-0.7, abs=0.15)


def test_what_is_certain_but_small_is_not_told() -> None:
    chance = random.Random(4)
    values = [chance.gauss(-0.15 if i >= 600 else 0.0, 0.01) for i in range(1200)]
    assert shifts(rows(values, responses=5000), Sensitivity()) == []
    assert len(shifts(rows(values, responses=5000), Sensitivity(tolerance=0.1))) == 1


def test_traffic_that_rises_and_falls_is_no_shift_whatever_the_mean() -> None:
    """What dividing by the root of the count would get wrong: a mean that is not 0, and a thousandfold tide."""
    chance = random.Random(5)
    minutes_of_traffic = [
        MinuteSums(TODAY + i, "shop", count, round(1000 * count * chance.gauss(-0.8, 1 / math.sqrt(count))), 0)
        for i in range(5 * DAY)
        for count in [round(2 + 1000 * (1 + math.sin(2 * math.pi * i / DAY)))]
    ]
    assert shifts(minutes_of_traffic, Sensitivity()) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_a_watch_made_of_what_another_kept_goes_on_as_it_would(values: list[float], cuts: list[int]) -> None:
    given_rows = rows(values)
    longest, shortest = detectors.LONGEST, detectors.SHORTEST
    detectors.LONGEST, detectors.SHORTEST = 16, 8
    try:
        at_once: Watch[MinuteSums] = Watch(TOUCHY)
        expected = [at_once.add(row) for row in given_rows]
        watch: Watch[MinuteSums] = Watch(TOUCHY)
        for place, row in enumerate(given_rows):
            if place in cuts:
                watch = Watch(TOUCHY, watch.rows)
            assert watch.add(row) == expected[place]
        assert watch.rows == at_once.rows
        assert len(watch.rows) < 16
    finally:
        detectors.LONGEST, detectors.SHORTEST = longest, shortest


def test_a_watch_forgets_in_the_end_and_still_finds_a_shift_that_it_saw_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(6)
    for at in range(2700, 2960, 20):  # the memory is cut at 2880
        values = [chance.gauss(-0.6 if i >= at else 0.0, 0.05) for i in range(3300)]
        watch: Watch[MinuteSums] = Watch(Sensitivity())
        found = [shift for row in rows(values, responses=200) if (shift := watch.add(row))]
        assert len(found) == 1 and 0 <= found[0].minute - TODAY - at < 15, at


def test_what_only_a_later_beginning_shows_is_told_when_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "LONGEST", 16)
    monkeypatch.setattr(detectors, "SHORTEST", 8)
    sensitivity = replace(TOUCHY, threshold=1.0)
    values = [-0.5] * 8 + [0.0] * 4 + [-0.8] * 4  # seen whole, the last four are hardly below the mean
    assert shifts(rows(values[:15]), sensitivity) == []
    watch: Watch[MinuteSums] = Watch(sensitivity)
    found = [watch.add(row) for row in rows(values)]
    assert found[:-1] == [None] * 15
    assert found[-1] is not None and found[-1].minute == TODAY + 15 and found[-1].since == TODAY + 12
    assert found[-1].fall == pytest.approx(0.8)


def test_a_change_that_was_too_small_is_forgotten_and_not_added_to_the_next() -> None:
    """By ADWIN, which alone is asked here. Page-Hinkley is there to add them up."""
    chance = random.Random(7)
    values = [chance.gauss(level, 0.01) for level in [0.0] * 100 + [-0.19] * 250 + [-0.38] * 120]
    only_adwin = Sensitivity(threshold=1e9)
    assert shifts(rows(values, responses=5000), only_adwin) == []
    assert len(shifts(rows([*values[:100], *values[350:]], responses=5000), only_adwin)) == 1
    stairs = rows([chance.gauss(-0.1 * (i // 60), 0.01) for i in range(480)], responses=5000)
    assert shifts(stairs, only_adwin) == []
    assert [shift.statistic for shift in shifts(stairs, Sensitivity())] == ["page_hinkley"]


def test_the_id_of_a_sensitivity_changes_with_every_part_of_it() -> None:
    usual = Sensitivity()
    others = [replace(usual, **{name: 2 * getattr(usual, name)}) for name in Sensitivity.__struct_fields__]
    assert len({usual.id, *(other.id for other in others)}) == 1 + len(others)
    assert Sensitivity().id == usual.id


# How well they do, on simulated traffic. docs/fleet.md has the figures of more of it.


@pytest.mark.parametrize("rate", RATES)
def test_a_stationary_fleet_raises_at_most_about_one_shift_in_thirty_days(rate: int) -> None:
    """Conversations whose responses are alike, a tide of traffic, a mean that differs between night and day."""
    chance = np.random.default_rng([11, rate])
    still = [noise(rate, 30, chance) for _ in range(4)]
    assert statistics.mean(false_shifts(ours, still, rhythm=0.1)) <= 1.0


@pytest.mark.parametrize(
    ("rate", "shift", "minutes_at_most"),
    [
        (1, 1.0, 600),
        (1, 0.5, 1500),
        (10, 0.5, 150),
        (10, 0.25, 700),
        (100, 1.0, 8),
        (100, 0.5, 20),
        (100, 0.25, 150),
        (5000, 1.0, 5),
        (5000, 0.5, 12),
        (5000, 0.25, 45),
    ],
)
def test_a_shift_is_found_soon(rate: int, shift: float, minutes_at_most: int) -> None:
    chance = np.random.default_rng([12, rate])
    moved = [noise(rate, 6, chance) for _ in range(6)]
    assert statistics.median(delays(ours, moved, shift)) <= minutes_at_most


def test_defaults_of_river_raise_many_false_shifts_on_the_same_traffic() -> None:
    chance = np.random.default_rng(13)
    still = [noise(10, 30, chance) for _ in range(2)]
    for make in (ADWIN, PageHinkley):
        assert statistics.mean(false_shifts(river_defaults(make), still, rhythm=0.1)) > 5


def test_the_simulated_traffic_is_what_it_says() -> None:
    for rate in (5, 300):
        traffic = noise(rate, 20, np.random.default_rng(14), Traffic(low=0.0))
        total = traffic.responses.sum()
        assert total / len(traffic.z) == pytest.approx(rate, rel=0.05)
        assert traffic.z.sum() / total == pytest.approx(0.0, abs=0.05)
        hours = traffic.z.reshape(-1, 60).sum(1) / np.sqrt(traffic.responses.reshape(-1, 60).sum(1))
        # Variance of a sum of conversations of geometric length 6, half of the variance common: 1 + 0.5 (11 - 1) = 6.
        assert 3.0 < hours.var() < 9.0
    fallen = minutes(traffic, rhythm=0.0, shift=0.5, at=14_400)
    late = [row for row in fallen if row.minute >= 14_400]
    assert sum(row.z for row in late) / sum(row.responses for row in late) == pytest.approx(-500, abs=30)


# Closing, the pure part.


def some_minutes(seed: int, count: int = 200) -> list[MinuteSums]:
    """Two deployments with gaps, jumps, and a week of silence."""
    chance = random.Random(seed)
    result, level, minute = [], 0.0, TODAY
    for _ in range(count):
        minute += chance.choice([1, 1, 1, 2, 30, 8 * DAY if chance.random() < 0.05 else 1])
        level = chance.uniform(-2, 2) if chance.random() < 0.03 else level
        for deployment in ("bar", "shop"):
            if chance.random() < 0.8:
                count_ = chance.randrange(1, 4)
                z = sum(round(1000 * chance.gauss(level, 0.2)) for _ in range(count_))
                result.append(MinuteSums(minute, deployment, count_, z, chance.randrange(count_ + 1)))
    return result


def close_by(
    sums: list[MinuteSums], ends: Sequence[int], restarts: Sequence[int] = ()
) -> tuple[ClosedMinutes | None, list[tuple[str, object]]]:
    closed: ClosedMinutes | None = None
    found: list[tuple[str, object]] = []
    for end in ends:
        # A store gives two days.
        given_rows = [
            row for row in sums if row.minute <= end and row.minute >= (closed.through - 2 * DAY if closed else 0)
        ]
        closed, more = close(closed, given_rows, end, TOUCHY, restarts)
        found += more
    return closed, found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_minutes_closed_in_any_portions_come_to_the_same(seed: int, cuts: list[int], recalibrated: bool) -> None:
    sums = some_minutes(seed)
    last = sums[-1].minute
    restarts = [sums[len(sums) // 2].minute] if recalibrated else []
    at_once = close_by(sums, [last], restarts)
    assert close_by(sums, sorted({sums[cut % len(sums)].minute for cut in cuts} | {last}), restarts) == at_once


def test_closing_minute_by_minute_finds_something_and_the_same() -> None:
    sums = some_minutes(1, 400)
    at_once = close_by(sums, [sums[-1].minute])
    assert len(at_once[1]) > 3
    assert close_by(sums, sorted({row.minute for row in sums})) == at_once


def test_hours_hold_the_last_week_and_ages_come_from_them() -> None:
    sums = rows([0.5] * (9 * DAY // 60), responses=10)
    sums = [replace(row, minute=TODAY + 60 * i, warned=1) for i, row in enumerate(sums)]
    closed, _ = close(None, sums, TODAY + 9 * DAY - 1, Sensitivity())
    assert len(closed.hours) == 7 * 24
    assert [(one.deployment, one.responses, one.mean, one.warned) for one in ages(closed, DAY)] == [
        ("shop", 240, 0.5, 0.1)
    ]
    assert ages(closed, 7 * DAY)[0].responses == 7 * 240
    assert ages(closed, 7 * DAY)[0].standard_error == 0.0


def test_the_standard_error_of_an_age_is_that_of_correlated_responses() -> None:
    """Against the spread of the means of many weeks. If responses were independent it would be 2.4 times smaller."""
    chance = np.random.default_rng(15)
    weeks = [minutes(noise(20, 7, chance), rhythm=0.0) for _ in range(40)]
    aged = [ages(close(None, week, 7 * DAY - 1, Sensitivity())[0], 7 * DAY)[0] for week in weeks]
    spread = statistics.stdev(one.mean for one in aged)
    told = statistics.mean(one.standard_error for one in aged)
    assert 0.7 < told / spread < 1.4
    assert told > 1.5 / math.sqrt(aged[0].responses)


# The reader, over real stores.


class Backend(Store, Reader, Outbox, FleetStore, Protocol):
    """What these tests ask of a store."""


class Partitions:
    """A log of several partitions, in memory, of which only the ends are ever asked: what of it is committed is told by
    the commits."""

    def __init__(self, count: int) -> None:
        self.ends = [0] * count

    def partitions(self, topic: str) -> int:
        return len(self.ends)

    def span(self, topic: str, partition: int) -> Span:
        return Span(0, self.ends[partition], "log-1")

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        raise NotImplementedError

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        raise NotImplementedError

    def close(self) -> None:
        pass


Line = list[tuple[float, str, int]]  # of one partition, in log order: event time, deployment, z in thousandths


class Town:
    """Partitions that hold responses, a store that has folded some of them, and a reader."""

    def __init__(self, store: Backend, lines: Sequence[Line], now: float = NOW, **options: float) -> None:
        self.store = store
        self.lines = lines
        self.log = Partitions(len(lines))
        self.log.ends = [len(line) for line in lines]
        self.done = [0] * len(lines)
        self.now = now
        self.idle = 0.0
        self.options = options
        self.reader = self.another()

    def another(self) -> FleetReader:
        return FleetReader(
            self.log, self.store, sensitivity=TOUCHY, clock=lambda: self.now, timer=lambda: self.idle, **self.options
        )

    def fold(self, partition: int, count: int) -> None:
        """What a worker would commit: the next records of a partition. The last one of all comes by itself, as it would
        live: the watermark of a batch that catches up lies in its middle."""
        start = self.done[partition]
        left = len(self.lines[partition]) - start
        batch = self.lines[partition][start : start + min(count, max(left - 1, 1))]
        if not batch:
            return
        self.done[partition] += len(batch)
        single = [[MinuteSums(int(time // 60), deployment, 1, z, int(z < -2000))] for time, deployment, z in batch]
        times = sorted(time for time, _, _ in batch)
        self.store.commit(
            Commit(
                topic=PROJECTIONS,
                partition=partition,
                topic_id="log-1",
                partitions=len(self.lines),
                expected=Position(start) if start else None,
                offset=self.done[partition],
                states={},
                sessions=[],
                points={},
                findings=[],
                counts={"folded": len(batch)},
                sums=added(*single),
                watermark=min(times[len(times) // 2], self.now),
                behind=self.done[partition] < len(self.lines[partition]),
                config=CONFIG.to_json() if not start else None,
            )
        )

    def say(self, partition: int, *responses: tuple[float, str, int]) -> None:
        """New records."""
        self.lines[partition].extend(responses)
        self.log.ends[partition] = len(self.lines[partition])

    def fold_rest(self, partition: int) -> None:
        while self.done[partition] < len(self.lines[partition]):
            self.fold(partition, len(self.lines[partition]))

    def fold_all(self, chance: random.Random, most: int = 40) -> list[Finding]:
        """Everything, in a random interleaving of partitions and batches, the reader at work in between."""
        found = []
        while left := [p for p, line in enumerate(self.lines) if self.done[p] < len(line)]:
            self.fold(chance.choice(left), chance.randint(1, most))
            if chance.random() < 0.5:
                found += self.reader.run_once()
        return found + self.reader.run_once()

    def findings(self) -> list[bytes]:
        """All that is stored, as bytes."""
        return sorted(encode(one) for one in self.store.findings(10_000) if one.kind == "fleet_shift")


def city(seed: int, partitions: int = 3, hours: int = 12, last: float = 0.0) -> list[Line]:
    """Two deployments whose mean jumps now and then, spread over partitions; each in order of time, plus a little."""
    chance = random.Random(seed)
    lines: list[Line] = [[] for _ in range(partitions)]
    level = {"shop": 0.0, "bar": 0.0}
    for minute in range(60 * hours):
        for deployment in level:
            if chance.random() < 0.01:
                level[deployment] = chance.uniform(-3, 3)
            for _ in range(chance.randrange(3)):
                time = (TODAY + minute) * 60.0 + chance.random() * 60
                lines[chance.randrange(partitions)].append(
                    (time, deployment, round(1000 * chance.gauss(level[deployment], 0.1)))
                )
    end = (TODAY + 60 * hours) * 60.0 + 600
    for line in lines:
        line.sort(key=lambda one: one[0] + chance.uniform(0, 60))  # a minute of disorder
        line.append((end, "shop", 0))  # so that every line reaches the end
    return lines


@pytest.fixture(params=["sqlite", "redis"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str) -> Iterator[Callable[[], Backend]]:
    opened: list[Backend] = []

    def make() -> Backend:
        if request.param == "sqlite":
            opened.append(SqliteStore(tmp_path / f"store-{len(opened)}.db"))
        else:
            opened.append(RedisStore(shared_redis, prefix=fresh("fleet")))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def copied(lines: Sequence[Line]) -> list[Line]:
    return [list(line) for line in lines]


def test_minutes_close_in_order_and_shifts_are_told_once(make_store: Callable[[], Backend]) -> None:
    town = Town(make_store(), city(1))
    found = town.fold_all(random.Random(1))
    assert len(found) > 3
    assert sorted(encode(one) for one in found) == town.findings()
    assert [one.finding.id for one in town.store.pending(1000)] == [one.id for one in found]
    assert [one.time for one in found] == sorted(one.time for one in found)
    closed = town.store.closed()
    assert closed is not None and closed.late == {}
    assert closed.through == TODAY + 12 * 60 + 10 - 3  # the last response, less two minutes, less the open minute
    for one in found:
        assert decode_finding(encode(one)) == one
        assert (one.conversation_id, one.kind, one.axis_id, one.turn) == ("", "fleet_shift", CONFIG.axis_id, 0)
        assert one.id == one.episode_id == finding_id(one.deployment, minute_of(one) - 1)
        assert one.severity == ("warning" if one.value > 0 else "info")
        assert abs(one.value) >= one.boundary == TOUCHY.tolerance and one.risk == one.value / one.boundary
        assert one.config_id == TOUCHY.id and one.certification == "uncertified" and one.budget is None
    assert {one.severity for one in found} == {"warning", "info"}
    assert town.reader.run_once() == []


def minute_of(finding: Finding) -> int:
    return int(datetime.fromisoformat(finding.time).timestamp() // 60)


@pytest.mark.parametrize("seed", range(4))
def test_a_wiped_store_comes_to_the_same_bytes_in_any_order_of_commits(
    make_store: Callable[[], Backend], seed: int
) -> None:
    lines = city(2)
    live = Town(make_store(), copied(lines))
    # Live: all partitions side by side, in time.
    at = TODAY * 60.0
    while any(live.done[p] < len(line) for p, line in enumerate(lines)):
        at += 20.0
        for p, line in enumerate(lines):
            live.fold(p, sum(time < at for time, _, _ in line) - live.done[p])
        live.reader.run_once()
    assert len(live.findings()) > 3
    rebuilt = Town(make_store(), copied(lines))
    rebuilt.fold_all(random.Random(seed), most=[1, 7, 100, 2000][seed])
    assert rebuilt.findings() == live.findings()
    assert rebuilt.store.closed() == live.store.closed()


def test_one_partition_far_ahead_of_the_others_makes_nothing_late(make_store: Callable[[], Backend]) -> None:
    lines = city(3, hours=4 * 24)  # days, so that a store which dropped old minutes too soon would show it
    level = Town(make_store(), copied(lines))
    level.fold_all(random.Random(0), most=500)
    ahead = Town(make_store(), copied(lines))
    for partition in (1, 2, 0):
        ahead.fold_rest(partition)
        if partition != 0:
            assert ahead.reader.run_once() == [], "closed without a partition that had not begun"
            assert ahead.store.closed() is None
    ahead.reader.run_once()
    assert ahead.findings() == level.findings() != []
    closed = ahead.store.closed()
    assert closed == level.store.closed() and closed is not None and closed.late == {}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 2**16))
def test_neither_partitions_nor_batches_nor_their_order_change_a_finding(seed: int, order: int) -> None:
    lines = city(seed, hours=2)
    merged = sorted((one for line in lines for one in line), key=lambda one: one[0])
    with tempfile.TemporaryDirectory() as directory:
        towns = [
            Town(SqliteStore(Path(directory, "one.db")), [merged]),
            Town(SqliteStore(Path(directory, "many.db")), lines),
        ]
        for town in towns:
            town.fold_all(random.Random(order))
        assert towns[0].findings() == towns[1].findings()
        assert towns[0].store.closed() == towns[1].store.closed()
        for town in towns:
            town.store.close()


def test_late_responses_are_counted_to_the_last_one_and_change_nothing_else(make_store: Callable[[], Backend]) -> None:
    town = Town(make_store(), city(4))
    found = town.fold_all(random.Random(4))
    before = town.store.closed()
    assert before is not None
    chance = random.Random(5)
    for number in range(137):
        town.say(number % 3, ((TODAY + chance.randrange(720)) * 60.0, "bar" if number % 10 else "new", -20_000))
    end = (TODAY + 13 * 60 + 30) * 60.0  # late responses are counted once an hour
    for partition in range(3):
        town.say(partition, (end, "shop", 0))
    assert town.fold_all(chance) == []
    after = town.store.closed()
    assert after is not None and after.late == {"bar": 123, "new": 14}
    assert town.findings() == sorted(encode(one) for one in found)
    assert sum(row.responses for row in after.hours) == sum(row.responses for row in before.hours) + 3
    assert telemetry.FLEET_LATE.labels("bar")._value.get() == 123
    # A day later they are of yesterday.
    for partition in range(3):
        town.say(partition, (end + 26 * 3600, "shop", 0))
    town.fold_all(chance)
    assert town.store.closed().late == {}  # type: ignore[union-attr]


def test_a_response_dated_in_2099_closes_nothing_and_silences_nobody(make_store: Callable[[], Backend]) -> None:
    lines = city(6)
    clean = Town(make_store(), copied(lines))
    clean.fold_all(random.Random(6))
    assert len(clean.findings()) > 3
    for line in lines:
        for place in (0, 3, len(line) // 2):
            line.insert(place, (4_070_908_800.0, "shop", -20_000))
    # Live, the clock runs with the responses, and a batch may hold nothing but the mad one.
    mad = Town(make_store(), lines)
    at = TODAY * 60.0
    while any(mad.done[p] < len(line) for p, line in enumerate(mad.lines)):
        at += 20.0
        mad.now = at
        for p, line in enumerate(mad.lines):
            while mad.done[p] < len(line) and (line[mad.done[p]][0] < at or line[mad.done[p]][0] > NOW):
                mad.fold(p, 1)
        mad.reader.run_once()
    assert mad.findings() == clean.findings()
    closed = mad.store.closed()
    assert closed is not None and closed.late == {}
    assert closed.through < TODAY + DAY


def test_no_minute_beyond_the_clock_is_closed_whatever_a_watermark_says(make_store: Callable[[], Backend]) -> None:
    """A worker whose own clock is wrong may have written it."""
    town = Town(make_store(), [[(TODAY * 60.0, "shop", 0), ((TODAY + 10_000) * 60.0, "shop", 0)]])
    town.fold(0, 1)
    town.fold(0, 1)
    town.now = (TODAY + 20) * 60.0
    town.reader.run_once()
    assert town.store.closed().through == TODAY + 20 - 3  # type: ignore[union-attr]


def test_a_collector_whose_clock_is_an_hour_ahead_makes_nobody_late_in_a_replay(
    make_store: Callable[[], Backend],
) -> None:
    """A third of the responses lie an hour in the future. The watermark is a median, so the others are awaited."""
    lines = city(7, partitions=1)
    chance = random.Random(7)
    lines[0] = [(time + (3600 if chance.random() < 0.33 else 0), d, z) for time, d, z in lines[0]]
    town = Town(make_store(), lines)
    while town.done[0] < len(lines[0]):
        town.fold(0, 200)
        town.reader.run_once()
    closed = town.store.closed()
    assert closed is not None and closed.late == {}


def test_an_idle_partition_holds_nobody_up_but_one_that_lags_does(make_store: Callable[[], Backend]) -> None:
    at = TODAY * 60.0
    town = Town(make_store(), [[(at, "shop", 0)], [(at, "shop", 0)], []])
    town.fold(0, 1)
    town.fold(1, 1)
    for minute in range(1, 10):
        town.say(0, (at + 60 * minute, "shop", 0))
        town.fold(0, 1)
        town.reader.run_once()
    assert town.store.closed().through == TODAY + 9 - 3  # type: ignore[union-attr]
    # Partition 1 gets a record that nobody has folded. Its last commit does not say so: the log does.
    town.say(1, (at + 600, "shop", 0))
    town.say(0, (at + 3600, "shop", 0))
    town.fold(0, 1)
    town.reader.run_once()
    assert town.store.closed().through == TODAY + 6  # type: ignore[union-attr]
    town.fold(1, 1)
    town.reader.run_once()
    assert town.store.closed().through == TODAY + 60 - 3  # type: ignore[union-attr]


def test_a_partition_that_does_not_move_is_given_up_after_a_while_unless_all_are_like_that(
    make_store: Callable[[], Backend],
) -> None:
    at = TODAY * 60.0
    town = Town(make_store(), [[(at, "shop", 0)], [(at, "shop", 0), (at + 1, "bar", 0)]], patience_seconds=600.0)
    town.fold(0, 1)
    town.fold(1, 1)
    for minute in range(1, 60):
        town.idle += 60.0
        town.say(0, (at + 60 * minute, "shop", 0))
        town.fold(0, 1)
        town.reader.run_once()
        closed = town.store.closed()
        if closed is not None and closed.through >= TODAY:
            break
    assert 10 <= minute <= 14, "given up too soon, or never"
    town.fold(1, 1)
    town.say(0, (at + 3900, "shop", 0))
    town.fold(0, 1)
    town.reader.run_once()
    assert town.store.closed().late == {"bar": 1}  # type: ignore[union-attr]
    # Nobody folds anything for a long time, say because Kafka gives nothing: then there is nothing to conclude.
    town.say(0, (at + 7200, "shop", 0), (at + 7200, "shop", 0))
    town.say(1, (at + 60, "shop", 0), (at + 7200, "shop", 0))
    town.fold(0, 1)
    before = town.store.closed()
    for _ in range(100):
        town.idle += 60.0
        town.reader.run_once()
    assert town.store.closed() == before


def test_after_a_long_stop_the_minutes_in_between_are_closed_in_order(make_store: Callable[[], Backend]) -> None:
    lines = city(8, hours=24)
    whole = Town(make_store(), copied(lines))
    whole.fold_all(random.Random(8))
    stopped = Town(make_store(), copied(lines))
    for partition, line in enumerate(lines):
        stopped.fold(partition, len(line) // 4)
    stopped.reader.run_once()
    for partition in range(len(lines)):
        stopped.fold_rest(partition)
    stopped.reader = stopped.another()  # the one before died with its process
    stopped.reader.run_once()
    assert stopped.findings() == whole.findings() != []
    assert stopped.store.closed() == whole.store.closed()


def test_two_readers_at_once_close_each_minute_once(make_store: Callable[[], Backend]) -> None:
    lines = city(9)
    alone = Town(make_store(), copied(lines))
    alone.fold_all(random.Random(9))
    town = Town(make_store(), lines)
    stop, problems, refused = threading.Event(), [], [0]

    class Counting:
        def __init__(self, store: Backend) -> None:
            self.store = store

        def __getattr__(self, name: str) -> object:
            return getattr(self.store, name)

        def close_minutes(self, expected: int | None, closed: ClosedMinutes, findings: list[Finding]) -> None:
            try:
                self.store.close_minutes(expected, closed, findings)
            except CommitRefused:
                refused[0] += 1
                raise

    def read() -> None:
        reader = FleetReader(town.log, Counting(town.store), sensitivity=TOUCHY, clock=lambda: town.now)  # type: ignore[arg-type]
        while not stop.is_set():
            try:
                reader.run_once()
            except Exception as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    chance = random.Random(9)
    while left := [p for p, line in enumerate(lines) if town.done[p] < len(line)]:
        town.fold(chance.choice(left), chance.randint(1, 10))
    stop.set()
    for thread in threads:
        thread.join()
    town.reader.run_once()
    assert not problems
    assert town.findings() == alone.findings() != []
    assert town.store.closed() == alone.store.closed()
    assert len(town.store.pending(1000)) == len(town.findings())


def test_a_reader_that_was_overtaken_writes_nothing(make_store: Callable[[], Backend]) -> None:
    town = Town(make_store(), city(10))
    for partition in range(3):
        town.fold_rest(partition)

    class Overtaken:
        def __getattr__(self, name: str) -> object:
            return getattr(town.store, name)

        def minutes(self, first: int, last: int) -> list[MinuteSums]:
            rows = town.store.minutes(first, last)
            assert town.reader.run_once()
            return rows

    slow = FleetReader(town.log, Overtaken(), sensitivity=TOUCHY, clock=lambda: town.now)  # type: ignore[arg-type]
    assert slow.run_once() == []
    assert len(town.store.pending(1000)) == len(town.findings()) > 0


def test_a_deployment_that_vanishes_and_returns_is_compared_with_its_past_for_a_week() -> None:
    for days, told in ((2, 1), (6, 1), (8, 0)):
        before = rows([0.0] * 30)
        after = rows([-3.0] * 30, first=TODAY + days * DAY)
        closed, found = close(None, before, TODAY + 40, TOUCHY)
        assert not found
        for through in (TODAY + DAY, TODAY + days * DAY - 1):
            closed, found = close(closed, [], through, TOUCHY)
        assert len(closed.minutes) == (30 if told else 0)  # what nobody will ask for is not kept
        closed, found = close(closed, after, TODAY + days * DAY + 40, TOUCHY)
        assert len(found) == told, days


def test_empty_minutes_are_closed_and_cost_nothing(make_store: Callable[[], Backend]) -> None:
    at = TODAY * 60.0
    town = Town(make_store(), [[(at, "shop", 0), (at + 86_400 * 3, "shop", 0)]])
    town.fold(0, 1)
    town.fold(0, 1)
    assert town.reader.run_once() == []
    closed = town.store.closed()
    assert closed is not None and closed.through == TODAY + 3 * DAY - 3
    assert closed.minutes == [MinuteSums(TODAY, "shop", 1, 0, 0)]


def test_nothing_closes_before_anything_was_committed(make_store: Callable[[], Backend]) -> None:
    town = Town(make_store(), [[(0.0, "shop", 0)], []])
    assert town.reader.run_once() == []
    town.fold(0, 1)  # dated 1970
    assert town.reader.run_once() == []
    assert town.store.closed() is None


def activate(store: Backend, at: int, number: int = 0) -> None:
    time = datetime.fromtimestamp(at * 60 + 1, UTC).isoformat().replace("+00:00", "Z")
    key = f"calibration/{PROJECTIONS}/0/{number}"
    value = json.dumps({"by": "ann", "time": time, "body": {"topic_id": "log-1", "config_id": "c"}}).encode()
    store.fold_actions("actions-1", number, number + 1, {key: value})


def test_a_new_calibration_is_no_shift_and_a_shift_after_it_is_one(make_store: Callable[[], Backend]) -> None:
    line: Line = []
    for minute in range(120):
        z = 0 if minute < 40 else -3000 if minute < 80 else -5000
        line.append(((TODAY + minute) * 60.0, "shop", z))
    town = Town(make_store(), [line])
    activate(town.store, TODAY + 40)
    town.store.fold_actions("actions-1", 1, 2, {f"calibration/{PROJECTIONS}/0/9": b"malformed"})
    town.fold_rest(0)
    found = town.reader.run_once()
    assert [(one.severity, minute_of(one) - TODAY) for one in found] == [("warning", 82)]
    assert found[0].value == pytest.approx(2.0)
    seen, _ = close(None, town.store.minutes(0, TODAY + 70), TODAY + 70, TOUCHY, [TODAY + 40])
    assert [row.minute - TODAY for row in seen.minutes] == list(range(40 + SETTLING, 71))
    without = Town(make_store(), [line])
    without.fold_rest(0)
    assert len(without.reader.run_once()) == 2


def test_a_real_worker_and_a_real_log_come_to_the_same_shift_twice(
    make_store: Callable[[], Backend], tmp_path: Path
) -> None:
    """A bad release after five hours: from projections in a log to a finding in the outbox, and again from the log."""
    chance = random.Random(16)
    log = EmbeddedLog(tmp_path / "log.db")
    messages = []
    for number in range(3000):
        at = TODAY * 60 + 12 * number
        time = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
        event = projection(f"c{number // 4}", number % 4, chance.gauss(-0.8 if number >= 1500 else 0.0, 0.5))
        messages.append(message(replace(event, time=time)))
    log.append(PROJECTIONS, messages)
    found: list[list[bytes]] = []
    for batch in (7, 500):
        store = make_store()
        worker = Worker(log, store, CONFIG, batch_size=batch)
        reader = FleetReader(log, store, clock=lambda: NOW)
        while worker.run_once():
            reader.run_once()
        pending = [one.finding for one in store.pending(10_000) if one.finding.kind == "fleet_shift"]
        found.append([encode(one) for one in pending])
        (one,) = pending
        assert one.axis_id == CONFIG.axis_id and one.severity == "warning"
        assert 0 < minute_of(one) - TODAY - 300 < 90 and 0.6 < one.value < 1.0
        assert store.closed().late == {}  # type: ignore[union-attr]
    assert found[0] == found[1]
    log.close()


# What people see.


def test_gauges_show_the_fifty_busiest_and_no_more(make_store: Callable[[], Backend]) -> None:
    line: Line = []
    for number in range(60):
        line += [(TODAY * 60.0 + i, f"d{number:02}", 1000 * number) for i in range(number + 1)]
    line.append(((TODAY + 10) * 60.0, "d59", 59_000))
    town = Town(make_store(), [line])
    town.fold_rest(0)
    town.reader.run_once()
    town.say(0, *((TODAY * 60.0, f"d{number:02}", 0) for number in range(60)), ((TODAY + 80) * 60.0, "d59", 0))
    town.fold_rest(0)
    town.reader.run_once()
    shown = {sample.labels["deployment"] for sample in telemetry.FLEET_Z.collect()[0].samples}
    assert shown == {f"d{number:02}" for number in range(10, 60)}
    assert telemetry.FLEET_Z.labels("d10", "day")._value.get() == 10.0
    late = {s.labels["deployment"]: s.value for s in telemetry.FLEET_LATE.collect()[0].samples}
    assert late["other"] == 10 and late["d10"] == 1 and len(late) == 51
    assert telemetry.FLEET_CLOSED._value.get() == (TODAY + 78) * 60


def told(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(fleet_command)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    return result.exit_code, result.stdout


def test_the_report_shows_deployments_their_age_and_the_last_shifts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path))
    assert told("--json")[0] == 1 and json.loads(told("--json")[1])["closed_until"] is None
    store = SqliteStore(tmp_path / "store.db")
    names = ("shop", "[bold]bar")
    line: Line = [(TODAY * 60.0 + 30 * i, names[i % 2], -1000 if i > 900 else 100) for i in range(1000)]
    town = Town(store, [line])
    town.fold_rest(0)
    found = town.reader.run_once()
    store.close()
    code, out = told("--json")
    report = json.loads(out)
    assert code == 0 and report["closed_until"] == "2026-01-01T08:17:00Z"
    day = report["deployments"]["shop"]["day"]
    assert day == report["deployments"]["shop"]["week"] and day["responses"] == 497
    assert day["mean_z"] == pytest.approx((451 * 0.1 - 46) / 497, abs=1e-3) and day["standard_error"] > 0.05
    assert {one["id"] for one in report["shifts"]} == {one.id for one in found} and len(found) == 2
    assert {one["fall"] for one in report["shifts"]} == {one.value for one in found}
    code, out = told("--shifts", "1")
    assert code == 0 and "[bold]bar" in out and "0.00 ± 0.07" in out and out.count("the mean fell by 1.1") == 1
