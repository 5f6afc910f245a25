"""Fleet drift: whether a whole deployment has moved, as after a bad release. Pure; the only file that knows river.

It sees the closed minutes of one deployment in order, and nothing else: no store, no clock, no conversation. The same
minutes give the same shifts.

**What the detectors see.** Minutes hold anything from one response to thousands, so their means are not equally sure.
Consecutive minutes are therefore joined until they hold `block` responses, and the detectors get the mean z of each
such block: at 5,000 responses a minute a block is a minute, at one a minute it is an hour and forty minutes, and in
either case its mean is known to 0.2 of a standard deviation or better, also when the responses of a conversation are
alike. The other way to equal certainty, dividing each minute's sum by the root of its count, would see a rise and a
fall of the traffic itself as soon as the mean is not exactly 0.

**What is told.** Both detectors compare a deployment with its own past, not with the baseline's 0: ADWIN (Bifet and
Gavaldà 2007) finds abrupt changes and forgets what is older; Page-Hinkley (Page 1954) adds up small ones. At thousands
of responses a minute every difference is significant, the one between day and night first. So a change counts only if
the mean has moved by `tolerance` or more, from before the likeliest place of the change to after it (least squares).
After a change that is told both begin anew. A smaller one is forgotten by the detector that found it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from monitor.errors import ConfigurationError

__all__ = ["LONGEST", "SHORTEST", "Minute", "Sensitivity", "Shift", "Watch", "shifts"]

Statistic: TypeAlias = Literal["page_hinkley", "adwin"]

# A watch remembers so many minutes, at most; then it begins anew with the newest of them. At one response a minute
# or more these are two days and one day.
LONGEST = 2880
SHORTEST = 1440


class Minute(Protocol):
    """What one deployment answered in one minute of event time: `minute` since 1970, how many `responses`, and the sum
    of their `z` in thousandths of a standard deviation."""

    @property
    def minute(self) -> int: ...  # noqa: D102
    @property
    def responses(self) -> int: ...  # noqa: D102
    @property
    def z(self) -> int: ...  # noqa: D102


M = TypeVar("M", bound=Minute)


class Sensitivity(Struct, frozen=True):
    """How the detectors are set. Measured on simulated fleets: see docs/fleet.md.

    Attributes:
        tolerance: the least move of the mean that is told, in standard deviations of single responses; also
            Page-Hinkley's `delta`, the distance from the mean that adds nothing.
        block: responses in one value, at least.
        threshold: Page-Hinkley's: moves beyond the tolerance, added up over blocks.
        least_blocks: Page-Hinkley says nothing before so many.
        confidence: ADWIN's `delta`. Far below the usual 0.002, because conversations outlast a minute, so neighbouring
            values are alike, and ADWIN's bound takes them for independent.
        scale: ADWIN's bound has a term for values between 0 and 1. In units of 1/scale the blocks' means fit it.
        window: blocks on either side of a change that ADWIN looks for, at least.
        grace: ADWIN says nothing before so many blocks.
    """

    tolerance: float = 0.2
    block: int = 100
    threshold: float = 2.0
    least_blocks: int = 8
    confidence: float = 1e-5
    scale: float = 3.0
    window: int = 5
    grace: int = 10

    @property
    def id(self) -> str:
        """32 hex digits of the sha256 of the canonical JSON: the `config_id` of what is found with it."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]


class Shift(NamedTuple):
    """A deployment's mean has moved.

    Attributes:
        minute: the closed minute at whose end it was found, minutes since 1970.
        since: the minute with which the move likely began.
        statistic: the detector that found it.
        before, after: mean z of the blocks before `since` and from then on, each as far as that detector looks back.
    """

    minute: int
    since: int
    statistic: Statistic
    before: float
    after: float

    @property
    def fall(self) -> float:
        """How far the mean fell, in standard deviations; negative where it rose."""
        return self.before - self.after


