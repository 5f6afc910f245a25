"""The frozen calibrations that the fold reads: readout, baselines, boundaries, persona space, and their one id.

It knows what healthy responses of a deployment look like and where the alarm lies. It does not know how the boundaries
were found (`budget`), nor anything of a conversation's history (`conversation`).

Sums use `math.fsum`, which is exactly rounded: the order of a JSON object's keys cannot change one bit of a verdict.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from monitor.axis.readout import Readout
from monitor.errors import ConfigurationError
from monitor.events import Certification, Projection

__all__ = [
    "Baseline",
    "Boundaries",
    "DetectorConfig",
    "PersonaSpace",
    "Readout",
    "fit_baseline",
    "moved",
    "robust_baseline",
    "without_promise",
]

# Beyond a million standard deviations the verdict is the same, and the running sums stay finite.
LARGEST_Z = 1e6
_ROUNDING = 1e-9  # far above the error of a dot product of unit vectors


class Baseline(Struct, frozen=True):
    """What healthy responses of one deployment look like, through one readout.

    Attributes:
        deployment, axis_id: the population and the axis it holds for.
        mean, standard_deviation: of the readout over responses; raw residual units.
        window_mean, window_standard_deviation: the same over the lowest window of each response.
        conversations, responses: how many it was fitted on.
    """

    deployment: str
    axis_id: str
    mean: float
    standard_deviation: float
    window_mean: float
    window_standard_deviation: float
    conversations: int
    responses: int

    def z(self, readout: float) -> float:
        """Standard deviations above the healthy mean response; negative is drift. At most 1e6 either way."""
        return _bounded((readout - self.mean) / self.standard_deviation)

    def window_z(self, readout: float) -> float:
        """The same for the readout of a response's lowest window."""
        return _bounded((readout - self.window_mean) / self.window_standard_deviation)


def fit_baseline(
    deployment: str, axis_id: str, conversations: Sequence[Sequence[Projection]], readout: Readout
) -> Baseline:
    """Fit a baseline on healthy conversations. Each weighs the same, however long: a chatterbox is one witness.

    The standard deviations are of single responses about the overall mean (population form), so they hold both the
    spread within conversations and between them. The result does not depend on any order.

    Raises:
        ConfigurationError: fewer than two conversations, an empty one, another axis, or no spread.
        EventError: a response lacks a coordinate of the readout.
    """
    if len(conversations) < 2:
        raise ConfigurationError(
            f"a baseline for {deployment!r} needs at least 2 conversations, got {len(conversations)}",
            cure="collect more healthy conversations",
        )
    if not all(conversations):
        raise ConfigurationError(
            f"a conversation given to the baseline of {deployment!r} has no responses", cure="leave it out"
        )
    others = {event.axis_id for conversation in conversations for event in conversation} - {axis_id}
    if others:
        raise ConfigurationError(
            f"the baseline of {deployment!r} is for axis {axis_id}, but responses carry {', '.join(sorted(others))}",
            cure="score the conversations again with one axis bundle",
        )
    means = [[readout.value(event.coordinates, event.prompt) for event in talk] for talk in conversations]
    lowest = [[readout.value(event.windows.lowest, event.prompt) for event in talk] for talk in conversations]
    mean, deviation = _moments(means)
    window_mean, window_deviation = _moments(lowest)
    for what, value in (("responses", deviation), ("lowest windows", window_deviation)):
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigurationError(
                f"the readout of the {what} of {deployment!r} has standard deviation {value}",
                cure="calibrate on varied traffic, and check that the readout's weights are not all 0",
            )
    return Baseline(
        deployment=deployment,
        axis_id=axis_id,
        mean=mean,
        standard_deviation=deviation,
        window_mean=window_mean,
        window_standard_deviation=window_deviation,
        conversations=len(conversations),
        responses=sum(map(len, conversations)),
    )


