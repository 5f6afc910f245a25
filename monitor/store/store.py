"""The store: what the worker keeps of the log, and what people and the dispatcher read. Seams only, no backend.

It knows nothing of SQLite or Redis, and a conversation's state is opaque bytes here. A store is a fold of the log: it
may be thrown away and rebuilt. One backend offers all these Protocols; each user asks only for the one it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from msgspec import Struct

from monitor.events import Finding, Kind, Outcome, Severity

__all__ = [
    "Actions",
    "ClosedMinutes",
    "Commit",
    "Fleet",
    "Housekeeping",
    "MinuteSums",
    "Outbox",
    "Pending",
    "Position",
    "Progress",
    "Rank",
    "Reader",
    "Session",
    "Store",
    "TrajectoryPoint",
]


class Position(NamedTuple):
    """Where a worker goes on reading.

    `offset` is the next one to read. `revision` rises when somebody deletes a conversation, so that a worker which
    still has the deleted state at hand is refused, and can't write it back.
    """

    offset: int
    revision: int = 0


class TrajectoryPoint(Struct, frozen=True, kw_only=True, gc=False):
    """One response of a conversation, judged. Numbers are exact to seven digits, times to the millisecond.

    Attributes:
        number: the response's place among the conversation's responses in log order, from 1; duplicates not counted.
        time: event time, seconds since 1970.
        turn, projection, held: of its `Projection`.
        outcome: what the fold did with it, in the fold's words.
        z: the readout in units of the baseline's standard deviation; low is drift. None where nothing judged it.
        risk: the largest statistic over its warning boundary: at 1 and above it warns. None where nothing judged it.
        place: coordinates on the first two persona components, its place on the persona map; None where it has none.
    """

    number: int
    time: float
    turn: int
    projection: float
    held: float
    outcome: Outcome
    z: float | None
    risk: float | None
    place: tuple[float, float] | None


class Session(Struct, frozen=True, kw_only=True, gc=False):
    """What people see of one conversation, as of its last response. Numbers are exact to seven digits.

    Attributes:
        deployment, model, axis_id, turn, projection, outcome: of the last response.
        time: event time of the last response, seconds since 1970, to the millisecond; `started` of the first.
        responses: how many were recorded, branches and late ones included, duplicates not. A store keeps the newest
            trajectory points only: of the others these summary numbers remain, and `lowest_z`, `highest_risk`.
        z, risk: of the last response that was judged; None when none of this segment was.
        lowest_z, highest_risk: over all responses that were judged.
        truncated: nobody here has seen how it began: its first records were gone, or never came.
        episode_id, kind, severity: of the open episode; None when none is open.
    """

    conversation_id: str
    deployment: str
    model: str
    axis_id: str
    turn: int
    projection: float
    outcome: Outcome
    time: float
    started: float
    responses: int
    z: float | None
    risk: float | None
    lowest_z: float | None = None
    highest_risk: float | None = None
    truncated: bool = False
    episode_id: str | None = None
    kind: Kind | None = None
    severity: Severity | None = None


class Rank(NamedTuple):
    """Where a session stands among others: riskiest first, those without a risk last, among equals by id."""

    risk: float | None
    conversation_id: str


class MinuteSums(Struct, frozen=True, order=True, array_like=True, gc=False):
    """What one partition, or all of them, saw of one deployment in one minute of event time.

    Whole numbers, so that sums do not depend on the order in which they are taken.

    Attributes:
        minute: minutes since 1970.
        responses: how many were folded.
        z: sum of their z, in thousandths of a standard deviation; each z counts as at most +-20.
        warned: how many of them lay at or beyond their warning boundary.
    """

    minute: int
    deployment: str
    responses: int
    z: int
    warned: int


class Progress(NamedTuple):
    """How far one partition has come. `watermark` is the latest event time committed, seconds since 1970; `behind` says
    whether the log held more when it was committed."""

    partition: int
    watermark: float
    behind: bool


class Commit(Struct, frozen=True, kw_only=True):
    """What one batch of records did. It is written whole or not at all.

    Attributes:
        topic, partition: where the records came from.
        topic_id, partitions: the log's id of that topic, and how many partitions it has.
        expected: the position read before the batch; None when there was none.
        offset: the next offset to read, after this batch.
        states: conversation id → its new state.
        sessions: of every conversation that had a response other than a duplicate.
        points: conversation id → its new points in log order.
        findings: in log order. One whose id is stored already is skipped, and so is its outbox row.
        counts: outcome → how many records had it; dead letters included.
        sums: what the batch adds to the fleet's minutes.
        watermark: latest event time in the batch, seconds since 1970; the stored one never goes back. None: no
            response.
        behind: whether the log holds more than this batch.
        config: the calibration in force from `offset` on, where a control record of this batch changed it, or nothing
            was stored yet.
    """

    topic: str
    partition: int
    topic_id: str
    partitions: int = 1
    expected: Position | None
    offset: int
    states: dict[str, bytes]
    sessions: list[Session]
    points: dict[str, list[TrajectoryPoint]]
    findings: list[Finding]
    counts: dict[str, int]
    sums: list[MinuteSums] = []
    watermark: float | None = None
    behind: bool = False
    config: bytes | None = None


class Pending(NamedTuple):
    """A finding that has not been told to anybody yet. `reference` is the store's own name for it.

    `committed` is when it was committed, by the store's clock, seconds since 1970: for measuring delays.
    """

    reference: str
    finding: Finding
    committed: float


class Store(Protocol):
    """For the worker. Every method raises `StoreUnavailable` where trying again may help, else `StoreError`."""

    def position(self, topic: str, partition: int) -> Position | None:
        """Where to go on; None when nothing of this partition was ever committed."""

    def config(self, topic: str, partition: int) -> bytes | None:
        """The calibration in force at that position; None when none was ever committed."""

    def load(self, topic: str, partition: int, conversation_ids: list[str]) -> dict[str, bytes]:
        """The states of those that are known."""

    def commit(self, batch: Commit) -> None:
        """One transaction.

        Raises:
            CommitRefused: the stored position is not `batch.expected`; nothing was written.
            StoreError: the store was folded from another log than `batch.topic_id`, or from one with another number of
                partitions; nothing was written. Neither is compared where one side does not know it ("" or 0).
            StoreUnavailable: perhaps written, perhaps not; read the position to know.
        """

    def close(self) -> None:
        """Give everything back."""


class Reader(Protocol):
    """For people: console, API, command line. Raises as `Store`."""

    def sessions(
        self,
        limit: int,
        *,
        offset: int = 0,
        after: Rank | None = None,
        deployment: str | None = None,
        since: float | None = None,
    ) -> list[Session]:
        """Riskiest first by `risk`; those that nothing judged come last. Among equals, by id.

        `after` goes on behind a place of the ranking, whoever stands there now; the place is that of a session which
        was listed. `offset` counts from there.
        `since` is an event time in seconds since 1970: sessions that have been silent since before it are left out.
        """

    def session(self, conversation_id: str) -> Session | None:
        """One of them."""

    def trajectory(self, conversation_id: str) -> list[TrajectoryPoint]:
        """Its newest responses in log order; the store bounds how many it keeps."""

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        """Newest first: by event time, then by id. Without a conversation, a store may keep the newest few thousand."""

    def counts(self) -> dict[str, int]:
        """Outcome → how many records of the log had it, and `dead_letter`. Exact, however often a worker died."""


class Outbox(Protocol):
    """For the dispatcher: a finding stays here until somebody has settled it. Raises as `Store`."""

    def pending(self, limit: int) -> list[Pending]:
        """The oldest ones first, as far as one partition goes."""

    def settle(self, references: list[str]) -> None:
        """They have been told; never give them out again. Unknown ones are fine."""

    def progress(self, topic: str) -> list[Progress]:
        """How far each partition has come that was ever committed, by partition."""


class Housekeeping(Protocol):
    """For the one who keeps house: at most one at a time, by lease. Raises as `Store`."""

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Take or renew; True when it is the holder's now. It ends by itself. A saving of work, not a lock: whoever
        writes under it must be right without it, too."""

    def release(self, name: str, holder: str) -> None:
        """Give it back early. Of somebody else's: nothing happens."""

    def forget(self, conversation_id: str) -> bool:
        """Delete all that is kept of one conversation; False when nothing was. The log keeps its records.

        A worker that has its state at hand is refused at its next commit, and so can't write it back.
        """

    def expire(self, before: float) -> int:
        """Forget conversations that have been silent since before an event time (seconds since 1970); says how many.
        A store that ages its keys by itself may leave that to them, and only sweep what they leave behind."""


