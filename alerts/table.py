"""The alert table: every episode that people may be told of, as of its last finding. In memory; time is passed in.

It knows no rule, no channel and no store; whoever holds it writes down what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from alerts.stages import moment
from alerts.story import sparkline, story
from monitor.alert import Alert, Resolution, State
from monitor.events import Finding
from monitor.store.store import Session, TrajectoryPoint

__all__ = ["Table", "opened"]

RANK = {"info": 0, "warning": 1, "critical": 2}
MOST_FINDINGS = 200  # ids that an alert keeps
MOST_ROLES = 8


class Table:
    """Alerts by id, and by the ids of their findings.

    Attributes:
        alerts: all of them, also those that are over.
        unwritten: ids of those that have changed since `written` was called, oldest change first.
    """

    def __init__(self, watch: Callable[[Alert], object] = id) -> None:
        """`watch` is told of each alert that is new or has changed."""
        self.alerts: dict[str, Alert] = {}
        self.unwritten: dict[str, None] = {}
        self._watch = watch
        self._by_finding: dict[str, str] = {}
        self._by_conversation: dict[str, set[str]] = {}

    def load(self, alert: Alert) -> None:
        """Take over one that is written down."""
        self._keep(alert)

    def put(self, alert: Alert) -> Alert:
        """Keep it in place of what it was before."""
        self._keep(alert)
        self.unwritten[alert.id] = None
        return alert

    def _keep(self, alert: Alert) -> None:
        self.alerts[alert.id] = alert
        for id in alert.finding_ids:
            self._by_finding[id] = alert.id
        self._by_conversation.setdefault(alert.conversation_id, set()).add(alert.id)
        self._watch(alert)

    def drop(self, id: str) -> None:
        """Forget one."""
        alert = self.alerts.pop(id)
        self.unwritten.pop(id, None)
        for finding in alert.finding_ids:
            self._by_finding.pop(finding, None)
        of_conversation = self._by_conversation[alert.conversation_id]
        of_conversation.discard(id)
        if not of_conversation:
            del self._by_conversation[alert.conversation_id]

    def written(self, ids: Iterable[str]) -> None:
        """They have been written down as they are."""
        for id in ids:
            self.unwritten.pop(id, None)

    # Who is it?

    def of_finding(self, finding: Finding) -> Alert | None:
        """The alert of the finding's episode."""
        return self.alerts.get(alert_id(finding))

    def knows(self, finding_id: str) -> bool:
        """Whether the finding is part of an alert."""
        return finding_id in self._by_finding

    def named(self, id: str) -> Alert | None:
        """By an alert's id, or the id of one of its findings."""
        return self.alerts.get(id) or self.alerts.get(self._by_finding.get(id, ""))

    def of_conversation(self, conversation_id: str) -> list[Alert]:
        """All alerts of one conversation."""
        return [self.alerts[id] for id in sorted(self._by_conversation.get(conversation_id, ()))]

    # What happens.

    def take(self, finding: Finding, session: Session | None, points: Sequence[TrajectoryPoint], now: float) -> Alert:
        """Make the finding part of its alert, which begins with it, ends with it, or goes on."""
        alert = self.of_finding(finding)
        if alert is None:
            return self.put(opened(finding, session, points, now))
        alert = replace(alert, finding_ids=(*alert.finding_ids, finding.id)[-MOST_FINDINGS:])
        if finding.turn >= alert.turn:
            alert = replace(
                alert,
                turn=finding.turn,
                statistic=finding.statistic,
                value=finding.value,
                boundary=finding.boundary,
                risk=finding.risk,
                budget=finding.budget,
                certification=finding.certification,
                nearest_roles=tuple(finding.nearest_roles[:MOST_ROLES]) or alert.nearest_roles,
                story=story(points, finding),
                sparkline=sparkline(points),
            )
        if finding.kind == "recovered":
            if alert.firing:
                alert = replace(alert, ends_at=finding.time, resolution="recovered", changed=now)
        else:
            higher = RANK[finding.severity] > RANK[alert.severity]
            if higher:
                alert = replace(alert, severity=finding.severity, changed=now)
            if not alert.firing and (higher or alert.resolution not in ("resolved", "recovered")):
                alert = replace(alert, ends_at=None, resolution=None, changed=now)
        return self.put(alert)

    def resolve(self, id: str, resolution: Resolution, now: float) -> None:
        """It is over; what is over already stays as it is."""
        alert = self.alerts[id]
        if alert.firing:
            self.put(replace(alert, ends_at=moment(now), resolution=resolution, changed=now))

    def reopen(self, id: str, now: float) -> None:
        """It goes on: what seemed to be over was not."""
        self.put(replace(self.alerts[id], ends_at=None, resolution=None, changed=now))

    def acknowledge(self, id: str, by: str) -> None:
        """Somebody has seen it; with an empty name, nobody has."""
        alert = self.alerts[id]
        if alert.acknowledged_by != by:
            severity = alert.acknowledged_as or (alert.severity if alert.firing else None)
            self.put(replace(alert, acknowledged_by=by, acknowledged_as=severity if by else None))

    def told(self, integration: str, covered: Mapping[str, State]) -> None:
        """An integration has been told; alerts that are gone are passed over."""
        for id, word in covered.items():
            alert = self.alerts.get(id)
            if alert is not None and alert.told.get(integration) != word:
                self.put(replace(alert, told={**alert.told, integration: word}))


def alert_id(finding: Finding) -> str:
    """Of the alert that a finding is part of."""
    return finding.id if finding.kind == "fleet_shift" else finding.episode_id


def opened(finding: Finding, session: Session | None, points: Sequence[TrajectoryPoint], now: float) -> Alert:
    """The alert that begins with this finding."""
    return Alert(
        id=alert_id(finding),
        conversation_id=finding.conversation_id,
        deployment=finding.deployment,
        model=session.model if session else "",
        axis_id=finding.axis_id,
        config_id=finding.config_id,
        kind=finding.kind,
        persona=finding.nearest_roles[0] if finding.nearest_roles else "",
        severity=finding.severity,
        starts_at=finding.time,
        accepted=now,
        changed=now,
        finding_ids=(finding.id,),
        turn=finding.turn,
        statistic=finding.statistic,
        value=finding.value,
        boundary=finding.boundary,
        risk=finding.risk,
        budget=finding.budget,
        certification=finding.certification,
        nearest_roles=tuple(finding.nearest_roles[:MOST_ROLES]),
        story=story(points, finding),
        sparkline=sparkline(points),
    )
