"""The dispatcher's alerts, and who has seen them: read at most once a second, however many ask. It knows no request.

A table of a hundred thousand takes longer than a second to read, so it is read again only after ten times as long as
the last reading took: whoever looks never takes more than a tenth of one processor.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from monitor.alert import Alert

__all__ = ["AlertTable"]

ALERT, ACKNOWLEDGE = "alert/", "acknowledge/"
FRESH_SECONDS = 1.0
SHARE = 10.0
LAST = 10  # of an alert's findings, those that are looked up one by one


class _Written(Struct):
    body: Alert


class _Seen(Struct):
    by: str


_alert = msgspec.json.Decoder(_Written).decode
_seen = msgspec.json.Decoder(_Seen).decode


class Actions(Protocol):
    """What is read of a store."""

    def actions(self, prefix: str) -> dict[str, bytes]:
        """See `monitor.store.store.Actions.actions`."""


class AlertTable:
    """Any number of threads may use one; its methods block while they read, and raise as the store does."""

    def __init__(self, store: Actions, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._reading = threading.Lock()
        self._expired = True
        self._due = 0.0
        self._values: dict[str, bytes] = {}
        self._decoded: dict[str, Alert] = {}
        self._alerts: list[Alert] = []

    def all(self) -> list[Alert]:
        """All of them, as of a moment ago: those that fire first, the newest first. While one thread reads them anew,
        the others are given what was there before, unless that has been called out of date."""
        if not self._reading.acquire(blocking=self._expired):
            return self._alerts
        try:
            begun = self._clock()
            if self._expired or begun >= self._due:
                self._expired = False
                self._read()
                self._due = begun + max(FRESH_SECONDS, SHARE * (self._clock() - begun))
            return self._alerts
        except BaseException:
            self._expired = True
            raise
        finally:
            self._reading.release()

    def find(self, id: str) -> Alert | None:
        """One of them, as of now."""
        key = ALERT + id
        alert = _read(self._store.actions(key).get(key, b""))
        if alert is None or alert.acknowledged_by:
            return alert
        seen = {one: self._store.actions(ACKNOWLEDGE + one) for one in (id, *alert.finding_ids[-LAST:])}
        return _with(alert, {key: value for found in seen.values() for key, value in found.items()})

    def expire(self) -> None:
        """Something has been done: whoever asks from now on sees it."""
        self._expired = True

    def _read(self) -> None:
        values, seen = self._store.actions(ALERT), self._store.actions(ACKNOWLEDGE)
        decoded = {}
        for key, value in values.items():  # what has not changed since the last reading is not decoded again
            alert = self._decoded.get(key) if self._values.get(key) == value else _read(value)
            if alert is not None:
                decoded[key] = alert
        newest = sorted(decoded.values(), key=lambda alert: (alert.starts_at, alert.id), reverse=True)
        self._values, self._decoded = values, decoded
        self._alerts = [_with(alert, seen) for alert in sorted(newest, key=lambda alert: not alert.firing)]


def _read(value: bytes) -> Alert | None:
    try:
        return _alert(value).body
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None  # of a release to come


def _with(alert: Alert, seen: Mapping[str, bytes]) -> Alert:
    """The alert, and who has seen it where its dispatcher has not taken that in yet."""
    if not alert.acknowledged_by and seen:
        for id in (alert.id, *alert.finding_ids):
            if value := seen.get(ACKNOWLEDGE + id):
                with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                    return replace(alert, acknowledged_by=_seen(value).by)
    return alert
