"""Whose normal each audited conversation is judged by: its own population's calibration, a parent's, or its own logs'.

It knows frozen configurations and a bounded sample of readouts; no files, and nothing of how a conversation is folded.

A deployment that the calibration names is judged by that, certified as it says. One that it does not name has no
certified boundary anywhere: it is judged by the parent's baseline and boundaries under its own name, and everything
that comes of it says *not certified for this population*. With a baseline from the logs themselves it is judged by
their median and spread, which assumes that most of their conversations are healthy.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from msgspec.structs import replace

from monitor.axis.bundle import Bundle
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, robust_baseline, without_promise
from monitor.detect.configure import detector_config
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection

__all__ = ["SELF_LEAST", "Basis", "Population", "Populations", "SelfSample", "is_live", "populations"]

Basis: TypeAlias = Literal["calibrated", "parent", "self", "learning"]

WITNESS = "anchorwatch/witness"
SELF_LEAST = 20  # conversations; with fewer the spread is a guess
SELF_MOST = 10_000  # conversations of one deployment that are kept for its median
REMEMBERED = 256  # configurations; a log that names a model per record must not fill the memory


def is_live(event: Projection) -> bool:
    """Whether a response was measured while the model spoke, so that a worker may have judged it."""
    return event.source != WITNESS


class Population(NamedTuple):
    """How one deployment is judged.

    Attributes:
        deployment: its name.
        basis: `calibrated` by its own, by a `parent`'s, by its logs' own (`self`), or `learning`: not judged.
        config: what the fold reads.
        lender: the deployment whose baseline is borrowed, where it is a parent's.
    """

    deployment: str
    basis: Basis
    config: DetectorConfig
    lender: str | None = None

    @property
    def baseline(self) -> Baseline | None:
        """The healthy mean and spread; None while learning."""
        return self.config.baselines.get(self.deployment)

    @property
    def boundaries(self) -> Boundaries:
        """Where the alarm lies."""
        return self.config.boundaries_of(self.deployment)


class Populations:
    """Finds the configuration of a deployment.

    Args:
        config: the calibration; its own deployments are judged by it as it stands.
        parent: baseline and boundaries for the others; None leaves them `learning`.
        own: baselines that the logs themselves gave, by deployment; they come before the parent's.
    """

    def __init__(
        self,
        config: DetectorConfig,
        parent: tuple[Baseline, Boundaries] | None = None,
        own: Mapping[str, Baseline] | None = None,
    ) -> None:
        self.config = config
        self._parent = parent
        self._own = dict(own or {})
        self._known: dict[tuple[str, bool], Population] = {}

    def of(self, deployment: str, *, live: bool = False) -> Population:
        """How this deployment is judged.

        Args:
            live: as a worker would, which judges nobody by a parent's baseline.
        """
        key = deployment, live
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = self._find(deployment, live)
        return self._known[key]

    def judging(self, event: Projection) -> Population:
        """How a recorded response is judged: the witness's as in an audit of its log, any other as a worker would."""
        return self.of(event.deployment, live=is_live(event))

    def with_own(self, own: Mapping[str, Baseline]) -> Populations:
        """The same with baselines from the logs themselves."""
        return Populations(self.config, self._parent, own)

    def _find(self, deployment: str, live: bool) -> Population:
        if deployment in self._own:
            boundaries = self._parent[1] if self._parent else self.config.boundaries
            return self._adopted(deployment, "self", self._own[deployment], boundaries)
        if deployment in self.config.baselines:
            return Population(deployment, "calibrated", self.config)
        if self._parent is None or live:
            return Population(deployment, "learning", self.config)
        return self._adopted(deployment, "parent", *self._parent)

    def _adopted(self, deployment: str, basis: Basis, baseline: Baseline, boundaries: Boundaries) -> Population:
        config = replace(
            self.config,
            baselines={deployment: replace(baseline, deployment=deployment)},
            own_boundaries={deployment: without_promise(boundaries)},
        )
        return Population(deployment, basis, config, baseline.deployment if basis == "parent" else None)


def populations(bundle: Bundle, calibration: DetectorConfig | None = None, **constants: float) -> Populations:
    """How an audit with this bundle judges.

    Args:
        calibration: deployments calibrated by the auditor, in place of the bundle's own calibration.
        constants: detector constants that replace the calibration's, as a worker's settings do.

    Raises:
        ConfigurationError: the bundle is not calibrated and no calibration is given, or it is for another axis.
    """
    if calibration is None:
        shipped = detector_config(bundle, **constants)
        return Populations(shipped, _parent(shipped))
    if calibration.axis_id != bundle.id:
        raise ConfigurationError(
            f"the calibration is for axis {calibration.axis_id:.16}, but this is bundle {bundle.id:.16}",
            cure="give --bundle the bundle that it was made with, or calibrate again",
        )
    calibration = replace(calibration, **constants)
    if bundle.info.calibration is None:
        return Populations(calibration, None)
    shipped = detector_config(bundle)
    # A baseline means nothing under another readout.
    same = shipped.readout == calibration.readout and shipped.ewma_weight == calibration.ewma_weight
    return Populations(calibration, _parent(shipped) if same else None)


def _parent(shipped: DetectorConfig) -> tuple[Baseline, Boundaries] | None:
    for deployment, baseline in shipped.baselines.items():
        return baseline, shipped.boundaries_of(deployment)
    return None


class SelfSample:
    """Readouts of at most 10,000 conversations per deployment, those whose names have the least hashes.

    The choice depends on names only, so it is the same in whatever order the log lies, and memory is bounded.
    """

    def __init__(self, populations: Populations) -> None:
        self._populations = populations
        self._readout = populations.config.readout
        self._axis = populations.config.axis_id
        self._talks: dict[str, dict[bytes, list[tuple[float, float]]]] = {}
        self._largest: dict[str, list[int]] = {}  # heaps of negated hashes

    def add(self, conversation: str, event: Projection) -> None:
        """One response of a conversation. What can't be read is left to the audit itself, which says so."""
        if event.axis_id != self._axis:
            return
        try:
            pair = (
                self._readout.value(event.coordinates, event.prompt),
                self._readout.value(event.windows.lowest, event.prompt),
            )
        except EventError:
            return
        if event.deployment not in self._talks and len(self._talks) >= REMEMBERED:
            return
        talks = self._talks.setdefault(event.deployment, {})
        heap = self._largest.setdefault(event.deployment, [])
        name = hashlib.sha256(conversation.encode(errors="surrogatepass")).digest()
        if name not in talks:
            rank = -int.from_bytes(name)
            if len(heap) >= SELF_MOST:
                if rank < heap[0]:
                    return
                del talks[(-heapq.heappushpop(heap, rank)).to_bytes(len(name))]
            else:
                heapq.heappush(heap, rank)
            talks[name] = []
        talks[name].append(pair)

    def baselines(self) -> tuple[dict[str, Baseline], dict[str, str]]:
        """A baseline per deployment, and why others have none."""
        found: dict[str, Baseline] = {}
        refused: dict[str, str] = {}
        for deployment, talks in sorted(self._talks.items()):
            if len(talks) < SELF_LEAST:
                refused[deployment] = f"{len(talks)} conversations are too few, {SELF_LEAST} are the least"
                continue
            try:
                found[deployment] = robust_baseline(deployment, self._axis, [talks[name] for name in sorted(talks)])
            except ConfigurationError as error:
                refused[deployment] = error.problem
        return found, refused
