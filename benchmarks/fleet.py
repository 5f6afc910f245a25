"""How soon a fleet's shift is found, and how often one is found where there is none: simulated traffic, real detectors.

    python -m benchmarks.fleet --json

Stationary traffic is made of conversations, not of responses: how alike the responses of a conversation are is what
breaks textbook detectors. Conversations begin at random, more by day than by night; their lengths are geometric, the
pauses between their responses log-normal; half of the variance of z is between conversations; one in twenty lies two
standard deviations low. The mean of the whole fleet moves with the time of day. More than a hundred responses a minute
are made by adding up: the noise of a minute's mean is that of a hundred, divided by the root of how many hundreds. That
is what independent conversations come to, at a hundredth of the work.

Beside ours stand river's ADWIN and PageHinkley as they come, on each minute's mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from river.drift import ADWIN, PageHinkley

from monitor.detect.fleet import Sensitivity, shifts
from monitor.store.store import MinuteSums

__all__ = ["Traffic", "delays", "false_shifts", "minutes", "noise", "ours", "river_defaults"]

DAY = 1440
RATES = (1, 10, 100, 1000, 5000)  # responses a minute
SHIFTS = (0.25, 0.5, 1.0)  # standard deviations
RHYTHMS = (0.0, 0.1, 0.2, 0.3, 0.4)  # from the mean by night to the mean by day
SIMULATED = 100  # responses a minute that are made one by one
USUAL = 0.1

Found = list[tuple[int, float]]  # minute, and how far the mean fell
Detector = Callable[[Sequence[MinuteSums]], Found]


class Traffic(NamedTuple):
    """What healthy traffic is like.

    Attributes:
        turns: responses of a conversation, on average.
        alike: share of the variance of z that lies between conversations.
        pause: median seconds between two responses of a conversation.
        tide: how much more traffic there is by day than on average, as a share.
        low: share of conversations that lie two standard deviations low.
    """

    turns: float = 6.0
    alike: float = 0.5
    pause: float = 45.0
    tide: float = 0.6
    low: float = 0.05


class Noise(NamedTuple):
    """Per minute: how many responses, and the sum of their z, whose mean is 0 and variance 1."""

    responses: NDArray[np.int64]
    z: NDArray[np.float64]


def noise(rate: int, days: int, chance: np.random.Generator, traffic: Traffic | None = None) -> Noise:
    """Stationary traffic of so many responses a minute, on average."""
    traffic = traffic or Traffic()
    made, span = min(rate, SIMULATED), (days + 1) * DAY  # the first day fills up with conversations that go on
    clock = np.arange(span)
    begun = chance.poisson(made / traffic.turns * (1 + traffic.tide * np.sin(2 * np.pi * clock / DAY)))
    starts = np.repeat(clock, begun) + chance.random(begun.sum())
    lengths = chance.geometric(1 / traffic.turns, len(starts))
    drop = 2.0 / np.sqrt(traffic.alike)
    level = chance.normal(size=len(starts)) - drop * (chance.random(len(starts)) < traffic.low)
    level = (level + drop * traffic.low) * np.sqrt(traffic.alike / (1 + drop**2 * traffic.low * (1 - traffic.low)))
    of = np.repeat(np.arange(len(starts)), lengths)
    pauses = chance.lognormal(np.log(traffic.pause / 60), 0.8, len(of))
    first = np.r_[0, np.cumsum(lengths)[:-1]]
    pauses[first] = 0.0
    passed = np.cumsum(pauses)
    minute = (starts[of] + passed - np.repeat(passed[first], lengths)).astype(np.int64)
    z = level[of] + chance.normal(0.0, np.sqrt(1 - traffic.alike), len(of))
    inside = (minute >= DAY) & (minute < span)
    at = minute[inside] - DAY
    responses = np.bincount(at, minlength=days * DAY)
    sums = np.bincount(at, weights=z[inside], minlength=days * DAY)
    hundreds = rate // made
    return Noise(responses * hundreds, sums * np.sqrt(hundreds))


def minutes(
    traffic: Noise, *, rhythm: float = USUAL, phase: float = 0.0, shift: float = 0.0, at: int = 0
) -> list[MinuteSums]:
    """The same traffic as a store has it, with a mean that moves by `rhythm` between night and day, and falls by
    `shift` from the minute `at` on. `phase` is the time of day at which it begins, in days."""
    clock = np.arange(len(traffic.z))
    mean = rhythm / 2 * np.sin(2 * np.pi * (clock / DAY + phase)) - np.where(clock >= at, shift, 0.0)
    sums = np.rint(1000 * (traffic.z + traffic.responses * mean)).astype(np.int64)
    return [
        MinuteSums(minute, "fleet", count, z, 0)
        for minute, (count, z) in enumerate(zip(traffic.responses.tolist(), sums.tolist(), strict=True))
        if count
    ]


def ours(rows: Sequence[MinuteSums]) -> Found:
    """What Anchorwatch finds."""
    return [(shift.minute, shift.fall) for shift in shifts(rows, Sensitivity())]


def river_defaults(make: type[ADWIN] | type[PageHinkley]) -> Detector:
    """A detector of river's as it comes, on each minute's mean. It does not say which way: any alarm counts."""

    def detector(rows: Sequence[MinuteSums]) -> Found:
        inner, found = make(), []
        for row in rows:
            inner.update(row.z / 1000 / row.responses)  # type: ignore[no-untyped-call]
            if inner.drift_detected:
                found.append((row.minute, 1.0))
        return found

    return detector


def false_shifts(detector: Detector, fleets: Sequence[Noise], rhythm: float) -> list[int]:
    """How many shifts, up or down, are found in each of these fleets, where there is none."""
    return [
        len(detector(minutes(traffic, rhythm=rhythm, phase=number / len(fleets))))
        for number, traffic in enumerate(fleets)
    ]


def delays(detector: Detector, fleets: Sequence[Noise], shift: float, rhythm: float = USUAL) -> list[float]:
    """Minutes from a fall to the first finding of a fall; infinite where it is not found before the traffic ends.

    It comes after half of the days, at another time of day in each fleet.
    """
    result = []
    for number, traffic in enumerate(fleets):
        at = len(traffic.z) // 2 + number * DAY // len(fleets)
        found = detector(minutes(traffic, rhythm=rhythm, shift=shift, at=at))
        result.append(next((float(minute + 1 - at) for minute, fall in found if minute >= at and fall > 0), np.inf))
    return result


def measure(count: int, days: int, after: int, seed: int) -> dict[str, object]:
    """All the figures: per detector and rate, false shifts in thirty days by rhythm, and delays by shift."""
    detectors: dict[str, Detector] = {
        "anchorwatch": ours,
        "river ADWIN": river_defaults(ADWIN),
        "river PageHinkley": river_defaults(PageHinkley),
    }
    rows = []
    for rate in RATES:
        chance = np.random.default_rng([seed, rate])
        still = [noise(rate, days, chance) for _ in range(count)]
        moved = [noise(rate, 2 * after, chance) for _ in range(4 * count)]
        for name, detector in detectors.items():
            rhythms = RHYTHMS if detector is ours else (0.0, USUAL)
            row = {
                "detector": name,
                "responses_per_minute": rate,
                "false_per_30_days": {
                    str(rhythm): round(statistics.mean(false_shifts(detector, still, rhythm)) * 30 / days, 2)
                    for rhythm in rhythms
                },
                "found": {},
                "median_minutes": {},
            }
            for shift in SHIFTS:
                waited = delays(detector, moved, shift)
                middle = statistics.median(waited)
                row["found"][str(shift)] = round(float(np.isfinite(waited).mean()), 2)  # type: ignore[index]
                row["median_minutes"][str(shift)] = middle if np.isfinite(middle) else None  # type: ignore[index]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"fleets": count, "days": days, "days_after_a_shift": after, "seed": seed, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=20, help="stationary fleets a rate; four times as many that move")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--after", type=int, default=3, help="days watched before a shift, and after it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    result = measure(options.fleets, options.days, options.after, options.seed)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