def robust_baseline(deployment: str, axis_id: str, conversations: Sequence[Sequence[tuple[float, float]]]) -> Baseline:
    """A baseline from logs that nobody has looked at: the median, and the median absolute deviation x 1.4826.

    Both bear up to half of the weight being drift, if it all lies on one side; beyond that, drift is the norm. Each
    conversation weighs the same, however long. For normally distributed readouts it agrees with `fit_baseline`. The
    result does not depend on any order.

    Args:
        conversations: per conversation its responses' readouts: of the whole response, and of its lowest window.

    Raises:
        ConfigurationError: fewer than two conversations, an empty one, or no spread.
    """
    if len(conversations) < 2 or not all(conversations):
        raise ConfigurationError(
            f"a baseline for {deployment!r} needs at least 2 conversations, and responses in each",
            cure="give more conversations",
        )
    columns = []
    for part, what in enumerate(("responses", "lowest windows")):
        weighted = [(pair[part], 1.0 / len(talk)) for talk in conversations for pair in talk]
        middle = _weighted_median(weighted)
        spread = 1.4826 * _weighted_median([(abs(value - middle), weight) for value, weight in weighted])
        if not _positive(spread):
            raise ConfigurationError(
                f"at least half of the {what} of {deployment!r} have one readout", cure="give more varied traffic"
            )
        columns.append((middle, spread))
    (mean, deviation), (window_mean, window_deviation) = columns
    return Baseline(
        deployment=deployment,
        axis_id=axis_id,
        mean=mean,
        standard_deviation=deviation,
        window_mean=window_mean,
        window_standard_deviation=window_deviation,
        conversations=len(conversations),
        responses=sum(map(len, conversations)),
    )


def moved(baseline: Baseline, unseen: Sequence[Sequence[float]]) -> Baseline:
    """A baseline on readouts of conversations that the readout had not learned from.

    A readout with many weights gives the conversations that it learned from less spread than others, and a flattering
    mean. The lowest windows are moved and stretched with their responses.

    Args:
        unseen: readouts by conversation; each conversation weighs the same.
    """
    mean, deviation = _moments(unseen)
    stretch = deviation / baseline.standard_deviation
    return replace(
        baseline,
        mean=mean,
        standard_deviation=deviation,
        window_mean=mean + stretch * (baseline.window_mean - baseline.mean),
        window_standard_deviation=stretch * baseline.window_standard_deviation,
    )


class Boundaries(Struct, frozen=True):
    """Where a warning begins, per statistic; all positive, reached is crossed.

    Attributes:
        level, drop, dip: in standard deviations of z.
        cusum: in accumulated standard deviations.
        critical_factor: critical begins at this multiple of the warning boundary; > 1.
        budget: share of healthy conversations that may warn, where one was asked for.
        certification: whether enough conversations stand behind that budget.
        critical_budget, critical_certification: the same for critical; uncertified where `critical_factor` is a choice.
        block_turns: the budget is for a block of so many responses, at most; each further block of a conversation is
            a new unit, in which the statistics start anew. None: one unit, however long.
        conversations: healthy conversations behind the boundaries; 0 where nobody counted.
        probability_within: of the realised share being within the budget, over draws of the calibration.
    """

    level: float
    drop: float
    cusum: float
    dip: float
    critical_factor: float = 2.0
    budget: float | None = None
    certification: Certification = "uncertified"
    critical_budget: float | None = None
    critical_certification: Certification = "uncertified"
    block_turns: int | None = None
    conversations: int = 0
    probability_within: float | None = None


def without_promise(boundaries: Boundaries) -> Boundaries:
    """The same boundaries for a population that they were not calibrated on: nothing is certified."""
    return replace(
        boundaries,
        certification="uncertified",
        critical_certification="uncertified",
        conversations=0,
        probability_within=None,
    )