class Watch(Generic[M]):
    """The detectors of one deployment, and the minutes that they are rebuilt from.

    `rows` is all there is to keep: a watch made of them goes on as this one would. They begin after the last shift,
    and are cut where they reach `LONGEST`; both follow from the minutes alone, not from who saw them in which portions.

    Args:
        sensitivity: how the detectors are set.
        rows: minutes that have been seen before, in order. What is found in them is not told again.

    Raises:
        ConfigurationError: river is not installed.
    """

    def __init__(self, sensitivity: Sensitivity, rows: Iterable[M] = ()) -> None:
        self.rows: list[M] = []
        self._set = sensitivity
        self._begin()
        for row in rows:
            self.add(row)

    def add(self, row: M) -> Shift | None:
        """See the next minute; says whether a shift was found at its end."""
        shift = self._see(row)
        if len(self.rows) < LONGEST:
            return shift
        rows = self.rows[-SHORTEST:]
        self.clear()
        for kept in rows:
            # Seen from a later beginning, a shift may show that did not before. It is new, and found now.
            if again := self._see(kept):
                shift = again._replace(minute=row.minute)
        return shift

    def clear(self) -> None:
        """Begin anew, without a past."""
        self.rows = []
        self._begin()

    def _begin(self) -> None:
        adwin, page_hinkley = _detectors()
        self._adwin = adwin(
            delta=self._set.confidence, clock=1, min_window_length=self._set.window, grace_period=self._set.grace
        )
        # With river's own alpha, 0.9999, the sums fade and their extremes do not: the tolerance would shrink.
        self._page_hinkley = page_hinkley(
            min_instances=self._set.least_blocks,
            delta=self._set.tolerance,
            threshold=self._set.threshold,
            alpha=1.0,
        )
        self._means: list[float] = []
        self._starts: list[int] = []
        self._from = {"page_hinkley": 0, "adwin": 0}  # the first block that each detector has not forgotten
        self._open()

    def _open(self) -> None:
        self._responses = self._z = 0
        self._start: int | None = None

    def _see(self, row: M) -> Shift | None:
        self.rows.append(row)
        self._start = row.minute if self._start is None else self._start
        self._responses += row.responses
        self._z += row.z
        if self._responses < self._set.block:
            return None
        mean = self._z / (1000.0 * self._responses)
        self._means.append(mean)
        self._starts.append(self._start)
        self._open()
        self._page_hinkley.update(mean)
        self._adwin.update(mean * self._set.scale)
        found: Shift | None = None
        if self._page_hinkley.drift_detected:
            found = self._told(row.minute, "page_hinkley")
        if self._adwin.drift_detected:
            found = found or self._told(row.minute, "adwin")
        if found:
            self.clear()
        return found

    def _told(self, minute: int, statistic: Statistic) -> Shift | None:
        """What a detector has found, if it is large enough. Either way that detector forgets all up to here (river's
        do, at their next value)."""
        first = self._from[statistic]
        self._from[statistic] = len(self._means)
        place, before, after = _split(self._means[first:])
        if abs(before - after) < self._set.tolerance:
            return None
        return Shift(minute, self._starts[first + place], statistic, before, after)


def shifts(minutes: Iterable[Minute], sensitivity: Sensitivity) -> list[Shift]:
    """Every shift in the minutes of one deployment, given in order."""
    watch = Watch[Minute](sensitivity)
    return [shift for row in minutes if (shift := watch.add(row))]


def _split(values: Sequence[float]) -> tuple[int, float, float]:
    """Where two constants fit the values best, and these: the index where the second begins, and both means."""
    total, count = sum(values), len(values)
    best = (-1.0, 0, 0.0, 0.0)
    for place, head in enumerate(accumulate(values[:-1]), start=1):
        before, after = head / place, (total - head) / (count - place)
        gain = place * (count - place) * (before - after) ** 2
        if gain > best[0]:
            best = (gain, place, before, after)
    return best[1:]


class _Detector(Protocol):
    @property
    def drift_detected(self) -> bool: ...
    def update(self, x: float) -> None: ...


def _detectors() -> tuple[Callable[..., _Detector], Callable[..., _Detector]]:
    # Not at the top: river brings pandas, SciPy and scikit-learn along, which take a second and 170 MB. Of many workers
    # only the one that reads the fleet's minutes needs them.
    try:
        from river.drift import ADWIN, PageHinkley
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"fleet drift can't be watched: the package {error.name} is missing",
            cure="pip install 'anchorwatch[fleet]', or set ANCHORWATCH_FLEET_WATCH=false",
        ) from error
    return ADWIN, PageHinkley
