"""Which notifications are due: every alert in its groups, each group with what it was last told. In memory.

Time is passed in, nothing is sent and nothing written here. A group belongs to one integration: what is late at one
receiver is late there only. Between two looks nothing is computed for a group whose turn has not come, so that 100,000
open episodes cost what changes among them.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import count

from msgspec.structs import replace

from alerts.allowance import COUNTED, Allowance
from alerts.config import AlertmanagerConfig, AlertsConfig, AnyIntegration, PagerDutyConfig, Route
from alerts.group import Group, Key, limits, record
from alerts.stages import Inhibition, Update, compose, needs_update, places, quiet, seconds, silenced
from monitor.actions import Silence
from monitor.alert import Alert, Notification, state

__all__ = ["Groups"]

MOST_AT_ONCE = 200  # notifications that one look gives
MINUTE = 60.0
FIRST_REFUSED_SECONDS = 10.0
LONGEST_REFUSED_SECONDS = 3600.0
DIGEST = "digest"


class Groups:
    """All groups of all integrations.

    Args:
        config: rules and routes.
        alerts: every alert by id, as it is now; only read.
        held_back: integration, cause, how many alerts: told when a cause begins.

    Attributes:
        gone: integration and group, of those that are no more → when something last went out for it.
        live: whether notifications are made.
    """

    def __init__(
        self,
        config: AlertsConfig,
        alerts: Mapping[str, Alert],
        held_back: Callable[[str, str, int], None] | None = None,
    ) -> None:
        self._alerts = alerts
        self._held_back = held_back
        self._groups: dict[Key, Group] = {}
        self._placed: dict[str, tuple[str, list[Key]]] = {}
        self._left: dict[str, list[Key]] = {}
        self._told_before: dict[str, list[Key]] = {}
        self._remembered: dict[Key, Notification] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._ticket = count()
        self._held: set[Key] = set()
        self._aside: dict[Key, float] = {}
        self._silences: tuple[tuple[Silence, float], ...] = ()
        self._next_look = -math.inf
        self._allowance = Allowance()
        self._digests: dict[str, Notification] = {}
        self._digested: set[Key] = set()
        self.gone: dict[Key, float] = {}
        self.live = False
        self.configure(config)

    # Rules.

    def configure(self, config: AlertsConfig) -> None:
        """Other rules from now on; what has been told stays told, and what was refused is tried."""
        self._config = config
        self._receivers = {receiver.name: receiver for receiver in config.receivers}
        self._integrations = {one.name: one for receiver in config.receivers for one in receiver.integrations}
        self._inhibition = Inhibition(config.inhibit_rules)
        before = list(self._groups.items())
        self._groups.clear()
        self._placed.clear()
        self._left.clear()
        self._held.clear()
        self._aside.clear()
        self._heap.clear()
        for group in (group for _, group in before if group.last is not None):
            assert group.last is not None
            self._remember(group.last if group.flying == group.last.id else record(group.last, group))
        for alert in self._alerts.values():
            self._inhibition.put(alert)
        for alert in self._alerts.values():
            self.put(alert)
        for key, group in before:
            if key in self._groups:
                self._groups[key].flying = group.flying
                self._groups[key].capped = group.capped

    def silence(self, silences: Iterable[Silence]) -> None:
        """These are in force until each ends."""
        self._silences = tuple((one, seconds(one.until)) for one in silences)
        self._look_again()

    def mode(self, live: bool) -> None:
        """Whether notifications are made, or only said to be held back."""
        if live != self.live:
            self.live = live
            self._look_again()

    def clock_jumped(self) -> None:
        """Look at every group again, since what was due at a moment may be due at another."""
        for place in self._groups:
            self._wake(place, -math.inf)

    # Alerts.

    def remember(self, notification: Notification) -> None:
        """Take over what is written down, before the alerts are put in."""
        self._allowance.load(notification)
        if notification.reason != DIGEST:
            self._remember(notification)
            return
        self._digests[notification.group] = notification
        if not notification.sent:  # it goes out once more: what it tells of must not go out beside it
            self._digested |= {(notification.integration, id) for id in notification.covered}

    def _remember(self, notification: Notification) -> None:
        key = notification.integration, notification.group
        self._remembered[key] = notification
        if notification.sent:
            for id, word in notification.covered.items():
                if word != "resolved":
                    self._told_before.setdefault(id, []).append(key)

    def put(self, alert: Alert) -> None:
        """An alert is new, or has changed."""
        if self._inhibition.put(alert):
            self._look_again()
        severity, now = self._placed.get(alert.id, ("", []))
        if severity != alert.severity:  # of its labels, no other ever changes
            before, now = now, self._place(alert)
            self._placed[alert.id] = alert.severity, now
            self._left[alert.id] = [
                key
                for key in dict.fromkeys([*before, *self._left.get(alert.id, ()), *self._told_by(alert)])
                if key not in now
            ]
        for key in now:
            group = self._groups[key]
            if group.capped is not None and alert.firing:
                group.capped.add(alert.id)
            if group.changed is not None:
                group.changed.add(alert.id)
            if group.untold(alert):
                self._wake(key, group.ready(alert.changed))
            elif group.due == math.inf:
                self._wake(key, group.repeat_at())
        if left := self._left.get(alert.id):
            self._left[alert.id] = [key for key in left if self._leave(key, alert)]

    def _place(self, alert: Alert) -> list[Key]:
        """Make it a member of its groups."""
        found: list[Key] = []
        for place in places(self._config.route, alert):
            for integration in self._receivers[place.route.receiver].integrations:
                key = integration.name, place.group
                group = self._groups.get(key)
                if group is None:
                    group = self._make(key, integration, place.route, dict(place.labels))
                found.append(key)
                if alert.id in group.members:
                    continue
                group.members.add(alert.id)
                group.left.discard(alert.id)
                word = alert.told.get(integration.name, alert.acknowledged_as)
                if word is None and (integration.name, alert.id) in self._digested:
                    word = state(alert)
                if word is not None and alert.id not in group.told:
                    group.tell(alert.id, word)
                    if group.last is None:  # it was told in another group, or by other rules
                        group.last_at = max(group.last_at, alert.changed)
        return found

    def _make(self, key: Key, integration: AnyIntegration, route: Route, labels: dict[str, str]) -> Group:
        receiver = self._receivers[integration.receiver]
        group = Group(integration, receiver, route, key[1], labels)
        if isinstance(integration, AlertmanagerConfig):
            group.changed = set()
        self._groups[key] = group
        if (last := self._remembered.pop(key, None)) is not None:
            group.last, group.last_at = last, seconds(last.time)
            group.flying = "" if last.sent else last.id
        return group

    def _told_by(self, alert: Alert) -> list[Key]:
        """Groups that have told of it before this dispatcher began, or by other rules, and have still to tell its
        end."""
        found = []
        for key in self._told_before.pop(alert.id, ()):
            integration = self._integrations.get(key[0])
            last = self._remembered.get(key) or (self._groups[key].last if key in self._groups else None)
            if integration is None or last is None:
                continue
            group = self._groups.get(key) or self._make(key, integration, self._config.route, dict(last.labels))
            if alert.id not in group.members:
                group.tell(alert.id, last.covered[alert.id])
                found.append(key)
        return found

    def _leave(self, key: Key, alert: Alert) -> bool:
        """It belongs to other groups now; says whether this one is still to tell its end."""
        group = self._groups.get(key)
        if group is None:
            return False
        group.members.discard(alert.id)
        if group.told.get(alert.id) not in (None, "resolved"):
            group.left.add(alert.id)
            if not alert.firing:
                if group.changed is not None:
                    group.changed.add(alert.id)
                self._wake(key, group.ready(alert.changed))
            return True
        group.left.discard(alert.id)
        group.tell(alert.id, None)
        self._drop_if_empty(key, group)
        return False

    def drop(self, alert: Alert) -> None:
        """Forget one."""
        self._inhibition.drop(alert)
        for key in self._keys(alert.id):
            group = self._groups[key]
            group.members.discard(alert.id)
            group.left.discard(alert.id)
            group.tell(alert.id, None)
            self._drop_if_empty(key, group)
        self._placed.pop(alert.id, None)
        self._left.pop(alert.id, None)
        for integration in self._integrations:
            self._aside.pop((integration, alert.id), None)

    def _keys(self, id: str) -> list[Key]:
        _, placed = self._placed.get(id, ("", []))
        return [key for key in (*placed, *self._left.get(id, ())) if key in self._groups]

    def owes(self, alert: Alert) -> bool:
        """Whether somebody who has been told of it is still to be told of its end."""
        groups = [self._groups[key] for key in self._keys(alert.id)]
        return any(
            group.integration.send_resolved and group.told.get(alert.id) not in (None, "resolved") for group in groups
        )

    def long_gone(self, before: float) -> list[Key]:
        """Integration and group of those that are no more, and for which nothing went out since; named once."""
        for key, last in self._remembered.items():
            if last.sent:
                self.gone.setdefault(key, seconds(last.time))
        found = [key for key, at in self.gone.items() if at < before]
        for key in found:
            del self.gone[key]
            self._remembered.pop(key, None)
        return [key for key in found if key not in self._groups]

    def acknowledge(self, alert: Alert) -> None:
        """Somebody has seen it, so it counts as told as it is."""
        for key in self._keys(alert.id) if alert.firing else ():
            group = self._groups[key]
            if alert.id in group.left:
                continue
            if group.told.get(alert.id) in (None, "resolved"):
                group.tell(alert.id, state(alert))
            elif isinstance(group.integration, PagerDutyConfig):
                group.seen = True
                self._wake(key, -math.inf)

    # What is due?

    def due(self, now: float) -> list[Notification]:
        """What is to go out now; each counts as under way until `sent`, `refused` or `dropped` says otherwise."""
        if now >= self._next_look:
            self._look_at_held(now)
        made: list[Notification] = []
        while self._heap and self._heap[0][0] <= now and len(made) < MOST_AT_ONCE:
            at, _, key = heapq.heappop(self._heap)
            group = self._groups.get(key)
            if group is not None and group.due == at:
                group.due = math.inf
                if (notification := self._evaluate(key, group, now)) is not None:
                    made.append(notification)
        return made

    def _look_again(self) -> None:
        self._next_look = -math.inf

    def _look_at_held(self, now: float) -> None:
        """Silences end, quiet hours begin and end, what inhibited is over: see whether it is their turn."""
        for key in self._held:
            self._wake(key, -math.inf)
        self._held.clear()
        ends = [until for _, until in self._silences if until > now]
        self._next_look = min([now + MINUTE - now % MINUTE, *ends])

    def _wake(self, key: Key, at: float) -> None:
        group = self._groups[key]
        if not group.flying and at < group.due:
            group.due = at
            heapq.heappush(self._heap, (at, next(self._ticket), key))

    def _evaluate(self, key: Key, group: Group, now: float) -> Notification | None:
        if group.flying:
            return None
        repeat_at = group.repeat_at()
        causes: dict[str, int] = {}
        alerts, muted = self._told_of(group, now, causes)
        update = needs_update(
            alerts,
            group.told,
            repeat=repeat_at <= now,
            seen=group.seen,
            send_resolved=group.integration.send_resolved,
        )
        if update is not None and update.reason == "all_resolved":
            # Receivers close what is open there. What fires unseen is over for them, and new when it is seen again.
            if group.changed is None:
                update = update._replace(muted=tuple(muted))
            elif group.firing > len(update.news):
                update = update._replace(reason="resolved")
        capped = False
        if update is None or update.reason in COUNTED:
            named = (*update.news, *update.others) if update else self._known(group.capped or ())
            deployments = {alert.deployment for alert in named}
            capped = bool(self._allowance.exhausted(group.receiver, group.integration.name, deployments, now))
        if update is None:
            group.more = False
            if group.capped and self.live and not capped:
                return self._digest(group.integration, now)
            self._hold(key, group, causes)
            if group.capped:
                self._held.add(key)
            self._wake(key, repeat_at if repeat_at > now else now + group.route.repeat_interval)
            return None
        if update.reason != "repeat":
            ready = group.ready(min(alert.changed for alert in update.news))
            longest = max(group.route.group_wait, group.route.group_interval, LONGEST_REFUSED_SECONDS)
            if now < ready <= now + longest:  # later than that it could never be: the clock was set back
                self._wake(key, ready)
                return None
        many = len(update.news or update.others)
        if not self.live:
            causes["shadow"] = many
        elif quiet(group.route, self._config.time_intervals, now):
            causes["quiet_hours"] = many
        elif capped:
            causes["cap"] = many
            group.capped = ((group.capped or set()) | {alert.id for alert in update.news}) or None
        elif group.capped is not None and update.reason in COUNTED:
            return self._digest(group.integration, now)
        else:
            return self._fly(group, update, now)
        self._hold(key, group, causes)
        return None

    def _told_of(self, group: Group, now: float, causes: dict[str, int]) -> tuple[list[Alert], list[Alert]]:
        """Whom the group may tell of now, and whom it has told of, which fires and is muted. The end of what was told
        is told whatever mutes it; what has left, ends here only."""
        members: Iterable[str] = group.members
        if group.changed is not None:
            here = (id for id in group.changed if id in group.members or id in group.left)
            group.changed = {id for id in here if group.untold(self._alerts[id])}
            members = group.changed & group.members
        found, muted = group.over(self._alerts), []
        silences = [silence for silence, until in self._silences if until > now]
        for id in members:
            alert = self._alerts[id]
            cause = ""
            if alert.firing:
                if self._aside.get((group.integration.name, id), -math.inf) > now:
                    cause = "refused"
                elif self._inhibition.inhibits(alert):
                    cause = "inhibited"
                elif silenced(alert, silences):
                    cause = "silenced"
            if cause:
                causes[cause] = causes.get(cause, 0) + 1
                if group.told.get(id) not in (None, "resolved"):
                    muted.append(alert)
            else:
                found.append(alert)
        return found, muted

    def _hold(self, key: Key, group: Group, causes: dict[str, int]) -> None:
        for cause, many in causes.items():
            if self._held_back is not None and many > group.causes.get(cause, 0):
                self._held_back(group.integration.name, cause, many - group.causes.get(cause, 0))
        group.causes = causes
        if causes:
            self._held.add(key)

    def _fly(self, group: Group, update: Update, now: float) -> Notification:
        name = group.integration.name
        note = ""
        if update.reason in COUNTED:
            deployments = {alert.deployment for alert in (*update.news, *update.others)}
            self._allowance.spend(group.receiver, name, deployments, now)
            if cap := self._allowance.exhausted(group.receiver, name, deployments, now):
                note = f"The cap of {cap} is reached: what comes next is held back until midnight UTC."
        most = limits(group.integration)
        if group.most:  # somewhere among them is what the receiver will not take
            most = most._replace(shown=min(most.shown, group.most), whole=True, context=False)
        notification = compose(
            update,
            most,
            integration=name,
            group=group.key,
            group_labels=group.labels,
            sequence=group.last.sequence + 1 if group.last else 0,
            now=now,
            note=note,
            spent=self._allowance.spent(name, now),
        )
        group.flying = notification.id
        group.more = any(alert.id not in notification.covered for alert in update.news)
        group.causes, group.seen = {}, False
        group.last, group.last_at = notification, now
        return notification

    def _digest(self, integration: AnyIntegration, now: float) -> Notification | None:
        """One message for all that a cap has held back at an integration."""
        groups = [
            group
            for group in self._groups.values()
            if group.capped is not None and group.integration.name == integration.name and not group.flying
        ]
        firing: list[Alert] = []
        over: list[Alert] = []
        for group in groups:
            update = needs_update(self._told_of(group, now, {})[0], group.told)
            firing += [alert for alert in (update.news if update else ()) if alert.firing]
            over += [
                alert for alert in self._known(group.capped or ()) if not alert.firing and alert.id not in group.told
            ]
        news = {alert.id: alert for alert in (*firing, *over)}
        if not news:
            for group in groups:
                group.capped = None
            return None
        key = hashlib.sha256(f"{DIGEST}\x1f{integration.name}".encode()).hexdigest()[:32]
        before = self._digests.get(key)
        ended = f", of which {len(over)} {'is' if len(over) == 1 else 'are'} over by now" if over else ""
        notification = compose(
            Update("digest", tuple(sorted(news.values(), key=lambda alert: (not alert.firing, -alert.risk, alert.id)))),
            limits(integration),
            integration=integration.name,
            group=key,
            group_labels={},
            sequence=before.sequence + 1 if before else 0,
            now=now,
            note=f"What the day's cap has held back: {len(news)} alert{'' if len(news) == 1 else 's'}{ended}.",
            spent=self._allowance.spent(integration.name, now),
        )
        self._digests[key] = notification
        for group in groups:
            group.flying = notification.id
        return notification

    def _known(self, ids: Iterable[str]) -> list[Alert]:
        return [self._alerts[id] for id in sorted(ids) if id in self._alerts]

    # What became of it?

    def sent(self, notification: Notification) -> Notification:
        """The integration has taken it; gives what is to be written down in its place."""
        written = replace(notification, alerts=(), note="", sent=True, covered={})
        for key, group in self._concerned(notification):
            for id, word in notification.covered.items():
                if id in group.members or id in group.left:
                    group.tell(id, word)
                    if word == "resolved" and id in group.left:
                        group.left.discard(id)
                        group.tell(id, None)
                if group.capped is not None:
                    group.capped.discard(id)
            if not group.capped:
                group.capped = None
            group.last_at = seconds(notification.time)
            if group.key == notification.group:
                group.last = written = record(notification, group)
            group.refused, group.most, group.again = 0, 0, -math.inf
            self._landed(key, group)
        if notification.group in self._digests:
            self._digests[notification.group] = written
        return written

    def refused(self, notification: Notification, now: float) -> None:
        """The integration will never take it. Nobody has been told, so it is tried in other words: later, with half as
        many alerts, until it is one alone; that one is then left aside for an hour."""
        for key, group in self._concerned(notification):
            if len(notification.covered) == 1 and len(notification.alerts) == 1:
                (id,) = notification.covered
                self._aside[notification.integration, id] = now + LONGEST_REFUSED_SECONDS
            group.refused += 1
            group.most = max(1, len(notification.alerts) // 2)
            wait = min(LONGEST_REFUSED_SECONDS, FIRST_REFUSED_SECONDS * 2.0 ** (group.refused - 1))
            group.again, group.more = now + wait, True
            self._landed(key, group)
            self._wake(key, group.again)

    def dropped(self, notification: Notification) -> None:
        """It is too old to be sent; what is still true is told anew."""
        for key, group in self._concerned(notification):
            self._landed(key, group)

    def _landed(self, key: Key, group: Group) -> None:
        group.flying = ""
        if not self._drop_if_empty(key, group):
            self._wake(key, -math.inf)

    def _concerned(self, notification: Notification) -> list[tuple[Key, Group]]:
        key = notification.integration, notification.group
        if notification.group not in self._digests:
            group = self._groups.get(key)
            return [(key, group)] if group is not None and group.flying == notification.id else []
        return [(place, group) for place, group in self._groups.items() if group.flying == notification.id]

    def _drop_if_empty(self, key: Key, group: Group) -> bool:
        if group.members or group.left or group.flying:
            return False
        self._groups.pop(key, None)
        self._held.discard(key)
        if group.last is not None:
            self.gone[key] = group.last_at
        return True
