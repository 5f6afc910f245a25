"""Calibrates deployments on healthy conversations of their own: which ones stand for what, and what may be promised.

It knows conversations as lists of responses, and no files. One conversation per user is a unit: people repeat
themselves, and a boundary from one person's forty conversations would be as sure as one from a single conversation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace
from rich.console import Console

from monitor.detect.baseline import DetectorConfig, fit_baseline, without_promise
from monitor.detect.budget import expected_load, fewest
from monitor.detect.fit import calibrate
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection

__all__ = ["Calibrated", "Gathering", "Talk", "calibrate_deployments", "print_calibrated", "report_of", "units"]

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


class Gathering:
    """Healthy responses, gathered into conversations as the fold would take them: no event twice, no other axis.

    Args:
        parent: the configuration that will judge; what it can't read is left out.
        deployment: take all for this one's; by default each is its own deployment's.
        left_out: told why, of each response that is.

    Attributes:
        users_known: whether any conversation names its user.
    """

    def __init__(self, parent: DetectorConfig, deployment: str | None, left_out: Callable[[str], None]) -> None:
        self.users_known = False
        self._parent, self._deployment, self._left_out = parent, deployment, left_out
        self._talks: dict[tuple[str, str], tuple[str | None, dict[str, Projection]]] = {}

    def add(self, conversation: str, user: str | None, event: Projection) -> None:
        """One response."""
        self.users_known |= user is not None
        if event.axis_id != self._parent.axis_id:
            self._left_out("it was measured with another axis bundle")
            return
        try:
            for coordinates in (event.coordinates, event.windows.lowest):
                self._parent.readout.value(coordinates, event.prompt)
        except EventError as error:
            self._left_out(error.problem)
            return
        deployment = self._deployment or event.deployment
        _, responses = self._talks.setdefault((conversation, deployment), (user, {}))
        if event.id in responses:
            self._left_out("the same event came twice")
            return
        responses[event.id] = replace(event, deployment=deployment)

    def talks(self) -> list[Talk]:
        """The conversations; one that changed its deployment is one of each."""
        return [Talk(id, user, list(responses.values())) for (id, _), (user, responses) in self._talks.items()]


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


def report_of(
    found: Calibrated,
    *,
    traffic: float,
    prevalence: float,
    detection: float | None = None,
    critical_budget: float | None = None,
    users_known: bool = True,
) -> dict[str, Any]:
    """What a calibration came to, for people and for scripts.

    Args:
        traffic: conversations a day.
        prevalence: share of them that drift.
        detection: share of drifting conversations that warn; None where unknown.
        critical_budget: what was asked for.
        users_known: whether the conversations named their users.
    """
    deployments = {}
    for name, own in sorted(found.config.own_boundaries.items()):
        baseline = found.config.baselines[name]
        load = None
        if own.certification == "certified" and own.budget is not None and detection is not None:
            load = expected_load(
                own.budget, detection=detection, conversations_per_day=traffic, prevalence=prevalence
            )._asdict()
        deployments[name] = {
            "certification": own.certification,
            "budget": own.budget,
            "probability_within": own.probability_within,
            "calibration_conversations": own.conversations,
            "block_turns": own.block_turns,
            "critical_certification": own.critical_certification,
            "critical_budget": own.critical_budget,
            "critical_factor": own.critical_factor,
            "boundaries": {key: getattr(own, key) for key in ("level", "drop", "cusum", "dip")},
            "baseline": {
                "mean": baseline.mean,
                "standard_deviation": baseline.standard_deviation,
                "conversations": baseline.conversations,
            },
            "expected_per_day": load,
        }
    return {
        "config_id": found.config.config_id,
        "axis_id": found.config.axis_id,
        "deployments": deployments,
        "refused": {name: {"problem": why.problem, "cure": why.cure} for name, why in sorted(found.refused.items())},
        "left_out_as_repeated_users": found.repeated,
        "users_known": users_known,
        "critical_budget_asked": critical_budget,
        "assumed": {"conversations_per_day": traffic, "prevalence": prevalence, "detection": detection},
    }


def print_calibrated(report: Mapping[str, Any], console: Console) -> None:
    """The report on a terminal."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    assumed = report["assumed"]
    for name, own in report["deployments"].items():
        say(f"{name}: {own['certification'].upper()}")
        if own["certification"] == "certified":
            say(
                f"  At most {own['budget']:.2%} of healthy conversations may warn, counted in blocks of "
                f"{own['block_turns']} replies; calibrated on {own['calibration_conversations']} conversations.\n"
                f"  On average over calibrations that holds; for this one, P(realised share <= budget) = "
                f"{own['probability_within']:.2f}."
            )
        else:
            say("  Too few for the budget: the parent's boundaries on its own baseline. Nothing is promised.")
        critical = (
            f"at most {own['critical_budget']:.2%}, certified"
            if own["critical_certification"] == "certified"
            else f"{own['critical_factor']:.2f} times the warning boundary, uncertified"
        )
        asked = report["critical_budget_asked"]
        if asked is not None and own["critical_certification"] != "certified":
            critical += f" (a budget of {asked:.2%} takes {fewest(asked)} conversations for the boundary alone)"
        say(f"  Critical: {critical}.")
        if load := own["expected_per_day"]:
            say(
                f"  At {assumed['conversations_per_day']:,} conversations a day, {assumed['prevalence']:.2%} drifting: "
                f"{load['false_alarms']:.0f} false and {load['true_alarms']:.0f} true warnings a day, precision "
                f"{load['precision'] or 0:.0%}, if {assumed['detection']:.0%} of what drifts warns: so many of the "
                f"scripts that the bundle learned from do, and of others fewer."
            )
    for name, why in report["refused"].items():
        say(f"{name}: REFUSED\n  {why['problem']}\n  cure: {why['cure']}")
    if not report["deployments"] and not report["refused"]:
        say("No conversation could be measured: nothing is calibrated.")
    if report["deployments"] and not report["users_known"]:
        say(
            "No conversation names its user: each counts as another one's. Where few people hold many, "
            "nothing is promised."
        )
    if report["left_out_as_repeated_users"]:
        say(f"{report['left_out_as_repeated_users']} conversations left out: their user has another one already.")


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
