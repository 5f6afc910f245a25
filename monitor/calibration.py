"""Calibrates deployments on healthy conversations of their own: which ones stand for what, and what may be promised.

It knows conversations as lists of responses, and no files. One conversation per user is a unit: people repeat
themselves, and a boundary from one person's forty conversations would be as sure as one from a single conversation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from monitor.detect.baseline import DetectorConfig, fit_baseline, without_promise
from monitor.detect.budget import fewest
from monitor.detect.fit import calibrate
from monitor.errors import ConfigurationError
from monitor.events import Projection

__all__ = ["Calibrated", "Talk", "calibrate_deployments", "units"]

# A quarter fits the mean and the spread, the rest the boundary: neither may see the other's conversations.
BASELINE_SHARE = 4


class Talk(NamedTuple):
    """One healthy conversation.

    Attributes:
        id: of the conversation.
        user: who held it; None is somebody else each time.
        responses: in order, of one deployment.
    """

    id: str
    user: str | None
    responses: Sequence[Projection]


class Calibrated(NamedTuple):
    """What calibrating came to.

    Attributes:
        config: the parent's configuration with the deployments that were calibrated.
        refused: why not, by deployment.
        repeated: conversations left out because their user has another one.
    """

    config: DetectorConfig
    refused: dict[str, ConfigurationError]
    repeated: int


def units(talks: Iterable[Talk]) -> tuple[list[Talk], int]:
    """One conversation per user, the one whose id has the least hash; and how many were left out."""
    chosen: dict[str, Talk] = {}
    count = 0
    for talk in talks:
        count += 1
        user = f"user\x1f{talk.user}" if talk.user is not None else f"conversation\x1f{talk.id}"
        if user not in chosen or _hash(talk) < _hash(chosen[user]):
            chosen[user] = talk
    return sorted(chosen.values(), key=_hash), count - len(chosen)


def calibrate_deployments(
    talks: Iterable[Talk],
    parent: DetectorConfig,
    *,
    budget: float,
    critical_budget: float | None = None,
    confidence: float | None = None,
    uncertified: bool = False,
) -> Calibrated:
    """Calibrate every deployment that has conversations enough.

    Args:
        talks: healthy conversations.
        parent: a bundle's own configuration: readout, constants, and how the four statistics stand to each other.
        budget, critical_budget, confidence: see `monitor.detect.fit.calibrate`.
        uncertified: where there are too few for the budget, take the parent's boundaries on the deployment's own mean
            and spread, and say that nothing is promised.
    """
    deployments: dict[str, list[Talk]] = {}
    for talk in talks:
        if talk.responses:
            deployments.setdefault(talk.responses[0].deployment, []).append(talk)
    config, refused, left_out = parent, dict[str, ConfigurationError](), 0
    for deployment in sorted(deployments):
        chosen, repeated = units(deployments[deployment])
        left_out += repeated
        responses = [talk.responses for talk in chosen]
        cut = max(2, math.ceil(len(responses) / BASELINE_SHARE))
        try:
            if uncertified and len(responses) - cut < fewest(budget, confidence):
                baseline = fit_baseline(deployment, parent.axis_id, responses, parent.readout)
                own = replace(parent, baselines={deployment: baseline})
                boundaries = without_promise(parent.boundaries)
            else:
                _enough(len(responses), cut, budget, confidence)
                own = calibrate(
                    responses[:cut],
                    responses[cut:],
                    deployment=deployment,
                    axis_id=parent.axis_id,
                    readout=parent.readout,
                    budget=budget,
                    critical_budget=critical_budget,
                    confidence=confidence,
                    shape=parent.boundaries,
                    critical_factor=parent.boundaries.critical_factor,
                    ewma_weight=parent.ewma_weight,
                    cusum_slack=parent.cusum_slack,
                )
                boundaries = own.boundaries
        except ConfigurationError as error:
            refused[deployment] = error
            continue
        config = replace(
            config,
            baselines={**config.baselines, **own.baselines},
            own_boundaries={**config.own_boundaries, deployment: boundaries},
        )
    return Calibrated(config, refused, left_out)


def _enough(count: int, cut: int, budget: float, confidence: float | None) -> None:
    needed = fewest(budget, confidence)
    if count - cut < needed:
        total = math.ceil(needed * BASELINE_SHARE / (BASELINE_SHARE - 1))
        raise ConfigurationError(
            f"{count} healthy conversations can't certify a budget of {budget:g}"
            + ("" if confidence is None else f" with confidence {confidence:g}")
            + f": a quarter of them gives the baseline, and {needed} are needed for the boundary",
            cure=f"collect at least {total}, ask for a larger budget, or pass --uncertified to go on without a promise",
        )


def _hash(talk: Talk) -> bytes:
    return hashlib.sha256(talk.id.encode()).digest()