class PersonaSpace(Struct, frozen=True, dict=True):
    """Where the roles lie on the first persona components; raw residual units, not centred.

    Attributes:
        components: names of the coordinates that span the space, for example pc1 to pc8.
        centre: their mean over roles, in the same order.
        roles: each role's coordinates, in the same order.
    """

    components: list[str]
    centre: list[float]
    roles: dict[str, list[float]]

    def nearest(self, coordinates: Mapping[str, float], count: int = 3) -> list[str]:
        """The roles whose centred vectors point most nearly the same way, nearest first; ties by name.

        Empty when a component is missing, or when the response lies on the centre and so points nowhere.
        """
        if any(name not in coordinates for name in self.components):
            return []
        here = self._direction([coordinates[name] for name in self.components])
        if not here:
            return []
        # Rounding differs between machines, and a tie must not: numpy finds who may be among the nearest, and exactly
        # rounded sums put those in order.
        roles, matrix = self._matrix
        if not roles or count < 1:
            return []
        rough = matrix @ np.asarray(here)
        close = np.flatnonzero(rough >= np.sort(rough)[-min(count, len(rough))] - _ROUNDING)
        ranked = [
            (-math.fsum(a * b for a, b in zip(here, self._directions[roles[at]], strict=True)), roles[at])
            for at in close
        ]
        return [role for _, role in sorted(ranked)[:count]]

    @cached_property
    def _matrix(self) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Roles that lie off the centre, and their directions, `[roles, components]`."""
        directions = {role: there for role, there in self._directions.items() if there}
        return list(directions), np.asarray(list(directions.values()), dtype=np.float64)

    @cached_property
    def _directions(self) -> dict[str, list[float]]:
        return {role: self._direction(position) for role, position in self.roles.items()}

    def _direction(self, position: Sequence[float]) -> list[float]:
        centred = [value - middle for value, middle in zip(position, self.centre, strict=True)]
        norm = math.hypot(*centred)
        return [value / norm for value in centred] if norm > 0.0 and math.isfinite(norm) else []


class DetectorConfig(Struct, frozen=True, dict=True):
    """Everything that the fold reads. Frozen: a new calibration is a new config with a new `config_id`.

    Attributes:
        axis_id: the only axis that it judges.
        readout: what is read from a response.
        baselines: by deployment; one without a baseline is `learning`.
        boundaries: where the alarm lies, for every deployment that has no boundaries of its own.
        own_boundaries: by deployment.
        persona_space: to name the nearest roles, where the bundle has one.
        ewma_weight: weight of the newest z in the level, in (0, 1].
        cusum_slack: how far below the mean a response may lie without adding to the CUSUM; standard deviations.
        release_fraction: a response is back inside at this share of the boundary, in (0, 1).
        release_turns: how many such responses in a row end an episode.
        session_gap_seconds: a longer silence, in event time, starts a new segment.

    Raises:
        ConfigurationError: on construction; lists every problem.
    """

    axis_id: str
    readout: Readout
    baselines: dict[str, Baseline]
    boundaries: Boundaries
    persona_space: PersonaSpace | None = None
    own_boundaries: dict[str, Boundaries] = {}
    ewma_weight: float = 0.4
    cusum_slack: float = 0.5
    release_fraction: float = 0.6
    release_turns: int = 2
    session_gap_seconds: float = 86400.0

    def __post_init__(self) -> None:
        problems = [*_numbers(self), *_baselines(self), *_space(self.persona_space)]
        if problems:
            raise ConfigurationError(
                "the detector's configuration is wrong:\n  - " + "\n  - ".join(problems),
                cure="calibrate again, or correct the values named above",
            )

    def boundaries_of(self, deployment: str) -> Boundaries:
        """Where the alarm lies for one deployment."""
        return self.own_boundaries.get(deployment, self.boundaries)

    @cached_property
    def config_id(self) -> str:
        """First 32 hex digits of the sha256 of the canonical JSON; every finding carries it."""
        # Through JSON and back first, so that a boundary given as the int 2 has the id of 2.0.
        return hashlib.sha256(DetectorConfig.from_json(self.to_json()).to_json()).hexdigest()[:32]

    def to_json(self) -> bytes:
        """As JSON with sorted keys."""
        return _encoder.encode(self)

    @staticmethod
    def from_json(data: bytes | str) -> DetectorConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: not JSON, a missing or ill-typed field, or a value that is wrong.
        """
        try:
            return msgspec.json.decode(data, type=DetectorConfig)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"not a detector configuration: {error}", cure="calibrate again") from error


_encoder = msgspec.json.Encoder(order="sorted")


def _bounded(z: float) -> float:
    return max(-LARGEST_Z, min(LARGEST_Z, z))


