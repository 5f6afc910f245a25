"""What the dispatcher writes down, and what it reads back: alerts and notifications, in the log of actions.

It knows what has changed since it was written, and nothing of why. While the log is away it keeps that, tries again in
growing intervals, and says so; nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from alerts.stages import moment
from alerts.table import Table
from monitor.actions import (
    Action,
    ActionsFold,
    Body,
    Kind,
    Paging,
    Silence,
    Store,
    append_actions,
    body_of,
    decode_action,
    withdraw,
)
from monitor.alert import Alert, Notification
from monitor.errors import ConfigurationError, EventError, LogError
from monitor.stream.log import ACTIONS, Log

__all__ = ["Journal", "read_bodies"]

WRITTEN_AT_ONCE = 200
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 30.0
BY = "dispatch"

T = TypeVar("T", Alert, Notification, Silence, Paging)

_log = structlog.get_logger("anchorwatch.dispatch")


class Journal:
    """One dispatcher's notes, while it has the lease.

    Args:
        log: where they are written.
        store: where they are folded, and read from.
        table: the alerts, with what of them is unwritten.
        clock: unix seconds.
        ticks: monotonic seconds.
    """

    def __init__(
        self, log: Log, store: Store, table: Table, clock: Callable[[], float], ticks: Callable[[], float]
    ) -> None:
        self._log = log
        self._store = store
        self._fold = ActionsFold(log, store)
        self._table = table
        self._clock = clock
        self._ticks = ticks
        self._records: dict[tuple[str, str], Notification] = {}
        self._withdrawn: dict[tuple[Kind, str], None] = {}
        self._failures = 0
        self._not_before = float("-inf")
        self._at = -1
        self._own = 0

    def note(self, notification: Notification) -> None:
        """To be written in place of the group's last one."""
        self._records[notification.integration, notification.group] = notification

    def take_back(self, kind: Kind, name: str) -> None:
        """To be withdrawn, before anything else is written."""
        self._withdrawn[kind, name] = None

    def to_withdraw(self, kind: Kind) -> set[str]:
        """Names of what is to be withdrawn, and is in the log still."""
        return {name for of, name in self._withdrawn if of == kind}

    @property
    def complete(self) -> bool:
        """Whether all is written."""
        return not self._table.unwritten and not self._records and not self._withdrawn

    def catch_up(self) -> bool:
        """Take what has been written since into the store; says whether some of it may be somebody else's. What is all
        our own is left for `fold`, since somebody may be waiting. Where the log is away, what is known stays what it
        was.

        Raises:
            StoreUnavailable, StoreError: as the store does.
        """
        if self._ticks() < self._not_before:
            return False
        try:
            if self._at >= 0 and self._log.span(ACTIONS, 0).end == self._at + self._own:
                return False
            self._take_in()
        except LogError as error:
            self._failed(error)
            return False
        return True

    def fold(self) -> bool:
        """The same for all of it, ours included. Raises as `catch_up`."""
        if self._ticks() < self._not_before:
            return False
        before, own = self._at, self._own
        try:
            self._take_in()
        except LogError as error:
            self._failed(error)
            return False
        return before < 0 or self._at != before + own

    def _take_in(self) -> None:
        while self._fold.run_once():
            pass
        self._at, self._own = self._store.actions_offset(self._log.span(ACTIONS, 0).topic_id), 0

    def write(self) -> None:
        """Write down all that is to be: alerts, then what was sent and what is about to be. Blocks until it is safe."""
        if self.complete or self._ticks() < self._not_before:
            return
        while not self.complete:
            try:
                for kind, name in list(self._withdrawn):
                    self.withdraw(kind, [name])
                    del self._withdrawn[kind, name]
            except LogError as error:
                self._failed(error)
                return
            ids = list(self._table.unwritten)[:WRITTEN_AT_ONCE]
            # That something has been sent is said only after its alerts know that they have been told.
            places = list(self._records)[: WRITTEN_AT_ONCE - len(ids)]
            records: list[tuple[Kind, str, Body]] = [("alert", id, self._table.alerts[id]) for id in ids]
            records += [("notification", "/".join(place), self._records[place]) for place in places]
            try:
                self._append(records)
            except LogError as error:
                self._failed(error)
                return
            self._table.written(ids)
            for place in places:
                del self._records[place]
        if self._failures:
            _log.info("the log of actions is written again", failed_tries=self._failures)
            self._failures = 0

    def _append(self, records: Sequence[tuple[Kind, str, Body]]) -> None:
        at = moment(self._clock())
        try:
            append_actions(self._log, records, by=BY, at=at)
            self._own += len(records)
        except ConfigurationError:
            for record in records:  # one of them can't be written: the others must be
                try:
                    append_actions(self._log, [record], by=BY, at=at)
                    self._own += 1
                except ConfigurationError as error:
                    _log.error("a note can't be written", kind=record[0], problem=error.problem, cure=error.cure)

    def withdraw(self, kind: Kind, names: Sequence[str]) -> None:
        """Take back what was written.

        Raises:
            LogError: as the log does.
        """
        for start in range(0, len(names), WRITTEN_AT_ONCE):
            some = names[start : start + WRITTEN_AT_ONCE]
            withdraw(self._log, kind, some)
            self._own += len(some)

    def _failed(self, error: LogError) -> None:
        self._failures += 1
        wait = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures - 1, 10))
        self._not_before = self._ticks() + wait
        if self._failures & (self._failures - 1) == 0:  # a long outage must not fill the log file
            _log.warning(
                "the log of actions is away; alerts are told nevertheless",
                problem=error.problem,
                cure=error.cure,
                failed_tries=self._failures,
            )


def read_bodies(actions: Mapping[str, bytes], of: type[T]) -> list[T]:
    """What actions of one kind say. One that this release can't read is passed over, and told."""
    found: list[T] = []
    for key, value in actions.items():
        try:
            body = body_of(key, value)
        except EventError as error:
            kind = key.partition("/")[0]
            _log.error("an action can't be read", kind=kind, problem=error.problem, cure=error.cure)
            continue
        if isinstance(body, of):
            found.append(body)
    return found


def read_action(key: str, value: bytes) -> Action | None:
    """One action, for who did it; None where this release can't read it."""
    try:
        return decode_action(key, value)
    except EventError:
        return None
