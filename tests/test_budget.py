"""The alarm budget holds: on average over calibrations, on traffic whose turns are alike, heavy-tailed and uneven."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy.stats import beta, binom

from monitor.axis.readout import Readout
from monitor.detect.baseline import DetectorConfig
from monitor.detect.budget import exact_interval, expected_load, fewest, limit, probability_within
from monitor.detect.conversation import ConversationState, step
from monitor.detect.fit import calibrate, conversation_peaks
from monitor.errors import ConfigurationError
from monitor.events import Projection, Windows

DEPLOYMENT, AXIS = "shop", "axis"
Talk = list[Projection]


def event(talk: str, turn: int, value: float, lowest: float) -> Projection:
    return Projection(
        id=f"{talk}#{turn}",
        time=f"2026-01-01T00:{turn // 60:02}:{turn % 60:02}Z",
        source="/test",
        conversation_id=talk,
        turn=turn,
        model="toy",
        axis_id=AXIS,
        layer=1,
        deployment=DEPLOYMENT,
        projection=value,
        coordinates={"a": value},
        prompt={},
        windows=Windows(lowest={"a": lowest}, last={"a": value}),
        tokens=30,
    )


def traffic(seed: int, count: int, lengths: tuple[int, int] = (3, 16)) -> list[Talk]:
    """Healthy conversations: each has a level of its own, its turns follow one another, now and then one falls far."""
    random = np.random.default_rng(seed)
    talks = []
    for index in range(count):
        level, last, talk = random.normal() * 0.8, 0.0, []
        for turn in range(int(random.integers(*lengths, endpoint=True))):
            last = 0.5 * last + random.standard_t(3) * 0.7
            value = 10.0 + level + last
            talk.append(event(f"{seed}.{index}", turn, value, value - abs(random.normal())))
        talks.append(talk)
    return talks


def warns(talk: Talk, config: DetectorConfig) -> bool:
    state: ConversationState | None = None
    for response in talk:
        result = step(state, response, config)
        state = result.state
        if any(finding.severity != "info" for finding in result.findings):
            return True
    return False


def calibrated(development: list[Talk], calibration: list[Talk], budget: float, **asked: Any) -> DetectorConfig:
    readout = Readout(coordinates={"a": 1.0})
    return calibrate(
        development, calibration, deployment=DEPLOYMENT, axis_id=AXIS, readout=readout, budget=budget, **asked
    )


# The arithmetic


@given(st.integers(1, 2000), st.floats(0.001, 0.5))
def test_fewest_is_where_the_promise_begins(count: int, budget: float) -> None:
    values = list(range(1, count + 1))
    if count < fewest(budget):
        with pytest.raises(ConfigurationError, match="can't certify") as caught:
            limit(values, budget)
        assert str(fewest(budget)) in caught.value.cure
    else:
        found = limit(values, budget)
        assert (count + 1 - found.rank) / (count + 1) <= budget + 1e-9
        # One rank lower would be too low.
        assert (count + 2 - found.rank) / (count + 1) > budget - 1e-9


@given(st.integers(1, 3000), st.floats(0.001, 0.5), st.data())
def test_the_probability_is_that_of_the_beta_distribution(count: int, budget: float, data: st.DataObject) -> None:
    rank = data.draw(st.integers(max(1, count - 60), count))
    assert probability_within(count, rank, budget) == pytest.approx(beta.cdf(budget, count + 1 - rank, rank), abs=1e-8)


@given(st.floats(0.005, 0.2), st.floats(0.5, 0.99), st.integers(0, 500))
def test_a_confidence_is_kept_or_refused(budget: float, confidence: float, more: int) -> None:
    needed = fewest(budget, confidence)
    found = limit(list(range(needed + more)), budget, confidence)
    assert found.probability_within >= confidence
    with pytest.raises(ConfigurationError):
        limit(list(range(needed - 1)), budget, confidence)


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_exact_interval(count: int, others: int) -> None:
    of = count + others
    if of == 0:
        assert exact_interval(0, 0) == (0.0, 1.0)
        return
    low, high = exact_interval(count, of)
    assert low == pytest.approx(0.0 if count == 0 else beta.ppf(0.025, count, others + 1), abs=1e-7)
    assert high == pytest.approx(1.0 if others == 0 else beta.ppf(0.975, count + 1, others), abs=1e-7)


def test_the_known_cases() -> None:
    assert fewest(0.01) == 99
    assert fewest(0.01, 0.95) == 299
    assert limit(list(range(99)), 0.01).rank == 99
    assert probability_within(99, 99, 0.01) == pytest.approx(1 - 0.99**99)
    assert limit(list(range(230)), 0.01).rank == 229


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1.0, math.nan])
def test_a_budget_that_is_no_share_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigurationError, match="budget"):
        limit([1.0] * 200, wrong)
    with pytest.raises(ConfigurationError, match="confidence"):
        limit([1.0] * 200, 0.05, wrong)
    with pytest.raises(ConfigurationError, match="budget"):
        fewest(wrong)


def test_a_critical_budget_that_is_no_smaller_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no less"):
        calibrated(traffic(1, 40), traffic(2, 120), 0.05, critical_budget=0.05)


def test_the_cure_names_a_budget_that_would_do() -> None:
    with pytest.raises(ConfigurationError) as caught:
        limit([0.0] * 50, 0.01)
    assert "0.02 or more" in caught.value.cure
    assert limit([0.0] * 50, 0.02).budget == 0.02


def test_the_load_of_a_day() -> None:
    load = expected_load(0.01, detection=0.8, conversations_per_day=10_000, prevalence=0.005)
    assert load.false_alarms == pytest.approx(99.5)
    assert load.true_alarms == pytest.approx(40.0)
    assert load.precision == pytest.approx(40 / 139.5)
    assert expected_load(0.01, detection=0.8, conversations_per_day=0, prevalence=0.5).precision is None


# The promise, on simulated traffic through the real fold


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, DetectorConfig]:
    """The joint statistic of 12,000 healthy conversations' first blocks, and the detector that scaled it."""
    config = calibrated(traffic(1, 60), traffic(2, 120), 0.05)
    shape = np.array([getattr(config.boundaries, name) for name in ("level", "drop", "cusum", "dip")])
    high = np.array([1e9] * 4)
    unreachable = _with(config, high)
    block = config.boundaries.block_turns
    peaks = np.array([conversation_peaks(talk[:block], unreachable) for talk in traffic(3, 12_000)])
    return (peaks / shape).max(axis=1), config


