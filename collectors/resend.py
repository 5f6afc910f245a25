"""A log that may be away: what it does not take soon waits in a spool, and is sent, in order, until it is taken.

It knows nothing of queues and of projections. Whatever is spooled is older than what comes next, so while anything
waits there the next goes behind it. One thread alone asks the log, so who hands messages over waits for it no longer
than he likes. A crash between "sent" and "forgotten" sends twice, under the same id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread

import structlog

from collectors.spool import Spool
from monitor import telemetry
from monitor.errors import AnchorwatchError, LogUnavailable
from monitor.stream.log import Log, Message

__all__ = ["ResendingLog"]

BATCH = 500
# How long the log has for an answer before the disk is asked. What a killed process loses came since then.
PATIENCE_SECONDS = 0.1
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 5.0

_log = structlog.get_logger("anchorwatch.resend")


class ResendingLog:
    """A topic of a log with a spool beside it, and a thread that writes to the log.

    Args:
        log, topic: where messages go in the end.
        spool: where they wait; it is closed with this.
        refused: told how many messages the log will not have, though it takes others.

    Attributes:
        full: whether the spool took no more when it was last asked.
        hurry: set, an `append` waits for the log no longer; so does an answer. Who calls `append` clears it before.

    `append` is for one thread.
    """

    def __init__(self, log: Log, topic: str, spool: Spool, refused: Callable[[int], None]) -> None:
        self.full = False
        self.hurry = Event()
        self._log = log
        self._topic = topic
        self._spool = spool
        self._refused = refused
        self._asked: Sequence[Message] | None = None  # what the log is to take past the spool
        self._taken: Sequence[Message] | None = None  # what it took last of these
        self._changed = Condition()  # held while the disk is written: not for who publishes
        self._closing = False
        self._deadline = float("inf")
        self._thread = Thread(target=self._run, name="anchorwatch-resend", daemon=True)
        self._thread.start()

    def append(self, messages: Sequence[Message]) -> None:
        """Hand the messages to the log, or keep them on disk. Blocks until one of the two has them safely: the log is
        given `PATIENCE_SECONDS`, less in a `hurry`. If it answers later, the copy on disk is forgotten, or sent.

        Raises:
            LogUnavailable: neither has; some may be in the log all the same. Call again with the same list.
        """
        with self._changed:
            if self._asked is None and self._taken is not messages and not self._spool.records:
                self._asked = messages
                self._changed.notify_all()
            asked = self._asked is messages
        if asked:
            self.hurry.wait(PATIENCE_SECONDS)
        with self._changed:
            if self._taken is not messages:
                self.keep(messages)

    def keep(self, messages: Sequence[Message]) -> None:
        """Put the messages into the spool without asking the log. Blocks until they are on disk.

        Raises:
            LogUnavailable: it takes none of them. Whatever the fault, memory is where they wait now.
        """
        with self._changed:
            try:
                self._spool.put(messages)
            except AnchorwatchError as error:
                if not self.full:
                    _log.error("the spool takes no more", problem=error.problem, cure=error.cure)
                self.full = True
                raise LogUnavailable(error.problem, cure=error.cure) from error
            self.full = False
            telemetry.PUBLISHER_SPOOLED.inc(len(messages))
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until the spool is empty; False when it was not within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._spool.records, timeout)

    def close(self, timeout: float) -> None:
        """Send what can be sent in so many seconds, and leave the rest to the next one who opens the spool."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)
        self._spool.close()

    def _run(self) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._spool.records or self._closing)
                asked = self._asked
                if time.monotonic() >= self._deadline or not (asked or self._spool.records):
                    return
            if asked:
                self._ask(asked)
                continue
            try:
                sent = self._send()
            except Exception as error:
                sent = 0
                _log.warning("the log is away; trying again", problem=_told(error), spooled=self._spool.records)
            with self._changed:
                self._changed.notify_all()
                if sent:
                    pause = FIRST_RETRY_SECONDS
                elif self._changed.wait_for(lambda: self._closing, pause):
                    # It ends with the deadline, and may find the log back before it.
                    left = self._deadline - time.monotonic()
                    self._changed.wait_for(lambda: False, max(0.0, min(FIRST_RETRY_SECONDS, left)))
                else:
                    pause = min(pause * 2, LONGEST_RETRY_SECONDS)

    def _ask(self, messages: Sequence[Message]) -> None:
        taken = None
        try:
            self._log.append(self._topic, messages)
            taken = messages
        except Exception as error:  # also a fault in a log's own code: on disk nothing is lost by it
            _log.warning("the log does not take projections: they go to the spool", problem=_told(error))
        with self._changed:
            self._asked, self._taken = None, taken
            self.hurry.set()
            if taken and self._forget(taken):
                telemetry.PUBLISHER_RESENT.inc(len(taken))
            self._changed.notify_all()

    def _forget(self, messages: Sequence[Message]) -> bool:
        """Drop these from the spool's head; False when they are not there: never put, or lost with a damaged file."""
        with self._changed:
            try:
                there = self._spool.head(1) == list(messages[:1])
                if there:
                    self._spool.forget(len(messages))
                return there
            except Exception as error:
                _log.warning("what was sent is sent again", problem=_told(error))
                return False

    def _send(self) -> int:
        """Send the spool's head; says how many messages are dealt with. Raises where the log or the spool is away."""
        batch = self._spool.head(BATCH)
        try:
            self._log.append(self._topic, batch)
            dealt, refused = len(batch), 0
        except LogUnavailable:
            raise
        except Exception as error:
            dealt, refused = self._send_one_by_one(batch)
            if not dealt:
                raise  # it refuses everything: then the fault is the log's, and no message is given up
            _log.error("the log refuses projections", count=refused, problem=_told(error))
        self._forget(batch[:dealt])
        telemetry.PUBLISHER_RESENT.inc(dealt - refused)
        if refused:
            self._refused(refused)
        return dealt

    def _send_one_by_one(self, batch: Sequence[Message]) -> tuple[int, int]:
        """Send a batch that was refused as a whole. Gives how many from the head on are dealt with, and how many of
        those the log will not have.

        One that no log will ever have must not hold up all that are behind it. But a log may refuse everything for a
        while, and take it back at any moment: so one is given up only when it is refused again after another
        conversation's has been taken. Its own conversation waits behind it, and keeps its order.
        """
        doubtful: list[Message] = []
        dealt = refused = 0
        try:
            for message in batch:
                if message.key in {other.key for other in doubtful} or not self._takes(message):
                    doubtful.append(message)
                    continue
                while doubtful:
                    refused += not self._takes(doubtful[0])
                    del doubtful[0]
                    dealt += 1
                dealt += 1
        except LogUnavailable:
            pass  # what is not dealt with stays, and some of it may come twice
        return dealt, refused

    def _takes(self, message: Message) -> bool:
        try:
            self._log.append(self._topic, [message])
        except LogUnavailable:
            raise
        except Exception:
            return False
        return True


def _told(error: Exception) -> str:
    # Of a foreign error the type only: its message could hold a record's content.
    return error.problem if isinstance(error, AnchorwatchError) else type(error).__name__
