"""The ranking of sessions, filtered and read page by page. It knows the store, and no request.

The store filters by deployment and time, by its indexes. The rest is looked for among the next few thousand of the
ranking, so that no question costs more than that: a page may hold fewer than asked, or none, and yet be not the last.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from msgspec import Struct

from monitor.events import Severity
from monitor.store.store import Rank, Session

__all__ = ["Page", "Wanted", "page"]

LOOKED_AT = 5_000
AT_ONCE = 500


class Ranking(Protocol):
    """What is read of a store."""

    def sessions(
        self,
        limit: int,
        *,
        offset: int = 0,
        after: Rank | None = None,
        deployment: str | None = None,
        since: float | None = None,
    ) -> list[Session]:
        """See `monitor.store.store.Reader.sessions`."""


class Wanted(Struct, frozen=True, kw_only=True):
    """Which sessions; None is all of them. `since` in seconds since 1970; `open` is whether an episode is."""

    deployment: str | None = None
    since: float | None = None
    model: str | None = None
    severity: Severity | None = None
    open: bool | None = None

    def admits(self, session: Session) -> bool:
        """Whether it passes what the store does not filter by."""
        return (
            self.model in (None, session.model)
            and self.severity in (None, session.severity)
            and self.open in (None, session.episode_id is not None)
        )


class Page(NamedTuple):
    """Some sessions, riskiest first, and behind which place the ranking goes on; None where it ends."""

    sessions: list[Session]
    next: Rank | None


def page(store: Ranking, wanted: Wanted, limit: int, after: Rank | None = None) -> Page:
    """The next `limit` at most. Blocks for a few reads. Raises as the store."""
    found: list[Session] = []
    everything = wanted.model is None and wanted.severity is None and wanted.open is None
    at_once = limit + 1 if everything else AT_ONCE
    for _ in range(0, LOOKED_AT, at_once):
        looked_at = store.sessions(at_once, after=after, deployment=wanted.deployment, since=wanted.since)
        for number, session in enumerate(looked_at, 1):
            after = Rank(session.risk, session.conversation_id)
            if wanted.admits(session):
                found.append(session)
                if len(found) == limit:
                    more = number < len(looked_at) or len(looked_at) == at_once
                    return Page(found, after if more else None)
        if len(looked_at) < at_once:
            return Page(found, None)
    return Page(found, after)
