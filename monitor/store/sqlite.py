"""The embedded store: one SQLite file that holds what the worker folded, for one machine and no server.

It knows nothing of the fold: states are bytes, sessions and trajectories are kept as a commit has them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from monitor.database import BUSY_SECONDS, Database
from monitor.errors import EventError, StoreError, StoreUnavailable
from monitor.events import Finding, decode_finding, encode
from monitor.store.gate import another_log, refused
from monitor.store.store import (
    ClosedMinutes,
    Commit,
    MinuteSums,
    Pending,
    Position,
    Progress,
    Rank,
    Session,
    TrajectoryPoint,
)

__all__ = ["SqliteStore"]

T = TypeVar("T")

TRAJECTORY_POINTS = 256
KEPT_MINUTES = 2 * 24 * 60
_CHUNK = 500  # SQLite releases in use allow 999 parameters in one statement

_SCHEMA = """
CREATE TABLE positions (
    topic TEXT NOT NULL, partition INTEGER NOT NULL, topic_id TEXT NOT NULL, partitions INTEGER NOT NULL,
    offset INTEGER NOT NULL, revision INTEGER NOT NULL, watermark REAL, behind INTEGER NOT NULL, config BLOB,
    PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE counts (outcome TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE states (conversation_id TEXT PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE sessions (
    conversation_id TEXT PRIMARY KEY, deployment TEXT NOT NULL, risk REAL, last_seen REAL NOT NULL,
    session BLOB NOT NULL
);
CREATE INDEX sessions_by_risk ON sessions (risk DESC, conversation_id);
CREATE INDEX sessions_by_deployment ON sessions (deployment, risk DESC, conversation_id);
CREATE INDEX sessions_by_time ON sessions (last_seen);
CREATE TABLE trajectory (
    conversation_id TEXT NOT NULL, number INTEGER NOT NULL, point BLOB NOT NULL,
    UNIQUE (conversation_id, number)
);
CREATE TABLE findings (
    id TEXT PRIMARY KEY, time REAL NOT NULL, conversation_id TEXT NOT NULL, finding BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX findings_by_time ON findings (time DESC, id);
CREATE INDEX findings_by_conversation ON findings (conversation_id, time DESC, id);
CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, conversation_id TEXT NOT NULL, finding BLOB NOT NULL,
    committed REAL NOT NULL
);
CREATE INDEX outbox_by_conversation ON outbox (conversation_id);
CREATE TABLE minutes (
    minute INTEGER NOT NULL, deployment TEXT NOT NULL, responses INTEGER NOT NULL, z INTEGER NOT NULL,
    warned INTEGER NOT NULL, PRIMARY KEY (minute, deployment)
) WITHOUT ROWID;
CREATE TABLE closed (name TEXT PRIMARY KEY CHECK (name = 'fleet'), through INTEGER NOT NULL, closed BLOB NOT NULL);
CREATE TABLE actions (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE actions_position (
    name TEXT PRIMARY KEY CHECK (name = 'actions'), topic_id TEXT NOT NULL, offset INTEGER NOT NULL
);
CREATE TABLE leases (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID
"""
_APPLICATION = 0x41575354  # "AWST"
_VERSION = 2
_RESCUE = (
    "Move it and its -wal and -shm files aside: the worker rebuilds the store from the log, as far as the log reaches."
)
_encode = msgspec.json.Encoder().encode
_point = msgspec.json.Decoder(TrajectoryPoint)
_session = msgspec.json.Decoder(Session)
_closed = msgspec.json.Decoder(ClosedMinutes)


class SqliteStore:
    """All the Protocols of `store` in one file.

    A commit survives the death of the process. A power cut may take the last commits, always whole; the worker then
    folds those records once more and comes to the same ids. A conversation is one row whatever its partition.
    """

    def __init__(
        self,
        path: Path,
        *,
        trajectory_points: int = TRAJECTORY_POINTS,
        max_bytes: int | None = None,
        busy_seconds: float = BUSY_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`trajectory_points` bounds what is kept per conversation; `clock` gives unix seconds, for leases and for when
        a finding was committed. See `Database` for the rest."""
        self._trajectory_points = trajectory_points
        self._clock = clock
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

    def config(self, topic: str, partition: int) -> bytes | None:
        """See `Store.config`."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT config FROM positions WHERE topic = ? AND partition = ?", (topic, partition)
            ).fetchone()
        return row[0] if row else None

    def load(self, topic: str, partition: int, conversation_ids: list[str]) -> dict[str, bytes]:  # noqa: ARG002
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
            _add(connection, batch.sums)
            _tell(connection, batch.findings, self._clock())

    def close(self) -> None:
        """See `Store.close`."""
        self._database.close()

    # For people.

    def sessions(
        self,
        limit: int,
        *,
        offset: int = 0,
        after: Rank | None = None,
        deployment: str | None = None,
        since: float | None = None,
    ) -> list[Session]:
        """See `Reader.sessions`."""
        found: list[Session] = []
        with self._database.read() as connection:
            for where, values in _behind(after):
                if deployment is not None:
                    where, values = "deployment = ? AND " + where, [deployment, *values]
                if since is not None:
                    where, values = where + " AND last_seen >= ?", [*values, since]
                order = f"FROM sessions WHERE {where} ORDER BY risk DESC, conversation_id"
                rows = connection.execute(
                    f"SELECT session {order} LIMIT ? OFFSET ?", [*values, limit - len(found), offset]
                ).fetchall()
                found += [_read(_session.decode, row[0]) for row in rows]
                if len(found) >= limit:
                    break
                if offset and not rows:
                    (there,) = connection.execute(
                        f"SELECT count(*) FROM (SELECT 1 {order} LIMIT ?)", [*values, offset]
                    ).fetchone()
                    offset -= there
                else:
                    offset = 0
        return found

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
        where, values = ("", []) if conversation_id is None else ("WHERE conversation_id = ?", [conversation_id])
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT finding FROM findings {where} ORDER BY time DESC, id LIMIT ?", [*values, limit]
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
                "SELECT sequence, finding, committed FROM outbox ORDER BY sequence LIMIT ?", (limit,)
            ).fetchall()
        return [Pending(str(sequence), _read(decode_finding, finding), at) for sequence, finding, at in rows]

    def settle(self, references: list[str]) -> None:
        """See `Outbox.settle`."""
        sequences = [(int(reference),) for reference in references if reference.isdecimal()]
        with self._database.write() as connection:
            connection.executemany("DELETE FROM outbox WHERE sequence = ?", sequences)

    def progress(self, topic: str) -> list[Progress]:
        """See `Outbox.progress`."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT partition, watermark, behind FROM positions WHERE topic = ? ORDER BY partition", (topic,)
            ).fetchall()
        return [Progress(partition, watermark or 0.0, bool(behind)) for partition, watermark, behind in rows]

    # For whoever keeps house.

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """See `Housekeeping.lease`."""
        now = self._clock()
        with self._database.write() as connection:
            connection.execute(
                "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
                "SET holder = excluded.holder, until = excluded.until WHERE holder = excluded.holder OR until <= ?",
                (name, holder, now + seconds, now),
            )
            (holds,) = connection.execute("SELECT holder FROM leases WHERE name = ?", (name,)).fetchone()
        return bool(holds == holder)

    def release(self, name: str, holder: str) -> None:
        """See `Housekeeping.release`."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (name, holder))

    def forget(self, conversation_id: str) -> bool:
        """See `Housekeeping.forget`."""
        with self._database.write() as connection:
            return _delete(connection, [conversation_id], outbox=True) > 0

    def expire(self, before: float) -> int:
        """See `Housekeeping.expire`. What has not been told yet stays in the outbox."""
        with self._database.write() as connection:
            silent = connection.execute("SELECT conversation_id FROM sessions WHERE last_seen < ?", (before,))
            ids = [row[0] for row in silent]
            if ids:
                _delete(connection, ids, outbox=False)
            return len(ids)

    # For the reader of the fleet's minutes.

    def minutes(self, first: int, last: int) -> list[MinuteSums]:
        """See `Fleet.minutes`."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM minutes WHERE minute BETWEEN ? AND ? ORDER BY minute, deployment", (first, last)
            ).fetchall()
        return [MinuteSums(*row) for row in rows]

    def closed(self) -> ClosedMinutes | None:
        """See `Fleet.closed`."""
        with self._database.read() as connection:
            row = connection.execute("SELECT closed FROM closed").fetchone()
        return _read(_closed.decode, row[0]) if row else None

    def close_minutes(self, expected: int | None, closed: ClosedMinutes, findings: list[Finding]) -> None:
        """See `Fleet.close_minutes`."""
        with self._database.write() as connection:
            row = connection.execute("SELECT through FROM closed").fetchone()
            if (through := row[0] if row else None) != expected:
                raise refused("the fleet's minutes", through, expected)
            connection.execute(
                "INSERT OR REPLACE INTO closed VALUES ('fleet', ?, ?)", (closed.through, _encode(closed))
            )
            connection.execute("DELETE FROM minutes WHERE minute < ?", (closed.through - KEPT_MINUTES,))
            _tell(connection, findings, self._clock())

    # For the operators' actions.

    def actions_offset(self, topic_id: str) -> int:
        """See `Actions.actions_offset`."""
        with self._database.read() as connection:
            return _actions_offset(connection, topic_id)

    def fold_actions(self, topic_id: str, expected: int, offset: int, changes: Mapping[str, bytes | None]) -> None:
        """See `Actions.fold_actions`. What was folded from a topic with another id goes: it is another history."""
        with self._database.write() as connection:
            if (stored := _actions_offset(connection, topic_id)) != expected:
                raise refused("the actions", stored, expected)
            if not stored:
                connection.execute("DELETE FROM actions")
            for key, value in changes.items():
                if value is None:
                    connection.execute("DELETE FROM actions WHERE key = ?", (key,))
                else:
                    connection.execute("INSERT OR REPLACE INTO actions VALUES (?, ?)", (key, value))
            connection.execute("INSERT OR REPLACE INTO actions_position VALUES ('actions', ?, ?)", (topic_id, offset))

    def actions(self, prefix: str) -> dict[str, bytes]:
        """See `Actions.actions`."""
        with self._database.read() as connection:
            # A range of the index: there may be a hundred thousand of them, and people ask for one by its whole key.
            rows = connection.execute(
                "SELECT key, value FROM actions WHERE key >= ? AND key < ? ORDER BY key", (prefix, _beyond(prefix))
            )
            return dict(rows)


def _beyond(prefix: str) -> str | bytes:
    """The least value above all texts that begin so, in SQLite's order; a blob is above every text."""
    for length in range(len(prefix), 0, -1):
        code = ord(prefix[length - 1])
        if code < 0x10FFFF:
            return prefix[: length - 1] + chr(0xE000 if code == 0xD7FF else code + 1)  # none between is a letter
    return b""


def _move(connection: sqlite3.Connection, batch: Commit) -> None:
    """Move the position, or refuse: the one gate through which everything else of a commit must pass."""
    row = connection.execute(
        "SELECT offset, revision FROM positions WHERE topic = ? AND partition = ?", (batch.topic, batch.partition)
    ).fetchone()
    stored = Position(*row) if row else None
    if stored != batch.expected:
        raise refused(f"{batch.topic}/{batch.partition}", stored, batch.expected)
    # Of all partitions, so that one which is new since the topic has grown is stopped, too.
    for topic_id, partitions in connection.execute(
        "SELECT topic_id, partitions FROM positions WHERE topic = ?", (batch.topic,)
    ):
        if problem := another_log(batch, topic_id=topic_id, partitions=partitions):
            raise problem
    connection.execute(
        "INSERT INTO positions VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "topic_id = coalesce(nullif(excluded.topic_id, ''), topic_id), "
        "partitions = coalesce(nullif(excluded.partitions, 0), partitions), offset = excluded.offset, "
        "watermark = coalesce(max(watermark, excluded.watermark), watermark, excluded.watermark), "
        "behind = excluded.behind, config = coalesce(excluded.config, config)",
        (
            batch.topic,
            batch.partition,
            batch.topic_id,
            batch.partitions,
            batch.offset,
            batch.watermark,
            batch.behind,
            batch.config,
        ),
    )


def _tell(connection: sqlite3.Connection, findings: list[Finding], now: float) -> None:
    """Keep what is new, and put it into the outbox. The outbox has its own copy, which outlives the conversation."""
    for finding in findings:
        body = encode(finding)
        time = datetime.fromisoformat(finding.time).timestamp()
        inserted = connection.execute(
            "INSERT OR IGNORE INTO findings VALUES (?, ?, ?, ?)", (finding.id, time, finding.conversation_id, body)
        )
        if inserted.rowcount:
            connection.execute(
                "INSERT INTO outbox (conversation_id, finding, committed) VALUES (?, ?, ?)",
                (finding.conversation_id, body, now),
            )


def _add(connection: sqlite3.Connection, sums: list[MinuteSums]) -> None:
    """Add to the fleet's minutes."""
    connection.executemany(
        "INSERT INTO minutes VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET responses = responses + "
        "excluded.responses, z = z + excluded.z, warned = warned + excluded.warned",
        ((s.minute, s.deployment, s.responses, s.z, s.warned) for s in sums),
    )


def _actions_offset(connection: sqlite3.Connection, topic_id: str) -> int:
    row = connection.execute("SELECT topic_id, offset FROM actions_position").fetchone()
    return row[1] if row and row[0] == topic_id else 0


def _delete(connection: sqlite3.Connection, conversation_ids: list[str], *, outbox: bool) -> int:
    """Delete all that is kept of some conversations; says how many rows that were. Whoever has their state at hand is
    refused from now on."""
    deleted = 0
    for ids in _chunks(conversation_ids):
        for table in ("states", "sessions", "trajectory", "findings", *(("outbox",) if outbox else ())):
            where = f"WHERE conversation_id IN ({_marks(ids)})"
            deleted += connection.execute(f"DELETE FROM {table} {where}", ids).rowcount
    connection.execute("UPDATE positions SET revision = revision + 1")
    return deleted


def _behind(after: Rank | None) -> list[tuple[str, list[float | str]]]:
    """The parts of the ranking behind a place, each a range of its index: the judged, and then those that are not."""
    if after is None:
        return [("TRUE", [])]
    if after.risk is None:
        return [("risk IS NULL AND conversation_id > ?", [after.conversation_id])]
    here: list[float | str] = [after.risk, after.risk, after.conversation_id]
    return [("risk <= ? AND (risk < ? OR conversation_id > ?)", here), ("risk IS NULL", [])]


def _row(session: Session) -> tuple[object, ...]:
    return (session.conversation_id, session.deployment, session.risk, session.time, _encode(session))


def _read(decode: Callable[[bytes], T], stored: bytes) -> T:
    """What was stored. SQLite has no checksums, so damage may first show here."""
    try:
        return decode(stored)
    except (EventError, msgspec.MsgspecError, TypeError) as error:
        raise StoreError(f"a row of the store is damaged: {type(error).__name__}", cure=_RESCUE) from error


def _chunks(values: list[str]) -> Iterator[list[str]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _marks(values: list[str]) -> str:
    return ", ".join("?" * len(values))
