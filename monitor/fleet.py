"""The reader of the fleet's minutes: it closes them in order, has the detectors look, and commits what they find.

It knows when a minute is over; it does not know how a shift is found (`monitor.detect.fleet`), nor who is told. One of
all workers runs it, by lease; two at once do no harm, since closing is a compare-and-set. Everything it goes on from
lies in the store: a new reader, or one behind a wiped store, finds the same shifts in the same minutes.

**When a minute is over.** A partition's watermark says how far it has come in event time. While some partitions lag,
the last of them counts; when none does, the furthest, so that an idle partition holds nobody up. A minute is closed
once that has passed its end by the allowed lateness. Which partitions lag is asked of the log, not only of the last
commits: a partition whose worker has died, or that a rebuilt store has not begun, lags without saying so. One that lags
and does not move for a while (paused by poison, say) is no longer waited for, unless all are like that.

**Clocks.** A watermark never lies beyond the wall clock, and no single collector moves it (`monitor.sums.watermark`). A
response dated in 2099 is thus counted in a minute of 2099, and closes nothing. Responses for a minute that is closed
are late: counted, and not seen by the detectors, because what they have said can't be taken back.

**New calibrations** change what z means. So the detectors begin anew a few minutes after one was activated.
"""

from __future__ import annotations

import hashlib
import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, Protocol

import msgspec
import structlog

from monitor import telemetry
from monitor.busiest import OTHER
from monitor.detect.baseline import DetectorConfig
from monitor.detect.fleet import Sensitivity, Shift, Watch
from monitor.errors import CommitRefused
from monitor.events import Finding
from monitor.store.store import Actions, ClosedMinutes, Fleet, MinuteSums, Position, Progress
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["Age", "FleetReader", "FleetStore", "ages", "close", "finding_id", "moment"]

LATENESS_SECONDS = 120.0
PATIENCE_SECONDS = 600.0
HOUR, DAY, WEEK = 60, 24 * 60, 7 * 24 * 60  # minutes
SETTLING = 5  # minutes after a calibration that no detector sees
MOST_LABELS = 50

_log = structlog.get_logger("anchorwatch.fleet")


class FleetStore(Fleet, Actions, Protocol):
    """What the reader needs of a store."""

    def progress(self, topic: str) -> list[Progress]:
        """See `monitor.store.store.Outbox.progress`."""

    def position(self, topic: str, partition: int) -> Position | None:
        """See `monitor.store.store.Store.position`."""

    def config(self, topic: str, partition: int) -> bytes | None:
        """See `monitor.store.store.Store.config`."""


