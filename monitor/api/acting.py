"""What people do, written to the log of actions and taken into the store at once. It knows no request.

The log is what counts: what is written there holds, whatever becomes of the store. Where the store is away, or
somebody else folds at the moment, it takes effect a little later.
"""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

import structlog

from monitor.actions import (
    Action,
    ActionsFold,
    Body,
    Kind,
    Paging,
    Store,
    append_action,
    body_of,
    decode_action,
    withdraw,
)
from monitor.errors import AnchorwatchError, ConfigurationError, EventError
from monitor.events import now_utc
from monitor.stream.log import Log

__all__ = ["Acting", "Done", "done"]

ROUNDS = 5

_log = structlog.get_logger("anchorwatch.api")


class Done(NamedTuple):
    """An action that holds: who did what, and when."""

    action: Action
    body: Body


def done(key: str, value: bytes | None) -> Done | None:
    """What a key's value says; None where there is none, or one of a release to come."""
    if value is None:
        return None
    try:
        return Done(decode_action(key, value), body_of(key, value))
    except (EventError, ConfigurationError):
        return None


class Acting:
    """Any number of threads may use one. Its methods block until the log has acknowledged."""

    def __init__(self, log: Log, store: Store) -> None:
        self._log = log
        self._store = store
        self._fold = ActionsFold(log, store)
        self._folding = threading.Lock()

    def write(self, kind: Kind, name: str, body: Body, by: str) -> str:
        """Do it, and say when that was.

        Raises:
            ConfigurationError: a text in it won't do.
            LogUnavailable, LogError: perhaps written, perhaps not; do it again.
        """
        at = now_utc()
        append_action(self._log, kind, name, body, by=by, at=at)
        self._take_in()
        return at

    def take_back(self, kind: Kind, name: str) -> None:
        """Withdraw it. Raises as `write`."""
        withdraw(self._log, kind, [name])
        self._take_in()

    def known(self, kind: Kind, name: str) -> Done | None:
        """What holds of one name, as the store knows it. Raises as the store."""
        key = f"{kind}/{name}"
        return done(key, self._store.actions(key).get(key))

    def listed(self, kind: Kind) -> dict[str, Done]:
        """Name → what holds, of a whole kind, by name."""
        prefix = f"{kind}/"
        found = ((key, done(key, value)) for key, value in self._store.actions(prefix).items())
        return {key.removeprefix(prefix): one for key, one in found if one is not None}

    def mode(self) -> Literal["shadow", "live"]:
        """Whether anybody is told at all. Raises as the store."""
        found = self.known("paging", "mode")
        return found.body.mode if found is not None and isinstance(found.body, Paging) else "shadow"

    def _take_in(self) -> None:
        with self._folding:
            try:
                for _ in range(ROUNDS):
                    if not self._fold.run_once():
                        break
            except AnchorwatchError as error:
                _log.info("what was done is written, and takes effect later", problem=error.problem)
