"""What people are told: an alert for every episode, and the notifications in which alerts go out. Data, no behaviour.

It knows no channel and no rule. One episode is one alert, from its first finding to its end; a fleet shift is an alert
of its own. Both structs are written to the topic of actions, so that a store which was wiped, or a dispatcher that was
killed in the middle of a delivery, goes on with the same ids and the same words. Names are Alertmanager's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from monitor.events import Certification, Kind, Severity

__all__ = ["LABELS", "STATES", "Alert", "Notification", "Reason", "Resolution", "State", "labels", "state"]

# Why an alert is over. recovered: the detector says so; ended: its conversation fell silent; resolved: somebody said
# so; forgotten: its conversation was deleted; expired: a fleet shift's time is up.
Resolution = Literal["recovered", "ended", "resolved", "forgotten", "expired"]
# What a receiver has last been told of an alert.
State = Literal["warning", "critical", "info", "resolved"]
STATES: tuple[State, ...] = ("warning", "critical", "info", "resolved")
# Why a notification goes out.
Reason = Literal["first", "new_alerts", "escalated", "resolved", "all_resolved", "repeat", "digest", "test"]


class Alert(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One episode, as its last finding leaves it. Everything that a message says is in here.

    Attributes:
        id: the episode's id; of a fleet shift the finding's.
        conversation_id: empty for a fleet shift.
        deployment, model, axis_id, config_id: as the finding and its session have them; a shift's model is empty.
        kind, persona: of the finding that opened it: they never change, so an alert's labels stay what they are.
            `persona` is the nearest role, empty where there is none.
        severity: the highest so far.
        starts_at: event time of the finding that opened it, RFC 3339.
        ends_at: when it was over; None while it fires. Event time where the detector said so, else the wall clock.
        resolution: why it is over; None while it fires.
        accepted: wall clock, seconds since 1970, when the dispatcher took it; `group_wait` counts from here.
        changed: wall clock of the last change of severity or status.
        finding_ids: of all findings that are part of it, in log order.
        turn, statistic, value, boundary, risk, budget, certification, nearest_roles: of the last finding; see
            `monitor.events.Finding`.
        story: the trajectory in words, one plain sentence.
        sparkline: the trajectory's z as block letters, oldest first.
        acknowledged_by: who has seen it; empty while nobody has. Then it is not repeated.
        acknowledged_as: how severe it was then, if it fired: whoever had not been told of it need not be told of that.
        told: integration → what it has last been told. Where a word is missing, it has been told nothing.
    """

    id: str
    conversation_id: str
    deployment: str
    model: str
    axis_id: str
    config_id: str
    kind: Kind
    persona: str
    severity: Severity
    starts_at: str
    ends_at: str | None = None
    resolution: Resolution | None = None
    accepted: float
    changed: float
    finding_ids: tuple[str, ...]
    turn: Annotated[int, Meta(ge=0)]
    statistic: str
    value: float
    boundary: float
    risk: float
    budget: float | None = None
    certification: Certification
    nearest_roles: tuple[str, ...] = ()
    story: str = ""
    sparkline: str = ""
    acknowledged_by: str = ""
    acknowledged_as: Severity | None = None
    told: dict[str, State] = {}

    @property
    def firing(self) -> bool:
        """Whether it is not over."""
        return self.ends_at is None


class Notification(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message to one integration, written down before it is sent: a repeat after a crash has the same id and body.

    Attributes:
        id: the same however often it is sent; receivers may drop what they have seen.
        integration: where it goes, such as `ops/webhook[0]`.
        group: hash of receiver, route and group labels: what belongs together for this integration, over time.
        labels: the group labels.
        reason: why now.
        time: wall clock, RFC 3339.
        sequence: how many have gone out for this group before.
        alerts: those that the message shows, riskiest first, as they were.
        covered: alert id → what the integration counts as told of, once it is taken; also those not shown.
        truncated: how many alerts of the group it does not show.
        note: one plain sentence, where there is something to say beside the alerts: what a cap has held back.
        sent: whether the integration has taken it; then it is kept without its alerts.
        spent: deployment → how many notifications its cap has counted today for the integration, this one included;
            under the empty name, those of all deployments. Empty where there is no cap.
    """

    id: str
    integration: str
    group: str
    labels: dict[str, str]
    reason: Reason
    time: str
    sequence: int
    alerts: tuple[Alert, ...]
    covered: dict[str, State]
    truncated: int = 0
    note: str = ""
    sent: bool = False
    spent: dict[str, int] = {}

    @property
    def status(self) -> Literal["firing", "resolved"]:
        """Firing while any alert that it shows does."""
        return "firing" if any(alert.firing for alert in self.alerts) else "resolved"


LABELS = ("alertname", "severity", "kind", "deployment", "model", "persona", "conversation_id", "episode_id")


def labels(alert: Alert) -> dict[str, str]:
    """What matchers and `group_by` see, and what other systems take for the alert's identity. Empty ones are left out.

    `severity` alone may change while the alert fires.
    """
    found = {
        "alertname": "AnchorwatchFleetShift" if alert.kind == "fleet_shift" else "AnchorwatchPersonaDrift",
        "severity": alert.severity,
        "kind": alert.kind,
        "deployment": alert.deployment,
        "model": alert.model,
        "persona": alert.persona,
        "conversation_id": alert.conversation_id,
        "episode_id": alert.id,
    }
    return {name: value for name, value in found.items() if value}


def state(alert: Alert) -> State:
    """What there is to tell of it now."""
    return alert.severity if alert.firing else "resolved"
