"""Notifications as JSON lines, in a file or on standard output: for log shippers, and for looking at.

It knows how to add lines that last; what a notification says comes from `alerts.message`. A repeat is the same line.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from alerts.config import AlertsConfig, LogConfig
from alerts.escape import json_line
from alerts.message import annotations_of, title
from monitor.alert import Alert, Notification, labels
from monitor.errors import ChannelUnavailable, ConfigurationError

__all__ = ["LogChannel", "line"]

_encoder = msgspec.json.Encoder(order="sorted")


def line(notification: Notification, config: AlertsConfig) -> bytes:
    """One JSON object and a newline: sorted keys, and nothing in it that a terminal would obey."""
    body: dict[str, Any] = {
        "id": notification.id,
        "time": notification.time,
        "integration": notification.integration,
        "group": notification.group,
        "labels": notification.labels,
        "reason": notification.reason,
        "sequence": notification.sequence,
        "status": notification.status,
        "title": title(notification),
        "note": notification.note,
        "truncated": notification.truncated,
        "alerts": [_alert(alert, config) for alert in notification.alerts],
    }
    return json_line(_encoder.encode(body)) + b"\n"


class LogChannel:
    """The log integration. A file is opened anew for each delivery, so that it may be rotated away, and flushed to the
    disk before it counts.
    """

    refresh: float | None = None

    def __init__(self, integration: LogConfig, config: AlertsConfig) -> None:
        """Without a path, standard output."""
        self.name = integration.name
        self.send_resolved = integration.send_resolved
        self._path: Path | None = integration.path
        self._config = config

    def check(self) -> None:
        """See at the start whether the file can be written; it is made when it is missing.

        Raises:
            ConfigurationError: it can't.
        """
        if self._path is None:
            return
        try:
            _append(self._path, b"")
        except OSError as error:
            raise ConfigurationError(
                f"{self._path} can't be written: {error.strerror}",
                cure="name a file in a directory that exists and that this user may write to",
            ) from error

    def deliver(self, notification: Notification) -> None:
        """Write the whole line, or nothing. See `Channel.deliver`.

        Raises:
            ChannelUnavailable: the disk is full, or the file can't be written now.
            ConfigurationError: nobody reads standard output any more.
        """
        data = line(notification, self._config)
        try:
            if self._path is None:
                _write(sys.stdout.fileno(), data)
            else:
                _append(self._path, data)
        except BrokenPipeError as error:
            raise ConfigurationError(
                "nobody reads standard output any more", cure="start the dispatcher again, together with its reader"
            ) from error
        except OSError as error:
            raise ChannelUnavailable(
                f"{self._path or 'standard output'} can't be written: {error.strerror}",
                cure="free space on its disk, and let this user write it",
            ) from error

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Nothing to say again: a line stays."""

    def close(self) -> None:
        """Nothing is held open."""


def _alert(alert: Alert, config: AlertsConfig) -> dict[str, Any]:
    return {
        "id": alert.id,
        "status": "firing" if alert.firing else "resolved",
        "labels": labels(alert),
        "annotations": annotations_of(alert, config),
        "starts_at": alert.starts_at,
        "ends_at": alert.ends_at,
        "finding_ids": alert.finding_ids,
        "turn": alert.turn,
        "value": alert.value,
        "boundary": alert.boundary,
        "risk": alert.risk,
        "budget": alert.budget,
        "certification": alert.certification,
        "nearest_roles": alert.nearest_roles,
    }


def _append(path: Path, data: bytes) -> None:
    """Add whole lines and flush them to the disk, or leave the file as it was."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data  # a line that a power cut tore must not spoil the next one
        try:
            _write(handle, data)
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
    if not size:  # it may be new: its name must last, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]