def _moments(conversations: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Mean and standard deviation of the values, each conversation weighing the same."""
    talks = list(conversations)
    mean = math.fsum(math.fsum(talk) / len(talk) for talk in talks) / len(talks)
    variance = math.fsum(math.fsum((v - mean) ** 2 for v in talk) / len(talk) for talk in talks) / len(talks)
    return mean, math.sqrt(variance)


def _weighted_median(weighted: Sequence[tuple[float, float]]) -> float:
    """The middle of the values by weight; halfway between two where the weight splits exactly there."""
    ordered = sorted(weighted)
    half = math.fsum(weight for _, weight in ordered) / 2
    below = 0.0
    for place, (value, weight) in enumerate(ordered):
        below += weight
        if math.isclose(below, half, rel_tol=1e-9) and place + 1 < len(ordered):
            return (value + ordered[place + 1][0]) / 2
        if below > half:
            return value
    return ordered[-1][0]


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0.0


def _numbers(config: DetectorConfig) -> Iterator[str]:
    """What is wrong with the readout, the boundaries and the constants."""
    weights = [*config.readout.coordinates.values(), *config.readout.prompt.values()]
    if not config.axis_id:
        yield "axis_id is empty"
    if not any(weights) or not all(map(math.isfinite, weights)):
        yield "readout must have finite weights, not all of them 0"
    yield from _boundaries("boundaries", config.boundaries)
    for deployment, own in sorted(config.own_boundaries.items()):
        yield from _boundaries(f"own_boundaries[{deployment!r}]", own)
    if not 0.0 < config.ewma_weight <= 1.0:
        yield f"ewma_weight is {config.ewma_weight}, must lie in (0, 1]"
    if not (math.isfinite(config.cusum_slack) and config.cusum_slack >= 0.0):
        yield f"cusum_slack is {config.cusum_slack}, must be finite and >= 0"
    if not 0.0 < config.release_fraction < 1.0:
        yield f"release_fraction is {config.release_fraction}, must lie in (0, 1)"
    if config.release_turns < 1:
        yield f"release_turns is {config.release_turns}, must be >= 1"
    if not _positive(config.session_gap_seconds):
        yield f"session_gap_seconds is {config.session_gap_seconds}, must be finite and > 0"


def _boundaries(where: str, b: Boundaries) -> Iterator[str]:
    """What is wrong with one set of boundaries."""
    for name, value in (("level", b.level), ("drop", b.drop), ("cusum", b.cusum), ("dip", b.dip)):
        if not _positive(value):
            yield f"{where}.{name} is {value}, must be finite and > 0"
    if not (math.isfinite(b.critical_factor) and b.critical_factor > 1.0):
        yield f"{where}.critical_factor is {b.critical_factor}, must be finite and > 1"
    if b.block_turns is not None and b.block_turns < 1:
        yield f"{where}.block_turns is {b.block_turns}, must be >= 1"
    budgets = (("", b.budget, b.certification), ("critical_", b.critical_budget, b.critical_certification))
    for prefix, budget, certification in budgets:
        if budget is not None and not 0.0 < budget < 1.0:
            yield f"{where}.{prefix}budget is {budget}, must lie between 0 and 1"
        if budget is None and certification == "certified":
            yield f"{where}.{prefix}certification is 'certified', but there is no budget to certify"


def _baselines(config: DetectorConfig) -> Iterator[str]:
    """What is wrong with the baselines."""
    for deployment, baseline in sorted(config.baselines.items()):
        where = f"baselines[{deployment!r}]"
        if baseline.deployment != deployment:
            yield f"{where} is the baseline of {baseline.deployment!r}"
        if baseline.axis_id != config.axis_id:
            yield f"{where} is for axis {baseline.axis_id}, not {config.axis_id}"
        if not math.isfinite(baseline.mean) or not math.isfinite(baseline.window_mean):
            yield f"{where} has a mean that is not finite"
        if not _positive(baseline.standard_deviation) or not _positive(baseline.window_standard_deviation):
            yield f"{where} has a standard deviation that is not finite and > 0"


def _space(space: PersonaSpace | None) -> Iterator[str]:
    """What is wrong with the persona space."""
    if space is None:
        return
    rows = {"centre": space.centre, **{f"roles[{role!r}]": row for role, row in sorted(space.roles.items())}}
    if not space.components:
        yield "persona_space has no components"
    for name, row in rows.items():
        if len(row) != len(space.components):
            yield f"persona_space.{name} has {len(row)} numbers for {len(space.components)} components"
        if not all(map(math.isfinite, row)):
            yield f"persona_space.{name} has a number that is not finite"
