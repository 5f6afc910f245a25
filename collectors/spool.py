"""Messages on disk until a log takes them: in order, bounded, and still there after a crash.

It knows nothing of the log that they wait for. A spool is a directory with an embedded log in it, which belongs to one
process at a time. What is damaged is moved aside, never in the way: a spool serves a model that must go on answering.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from monitor import telemetry
from monitor.errors import ConfigurationError, LogError, LogUnavailable
from monitor.stream.log import EmbeddedLog, Message

__all__ = ["Spool"]

FILE = "spool.db"
LOCK = "lock"
TOPIC = "spool"
# An embedded log gives no space back to the disk; beyond this size an empty one is begun anew.
RENEW_BYTES = 16 * 2**20

_log = structlog.get_logger("anchorwatch.spool")
_held: set[Path] = set()  # a file lock keeps other processes out, not other threads
_holding = threading.Lock()


class Spool:
    """A queue of messages in a directory of its own. For any number of threads.

    Args:
        directory: it is made when missing. On a local disk.
        max_bytes: most that its file may hold. SQLite's journal beside it takes a few MiB more.

    Raises:
        ConfigurationError: another process has it, or it can't be made.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory.absolute()
        self._path = self._directory / FILE
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._log: EmbeddedLog | None = None
        self._begin = self._end = 0
        self._closed = False
        self._claim = _claim(self._directory)
        try:
            self._opened()
        except LogUnavailable as error:  # a full disk, say: it may have room when the spool is needed
            _log.error("the spool can't be opened now; trying again when it is needed", problem=error.problem)
        except LogError as error:
            self.close()
            raise ConfigurationError(
                error.problem, cure="choose another ANCHORWATCH_SPOOL_DIR, or ANCHORWATCH_WHEN_FULL"
            ) from error
        self._measure()

    @property
    def records(self) -> int:
        """How many messages wait. One that was damaged does not know of any."""
        with self._lock:
            return self._end - self._begin

    def put(self, messages: Sequence[Message]) -> None:
        """Keep them all behind those that wait. Blocks until they are flushed to disk.

        Raises:
            LogUnavailable: none of them is kept: the spool is full, or its disk, or it is closed.
            LogError: none of them is kept, for a fault that does not pass.
        """
        with self._lock:
            try:
                self._opened().append(TOPIC, messages)
            except LogUnavailable:
                raise
            except LogError as error:
                self._set_aside(error)
                self._opened().append(TOPIC, messages)
            self._end += len(messages)
            self._measure()

    def head(self, limit: int) -> list[Message]:
        """The first `limit` messages, which stay.

        Raises:
            LogError: they can't be read.
        """
        with self._lock:
            if self._begin == self._end:
                return []
            try:
                records = self._opened().read(TOPIC, 0, self._begin, limit)
            except LogUnavailable:
                raise
            except LogError as error:
                self._set_aside(error)
                return []
            return [Message(record.key, record.value, record.headers) for record in records]

    def forget(self, count: int) -> None:
        """Drop the first `count` messages: the log has them.

        Where the disk does not let go of them now, they are dropped later; after a crash in between they come twice.
        """
        with self._lock:
            if self._closed or self._log is None:
                return
            self._begin = min(self._begin + count, self._end)
            try:
                if self._begin == self._end and self._bytes() > RENEW_BYTES:
                    self._remove()
                    self._opened()
                else:
                    self._log.retain(TOPIC, records=self._end - self._begin)
            except LogUnavailable as error:
                _log.warning("what was sent stays in the spool for now", problem=error.problem)
            except LogError as error:
                self._set_aside(error)
            self._measure()

    def close(self) -> None:
        """Give it back; what waits stays, for the next one who opens it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._log is not None:
                self._log.close()
            os.close(self._claim)
        with _holding:
            _held.discard(self._directory)

    def _opened(self) -> EmbeddedLog:
        if self._closed:
            raise LogUnavailable(f"the spool {self._directory} is closed")
        if self._log is None:
            try:
                self._log, self._begin, self._end = self._open()
            except LogUnavailable:
                raise
            except LogError as error:
                self._set_aside(error)
                self._log, self._begin, self._end = self._open()
            if self._end > self._begin:
                _log.info("the spool holds what was not sent before", records=self._end - self._begin)
        return self._log

    def _open(self) -> tuple[EmbeddedLog, int, int]:
        log = EmbeddedLog(self._path, max_bytes=self._max_bytes)
        try:
            begin, end, _ = log.span(TOPIC, 0)
        except LogError:
            log.close()
            raise
        return log, begin, end

    def _set_aside(self, error: LogError) -> None:
        """Make way for a new file. What the old one still holds is a person's to rescue."""
        waiting = self._end - self._begin
        if self._log is not None:
            self._log.close()
            self._log = None
        self._begin = self._end = 0
        name = f"{FILE}.damaged-{time.time_ns()}"
        try:
            for suffix in ("-wal", "-shm", ""):
                part = self._path.with_name(FILE + suffix)
                if part.exists():
                    part.rename(self._path.with_name(name + suffix))
        except OSError as failed:
            raise LogError(f"{error.problem}, and can't be moved aside: {failed.strerror}") from failed
        telemetry.PUBLISHER_SPOOLS_DAMAGED.inc()
        _log.error(
            "the spool is damaged: it is moved aside, and a new one begun",
            problem=error.problem,
            kept=str(self._path.with_name(name)),
            records=waiting or "unknown",
            cure="sqlite3's .recover may read what is left of it; else delete it",
        )

    def _remove(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        self._begin = self._end = 0
        try:
            for suffix in ("-wal", "-shm", ""):
                self._path.with_name(FILE + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise LogUnavailable(f"the spool {self._path} can't be removed: {error.strerror}") from error

    def _bytes(self) -> int:
        return sum(
            part.stat().st_size for suffix in ("", "-wal") if (part := self._path.with_name(FILE + suffix)).exists()
        )

    def _measure(self) -> None:
        telemetry.PUBLISHER_SPOOL_RECORDS.set(self._end - self._begin)
        telemetry.PUBLISHER_SPOOL_BYTES.set(self._bytes())


def _claim(directory: Path) -> int:
    """Lock the directory for this process; the lock goes with the process, however it ends. Gives the open file."""
    with _holding:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = -1 if directory in _held else os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"the spool {directory} can't be made: {error.strerror}",
                cure="choose a directory that this user may write to: ANCHORWATCH_SPOOL_DIR",
            ) from error
        try:
            if file < 0:
                raise BlockingIOError
            # A record lock, unlike flock's, is not inherited by a fork: a stray child would keep a dead parent's spool.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if file >= 0:
                os.close(file)
            raise ConfigurationError(
                f"the spool {directory} is in use by another collector",
                cure="give each collector on this machine its own ANCHORWATCH_SPOOL_DIR",
            ) from error
        _held.add(directory)
        return file
