"""What people did, taken into the alert table: acknowledged, resolved, silenced, forgot, switched to live.

It reads the folded actions, and writes none but to take back a resolution that no longer holds.
"""

from __future__ import annotations

from alerts.groups import Groups
from alerts.journal import Journal, read_action, read_bodies
from alerts.table import Table
from monitor import telemetry
from monitor.actions import Paging, Silence
from monitor.alert import Alert
from monitor.events import Finding
from monitor.store.store import Actions

__all__ = ["Operators"]


class Operators:
    """Their doings as of the last `read`.

    Args:
        live: True: notifications go out whatever operators say.

    Attributes:
        forgotten: conversation → the request to forget it, also of those that are forgotten by now.
    """

    def __init__(
        self, store: Actions, journal: Journal, table: Table, groups: Groups, *, live: bool | None = None
    ) -> None:
        self._store = store
        self._journal = journal
        self._table = table
        self._groups = groups
        self._live = live
        self._acknowledged: dict[str, str] = {}
        self._resolved: set[str] = set()
        self.forgotten: dict[str, bytes] = {}

    def read(self, now: float) -> list[Alert]:
        """Take it all in. Gives the alerts of conversations that somebody has asked to forget since.

        Raises:
            StoreUnavailable, StoreError: as the store does.
        """
        store, table = self._store, self._table
        self._acknowledged = {
            key.removeprefix("acknowledge/"): action.by
            for key, value in store.actions("acknowledge/").items()
            if (action := read_action(key, value)) is not None
        }
        resolved = {key.removeprefix("resolve/") for key in store.actions("resolve/")}
        self._resolved = resolved - self._journal.to_withdraw("resolve")
        self._groups.silence(read_bodies(store.actions("silence/"), Silence))
        modes = read_bodies(store.actions("paging/"), Paging)
        self._groups.mode(self._live if self._live is not None else any(mode.mode == "live" for mode in modes))
        telemetry.ALERTS_MODE.set(self._groups.live)
        for id in self._resolved:
            if id in table.alerts:
                table.resolve(id, "resolved", now)
        seen = {alert.id: by for id, by in self._acknowledged.items() if (alert := table.named(id)) is not None}
        for alert in [one for one in table.alerts.values() if one.acknowledged_by or one.id in seen]:
            self._acknowledge(alert, seen.get(alert.id, ""))
        before = self.forgotten
        self.forgotten = {key.removeprefix("forget/"): value for key, value in store.actions("forget/").items()}
        asked = [name for name, value in self.forgotten.items() if before.get(name) != value]
        return [alert for name in asked for alert in table.of_conversation(name)]

    def took(self, alert: Alert, finding: Finding, now: float) -> None:
        """A finding has become part of an alert, which may be acknowledged or resolved already."""
        by = self._acknowledged.get(alert.id) or self._acknowledged.get(finding.id)
        if by and not alert.acknowledged_by:
            self._acknowledge(alert, by)
        if alert.id not in self._resolved or not alert.firing:
            return
        if len(alert.finding_ids) == 1:
            self._table.resolve(alert.id, "resolved", now)
            return
        # It was resolved, and has become worse: it fires again, and may be resolved again.
        self._resolved.discard(alert.id)
        self._journal.take_back("resolve", alert.id)

    def _acknowledge(self, alert: Alert, by: str) -> None:
        if alert.acknowledged_by == by:
            return
        self._table.acknowledge(alert.id, by)
        if by:
            self._groups.acknowledge(self._table.alerts[alert.id])
