"""What going live would bring: warnings a day, how many of them are true, and whom they reach. Pure.

It rests on the budgets of the calibration in force (see `monitor.detect.budget`), on the traffic that somebody states,
and on the share of drifting conversations that warn, which nobody knows of their own traffic: it is the bundle's, on
the scripts that it was made with. Where no budget is certified there is no figure, and it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from msgspec import Struct

from alerts.config import AlertsConfig, taken_by
from monitor.detect.baseline import DetectorConfig
from monitor.detect.budget import expected_load
from monitor.events import Kind

__all__ = ["Outlook", "Pages", "outlook", "pages"]

SEVERITIES = ("warning", "critical")
KINDS = tuple(kind for kind in get_args(Kind) if kind not in ("recovered", "fleet_shift"))


class Outlook(Struct, frozen=True, kw_only=True):
    """One deployment on one day.

    Attributes:
        budget: share of healthy conversations that may warn; None where none is certified, and then neither is what
            follows from it.
        conversations: a day, as stated.
        false_warnings, true_warnings: conversations that warn.
        precision: share of the warnings that are true.
        false_criticals: healthy conversations that become critical; None where that has no budget of its own.
        calibrated: whether the deployment has boundaries of its own.
    """

    deployment: str
    calibrated: bool
    conversations: float
    budget: float | None = None
    false_warnings: float | None = None
    true_warnings: float | None = None
    precision: float | None = None
    false_criticals: float | None = None


class Pages(Struct, frozen=True, kw_only=True):
    """What one receiver is sent on one day, at most.

    Attributes:
        severities: which of them its routes let through, whatever the kind of drift.
        alerts: new ones; None where a deployment has no figure.
        cap: of notifications, by its own rule; None where it has none.
    """

    receiver: str
    severities: tuple[str, ...]
    alerts: float | None
    cap: int | None


def outlook(
    config: DetectorConfig, traffic: Mapping[str, float], *, prevalence: float, detection: float | None
) -> list[Outlook]:
    """One for every deployment that the traffic names.

    Args:
        config: the calibration in force.
        traffic: deployment → conversations a day.
        prevalence: share of conversations that drift.
        detection: share of drifting conversations that warn; None where nobody knows.
    """
    found = []
    for deployment, conversations in sorted(traffic.items()):
        one = Outlook(deployment=deployment, calibrated=deployment in config.baselines, conversations=conversations)
        boundaries = config.boundaries_of(deployment)
        budget = boundaries.budget if boundaries.certification == "certified" and one.calibrated else None
        if budget is not None and detection is not None:
            load = expected_load(
                budget, detection=detection, conversations_per_day=conversations, prevalence=prevalence
            )
            critical = boundaries.critical_budget if boundaries.critical_certification == "certified" else None
            one = Outlook(
                deployment=deployment,
                calibrated=True,
                conversations=conversations,
                budget=budget,
                false_warnings=load.false_alarms,
                true_warnings=load.true_alarms,
                precision=load.precision,
                false_criticals=None if critical is None else conversations * (1.0 - prevalence) * critical,
            )
        found.append(one)
    return found


def pages(rules: AlertsConfig, found: Iterable[Outlook]) -> list[Pages]:
    """What each receiver gets of it. Alerts of one group go out together, so that there are fewer messages."""
    reached: dict[str, set[str]] = {}
    alerts: dict[str, list[float | None]] = {}
    for one in found:
        here: dict[str, set[str]] = {}
        for kind in KINDS:
            for severity in SEVERITIES:
                labels = {"alertname": "AnchorwatchPersonaDrift", "deployment": one.deployment, "kind": kind}
                for route in taken_by(rules.route, {**labels, "severity": severity}):
                    here.setdefault(route.receiver, set()).add(severity)
        total = None
        if one.false_warnings is not None and one.true_warnings is not None:
            total = one.false_warnings + one.true_warnings
        for receiver, severities in here.items():
            reached.setdefault(receiver, set()).update(severities)
            alerts.setdefault(receiver, []).append(total)
    return [
        Pages(
            receiver=receiver.name,
            severities=tuple(one for one in SEVERITIES if one in reached[receiver.name]),
            alerts=None if None in alerts[receiver.name] else sum(filter(None, alerts[receiver.name])),
            cap=receiver.max_per_day,
        )
        for receiver in rules.receivers
        if receiver.name in reached
    ]
