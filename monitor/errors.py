"""Every error Anchorwatch raises, in one tree.

Each says what is wrong and the cure; `retry` says whether trying again can help.

::

    AnchorwatchError
    ├── ConfigurationError      a setting, path or option is wrong; all of them at once
    ├── BundleError             an axis bundle can't be used
    │   ├── BundleCorrupt       truncated, tampered, unsafe, or not finite
    │   └── BundleMismatch      made for another model, weights, template or layer
    ├── ModelError              a model can't be loaded, or its decoder layers can't be found
    ├── CatalogueError          roles, questions or scripts are missing or malformed
    ├── EventError              a record is not a valid event; poison, never retried
    ├── LogError                the log (Kafka or embedded) can't be read or written
    │   └── LogUnavailable      … now; retry
    ├── StoreError              the store (Redis or SQLite) can't be read or written
    │   ├── StoreUnavailable    … now; retry
    │   └── CommitRefused       another worker has moved this partition's position; reread and go on
    └── ChannelError            a channel will never take what it is given
        └── ChannelUnavailable  … does not take it now; retry
"""

from __future__ import annotations

__all__ = [
    "AnchorwatchError",
    "BundleCorrupt",
    "BundleError",
    "BundleMismatch",
    "CatalogueError",
    "ChannelError",
    "ChannelUnavailable",
    "CommitRefused",
    "ConfigurationError",
    "EventError",
    "LogError",
    "LogUnavailable",
    "ModelError",
    "StoreError",
    "StoreUnavailable",
]


class AnchorwatchError(Exception):
    """The root of the tree.

    `problem` says what is wrong, `cure` what the reader can do about it; `str()` gives both.
    """

    retry = False

    def __init__(self, problem: str, *, cure: str = "") -> None:
        self.problem = problem
        self.cure = cure
        super().__init__(f"{problem}\n  cure: {cure}" if cure else problem)


class ConfigurationError(AnchorwatchError):
    """One or more settings are wrong; the message lists all of them."""


class BundleError(AnchorwatchError):
    """An axis bundle can't be used."""


class BundleCorrupt(BundleError):
    """The bundle is truncated, tampered with, unsafe to load, or holds numbers that are not finite."""


class BundleMismatch(BundleError):
    """The bundle was made for another model, other weights, another chat template, or another layer."""


class ModelError(AnchorwatchError):
    """A model can't be loaded, or its decoder layers can't be found."""


class CatalogueError(AnchorwatchError):
    """Roles, questions, style requests or scripts are missing or malformed."""


class EventError(AnchorwatchError):
    """A record is not a valid event. It goes to the dead letters and is never retried."""


class LogError(AnchorwatchError):
    """The log can't be read or written."""


class LogUnavailable(LogError):
    """The log does not answer now."""

    retry = True


class StoreError(AnchorwatchError):
    """The store can't be read or written."""


class StoreUnavailable(StoreError):
    """The store does not answer now."""

    retry = True


class CommitRefused(StoreError):
    """The stored position is not the one this commit expected: another worker owns the partition now."""

    retry = True


class ChannelError(AnchorwatchError):
    """A channel will never take what it is given, however often it is tried."""


class ChannelUnavailable(ChannelError):
    """A channel does not take anything now. `retry_after`: not before so many seconds, where it said so."""

    retry = True

    def __init__(self, problem: str, *, cure: str = "", retry_after: float | None = None) -> None:
        super().__init__(problem, cure=cure)
        self.retry_after = retry_after
