"""From the settings to an open log, store and subscription. It knows where each setting goes, and no more."""

from __future__ import annotations

from monitor.settings import Settings
from monitor.store import open_store
from monitor.store.sqlite import SqliteStore
from monitor.stream import open_log
from monitor.stream.log import PROJECTIONS, EmbeddedSubscription, Log, Subscription

__all__ = ["log", "store", "subscription"]


def log(settings: Settings) -> Log:
    """The log of ANCHORWATCH_LOG_URL."""
    return open_log(settings.log_url)


def store(settings: Settings) -> SqliteStore:
    """The store of ANCHORWATCH_STORE_URL."""
    return open_store(settings.store_url)


def subscription(settings: Settings, log: Log, topic: str = PROJECTIONS) -> Subscription:  # noqa: ARG001
    """This worker's share of a topic of that log."""
    return EmbeddedSubscription(log, topic)
