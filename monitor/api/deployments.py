"""`GET /v1/deployments`: the populations that conversations are judged against, their baselines, and how these age.

It knows which calibration each partition is judged by, and the fleet's closed minutes; it judges nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Annotated, Protocol

from fastapi import Depends, FastAPI, Response
from msgspec import Struct

from monitor.api.access import needs
from monitor.api.answers import moment
from monitor.api.auth import Key
from monitor.api.bodies import json_response
from monitor.api.documents import answer
from monitor.api.documents import problems as problems_of
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig
from monitor.fleet import DAY, HOUR, WEEK, Age, ages
from monitor.store.store import ClosedMinutes, Progress, Rank, Reader
from monitor.stream.log import PROJECTIONS

__all__ = ["DeploymentList", "DeploymentStore", "mount_deployments"]

LOOKED_AT = 1_000


class DeploymentStore(Reader, Protocol):
    """What is read of a store."""

    def progress(self, topic: str) -> list[Progress]:
        """See `monitor.store.store.Outbox.progress`."""

    def config(self, topic: str, partition: int) -> bytes | None:
        """See `monitor.store.store.Store.config`."""

    def closed(self) -> ClosedMinutes | None:
        """See `monitor.store.store.Fleet.closed`."""


class Aged(Struct, frozen=True, kw_only=True):
    """What a deployment's responses were like lately, beside the 0 of its baseline; see `monitor.fleet.Age`."""

    responses: int
    mean_z: float
    standard_error: float | None
    warned: float


class DeploymentView(Struct, frozen=True, kw_only=True):
    """One deployment. Without a baseline it is `learning`: shown and counted, and nobody is told of it.

    `own_boundaries`: whether the boundaries were calibrated on this deployment. `last_*` is null where there was no
    traffic; `late_responses` came, in the last day, after their minute had been closed.
    """

    deployment: str
    learning: bool
    config_id: str | None
    baseline: Baseline | None
    boundaries: Boundaries | None
    own_boundaries: bool
    last_hour: Aged | None
    last_day: Aged | None
    last_week: Aged | None
    late_responses: int


class CalibrationView(Struct, frozen=True, kw_only=True):
    """A calibration in force, and the partitions that are judged by it."""

    config_id: str
    axis_id: str
    partitions: list[int]
    deployments: list[str]


class DeploymentList(Struct, frozen=True, kw_only=True):
    """Deployments by name; the calibrations in force: more than one only while they change; and up to which moment of
    event time the fleet's minutes are closed."""

    deployments: list[DeploymentView]
    calibrations: list[CalibrationView]
    closed_through: str | None


EXAMPLE = DeploymentList(
    deployments=[
        DeploymentView(
            deployment="support-bot",
            learning=False,
            config_id="c" * 32,
            baseline=Baseline("support-bot", "0" * 64, 0.25, 0.5, -0.75, 0.5, 400, 2600),
            boundaries=Boundaries(
                level=2.0, drop=2.5, cusum=4.0, dip=3.0, budget=0.01, certification="certified", conversations=400
            ),
            own_boundaries=True,
            last_hour=Aged(responses=310, mean_z=-0.02, standard_error=None, warned=0.003),
            last_day=Aged(responses=7300, mean_z=0.01, standard_error=0.02, warned=0.004),
            last_week=Aged(responses=51000, mean_z=0.0, standard_error=0.01, warned=0.004),
            late_responses=0,
        )
    ],
    calibrations=[
        CalibrationView(config_id="c" * 32, axis_id="0" * 64, partitions=[0, 1, 2], deployments=["support-bot"])
    ],
    closed_through="2026-01-02T03:02:00.000Z",
)


def mount_deployments(app: FastAPI, store: DeploymentStore) -> None:
    """Give the route to the application."""

    @app.get(
        "/v1/deployments",
        summary="Deployments and their baselines",
        response_class=Response,
        responses=answer("All of them.", EXAMPLE) | problems_of(503),
    )
    def deployments(_: Annotated[Key, Depends(needs("read"))]) -> Response:
        """Every deployment that has a baseline, or had judged traffic in the last week; and those that are learning,
        as far as the first thousand sessions that nothing judged tell. Budgets that are not `certified` are a choice,
        or borrowed from other traffic."""
        configs: dict[bytes, list[int]] = {}
        for one in store.progress(PROJECTIONS):
            if stored := store.config(PROJECTIONS, one.partition):
                configs.setdefault(stored, []).append(one.partition)
        unjudged = store.sessions(LOOKED_AT, after=Rank(None, ""))
        learning = {session.deployment for session in unjudged if session.outcome == "learning"}
        judges = [(_config(data), partitions) for data, partitions in configs.items()]
        return json_response(listed(judges, store.closed(), learning))


def listed(
    configs: list[tuple[DetectorConfig, list[int]]], closed: ClosedMinutes | None, learning: Collection[str] = ()
) -> DeploymentList:
    """The answer. Where two calibrations know a deployment, the one that judges more partitions is shown."""
    spans = {} if closed is None else {span: _by_name(ages(closed, span)) for span in (2 * HOUR, DAY, WEEK)}
    lately = spans.get(2 * HOUR, {}), spans.get(DAY, {}), spans.get(WEEK, {})
    judging: dict[str, DetectorConfig] = {}
    for config, _ in sorted(configs, key=lambda one: len(one[1])):
        judging |= dict.fromkeys(config.baselines, config)
    return DeploymentList(
        deployments=[
            _view(name, judging.get(name), lately, closed.late.get(name, 0) if closed else 0)
            for name in sorted({*judging, *lately[2], *learning})
        ],
        calibrations=[
            CalibrationView(
                config_id=config.config_id,
                axis_id=config.axis_id,
                partitions=partitions,
                deployments=sorted(config.baselines),
            )
            for config, partitions in configs
        ],
        closed_through=None if closed is None else moment((closed.through + 1) * 60.0),
    )


def _view(
    name: str, config: DetectorConfig | None, lately: tuple[dict[str, Age], dict[str, Age], dict[str, Age]], late: int
) -> DeploymentView:
    hour, day, week = (_aged(ages.get(name)) for ages in lately)
    return DeploymentView(
        deployment=name,
        learning=config is None,
        config_id=config.config_id if config else None,
        baseline=config.baselines[name] if config else None,
        boundaries=config.boundaries_of(name) if config else None,
        own_boundaries=config is not None and name in config.own_boundaries,
        last_hour=hour,
        last_day=day,
        last_week=week,
        late_responses=late,
    )


def _aged(age: Age | None) -> Aged | None:
    if age is None:
        return None
    error = age.standard_error if math.isfinite(age.standard_error) else None
    return Aged(responses=age.responses, mean_z=age.mean, standard_error=error, warned=age.warned)


def _by_name(found: list[Age]) -> dict[str, Age]:
    return {age.deployment: age for age in found}


@functools.lru_cache(maxsize=8)
def _config(data: bytes) -> DetectorConfig:
    """A calibration is large, and changes seldom."""
    return DetectorConfig.from_json(data)
