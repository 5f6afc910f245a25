"""The fault suite in its quick form: the most telling scenarios, small. `make soak` runs all of them, long.

ANCHORWATCH_TEST_SEED names the seed; it is printed with a failure, and reproduces what the processes are told to do, if
not how the machine schedules them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import scenarios
from faults.scenarios import Outcome
from faults.soak import summary

SEED = int(os.environ.get("ANCHORWATCH_TEST_SEED") or random.SystemRandom().randrange(1_000_000))

QUICK: dict[str, Callable[[Path, int], Outcome]] = {
    "kills-and-a-zombie-tansu": lambda d, s: scenarios.kills(d, s, rounds=4, freezes=1),
    "dispatcher-kills-embedded": lambda d, s: scenarios.dispatcher_kills(d, s, rounds=4),
    "zombie-embedded": lambda d, s: scenarios.zombie(d, s, freezes=1, broker=None, redis=False),
    "store-away-tansu": lambda d, s: scenarios.store_away(d, s, seconds=1.5),
    "broker-away-noida": lambda d, s: scenarios.broker_away(d, s, seconds=3.0),
    "all-poison-tansu": scenarios.all_poison,
    "poison-embedded": lambda d, s: scenarios.poison(d, s, turns=12, broker=None),
    "strange-traffic-embedded": lambda d, s: scenarios.strange_traffic(d, s, turns=60),
    "long-and-flooded-embedded": lambda d, s: scenarios.long_and_flooded(d, s, turns=3_000),
    "calibrations-embedded": lambda d, s: scenarios.calibrations(d, s, changes=1, broker=None),
}


@pytest.fixture(scope="module")
def done(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    outcomes: list[Outcome] = []
    yield outcomes
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nfaults: {summary(outcomes, SEED)}")


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_lost_and_nothing_twice(name: str, tmp_path: Path, done: list[Outcome]) -> None:
    print(f"ANCHORWATCH_TEST_SEED={SEED}")
    outcome = QUICK[name](tmp_path, SEED)
    print(outcome)
    assert (outcome.report.lost, outcome.report.duplicated) == (0, 0)
    assert outcome.report.events > 0
    done.append(outcome)
