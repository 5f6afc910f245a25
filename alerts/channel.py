"""The seam between the dispatcher and every way to people. It knows no protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from monitor.alert import Alert, Notification

__all__ = ["Channel"]


class Channel(Protocol):
    """One integration. Its methods are called from one thread at a time, and block for a bounded time.

    Attributes:
        name: the integration's, such as `ops/webhook[0]`.
        send_resolved: whether it wants to hear of the end of alerts.
        refresh: seconds after which firing alerts are to be told again, or they count as over there; None: never.
    """

    name: str
    send_resolved: bool
    refresh: float | None

    def deliver(self, notification: Notification) -> None:
        """Hand it over; the same notification always makes the same bytes.

        Raises:
            ChannelUnavailable: not now; it is tried again, not before `error.retry_after` seconds where that is given.
            ChannelError: never.
        """

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        """Say again that these fire; only where `refresh` is given. Raises as `deliver`."""

    def close(self) -> None:
        """Give everything back."""
