"""One group at one integration: which alerts belong together there, and what has been told of them. Data, and how it
changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from alerts.config import AlertmanagerConfig, AnyIntegration, LogConfig, Receiver, Route
from alerts.stages import Limits
from monitor.alert import Alert, Notification, State, state

__all__ = ["Group", "Key", "limits", "record"]

MOST_REMEMBERED = 1000  # alerts that a group's record names

Key = tuple[str, str]  # integration and group


class Group(Struct):
    """What is known of one group.

    Attributes:
        integration, receiver, route, key, labels: where it tells, and what belongs to it.
        members: ids of its alerts.
        left: of those that belong to another group by now, and whose end is told here, too.
        told: alert id → what this group has last told of it.
        firing: how many of those are not known to be over there.
        last, last_at: the last notification, and when it was made.
        flying: id of the one that is under way; empty where none is.
        more: there was more to tell than one notification covers.
        seen: somebody has acknowledged what fires, and the integration wants to know.
        due: when to look at it.
        causes: why alerts were held back at the last look, and how many.
        capped: ids of alerts that a cap has held back; None where it has held back none.
        changed: of Alertmanager's, ids of those that have changed since it was told, for what else fires is not shown
            there; None: each look is at all members.
        refused, most, again: how often in a row the receiver has refused, how many alerts it is shown therefore, and
            when at the earliest.
    """

    integration: AnyIntegration
    receiver: Receiver
    route: Route
    key: str
    labels: dict[str, str]
    members: set[str] = set()
    left: set[str] = set()
    told: dict[str, State] = {}
    firing: int = 0
    last: Notification | None = None
    last_at: float = -math.inf
    flying: str = ""
    more: bool = False
    seen: bool = False
    due: float = math.inf
    causes: dict[str, int] = {}
    capped: set[str] | None = None
    changed: set[str] | None = None
    refused: int = 0
    most: int = 0
    again: float = -math.inf

    def tell(self, id: str, word: State | None) -> None:
        """Note what it has told of an alert; None: nothing."""
        before = self.told.pop(id, "resolved")
        if word is not None:
            self.told[id] = word
        self.firing += ((word or "resolved") != "resolved") - (before != "resolved")

    def untold(self, alert: Alert) -> bool:
        """Whether there is something to tell of it."""
        now = state(alert)
        return now != self.told.get(alert.id, "resolved") and (now != "resolved" or self.integration.send_resolved)

    def ready(self, changed: float) -> float:
        """When a change may be told of: after `group_wait`, or `group_interval` after the last notification.
        Alertmanager waits by itself."""
        if self.more or isinstance(self.integration, AlertmanagerConfig):
            return self.again
        if self.firing and self.last is not None:
            return max(self.last_at + self.route.group_interval, self.again)
        return max(changed + self.route.group_wait, self.again)

    def repeat_at(self) -> float:
        """When what fires is to be said again."""
        if not self.firing or isinstance(self.integration, AlertmanagerConfig):
            return math.inf
        return self.last_at + max(self.route.repeat_interval, self.route.group_interval)

    def over(self, alerts: Mapping[str, Alert]) -> list[Alert]:
        """Those that have left, and whose end is to be told."""
        left = self.left if self.changed is None else self.left & self.changed
        return [alerts[id] for id in left if not alerts[id].firing and self.told.get(id) != "resolved"]


def record(notification: Notification, group: Group) -> Notification:
    """What is written down of a notification that was taken: what its group has told, and no alerts."""
    firing = [(id, word) for id, word in group.told.items() if word != "resolved"]
    return replace(notification, alerts=(), note="", sent=True, covered=dict(firing[-MOST_REMEMBERED:]))


def limits(integration: AnyIntegration) -> Limits:
    """How much it is told at once."""
    match integration:
        case AlertmanagerConfig():
            return Limits(1000, whole=True, context=False)
        case LogConfig():
            return Limits(1000, whole=True)
        case _:
            return Limits(getattr(integration, "max_alerts", 100))
