"""What a committed batch adds to the instruments, by deployment. It knows what the fold did, and no log or store."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

from prometheus_client import Gauge

from monitor import telemetry
from monitor.busiest import Busiest
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import Step
from monitor.events import Kind, Projection, Severity
from monitor.standing import RECENT_SECONDS, Standings

__all__ = ["MOST_DEPLOYMENTS", "MOST_SESSIONS", "Tally"]

MOST_DEPLOYMENTS = 50
MOST_SESSIONS = 20
REMEMBERED = 100_000  # conversations that have warned
_OPENING: tuple[Kind, ...] = ("low_start", "sudden_drop", "sustained_drop", "dip")
# What can be found. Prometheus sees no increase in a series that begins at 1, so each begins at 0.
_FINDINGS: tuple[tuple[Kind, Severity], ...] = (
    *((kind, "warning") for kind in _OPENING),
    *((kind, "critical") for kind in _OPENING),
    ("recovered", "info"),
    ("fleet_shift", "warning"),
    ("fleet_shift", "info"),
)
_BY_DEPLOYMENT = (
    telemetry.RESPONSES,
    telemetry.TOKENS,
    telemetry.PROJECTION,
    telemetry.Z,
    telemetry.FINDINGS,
    telemetry.BUDGET_UNITS,
    telemetry.BUDGET_UNITS_WARNED,
)


class Tally:
    """Counts batch by batch; at most fifty deployments have labels of their own. For one thread.

    An alarm budget is a share of units: a conversation, or each block of a long one. A unit is counted when it begins
    to be judged, and once more when it warns for the first time. Which have warned is remembered for the last 100,000
    conversations that did, not over a restart, so that a unit may then be counted twice: the realised rate never looks
    better than it is.

    Args:
        deployments: how many have labels of their own.
        sessions: how many of the riskiest conversations are shown by name.
    """

    def __init__(self, deployments: int = MOST_DEPLOYMENTS, sessions: int = MOST_SESSIONS) -> None:
        self._busiest = Busiest(deployments)
        self._sessions = sessions
        self._standings = Standings()
        self._shown: dict[Gauge, set[tuple[str, ...]]] = {}
        self._warned: OrderedDict[str, int] = OrderedDict()  # conversation → folded before the block that warned
        self._budgets: tuple[str, frozenset[str]] | None = None
        self._labels: set[str] = set()

    def add(self, steps: Sequence[tuple[Projection, Step]], config: DetectorConfig | None, partition: int = 0) -> None:
        """Count what was committed, and show the budgets of the calibration now in force, where it is known."""
        for lost in self._busiest.elect():
            self._labels.discard(lost)
            for instrument in _BY_DEPLOYMENT:
                instrument.remove_by_labels({"deployment": lost})
        deployments: defaultdict[str, list[tuple[Projection, Step]]] = defaultdict(list)
        for one in steps:
            deployments[one[0].deployment].append(one)
        for deployment, some in deployments.items():
            label = self._busiest.count(deployment, len(some))
            if label not in self._labels:
                self._labels.add(label)
                for kind, severity in _FINDINGS:
                    telemetry.FINDINGS.labels(label, kind, severity)
            self._count(label, some)
        for projection, result in steps:
            if result.z is not None:
                self._standings.see(partition, projection.conversation_id, result.state)
        if config is not None:
            self._show_budgets(config)

    def leave(self, partition: int) -> None:
        """A partition is another worker's now, and so are its conversations."""
        self._standings.leave(partition)

    def show(self, now: float) -> None:
        """Set the gauges of who stands worst. `now` is the wall clock, seconds since 1970: call it now and then."""
        self._standings.forget_before(now - RECENT_SECONDS)
        episodes: Counter[tuple[str, ...]] = Counter()
        for (deployment, severity), count in self._standings.open_episodes().items():
            episodes[self._busiest.label(deployment), severity] += count
        self._set(telemetry.OPEN_EPISODES, episodes)
        riskiest = self._standings.riskiest(self._sessions)
        self._set(telemetry.RISKIEST, {(one.conversation_id, one.deployment): one.risk for one in riskiest})

    def _set(self, gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
        """Show these and no others; what stays is never away in between."""
        for gone in self._shown.get(gauge, set()) - values.keys():
            gauge.remove(*gone)
        for labels, value in values.items():
            gauge.labels(*labels).set(value)
        self._shown[gauge] = set(values)

    def _count(self, label: str, steps: Sequence[tuple[Projection, Step]]) -> None:
        for outcome, count in Counter([result.outcome for _, result in steps]).items():
            telemetry.RESPONSES.labels(label, outcome).inc(count)
        new = [one for one in steps if one[1].outcome != "duplicate"]
        telemetry.TOKENS.labels(label).inc(sum(projection.tokens for projection, _ in new))
        projections, z = telemetry.PROJECTION.labels(label), telemetry.Z.labels(label)
        units = warned = 0
        for projection, result in new:
            projections.observe(projection.projection)
            if result.z is None:
                continue
            z.observe(result.z)
            units += result.state.block == 1
            for finding in result.findings:
                telemetry.FINDINGS.labels(label, finding.kind, finding.severity).inc()
                warned += finding.kind != "recovered" and self._first_of_unit(projection.conversation_id, result)
        telemetry.BUDGET_UNITS.labels(label).inc(units)
        telemetry.BUDGET_UNITS_WARNED.labels(label).inc(warned)

    def _first_of_unit(self, conversation_id: str, result: Step) -> bool:
        begun = result.state.folded - result.state.block
        if self._warned.get(conversation_id) == begun:
            return False
        self._warned[conversation_id] = begun
        self._warned.move_to_end(conversation_id)
        if len(self._warned) > REMEMBERED:
            self._warned.popitem(last=False)
        return True

    def _show_budgets(self, config: DetectorConfig) -> None:
        now = config.config_id, frozenset(self._labels)
        if now == self._budgets:
            return
        self._budgets = now
        telemetry.ALARM_BUDGET.clear()
        for deployment in config.baselines.keys() & self._labels:
            boundaries = config.boundaries_of(deployment)
            if boundaries.budget is not None:
                telemetry.ALARM_BUDGET.labels(deployment, boundaries.certification).set(boundaries.budget)
