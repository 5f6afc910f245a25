"""A bounded queue in front of the log, so that generation never waits for it. It knows nothing of models.

`publish` hands a projection over and returns; one thread writes batches. When the log is away or slow the queue fills,
and what happens then was chosen: drop the newest, drop the oldest, or block. Drops are counted, never silent.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from threading import Condition, Thread
from typing import Literal, Protocol

import structlog

from monitor import telemetry
from monitor.errors import AnchorwatchError, ConfigurationError, LogUnavailable
from monitor.events import Projection, encode
from monitor.stream.log import PROJECTIONS, Log, Message

__all__ = ["Publisher", "QueuePublisher", "WhenFull"]

WhenFull = Literal["drop_newest", "drop_oldest", "block"]
Reason = Literal["full", "closed", "log", "invalid"]

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
            nothing else, "drop_oldest" drops the newest.
        topic: the log's topic.

    Attributes:
        dropped: how many were dropped, for whatever reason.

    Use as a context manager, or call `close`, which flushes; so does an orderly end of the process. Make it after a
    fork: threads do not survive one.
    """

    def __init__(
        self, log: Log, *, size: int = 10_000, when_full: WhenFull = "drop_newest", topic: str = PROJECTIONS
    ) -> None:
        if size < 1:
            raise ConfigurationError(f"the queue's size is {size}", cure="ANCHORWATCH_QUEUE_SIZE must be at least 1")
        self.dropped = 0
        self._lost = 0  # dropped after they had been taken
        self._log = log
        self._size = size
        self._when_full = when_full
        self._topic = topic
        self._waiting: deque[Message] = deque()
        self._writing = 0
        self._closing = False
        self._deadline = float("inf")
        self._changed = Condition()
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
            message = Message(key=projection.conversation_id, value=encode(projection))
        except Exception as error:  # such as half a surrogate pair in a name: it must not stop the line behind it
            _log.error("a projection can't be encoded", error=type(error).__name__)
            with self._changed:
                return self._drop("invalid")
        with self._changed:
            while not self._closing and len(self._waiting) + self._writing >= self._size:
                if self._when_full == "block":
                    self._changed.wait()
                elif self._when_full == "drop_oldest" and self._waiting:
                    self._waiting.popleft()
                    self._drop("full")
                else:
                    return self._drop("full")
            if self._closing:
                return self._drop("closed")
            self._waiting.append(message)
            self._tell()
            return True

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything taken so far is written; False when it was not in `timeout` seconds, or was lost."""
        with self._changed:
            lost = self._lost
            done = self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)
            return done and self._lost == lost

    def close(self, timeout: float = 10.0) -> None:
        """Write what is queued, for at most `timeout` seconds; what is left then is dropped, and counted.

        A batch that the log is writing at that moment is neither: it is counted when the log answers.
        """
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._tell()
        self._thread.join(timeout)
        with self._changed:
            while self._waiting:
                self._waiting.popleft()
                self._drop("closed")
            self._tell()

    def _drop(self, reason: Reason) -> bool:
        self.dropped += 1
        self._lost += reason in ("closed", "log")
        telemetry.PUBLISHER_DROPPED.labels(reason).inc()
        return False

    def _tell(self) -> None:
        telemetry.PUBLISHER_QUEUE_DEPTH.set(len(self._waiting) + self._writing)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting or time.monotonic() >= self._deadline:
                    return
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                self._writing = len(batch)
            written = self._write(batch)
            with self._changed:
                self._writing = 0
                if not written:
                    for _ in batch:
                        self._drop("log")
                self._tell()

    def _write(self, batch: list[Message]) -> bool:
        """Append, and try again while the log is away; until closing has taken too long. False when it gave up."""
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                self._log.append(self._topic, batch)
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
