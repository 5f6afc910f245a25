"""A bounded queue in front of the log, so that generation never waits for it. It knows nothing of models.

`publish` hands a projection over and returns; one thread writes batches. When the log is away or slow the queue fills,
and what happens then was chosen: drop the newest, drop the oldest, block, or keep them in a spool on disk until the log
is back. Drops are counted, never silent.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from monitor import telemetry
from monitor.envelope import message_of
from monitor.errors import AnchorwatchError, ConfigurationError, LogUnavailable
from monitor.events import Projection
from monitor.settings import Settings
from monitor.stream.log import PROJECTIONS, Log, Message

if TYPE_CHECKING:
    from collectors.resend import ResendingLog

__all__ = ["Publisher", "QueuePublisher", "WhenFull", "open_publisher"]

WhenFull = Literal["drop_newest", "drop_oldest", "block", "spool"]
Reason = Literal["full", "spool", "closed", "log", "invalid"]

SPOOL_BYTES = 2**30

BATCH = 500
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 5.0

_log = structlog.get_logger("anchorwatch.publish")


class Publisher(Protocol):
    """Where a watch hands its projections."""

    def publish(self, projection: Projection) -> bool:
        """Take one; False when it was dropped."""


class QueuePublisher:
    """A `Publisher` that writes to a log from a thread of its own.

    Args:
        log: where to write.
        size: projections held in memory at most, those being written included.
        when_full: what gives way when the queue is full. What is being written can't any more: where the queue is
            nothing else, "drop_oldest" drops the newest. With "spool" what the log does not take soon goes to disk, and
            the newest are dropped when the disk takes no more either.
        topic: the log's topic.
        spool: directory of spools, one for each topic; each belongs to one process at a time.
        spool_bytes: most that the spool may hold.

    Attributes:
        dropped: how many were dropped, for whatever reason.

    Use as a context manager, or call `close`, which flushes; so does an orderly end of the process. Make it after a
    fork: threads do not survive one.

    What a spool holds outlives the process, and is sent before anything else by the next one; beside the queue, one
    batch of it is in memory. What is only in memory is lost with a process that is killed: what came in the last tenth
    of a second, in which the log may answer before the disk is asked, and while the disk was being written.

    Raises:
        ConfigurationError: no room at all, or a spool that can't be made or is another process's.
    """

    def __init__(
        self,
        log: Log,
        *,
        size: int = 10_000,
        when_full: WhenFull = "drop_newest",
        topic: str = PROJECTIONS,
        spool: Path | None = None,
        spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        if size < 1:
            raise ConfigurationError(f"the queue's size is {size}", cure="ANCHORWATCH_QUEUE_SIZE must be at least 1")
        if (when_full == "spool") != (spool is not None):
            raise ConfigurationError("a spool and when_full = spool go together", cure="give both, or neither")
        self.dropped = 0
        self._lost = 0  # dropped after they had been taken
        self._log = log
        self._size = size
        self._when_full = when_full
        self._topic = topic
        self._waiting: deque[Message] = deque()
        self._writing: list[Message] = []
        self._closing = False
        self._deadline = float("inf")
        self._changed = Condition()
        self._resending: ResendingLog | None = None
        if spool is not None:
            self._resending = _resending(log, topic, spool, spool_bytes, self._refused)
        self._thread = Thread(target=self._run, name="anchorwatch-publisher", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> QueuePublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, projection: Projection) -> bool:
        """Queue one projection. Waits only where `when_full` is "block"."""
        try:
            message = message_of(projection)
        except Exception as error:  # such as half a surrogate pair in a name: it must not stop the line behind it
            _log.error("a projection can't be encoded", error=type(error).__name__)
            with self._changed:
                return self._drop("invalid")
        with self._changed:
            while not self._closing and len(self._waiting) + len(self._writing) >= self._size:
                if self._when_full == "block":
                    self._changed.wait()
                elif self._when_full == "drop_oldest" and self._waiting:
                    self._waiting.popleft()
                    self._drop("full")
                else:
                    return self._drop("spool" if self._resending and self._resending.full else "full")
            if self._closing:
                return self._drop("closed")
            self._waiting.append(message)
            self._tell()
            return True

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until the log has everything taken so far; False when it has not in `timeout` seconds, or never will."""
        deadline = time.monotonic() + timeout
        with self._changed:
            lost = self._lost
            done = self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)
        if done and self._resending:
            done = self._resending.flush(max(0.0, deadline - time.monotonic()))
        return done and self._lost == lost

    def close(self, timeout: float = 10.0) -> None:
        """Write what is queued, for at most `timeout` seconds; what is left then stays in the spool, or is dropped.

        Without a spool, a batch that the log is writing at that moment is neither: it is counted when the log answers.
        """
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._tell()
        self._thread.join(None if self._resending else timeout)  # with a spool it waits for the disk only
        if self._resending:
            self._resending.close(max(0.0, self._deadline - time.monotonic()))
        with self._changed:
            while self._waiting:
                self._waiting.popleft()
                self._drop("closed")
            self._tell()

    def _refused(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._drop("log")

    def _drop(self, reason: Reason) -> bool:
        self.dropped += 1
        self._lost += reason in ("closed", "log")
        telemetry.PUBLISHER_DROPPED.labels(reason).inc()
        return False

    def _tell(self) -> None:
        telemetry.PUBLISHER_QUEUE_DEPTH.set(len(self._waiting) + len(self._writing))
        if self._resending and self._half_full():
            self._resending.hurry.set()
        self._changed.notify_all()

    def _half_full(self) -> bool:
        return 2 * (len(self._waiting) + len(self._writing)) >= self._size

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting or (not self._resending and time.monotonic() >= self._deadline):
                    return
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                self._writing = batch
                if self._resending and not self._half_full():
                    self._resending.hurry.clear()
            written = self._write(batch)
            with self._changed:
                self._writing = []
                if written:
                    telemetry.PUBLISHER_WRITTEN.inc(len(batch))
                else:
                    for _ in batch:
                        self._drop("spool" if self._resending else "log")
                self._tell()

    def _write(self, batch: list[Message]) -> bool:
        """Append, and try again while the log is away; until closing has taken too long. False when it gave up."""
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                if not self._resending:
                    self._log.append(self._topic, batch)
                elif time.monotonic() < self._deadline:
                    self._resending.append(batch)
                else:
                    self._resending.keep(batch)
                return True
            except LogUnavailable as error:
                _log.warning(
                    "the log is away; trying again", problem=error.problem, seconds=pause, queued=len(self._waiting)
                )
            except AnchorwatchError as error:
                _log.error("the log refuses projections", problem=error.problem, cure=error.cure)
                return False
            except Exception as error:  # a fault in a log's own code must not end this thread, and with it the queue
                _log.error("the log failed", error=type(error).__name__)
                return False
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=pause)
                left = self._deadline - time.monotonic()
            if left <= 0:
                return False
            if self._closing:
                time.sleep(min(FIRST_RETRY_SECONDS, left))
            pause = min(pause * 2, LONGEST_RETRY_SECONDS)


def open_publisher(log: Log, settings: Settings, topic: str = PROJECTIONS) -> QueuePublisher:
    """The publisher that the settings ask for.

    Raises:
        ConfigurationError: see `QueuePublisher`.
    """
    return QueuePublisher(
        log,
        size=settings.queue_size,
        when_full=settings.when_full,
        topic=topic,
        spool=settings.spool_dir or settings.data_dir / "spool" if settings.when_full == "spool" else None,
        spool_bytes=settings.spool_max_bytes,
    )


def _resending(log: Log, topic: str, directory: Path, max_bytes: int, refused: Callable[[int], None]) -> ResendingLog:
    from collectors.resend import ResendingLog  # file locks are POSIX's: only who spools needs them
    from collectors.spool import Spool

    return ResendingLog(log, topic, Spool(directory / topic, max_bytes), refused)
