"""The embedded store: one SQLite file that holds what the worker folded, for one machine and no server.

It knows nothing of the fold: states are bytes, and what it derives (sessions, trajectories) comes from the points and
findings of a commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from monitor.database import BUSY_SECONDS, Database
from monitor.errors import CommitRefused, EventError, StoreError, StoreUnavailable
from monitor.events import Finding, decode_finding, encode
from monitor.store.store import Commit, Pending, Position, Session, TrajectoryPoint

__all__ = ["SqliteStore"]

T = TypeVar("T")

TRAJECTORY_POINTS = 256
_CHUNK = 500  # SQLite releases in use allow 999 parameters in one statement

_SCHEMA = """
CREATE TABLE positions (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, topic_id TEXT NOT NULL,
    offset INTEGER NOT NULL, revision INTEGER NOT NULL,
    PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE counts (outcome TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE states (conversation_id TEXT PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE sessions (
    conversation_id TEXT PRIMARY KEY, deployment TEXT NOT NULL, risk REAL, last_seen REAL NOT NULL,
    session BLOB NOT NULL
);
CREATE INDEX sessions_by_risk ON sessions (risk DESC, last_seen DESC, conversation_id);
CREATE INDEX sessions_by_deployment ON sessions (deployment, risk DESC, last_seen DESC, conversation_id);
CREATE TABLE trajectory (
    conversation_id TEXT NOT NULL, number INTEGER NOT NULL, point BLOB NOT NULL,
    UNIQUE (conversation_id, number)
);
CREATE TABLE findings (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    conversation_id TEXT NOT NULL, finding BLOB NOT NULL
);
CREATE INDEX findings_by_conversation ON findings (conversation_id, sequence);
CREATE TABLE outbox (sequence INTEGER PRIMARY KEY)
"""
_APPLICATION = 0x41575354  # "AWST"
_VERSION = 1
_RESCUE = (
    "Move it and its -wal and -shm files aside: the worker rebuilds the store from the log, as far as the log reaches."
)
_encode = msgspec.json.Encoder().encode
_point = msgspec.json.Decoder(TrajectoryPoint)
_session = msgspec.json.Decoder(Session)


class SqliteStore:
    """`Store`, `Reader` and `Outbox` in one file.

    A commit survives the death of the process. A power cut may take the last commits, always whole; the worker then
    folds those records once more and comes to the same ids.
    """

    def __init__(
        self,
        path: Path,
        *,
        trajectory_points: int = TRAJECTORY_POINTS,
        max_bytes: int | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """`trajectory_points` bounds what is kept per conversation. See `Database` for the rest."""
        self._trajectory_points = trajectory_points
        self._database = Database(
            path,
            name="store",
            schema=_SCHEMA,
            application=_APPLICATION,
            version=_VERSION,
            broken=StoreError,
            unavailable=StoreUnavailable,
            rescue=_RESCUE,
            synchronous="NORMAL",
            max_bytes=max_bytes,
            busy_seconds=busy_seconds,
        )

    # For the worker.

    def position(self, topic: str, partition: int) -> Position | None:
        """See `Store.position`."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT offset, revision FROM positions WHERE topic = ? AND partition = ?", (topic, partition)
            ).fetchone()
        return Position(*row) if row else None

    def load(self, conversation_ids: list[str]) -> dict[str, bytes]:
        """See `Store.load`."""
        with self._database.read() as connection:
            return {
                key: state
                for ids in _chunks(conversation_ids)
                for key, state in connection.execute(
                    f"SELECT conversation_id, state FROM states WHERE conversation_id IN ({_marks(ids)})", ids
                )
            }

    def commit(self, batch: Commit) -> None:
        """See `Store.commit`."""
        with self._database.write() as connection:
            _move(connection, batch)
            connection.executemany(
                "INSERT INTO counts VALUES (?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
                batch.counts.items(),
            )
            connection.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", batch.states.items())
            connection.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?)", map(_row, batch.sessions))
            connection.executemany(
                "INSERT OR REPLACE INTO trajectory (conversation_id, number, point) VALUES (?, ?, ?)",
                ((key, point.number, _encode(point)) for key, points in batch.points.items() for point in points),
            )
            connection.executemany(
                "DELETE FROM trajectory WHERE conversation_id = ? AND number <= ?",
                ((key, points[-1].number - self._trajectory_points) for key, points in batch.points.items()),
            )
            for finding in batch.findings:
                row = (finding.id, finding.conversation_id, encode(finding))
                inserted = connection.execute(
                    "INSERT OR IGNORE INTO findings (id, conversation_id, finding) VALUES (?, ?, ?)", row
                )
                if inserted.rowcount:
                    connection.execute("INSERT INTO outbox VALUES (?)", (inserted.lastrowid,))

    def forget(self, conversation_id: str) -> bool:
        """See `Store.forget`."""
        with self._database.write() as connection:
            return _delete(connection, [conversation_id]) > 0

    def expire(self, before: str) -> int:
        """Forget every conversation that has been silent since before the event time `before`; says how many."""
        with self._database.write() as connection:
            silent = connection.execute("SELECT conversation_id FROM sessions WHERE last_seen < ?", (_seconds(before),))
            ids = [row[0] for row in silent]
            _delete(connection, ids)
            return len(ids)

    def close(self) -> None:
        """See `Store.close`."""
        self._database.close()

    # For people.

    def sessions(
        self, limit: int, *, offset: int = 0, deployment: str | None = None, since: str | None = None
    ) -> list[Session]:
        """See `Reader.sessions`."""
        where = "last_seen >= ?"
        values: list[float | str] = [_seconds(since) if since else float("-inf")]
        if deployment is not None:
            where, values = "deployment = ? AND " + where, [deployment, *values]
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT session FROM sessions WHERE {where} "
                "ORDER BY risk DESC, last_seen DESC, conversation_id LIMIT ? OFFSET ?",
                [*values, limit, offset],
            ).fetchall()
        return [_read(_session.decode, row[0]) for row in rows]

    def session(self, conversation_id: str) -> Session | None:
        """See `Reader.session`."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT session FROM sessions WHERE conversation_id = ?", (conversation_id,)
            ).fetchone()
        return _read(_session.decode, row[0]) if row else None

    def trajectory(self, conversation_id: str) -> list[TrajectoryPoint]:
        """See `Reader.trajectory`."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT point FROM trajectory WHERE conversation_id = ? ORDER BY number", (conversation_id,)
            ).fetchall()
        return [_read(_point.decode, row[0]) for row in rows]

    def findings(self, limit: int, *, conversation_id: str | None = None) -> list[Finding]:
        """See `Reader.findings`."""
        where, values = ("WHERE conversation_id = ?", [conversation_id]) if conversation_id else ("", [])
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT finding FROM findings {where} ORDER BY sequence DESC LIMIT ?", [*values, limit]
            ).fetchall()
        return [_read(decode_finding, row[0]) for row in rows]

    def counts(self) -> dict[str, int]:
        """See `Reader.counts`."""
        with self._database.read() as connection:
            return dict(connection.execute("SELECT outcome, count FROM counts ORDER BY outcome"))

    # For the dispatcher.

    def pending(self, limit: int) -> list[Pending]:
        """See `Outbox.pending`."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT sequence, finding FROM outbox JOIN findings USING (sequence) ORDER BY sequence LIMIT ?",
                (limit,),
            ).fetchall()
        return [Pending(sequence, _read(decode_finding, finding)) for sequence, finding in rows]

    def settle(self, sequences: list[int]) -> None:
        """See `Outbox.settle`."""
        with self._database.write() as connection:
            connection.executemany("DELETE FROM outbox WHERE sequence = ?", ((sequence,) for sequence in sequences))


def _move(connection: sqlite3.Connection, batch: Commit) -> None:
    """Move the position, or refuse: the one gate through which everything else of a commit must pass."""
    row = connection.execute(
        "SELECT offset, revision, topic_id FROM positions WHERE topic = ? AND partition = ?",
        (batch.topic, batch.partition),
    ).fetchone()
    stored = Position(*row[:2]) if row else None
    if stored != batch.expected:
        raise CommitRefused(
            f"{batch.topic}/{batch.partition} stands at {stored}, this worker expected {batch.expected}",
            cure="nothing to do: the worker reads the position again and goes on. If it keeps happening, two workers "
            "serve one partition: stop one of them",
        )
    if row and row[2] != batch.topic_id:
        raise StoreError(
            f"the store was folded from another log than the one that now holds {batch.topic}",
            cure="point ANCHORWATCH_LOG_URL back at the old log, or move the store aside: it is rebuilt from this log",
        )
    connection.execute(
        "INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?, ?)",
        (batch.topic, batch.partition, batch.topic_id, batch.offset, stored.revision if stored else 0),
    )


def _delete(connection: sqlite3.Connection, conversation_ids: list[str]) -> int:
    """Delete all that is kept of some conversations; says how many rows that were."""
    deleted = 0
    for ids in _chunks(conversation_ids):
        chosen = f"WHERE conversation_id IN ({_marks(ids)})"
        connection.execute(f"DELETE FROM outbox WHERE sequence IN (SELECT sequence FROM findings {chosen})", ids)
        for table in ("states", "sessions", "trajectory", "findings"):
            deleted += connection.execute(f"DELETE FROM {table} {chosen}", ids).rowcount
    connection.execute("UPDATE positions SET revision = revision + 1")
    return deleted


def _row(session: Session) -> tuple[object, ...]:
    return (session.conversation_id, session.deployment, session.risk, _seconds(session.time), _encode(session))


def _read(decode: Callable[[bytes], T], stored: bytes) -> T:
    """What was stored. SQLite has no checksums, so damage may first show here."""
    try:
        return decode(stored)
    except (EventError, msgspec.MsgspecError, TypeError) as error:
        raise StoreError(f"a row of the store is damaged: {error}", cure=_RESCUE) from error


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _chunks(values: list[str]) -> Iterator[list[str]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _marks(values: list[str]) -> str:
    return ", ".join("?" * len(values))
