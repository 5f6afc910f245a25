"""Fits what the detector reads, and where its boundaries lie, on developed traffic. Pure numpy; it draws nothing.

What is read is Fisher's linear discriminant: it points from drifting towards healthy responses, scaled by how either
side scatters. Kinds of conversation weigh the same, and how they differ from one another counts as scatter: a direction
in which a poem differs from a plain task is no evidence, which is what tells a poem from a persona.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from monitor.axis.readout import Readout
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, fit_baseline
from monitor.detect.budget import fewest, limit
from monitor.detect.conversation import ConversationState, step
from monitor.errors import ConfigurationError
from monitor.events import Projection

__all__ = ["Conversations", "Group", "calibrate", "conversation_peaks", "fit_direction", "fit_readout", "unreachable"]

Floats = NDArray[np.floating]
# Kind of conversation -> its conversations, each a list of responses in order.
Conversations = Mapping[str, Sequence[Sequence[Projection]]]

# Parts of the false alarms that level, drop, cusum and dip may spend. Drop and dip are for sharp events, and see most
# of a healthy conversation's changes of subject: they get less, and so alarm on what is extreme only. The shape is
# read at a larger share than any budget, where a development split of a hundred conversations still says something.
_SPENT = (0.35, 0.15, 0.35, 0.15)
_SHAPE_SHARE = 0.08
_OUT_OF_REACH = Boundaries(level=1e9, drop=1e9, cusum=1e9, dip=1e9)


class Group(NamedTuple):
    """Responses of one kind of conversation.

    Attributes:
        features: [responses, d].
        weight: of the group, beside the others of its side.
    """

    features: Floats
    weight: float


def fit_direction(healthy: Sequence[Group], drifting: Sequence[Group], *, shrinkage: float) -> Floats:
    """Fisher's discriminant between two sides.

    Args:
        shrinkage: how far the covariance is drawn towards its diagonal, 0 to 1: near 1 where there are as many features
            as responses.

    Returns:
        Weights [d] whose value is high for healthy responses, scaled to unit standard deviation within a side.

    Raises:
        ConfigurationError: a side is empty, or nothing varies.
    """
    if not healthy or not drifting:
        raise ConfigurationError("a discriminant needs healthy and drifting conversations", cure="give both")
    (high, healthy_scatter), (low, drifting_scatter) = _moments(healthy), _moments(drifting)
    within = (healthy_scatter + drifting_scatter) / 2
    if not (np.diag(within) > 0).all():
        raise ConfigurationError("a feature never varies, so it can't be weighed", cure="give more varied responses")
    within = (1 - shrinkage) * within + shrinkage * np.diag(np.diag(within))
    weights = np.linalg.solve(within, high - low)
    return np.asarray(weights / math.sqrt(weights @ within @ weights))


def fit_readout(
    healthy: Conversations,
    drifting: Conversations,
    *,
    coordinates: Sequence[str],
    prompt: Sequence[str] = (),
    shrinkage: float = 0.1,
) -> Readout:
    """Fisher's discriminant on response coordinates and, where asked, prompt coordinates.

    Args:
        healthy, drifting: responses by kind of conversation.
        coordinates, prompt: which directions may be weighed.
        shrinkage: how far the covariance is drawn towards its diagonal, 0 to 1.

    Returns:
        Weights whose value is high for healthy responses, scaled to unit standard deviation within a side.

    Raises:
        ConfigurationError: a side is empty, or a direction never varies.
    """
    if not healthy or not drifting:
        raise ConfigurationError("a readout needs healthy and drifting conversations", cure="give both")
    names = [*coordinates, *(f"prompt.{name}" for name in prompt)]
    high, low = (
        [Group(_features(talks, coordinates, prompt), 1.0) for talks in side.values()] for side in (healthy, drifting)
    )
    still = np.ptp(np.concatenate([group.features for group in (*high, *low)]), axis=0) == 0
    if still.any():
        raise ConfigurationError(
            f"nothing varies along {', '.join(np.array(names)[still])}, so it can't be weighed",
            cure="leave it out, or give more varied conversations",
        )
    weights = fit_direction(high, low, shrinkage=shrinkage)
    named = {name: float(f"{weight:.6g}") for name, weight in zip(names, weights, strict=True)}
    return Readout(
        coordinates={name: named[name] for name in coordinates},
        prompt={name: named[f"prompt.{name}"] for name in prompt},
    )


def calibrate(
    development: Sequence[Sequence[Projection]],
    calibration: Sequence[Sequence[Projection]],
    *,
    deployment: str,
    axis_id: str,
    readout: Readout,
    budget: float,
    critical_budget: float | None = None,
    confidence: float | None = None,
    shape: Boundaries | None = None,
    baseline: Baseline | None = None,
    critical_factor: float = 1.5,
    ewma_weight: float = 0.4,
    cusum_slack: float = 0.5,
) -> DetectorConfig:
    """Baseline and boundaries from healthy conversations, each of its own user or script.

    The development conversations give the baseline and the scale of each statistic (`_SPENT`); the calibration
    conversations, which had no part in anything else, give the one factor on all four scales: the split-conformal
    boundary on the conversations' largest scaled statistic. It holds for blocks of T responses, T the 95th percentile
    of the calibration conversations' lengths; of a longer one, the first T count.

    Args:
        development, calibration: responses by conversation, in order; of the one deployment.
        budget: share of healthy conversations that may warn.
        critical_budget: the same for critical; where it can't be certified, critical begins at `critical_factor` times
            the warning boundary, uncertified.
        confidence: see `budget.limit`.
        baseline: take this one, instead of fitting it on the development conversations.
        shape: take the proportions of the four boundaries from these, instead of from the development conversations.

    Raises:
        ConfigurationError: as `fit_baseline` and `limit`; the critical budget is not below the budget; or conversations
            of another deployment.
    """
    if critical_budget is not None and critical_budget >= budget:
        raise ConfigurationError(
            f"the critical budget {critical_budget:g} is no less than the budget {budget:g}", cure="give a smaller one"
        )
    block = math.ceil(np.percentile([len(talk) for talk in calibration], 95)) if calibration else 1
    config = DetectorConfig(
        axis_id=axis_id,
        readout=readout,
        baselines={deployment: baseline or fit_baseline(deployment, axis_id, development, readout)},
        boundaries=_OUT_OF_REACH,
        ewma_weight=ewma_weight,
        cusum_slack=cusum_slack,
    )
    if shape is not None:
        scales = np.array([shape.level, shape.drop, shape.cusum, shape.dip])
    else:
        scales = _scales(_peaks(development, config, block, deployment))
    joint = (_peaks(calibration, config, block, deployment) / scales).max(axis=1, initial=-math.inf)
    warning = limit(joint.tolist(), budget, confidence)
    certified = False
    if critical_budget is not None and len(joint) >= fewest(critical_budget, confidence):
        highest = limit(joint.tolist(), critical_budget, confidence)
        certified = highest.value > warning.value
        critical_factor = highest.value / warning.value if certified else critical_factor
    level, drop, cusum, dip = (float(f"{value:.4g}") for value in scales * warning.value)
    boundaries = Boundaries(
        level=level,
        drop=drop,
        cusum=cusum,
        dip=dip,
        critical_factor=critical_factor,
        budget=budget,
        certification="certified",
        critical_budget=critical_budget if certified else None,
        critical_certification="certified" if certified else "uncertified",
        block_turns=block,
        conversations=len(joint),
        probability_within=warning.probability_within,
    )
    return replace(config, boundaries=boundaries)


def conversation_peaks(talk: Sequence[Projection], config: DetectorConfig) -> tuple[float, float, float, float]:
    """The largest level, drop, cusum and dip of one conversation, in the units of `Statistics`."""
    state: ConversationState | None = None
    peaks = [-math.inf] * 4
    for response in talk:
        result = step(state, response, config)
        state = result.state
        if result.statistics is not None:
            peaks = [max(peak, value) for peak, value in zip(peaks, result.statistics, strict=True)]
    level, drop, cusum, dip = peaks
    return level, drop, cusum, dip


def unreachable(config: DetectorConfig) -> DetectorConfig:
    """The same detector with boundaries that nothing reaches: no episode restarts its statistics, no CUSUM is cut."""

    def far(boundaries: Boundaries) -> Boundaries:
        return replace(_OUT_OF_REACH, block_turns=boundaries.block_turns)

    own = {deployment: far(boundaries) for deployment, boundaries in config.own_boundaries.items()}
    return replace(config, boundaries=far(config.boundaries), own_boundaries=own)


def _scales(peaks: Floats) -> Floats:
    """What each statistic reaches in so many of the development conversations as it may spend; [4]."""
    spent = [
        np.percentile(column, 100 * (1 - _SHAPE_SHARE * part)) for column, part in zip(peaks.T, _SPENT, strict=True)
    ]
    return np.maximum(spent, 0.5)


def _peaks(talks: Sequence[Sequence[Projection]], config: DetectorConfig, block: int, deployment: str) -> Floats:
    """The largest statistics of each conversation's first block, [conversations, 4]."""
    peaks = np.array([conversation_peaks(talk[:block], config) for talk in talks]).reshape(-1, 4)
    if not np.isfinite(peaks).all():
        raise ConfigurationError(
            f"some conversations are not of the deployment {deployment!r}, so they were not judged",
            cure="give the conversations of one deployment, and its name",
        )
    return peaks


def _moments(groups: Sequence[Group]) -> tuple[Floats, Floats]:
    """Mean [d] and scatter about it [d, d] of one side, each group with its weight."""
    shares = np.array([group.weight for group in groups]) / sum(group.weight for group in groups)
    mean = sum(share * group.features.mean(axis=0) for share, group in zip(shares, groups, strict=True))
    scatter = sum(
        share * (group.features - mean).T @ (group.features - mean) / len(group.features)
        for share, group in zip(shares, groups, strict=True)
    )
    return np.asarray(mean), np.asarray(scatter)


def _features(talks: Sequence[Sequence[Projection]], coordinates: Sequence[str], prompt: Sequence[str]) -> Floats:
    return np.array(
        [
            [*(event.coordinates[name] for name in coordinates), *(event.prompt[name] for name in prompt)]
            for talk in talks
            for event in talk
        ]
    )
