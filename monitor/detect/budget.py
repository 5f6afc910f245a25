"""The alarm budget: where a boundary must lie so that at most a stated share of healthy conversations warns.

Split conformal prediction (Vovk, Gammerman, Shafer 2005; Lei et al. 2018) on one number per conversation. It knows how
large that number was in n healthy conversations, one per script or user, and nothing of what it is made of.

The promise. If the conversations to come are exchangeable with the n calibrated ones, a new healthy one reaches the
boundary with probability at most the budget, *on average over calibrations*. For the one calibration in hand the
realised share is itself random, Beta(n + 1 - k, k) where the boundary is the k-th smallest of n: `probability_within`
says how likely it lies within the budget, and `confidence` asks for a boundary that makes it likely enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from monitor.errors import ConfigurationError

__all__ = ["Limit", "Load", "exact_interval", "expected_load", "fewest", "limit", "probability_within"]


class Limit(NamedTuple):
    """A boundary on one statistic, and what is promised for it.

    Attributes:
        value: reached is crossed; in the statistic's own unit.
        rank: the boundary lies just above the rank-th smallest calibrated value, counted from 1.
        conversations: how many were calibrated on.
        budget: the asked share.
        probability_within: of the realised share being within the budget, over draws of the calibration.
    """

    value: float
    rank: int
    conversations: int
    budget: float
    probability_within: float


class Load(NamedTuple):
    """What a budget means for the people on call, per day.

    Attributes:
        false_alarms, true_alarms: conversations that warn.
        precision: share of the warnings that are true; None where nothing would warn.
    """

    false_alarms: float
    true_alarms: float
    precision: float | None


def probability_within(conversations: int, rank: int, budget: float) -> float:
    """P(realised share <= budget) for the rank-th smallest of n: P(Binomial(n, budget) >= n + 1 - rank)."""
    return max(0.0, 1.0 - _at_most(conversations - rank, conversations, budget))


def exact_interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share; (0, 1) of nothing."""
    tail = (1.0 - confidence) / 2
    low = 0.0 if count == 0 else _solve(lambda share: 1.0 - _at_most(count - 1, of, share) < tail)
    high = 1.0 if count == of else _solve(lambda share: _at_most(count, of, share) > tail)
    return low, high


def fewest(budget: float, confidence: float | None = None) -> int:
    """The smallest number of healthy conversations that can certify a budget, with or without a confidence.

    Raises:
        ConfigurationError: either is no share between 0 and 1.
    """
    for name, share in (("budget", budget), ("confidence", confidence)):
        if share is not None and not 0.0 < share < 1.0:
            raise ConfigurationError(f"the {name} is {share}", cure=f"give a {name} between 0 and 1")
    count = math.ceil(1.0 / budget - 1.0 - 1e-9)
    if confidence is not None:
        count = max(count, math.ceil(math.log1p(-confidence) / math.log1p(-budget) - 1e-9))
    return count


def limit(values: Sequence[float], budget: float, confidence: float | None = None) -> Limit:
    """The boundary for a budget.

    Args:
        values: the statistic's largest value in each healthy calibration conversation; large is drift.
        budget: share of healthy conversations that may reach it, in (0, 1).
        confidence: least probability that the realised share is within the budget; without it the promise holds on
            average over calibrations.

    Returns:
        The ceil((n + 1)(1 - budget))-th smallest value, or a higher one where the confidence asks for it.

    Raises:
        ConfigurationError: too few conversations for this budget; it says how many would do.
    """
    needed, count = fewest(budget, confidence), len(values)
    if not all(map(math.isfinite, values)):
        raise ConfigurationError("a calibration conversation was not judged", cure="give conversations of one axis")
    if count < needed:
        promise = f"a budget of {budget:g}" + ("" if confidence is None else f" with confidence {confidence:g}")
        raise ConfigurationError(
            f"{count} healthy conversations can't certify {promise}",
            cure=f"collect at least {needed}, or ask for a budget of {_least_budget(count, confidence):.2g} or more",
        )
    rank = math.ceil((count + 1) * (1.0 - budget) - 1e-9)
    while confidence is not None and probability_within(count, rank, budget) < confidence:
        rank += 1  # ends: at rank n the probability is 1 - (1 - budget)^n, and n is enough for that
    value = sorted(values)[rank - 1]
    # Reached is crossed, so the boundary lies just above; a boundary must be above 0, also where nothing ever fell.
    return Limit(max(value * (1 + 1e-3), 1e-3), rank, count, budget, probability_within(count, rank, budget))


def expected_load(budget: float, *, detection: float, conversations_per_day: float, prevalence: float) -> Load:
    """Warnings a day at a stated traffic.

    Args:
        budget: share of healthy conversations that warn.
        detection: share of drifting conversations that warn.
        conversations_per_day: all conversations.
        prevalence: share of them that drift.
    """
    false_alarms = conversations_per_day * (1.0 - prevalence) * budget
    true_alarms = conversations_per_day * prevalence * detection
    total = false_alarms + true_alarms
    return Load(false_alarms, true_alarms, true_alarms / total if total else None)


def _at_most(count: int, of: int, share: float) -> float:
    """P(Binomial(of, share) <= count), for a share inside (0, 1)."""
    # What lies twelve standard deviations below the mean adds nothing, and may be a million terms.
    first = max(0, math.floor(of * share - 12.0 * math.sqrt(of * share * (1.0 - share)) - 30.0))
    terms = (
        math.exp(
            math.lgamma(of + 1)
            - math.lgamma(found + 1)
            - math.lgamma(of - found + 1)
            + found * math.log(share)
            + (of - found) * math.log1p(-share)
        )
        for found in range(first, count + 1)
    )
    return min(1.0, math.fsum(terms))


def _solve(below: Callable[[float], bool]) -> float:
    """Where a condition that holds for small shares ceases to hold, by bisection."""
    low, high = 1e-12, 1.0 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def _least_budget(count: int, confidence: float | None) -> float:
    """The least budget that so many conversations certify, rounded up."""
    least = 1.0 / (count + 1)
    if confidence is not None and count:
        least = max(least, -math.expm1(math.log1p(-confidence) / count))
    return math.ceil(least * 1000) / 1000 if least < 1 else 0.999
