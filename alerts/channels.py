"""From one integration of the configuration to its open channel; and the findings' own JSON lines.

A channel knows how to hand findings over, and whether a failure may pass. It does not know which ones to hand over.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alerts.alertmanager import AlertmanagerChannel
from alerts.channel import Channel
from alerts.config import (
    AlertmanagerConfig,
    AlertsConfig,
    AnyIntegration,
    EmailConfig,
    LogConfig,
    PagerDutyConfig,
    SlackConfig,
    WebhookConfig,
)
from alerts.email import EmailChannel
from alerts.jsonl import LogChannel
from alerts.pagerduty import PagerDutyChannel
from alerts.slack import SlackChannel
from alerts.webhook import WebhookChannel
from monitor.errors import ChannelUnavailable, ConfigurationError
from monitor.events import Finding, encode

__all__ = ["JsonLines", "open_channel"]


def open_channel(integration: AnyIntegration, config: AlertsConfig) -> Channel:
    """The channel of one integration; `config` has the links that its messages carry.

    Raises:
        ConfigurationError: a file of it can't be read or written.
    """
    match integration:
        case WebhookConfig():
            return WebhookChannel(integration, config)
        case AlertmanagerConfig():
            return AlertmanagerChannel(integration, config)
        case PagerDutyConfig():
            return PagerDutyChannel(integration, config)
        case SlackConfig():
            return SlackChannel(integration, config)
        case EmailConfig():
            return EmailChannel(integration, config)
        case LogConfig():
            channel = LogChannel(integration, config)
            channel.check()
            return channel


class JsonLines:
    """One finding a line, as canonical JSON: what is delivered twice is the same line twice.

    A file is opened anew for each delivery, so that it may be rotated away, and flushed to the disk before it counts.
    """

    name = "json-lines"

    def __init__(self, path: Path | None = None) -> None:
        """Without a path, standard output."""
        self._path = path

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

    def deliver(self, findings: Sequence[Finding]) -> None:
        """Write them all, or none. See `Channel.deliver`.

        Raises:
            ChannelUnavailable: the disk is full, or the file can't be written now.
            ConfigurationError: nobody reads standard output any more.
        """
        data = b"".join(encode(finding) + b"\n" for finding in findings)
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