def _with(config: DetectorConfig, boundaries: np.ndarray) -> DetectorConfig:
    level, drop, cusum, dip = map(float, boundaries)
    return replace(config, boundaries=replace(config.boundaries, level=level, drop=drop, cusum=cusum, dip=dip))


@pytest.mark.parametrize(("count", "budget"), [(99, 0.01), (230, 0.01), (250, 0.02), (60, 0.05), (150, 0.1)])
def test_the_realised_share_is_within_the_budget_over_many_calibrations(
    pool: tuple[np.ndarray, DetectorConfig], count: int, budget: float
) -> None:
    joint, _ = pool
    random = np.random.default_rng(7)
    shares, promised = [], probability_within(count, limit(joint[:count].tolist(), budget).rank, budget)
    for _ in range(600):
        mixed = random.permutation(joint)
        boundary = limit(mixed[:count].tolist(), budget).value
        shares.append(float((mixed[count:] >= boundary).mean()))
    mean, error = np.mean(shares), np.std(shares) / math.sqrt(len(shares))
    assert mean <= budget + 3 * error
    assert mean >= 0.4 * budget  # it is a boundary, not a switched-off alarm
    within = float(np.mean([share <= budget for share in shares]))
    assert abs(within - promised) < 0.08


def test_the_fold_warns_where_the_joint_statistic_reaches_the_boundary(
    pool: tuple[np.ndarray, DetectorConfig],
) -> None:
    joint, config = pool
    talks = traffic(3, 12_000)[:600]
    block = config.boundaries.block_turns
    assert block is not None
    said = [warns(talk[:block], config) for talk in talks]
    assert said == [bool(value >= 1.0) for value in joint[:600]]
    assert 5 < sum(said) < 100


def test_a_confidence_makes_an_overrun_rare(pool: tuple[np.ndarray, DetectorConfig]) -> None:
    joint, _ = pool
    random = np.random.default_rng(8)
    over = 0
    for _ in range(500):
        mixed = random.permutation(joint)
        over += bool((mixed[150:] >= limit(mixed[:150].tolist(), 0.05, confidence=0.9).value).mean() > 0.05)
    assert over <= binom.ppf(0.999, 500, 0.1)


def test_further_blocks_are_units_of_their_own(pool: tuple[np.ndarray, DetectorConfig]) -> None:
    """Without blocks a conversation of 160 turns would warn almost surely; with them, each block is one more unit."""
    _, config = pool
    block = config.boundaries.block_turns
    assert block is not None
    long = traffic(4, 400, (160, 160))
    first = sum(warns(talk[:block], config) for talk in long) / len(long)
    warned = [warned_blocks(talk, config, block) for talk in long]
    per_block = sum(map(len, warned)) / (len(long) * 160 / block)
    assert per_block == pytest.approx(first, abs=0.03)
    endless = replace(config, boundaries=replace(config.boundaries, block_turns=None))
    without = [warned_blocks(talk, endless, block) for talk in long]
    assert sum(map(len, without)) > sum(map(len, warned))


def warned_blocks(talk: Talk, config: DetectorConfig, block: int) -> set[int]:
    state: ConversationState | None = None
    found = set()
    for index, response in enumerate(talk):
        result = step(state, response, config)
        state = result.state
        if any(finding.severity != "info" for finding in result.findings):
            found.add(index // block)
    return found


# What a calibration says of itself


def test_it_is_certified_and_says_on_how_many() -> None:
    found = calibrated(traffic(1, 40), traffic(2, 120), 0.05).boundaries
    assert (found.certification, found.budget, found.conversations) == ("certified", 0.05, 120)
    assert found.probability_within == pytest.approx(probability_within(120, 115, 0.05))
    assert found.block_turns == 16
    assert (found.critical_certification, found.critical_budget) == ("uncertified", None)


def test_critical_has_a_budget_of_its_own_where_there_are_enough() -> None:
    found = calibrated(traffic(1, 40), traffic(2, 120), 0.05, critical_budget=0.01).boundaries
    assert (found.critical_certification, found.critical_budget) == ("certified", 0.01)
    assert found.critical_factor > 1.0
    few = calibrated(traffic(1, 40), traffic(2, 90), 0.05, critical_budget=0.01).boundaries
    assert (few.critical_certification, few.critical_budget, few.critical_factor) == ("uncertified", None, 1.5)


def test_too_few_conversations_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(ConfigurationError, match="98 healthy conversations") as caught:
        calibrated(traffic(1, 40), traffic(2, 98), 0.01)
    assert "99" in caught.value.cure


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_order_does_not_matter(seed: int) -> None:
    development, calibration = traffic(1, 20), traffic(2, 60)
    random = np.random.default_rng(seed)
    mixed = [[talks[i] for i in random.permutation(len(talks))] for talks in (development, calibration)]
    assert calibrated(*mixed, 0.05).config_id == calibrated(development, calibration, 0.05).config_id
