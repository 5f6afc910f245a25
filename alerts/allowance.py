"""How many notifications an integration may still be sent today. In memory; time is passed in.

A day is one of UTC. What was spent is written into each notification, so that a dispatcher that starts anew goes on
counting: the latest one of the day has the whole count in it, and the latest of anything is what is kept.
"""

from __future__ import annotations

from collections.abc import Collection

from alerts.config import Receiver
from alerts.stages import seconds
from monitor.alert import Notification, Reason

__all__ = ["COUNTED", "DAY", "Allowance"]

DAY = 86_400.0
COUNTED: frozenset[Reason] = frozenset({"first", "new_alerts", "escalated", "repeat"})
MOST_DEPLOYMENTS = 1000


class Allowance:
    """The caps of every receiver; each of its integrations has them for itself."""

    def __init__(self) -> None:
        self._spent: dict[str, tuple[int, dict[str, int]]] = {}

    def load(self, notification: Notification) -> None:
        """Take over what is written down."""
        if notification.spent:
            spent = self._today(notification.integration, seconds(notification.time))
            if spent is not None:
                for deployment, count in notification.spent.items():
                    spent[deployment] = max(count, spent.get(deployment, 0))

    def exhausted(self, receiver: Receiver, integration: str, deployments: Collection[str], now: float) -> str:
        """Which cap has been reached, in words; empty where one more may go out."""
        spent = self._today(integration, now) or {}
        if receiver.max_per_day is not None and spent.get("", 0) >= receiver.max_per_day:
            return f"{receiver.max_per_day} notifications a day"
        most = receiver.max_per_deployment_per_day
        if most is not None and deployments and all(spent.get(name, 0) >= most for name in deployments):
            return f"{most} notifications a day for one deployment"
        return ""

    def spend(self, receiver: Receiver, integration: str, deployments: Collection[str], now: float) -> None:
        """One more goes out."""
        if receiver.max_per_day is None and receiver.max_per_deployment_per_day is None:
            return
        spent = self._today(integration, now)
        if spent is not None:
            for name in {"", *deployments}:
                if name in spent or len(spent) < MOST_DEPLOYMENTS:
                    spent[name] = spent.get(name, 0) + 1

    def spent(self, integration: str, now: float) -> dict[str, int]:
        """What is written into a notification."""
        return dict(self._today(integration, now) or {})

    def _today(self, integration: str, now: float) -> dict[str, int] | None:
        """The day's counts; None where the day is over already: the clock went back."""
        day, spent = self._spent.get(integration, (-1, {}))
        today = int(now // DAY)
        if today > day:
            day, spent = today, {}
            self._spent[integration] = day, spent
        return spent if today == day else None
