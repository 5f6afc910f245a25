"""A bounded queue in front of the log, so that generation never waits for it. It knows nothing of models.

`publish` hands a projection over and returns; one thread writes batches. When the log is away or slow the queue fills,
and what happens then was chosen: drop the newest, drop the oldest, or block. Drops are counted, never silent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Literal, Protocol

import structlog

from monitor import telemetry
from monitor.errors import ConfigurationError, LogError, LogUnavailable
from monitor.events import Projection, encode
from monitor.stream.log import PROJECTIONS, Log, Message

__all__ = ["Publisher", "QueuePublisher", "WhenFull"]

WhenFull = Literal["drop_newest", "drop_oldest", "block"]

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
        size: projections held in memory at most.
        when_full: what gives way when the queue is full.
        topic: the log's topic.

    Attributes:
        dropped: how many were dropped, for whatever reason.

    Use as a context manager, or call `close`, which flushes.
    """

    def __init__(
        self, log: Log, *, size: int = 10_000, when_full: WhenFull = "drop_newest", topic: str = PROJECTIONS
    ) -> None:
        if size < 1:
            raise ConfigurationError(f"the queue's size is {size}", cure="ANCHORWATCH_QUEUE_SIZE must be at least 1")
        self.dropped = 0
        self._log = log
        self._size = size
        self._when_full = when_full
        self._topic = topic
        self._waiting: deque[Projection] = deque()
        self._writing = 0
        self._closing = False
        self._deadline = float("inf")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="anchorwatch-publisher", daemon=True)
        self._thread.start()

    def __enter__(self) -> QueuePublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, projection: Projection) -> bool:
        """Queue one projection. Waits only where `when_full` is "block"."""
        with self._changed:
            if self._closing:
                return self._drop("closed")
            # What is being written still takes memory, so it counts.
            while len(self._waiting) + self._writing >= self._size:
                if self._when_full == "drop_newest" or not (self._waiting or self._when_full == "block"):
                    return self._drop("full")
                if self._when_full == "drop_oldest":
                    self._waiting.popleft()
                    self._drop("full")
                else:
                    self._changed.wait()
                    if self._closing:
                        return self._drop("closed")
            self._waiting.append(projection)
            telemetry.PUBLISHER_QUEUE_DEPTH.set(len(self._waiting))
            self._changed.notify_all()
            return True

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything taken so far is written; False when that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Write what is queued, for at most `timeout` seconds; what is left then is dropped, and counted."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout + LONGEST_RETRY_SECONDS)
        with self._changed:
            while self._waiting:
                self._waiting.popleft()
                self._drop("closed")

    def _drop(self, reason: str) -> bool:
        self.dropped += 1
        telemetry.PUBLISHER_DROPPED.labels(reason).inc()
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                self._writing = len(batch)
            self._write(batch)
            with self._changed:
                self._writing = 0
                telemetry.PUBLISHER_QUEUE_DEPTH.set(len(self._waiting))
                self._changed.notify_all()
                if self._closing and time.monotonic() >= self._deadline:
                    return

    def _write(self, batch: list[Projection]) -> None:
        """Append, and try again while the log is away; until closing has taken too long."""
        messages = [Message(key=projection.conversation_id, value=encode(projection)) for projection in batch]
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                self._log.append(self._topic, messages)
                return
            except LogUnavailable as error:
                _log.warning(
                    "the log is away; trying again", problem=error.problem, seconds=pause, queued=len(self._waiting)
                )
            except LogError as error:
                _log.error("the log refuses projections", problem=error.problem, cure=error.cure)
                self._give_up(batch)
                return
            with self._changed:
                if self._closing:
                    pause = min(pause, max(self._deadline - time.monotonic(), 0.0))
                if time.monotonic() >= self._deadline:
                    break
                self._changed.wait_for(lambda: self._closing, timeout=pause)
                if self._closing:
                    time.sleep(min(pause, 0.1))
            pause = min(pause * 2, LONGEST_RETRY_SECONDS)
        self._give_up(batch)

    def _give_up(self, batch: list[Projection]) -> None:
        with self._changed:
            for _ in batch:
                self._drop("log")