class ClosedMinutes(Struct, frozen=True):
    """The fleet as its reader left it.

    Attributes:
        through: the last minute that is closed.
        minutes: those closed ones that the detectors are rebuilt from, as they were when they were closed, in order.
        late: deployment → responses that had come, for minutes of the last day, after these had been closed; counted
            whenever the first minute of an hour is closed.
        hours: the closed minutes of the last week, summed by the hour; `minute` is the hour's first. In order.
    """

    through: int
    minutes: list[MinuteSums]
    late: dict[str, int]
    hours: list[MinuteSums] = []


class Fleet(Protocol):
    """For the reader of the fleet's minutes. Raises as `Store`."""

    def minutes(self, first: int, last: int) -> list[MinuteSums]:
        """The sums over all partitions for minutes first to last, both included, in order. What is two days older than
        the last closed minute may be gone. What is not closed yet never is: in a rebuilt store one partition may run
        days ahead of another."""

    def closed(self) -> ClosedMinutes | None:
        """What was closed last."""

    def close_minutes(self, expected: int | None, closed: ClosedMinutes, findings: list[Finding]) -> None:
        """Keep it, with the findings in the outbox, in one transaction. Findings whose id is stored are skipped.

        Raises:
            CommitRefused: the stored `through` is not `expected`; nothing was written.
        """


class Actions(Protocol):
    """What operators did, folded from the compacted topic of actions: each key's newest value. Raises as `Store`."""

    def actions_offset(self, topic_id: str) -> int:
        """The next offset of that topic to fold; 0 when nothing was, or when it was of a topic with another id."""

    def fold_actions(self, topic_id: str, expected: int, offset: int, changes: Mapping[str, bytes | None]) -> None:
        """Keep the new values, drop those that are None, and move the offset, in one transaction.

        Raises:
            CommitRefused: the stored offset is not `expected`; nothing was written.
        """

    def actions(self, prefix: str) -> dict[str, bytes]:
        """Key → value, of all keys that begin so; sorted."""