class FleetReader:
    """Closes minutes of one topic.

    Args:
        log: asked which partitions lag, whenever a minute may be over.
        store: where the sums are, and where closed minutes and findings go.
        topic: whose partitions' progress counts.
        sensitivity: how the detectors are set.
        lateness_seconds: how long after its end a minute waits for what is still on its way.
        patience_seconds: how long a lagging partition that does not move is waited for.
        clock: unix seconds; no minute beyond it is closed.
        timer: monotonic seconds, for the patience.
    """

    def __init__(
        self,
        log: Log,
        store: FleetStore,
        topic: str = PROJECTIONS,
        *,
        sensitivity: Sensitivity | None = None,
        lateness_seconds: float = LATENESS_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._store = store
        self._topic = topic
        self._sensitivity = sensitivity or Sensitivity()
        self._lateness = lateness_seconds
        self._patience = patience_seconds
        self._clock = clock
        self._timer = timer
        self._standing: dict[int, tuple[int, float]] = {}  # partition → the offset where it lags, and since when
        self._given_up: frozenset[int] = frozenset()

    def run_once(self) -> list[Finding]:
        """Close what is over; says what was found in it. Costs a look at the progress while nothing is.

        Raises:
            LogUnavailable, StoreUnavailable: nothing is lost; call again later.
            LogError, StoreError: somebody must look.
            ConfigurationError: river is not installed.
        """
        closed = self._store.closed()
        expected = closed.through if closed else None
        last = -1 if expected is None else expected
        watermarks = {one.partition: one.watermark for one in self._store.progress(self._topic)}
        if self._over(max(watermarks.values(), default=-math.inf)) <= last:
            return []
        through = self._over(self._watermark(watermarks))
        if through <= last:
            return []
        # Late responses are counted once an hour: a day's minutes of fifty deployments are a million numbers.
        counting = expected is None or through // HOUR > expected // HOUR
        sums = self._store.minutes(min(last + 1, _day_before(through)) if counting else last + 1, through)
        after, found = close(closed, sums, through, self._sensitivity, self._restarts(), counting=counting)
        axis_id = self._axis_id() if found else ""
        findings = [_finding(deployment, shift, self._sensitivity, axis_id) for deployment, shift in found]
        try:
            self._store.close_minutes(expected, after, findings)
        except CommitRefused:
            return []  # another reader was faster; its minutes are as good, so go on from them next time
        self._tell(after, found)
        return findings

    def _over(self, watermark: float) -> int:
        """The last minute that is over, given how far the topic has come; -1 where none is."""
        mark = min(watermark, self._clock()) - self._lateness
        return int(mark // 60.0) - 1 if mark >= 60.0 else -1

    def _watermark(self, watermarks: Mapping[int, float]) -> float:
        """How far the topic has come: where its last lagging partition stands, or else the furthest one."""
        now, standing, lagging = self._timer(), {}, {}
        for partition in range(self._log.partitions(self._topic)):
            position = self._store.position(self._topic, partition)
            span = self._log.span(self._topic, partition)
            offset = position.offset if position else span.begin
            if offset < span.end:
                lagging[partition] = watermarks.get(partition, -math.inf)
                before = self._standing.get(partition)
                standing[partition] = before if before and before[0] == offset else (offset, now)
        self._standing = standing
        stuck = frozenset(partition for partition, (_, since) in standing.items() if now - since >= self._patience)
        awaited = [mark for partition, mark in lagging.items() if partition not in stuck]
        others = [mark for partition, mark in watermarks.items() if partition not in stuck]
        # Where nobody moves at all, nobody is left to go by: whoever comes back first goes on.
        mark = min(awaited) if awaited else max(others, default=-math.inf)
        if stuck - self._given_up and mark > -math.inf:
            _log.warning(
                "the fleet's minutes are closed without partitions that lag and do not move",
                topic=self._topic,
                partitions=sorted(stuck),
                seconds=self._patience,
                cure="see why they are not read: `anchorwatch doctor`. What they hold will be counted as late",
            )
        self._given_up = stuck
        return mark

    def _restarts(self) -> list[int]:
        """The minutes in which calibrations were activated, in order, by the clocks of those who did it."""
        minutes = set()
        for value in self._store.actions(f"calibration/{self._topic}/").values():
            try:
                at = datetime.fromisoformat(_activated.decode(value).time)
            except (msgspec.MsgspecError, ValueError):
                continue  # the fold of the actions has told already
            minutes.add(int(at.timestamp() // 60.0))
        return sorted(minutes)

    def _axis_id(self) -> str:
        for partition in range(self._log.partitions(self._topic)):
            if config := self._store.config(self._topic, partition):
                return DetectorConfig.from_json(config).axis_id
        return "unknown"

    def _tell(self, closed: ClosedMinutes, found: Sequence[tuple[str, Shift]]) -> None:
        """Log lines and gauges."""
        telemetry.FLEET_CLOSED.set((closed.through + 1) * 60)
        spans = {"hour": ages(closed, 2 * HOUR), "day": ages(closed, DAY), "week": ages(closed, WEEK)}
        busiest = sorted(spans["week"], key=lambda one: (-one.responses, one.deployment))
        shown = {one.deployment for one in busiest[:MOST_LABELS]}
        for deployment, shift in found:
            label = deployment if deployment in shown else OTHER
            telemetry.FINDINGS.labels(label, "fleet_shift", _severity(shift)).inc()
            _log.warning(
                "the mean of a deployment has moved",
                deployment=deployment,
                since=moment(shift.since),
                found=moment(shift.minute + 1),
                detector=shift.statistic,
                z_before=round(shift.before, 3),
                z_after=round(shift.after, 3),
            )
        telemetry.FLEET_Z.clear()
        telemetry.FLEET_Z_ERROR.clear()
        telemetry.FLEET_LATE.clear()
        for span, rows in spans.items():
            for age in rows:
                if age.deployment in shown:
                    telemetry.FLEET_Z.labels(age.deployment, span).set(age.mean)
                    if span != "hour" and math.isfinite(age.standard_error):
                        telemetry.FLEET_Z_ERROR.labels(age.deployment, span).set(age.standard_error)
        for deployment, late in closed.late.items():
            telemetry.FLEET_LATE.labels(deployment if deployment in shown else OTHER).inc(late)


def close(
    closed: ClosedMinutes | None,
    sums: Sequence[MinuteSums],
    through: int,
    sensitivity: Sensitivity,
    restarts: Sequence[int] = (),
    *,
    counting: bool = True,
) -> tuple[ClosedMinutes, list[tuple[str, Shift]]]:
    """Close every minute up to `through`. Pure, and the same in one go or minute by minute.

    Args:
        closed: what is closed; None at the very first time.
        sums: what the store has now of the minutes after the last closed one up to `through`, in order; and of the day
            before, if late responses are to be counted.
        through: the last minute to close.
        sensitivity: how the detectors are set.
        restarts: minutes in which a calibration was activated, in order.
        counting: whether to count late responses. If not, the last count stays.
    """
    last = closed.through if closed else -1
    new = [row for row in sums if row.minute > last]
    kept: dict[str, list[MinuteSums]] = defaultdict(list)
    for row in closed.minutes if closed else ():
        kept[row.deployment].append(row)
    fresh: dict[str, list[MinuteSums]] = defaultdict(list)
    for row in new:
        fresh[row.deployment].append(row)
    found: list[tuple[str, Shift]] = []
    for deployment, rows in fresh.items():
        watch = Watch(sensitivity, kept[deployment])
        for row in rows:
            if shift := _see(watch, row, restarts):
                found.append((deployment, shift))
        kept[deployment] = watch.rows
    minutes = sorted(row for rows in kept.values() if rows and rows[-1].minute > through - WEEK for row in rows)
    hours = _by_hour([*(closed.hours if closed else ()), *new], through)
    late = _late(sums, hours, through) if counting or closed is None else closed.late
    found.sort(key=lambda one: (one[1].minute, one[0]))
    return ClosedMinutes(through, minutes, late, hours), found


def _see(watch: Watch[MinuteSums], row: MinuteSums, restarts: Sequence[int]) -> Shift | None:
    """Show a watch one more minute, or none where a calibration changes what it would see."""
    count = bisect_right(restarts, row.minute)
    restart = restarts[count - 1] if count else -math.inf
    if watch.rows and (watch.rows[0].minute < restart or row.minute - watch.rows[-1].minute > WEEK):
        watch.clear()
    return watch.add(row) if row.minute >= restart + SETTLING else None


def _by_hour(rows: Iterable[MinuteSums], through: int) -> list[MinuteSums]:
    """Sums by hour, of the week up to `through`, in order."""
    hours: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        minute = row.minute - row.minute % HOUR
        if minute + HOUR - 1 > through - WEEK:
            total = hours.setdefault((minute, row.deployment), [0, 0, 0])
            total[0] += row.responses
            total[1] += row.z
            total[2] += row.warned
    return [MinuteSums(minute, deployment, *total) for (minute, deployment), total in sorted(hours.items())]


def _day_before(through: int) -> int:
    """The first minute of the hour a day before `through`'s: late responses are counted from it on."""
    return max(through - through % HOUR - DAY, 0)


def _late(sums: Iterable[MinuteSums], hours: Iterable[MinuteSums], through: int) -> dict[str, int]:
    """By deployment, what the last day's minutes have got since they were closed: what they hold less what was seen."""
    first = _day_before(through)
    late: dict[str, int] = defaultdict(int)
    for row in sums:
        if row.minute >= first:
            late[row.deployment] += row.responses
    for row in hours:
        if row.minute >= first:
            late[row.deployment] -= row.responses
    return {deployment: count for deployment, count in sorted(late.items()) if count > 0}


class Age(NamedTuple):
    """Where a deployment's mean lies, beside the 0 of its baseline: how far the baseline has aged.

    Attributes:
        deployment: which.
        responses: how many were folded.
        mean: their mean z.
        standard_error: of the mean, hours taken as the independent units, since the responses of a conversation are
            alike; NaN with fewer than two hours.
        warned: the share of responses at or beyond their warning boundary.
    """

    deployment: str
    responses: int
    mean: float
    standard_error: float
    warned: float


def ages(closed: ClosedMinutes, minutes: int) -> list[Age]:
    """The age of every deployment's baseline, by name, over those hours that began in the last `minutes`."""
    by_deployment: dict[str, list[MinuteSums]] = defaultdict(list)
    for row in closed.hours:
        if row.minute > closed.through - minutes:
            by_deployment[row.deployment].append(row)
    result = []
    for deployment, units in sorted(by_deployment.items()):
        responses = sum(unit.responses for unit in units)
        mean = sum(unit.z for unit in units) / 1000.0 / responses
        # The error of a ratio of sums over clusters (Cochran 1977, 6.3), the clusters being the units.
        spread = math.fsum((unit.z / 1000.0 - unit.responses * mean) ** 2 for unit in units)
        count = len(units)
        error = math.sqrt(spread * count / (count - 1)) / responses if count > 1 else math.nan
        result.append(Age(deployment, responses, mean, error, sum(unit.warned for unit in units) / responses))
    return result


class _Activated(msgspec.Struct):
    time: str


_activated = msgspec.json.Decoder(_Activated)


def finding_id(deployment: str, minute: int) -> str:
    """Hash of deployment and minute: the same on every replay, 32 hex digits."""
    return hashlib.sha256(f"fleet_shift\x1f{deployment}\x1f{minute}".encode()).hexdigest()[:32]


def _finding(deployment: str, shift: Shift, sensitivity: Sensitivity, axis_id: str) -> Finding:
    identity = finding_id(deployment, shift.minute)
    return Finding(
        id=identity,
        time=moment(shift.minute + 1),
        conversation_id="",
        turn=0,
        deployment=deployment,
        axis_id=axis_id,
        kind="fleet_shift",
        severity=_severity(shift),
        statistic=shift.statistic,
        value=shift.fall,
        boundary=sensitivity.tolerance,
        risk=shift.fall / sensitivity.tolerance,
        budget=None,
        certification="uncertified",
        config_id=sensitivity.id,
        episode_id=identity,
    )


def _severity(shift: Shift) -> Literal["warning", "info"]:
    return "warning" if shift.fall > 0.0 else "info"


def moment(minute: int) -> str:
    """The beginning of a minute since 1970, RFC 3339 in UTC."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)).strftime("%Y-%m-%dT%H:%M:%SZ")
