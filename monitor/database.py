"""One SQLite file as the embedded log and the embedded store need it: whole transactions, and errors that say the cure.

It knows nothing of records, conversations or findings. Several threads and several processes may use one file; each
process opens it for itself (a handle must not cross a fork). The directory must be on a local disk: SQLite's
write-ahead log needs shared memory, which network file systems lack.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from monitor.errors import AnchorwatchError, ConfigurationError

__all__ = ["Database", "sqlite_path", "sqlite_url"]

BUSY_SECONDS = 5.0
JOURNAL_LIMIT_BYTES = 64 * 2**20
_OPENING_ATTEMPTS = 50


def sqlite_url(path: Path) -> str:
    """The URL of a database file, as the settings want it."""
    return "sqlite://" + quote(str(path.absolute()))


def sqlite_path(url: str) -> Path:
    """The file named by `sqlite:///absolute/path`.

    Raises:
        ConfigurationError: another scheme, a host, or no absolute path.
    """
    parts = urlsplit(url)
    if not url.startswith("sqlite:///") or not parts.path.strip("/"):
        raise ConfigurationError(
            f"{url!r} does not name a SQLite file",
            cure="write sqlite:///absolute/path/to/file.db (three slashes, and the path from the root)",
        )
    return Path("/" + unquote(parts.path).lstrip("/"))


class Database:
    """Two connections to one file, one for reading and one for writing, so that readers never wait for a flush to disk.

    Args:
        path: the file; it and its directory are made when missing.
        name: what the file is to a person, "log" or "store"; used in messages.
        schema: the SQL that makes an empty file's tables.
        application: number in the file's header that tells a log from a store.
        version: schema version in the file's header; another one is refused.
        broken: error class for what a person must repair.
        unavailable: error class for what may pass: a lock, a full disk.
        rescue: what to do about a damaged file.
        synchronous: "FULL" survives a power cut after each commit; "NORMAL" may lose the last commits, whole, then.
        max_bytes: the file's own limit; None for the disk's.
        busy_seconds: how long to wait for another process's write.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        schema: str,
        application: int,
        version: int,
        broken: type[AnchorwatchError],
        unavailable: type[AnchorwatchError],
        rescue: str,
        synchronous: Literal["FULL", "NORMAL"],
        max_bytes: int | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self.path = path
        self._name = name
        self._broken = broken
        self._unavailable = unavailable
        self._rescue = rescue
        self._synchronous = synchronous
        self._max_bytes = max_bytes
        self._busy_seconds = busy_seconds
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise broken(
                f"the directory of the {name}, {path.parent}, can't be made: {error.strerror}",
                cure="choose a directory that this user may write to (ANCHORWATCH_DATA_DIR)",
            ) from error
        if _torn(path):
            raise broken(f"the {name} {path} is damaged (its last page is cut)", cure=rescue)
        self._writer = self._connect()
        try:
            with self.write() as connection:
                self._adopt(connection, schema, application, version)
            self._reader = self._connect()
        except BaseException:
            self._writer.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent snapshot."""
        with self._reading, self._explained(), self._transaction(self._reader, "BEGIN"):
            yield self._reader

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on disk when the block ends, or none of it when anything raises."""
        with self._writing, self._explained(), self._transaction(self._writer, "BEGIN IMMEDIATE"):
            yield self._writer

    def close(self) -> None:
        """Give the file back. Using it afterwards raises."""
        with self._writing, self._reading:
            self._closed = True
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection, begin: str) -> Iterator[None]:
        if self._closed:
            raise self._broken(f"the {self._name} {self.path} is closed", cure="open it again")
        connection.execute(begin)
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # SQLite itself has rolled back already after some faults, such as a full disk.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _connect(self) -> sqlite3.Connection:
        with self._explained():
            connection = sqlite3.connect(
                self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            if (mode := _write_ahead(connection)) != "wal":
                connection.close()
                raise self._broken(
                    f"the {self._name} {self.path} can't use a write-ahead log (mode {mode!r})",
                    cure="move it to a local disk; network file systems will not do",
                )
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            connection.execute(f"PRAGMA journal_size_limit={JOURNAL_LIMIT_BYTES}")
            if self._max_bytes is not None:
                (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
                connection.execute(f"PRAGMA max_page_count={max(1, self._max_bytes // page_bytes)}")
            return connection

    def _adopt(self, connection: sqlite3.Connection, schema: str, application: int, version: int) -> None:
        """Make the tables of an empty file; refuse somebody else's file, and another version of ours."""
        (found_application,) = connection.execute("PRAGMA application_id").fetchone()
        (found_version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not found_application:
            for statement in schema.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={application}")
            connection.execute(f"PRAGMA user_version={version}")
        elif found_application != application:
            raise self._broken(
                f"{self.path} is a database, but not an Anchorwatch {self._name}",
                cure=f"check ANCHORWATCH_{self._name.upper()}_URL; log and store are two files",
            )
        elif found_version != version:
            raise self._broken(
                f"the {self._name} {self.path} has schema version {found_version}, this program writes {version}",
                cure=f"run the Anchorwatch release that wrote it, or move the file aside. {self._rescue}",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> AnchorwatchError:
        where = f"the {self._name} {self.path}"
        # The extended code's low byte is the primary code.
        match getattr(error, "sqlite_errorcode", -1) & 0xFF:
            case sqlite3.SQLITE_FULL:
                return self._unavailable(
                    f"{where} is full; nothing of the last write was kept",
                    cure="free space on its disk, or shorten what it keeps; writing then goes on by itself",
                )
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return self._unavailable(
                    f"{where} has been locked by another process for {self._busy_seconds:g} s",
                    cure="find the process that holds it (fuser) and stop it, or wait",
                )
            case sqlite3.SQLITE_IOERR:
                return self._unavailable(f"{where}: the disk fails ({error})", cure="check the disk and its mount")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self._broken(f"{where} is damaged ({error})", cure=self._rescue)
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
                return self._broken(
                    f"{where} can't be opened for writing ({error})",
                    cure="check that the path is a file, and that this user may write to it and its directory",
                )
            case _:
                return self._broken(f"{where} failed: {error}", cure=self._rescue)


def _torn(path: Path) -> bool:
    """Whether the file ends within a page: SQLite would read zeros there. A write-ahead log may hold the rest.

    Only SQLite may open the file: to close a descriptor of it takes away every lock that this process has on it, and
    whoever closes it next, anywhere, would delete the write-ahead log under those who still write there (sqlite.org,
    "How to corrupt an SQLite database file", section 2.2).
    """
    journal = path.with_name(path.name + "-wal")
    try:
        size = path.stat().st_size
        if size < 512 or (journal.is_file() and journal.stat().st_size):
            return False
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()  # has the header read
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    except (OSError, sqlite3.Error):
        return False  # missing, not ours, or no database: SQLite has the words for that
    return bool(size % page_bytes)


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Turn on the write-ahead log. The switch needs the file for itself and does not wait, so try again for a while."""
    for attempt in range(_OPENING_ATTEMPTS):
        try:
            return str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or attempt == _OPENING_ATTEMPTS - 1:
                raise
            time.sleep(0.02)
    raise AssertionError("unreachable")
