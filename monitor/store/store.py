"""The store: what the worker keeps of the log, and what people and the dispatcher read. Seams only, no backend.

It knows nothing of SQLite or Redis, and a conversation's state is opaque bytes here. A store is a fold of the log: it
may be thrown away and rebuilt. One backend offers all three Protocols; each reader asks only for the one it needs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from msgspec import Struct

from monitor.events import Finding, Kind, Severity

__all__ = ["Commit", "Outbox", "Pending", "Position", "Reader", "Session", "Store", "TrajectoryPoint"]


class Position(NamedTuple):
    """Where a worker goes on reading.

    `offset` is the next one to read. `revision` rises when somebody deletes a conversation, so that a worker which
    still has the deleted state at hand is refused, and can't write it back.
    """

    offset: int
    revision: int = 0


class TrajectoryPoint(Struct, frozen=True, kw_only=True):
    """One response of a conversation, judged.

    Attributes:
        number: the response's place among the conversation's responses in log order, from 1; duplicates not counted.
        projection_id, time, turn, projection, held: of its `Projection`.
        outcome: what the fold did with it, in the fold's words.
        z: the readout in units of the baseline's standard deviation; low is drift. None where nothing judged it.
        risk: the largest statistic over its warning boundary: at 1 and above it warns. None where nothing judged it.
        coordinates: the response's means on the measured directions: its place on the persona map.
    """

    number: int
    projection_id: str
    time: str
    turn: int
    projection: float
    held: float
    outcome: str
    z: float | None
    risk: float | None
    coordinates: dict[str, float]


class Session(Struct, frozen=True, kw_only=True):
    """What people see of one conversation, as of its last response.

    Attributes:
        deployment, model, axis_id, turn, projection, outcome: of the last response.
        time: event time of the last response.
        responses: how many were recorded, branches and late ones included, duplicates not.
        z, risk: of the last response that was judged; None when none of this segment was.
        episode_id, kind, severity: of the open episode; None when none is open.
    """

    conversation_id: str
    deployment: str
    model: str
    axis_id: str
    turn: int
    projection: float
    outcome: str
    time: str
    responses: int
    z: float | None
    risk: float | None
    episode_id: str | None = None
    kind: Kind | None = None
    severity: Severity | None = None


class Commit(Struct, frozen=True, kw_only=True):
    """What one batch of records did. It is written whole or not at all.

    Attributes:
        topic, partition: where the records came from.
        topic_id: the log's id of that topic.
        expected: the position read before the batch; None when there was none.
        offset: the next offset to read, after this batch.
        states: conversation id → its new state.
        sessions: of every conversation that had a response other than a duplicate.
        points: conversation id → its new points in log order.
        findings: in log order. One whose id is stored already is skipped, and so is its outbox row.
        counts: outcome → how many records had it; dead letters included.
    """

    topic: str
    partition: int
    topic_id: str
    expected: Position | None
    offset: int
    states: dict[str, bytes]
    sessions: list[Session]
    points: dict[str, list[TrajectoryPoint]]
    findings: list[Finding]
    counts: dict[str, int]


class Pending(NamedTuple):
    """A finding that has not been told to anybody yet. `sequence` rises in log order within a partition."""

    sequence: int
    finding: Finding


class Store(Protocol):
    """For the worker. Every method raises `StoreUnavailable` where trying again may help, else `StoreError`."""

    def position(self, topic: str, partition: int) -> Position | None:
        """Where to go on; None when nothing of this partition was ever committed."""

    def load(self, conversation_ids: list[str]) -> dict[str, bytes]:
        """The states of those that are known."""

    def commit(self, batch: Commit) -> None:
        """One transaction.

        Raises:
            CommitRefused: the stored position is not `batch.expected`; nothing was written.
            StoreError: the store was folded from another log than `batch.topic_id`; nothing was written.
            StoreUnavailable: perhaps written, perhaps not; read the position to know.
        """

    def forget(self, conversation_id: str) -> bool:
        """Delete all that is kept of one conversation; False when nothing was. The log keeps its records."""

    def close(self) -> None:
        """Give everything back."""


class Reader(Protocol):
    """For people: console, API, command line. Raises as `Store`."""

    def sessions(
        self, limit: int, *, offset: int = 0, deployment: str | None = None, since: str | None = None
    ) -> list[Session]:
        """Riskiest first, then latest, then by id; those that nothing judged come last.

        `since` is an event time: sessions that have been silent since before it are left out.
        """

    def session(self, conversation_id: str) -> Session | None:
        """One of them."""

    def trajectory(self, conversation_id: str) -> list[TrajectoryPoint]:
        """Its newest responses in log order; the store bounds how many it keeps."""

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        """Newest first."""

    def counts(self) -> dict[str, int]:
        """Outcome → how many records of the log had it, and `dead_letter`. Exact, however often a worker died."""


class Outbox(Protocol):
    """For the dispatcher: a finding stays here until somebody has settled it. Raises as `Store`."""

    def pending(self, limit: int) -> list[Pending]:
        """The oldest ones first."""

    def settle(self, sequences: list[int]) -> None:
        """They have been told; never give them out again. Unknown ones are fine."""
