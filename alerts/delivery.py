"""One integration's queue: notifications go out one after the other, and are tried again while nobody takes them.

It has a thread of its own, so that a slow receiver holds up neither the others nor whoever fills the queue. It decides
nothing: what is in the queue goes out as it is, and what became of it is handed back.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import structlog

from alerts.channel import Channel
from alerts.stages import seconds
from monitor import telemetry
from monitor.alert import Alert, Notification
from monitor.errors import ChannelError, ChannelUnavailable, ConfigurationError

__all__ = ["Delivery", "Landed"]

FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 30.0
SOON_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 300.0  # however long a receiver asks to be left alone

_log = structlog.get_logger("anchorwatch.dispatch")


class Landed(NamedTuple):
    """What became of a notification.

    taken: by the receiver; refused: for ever; too_old: nobody took it while it was worth telling; left: nobody took it,
    and its queue was cleared or stopped meanwhile; broken: the channel can't go on, `error` says why.
    """

    notification: Notification
    result: Literal["taken", "refused", "too_old", "left", "broken"]
    error: ConfigurationError | None = None


class Delivery:
    """The queue of one channel.

    Args:
        channel: used from one thread at a time.
        landed: told of each notification that leaves the queue, from the queue's own thread.
        max_age: seconds after which a notification is not worth telling any more.
        clock: unix seconds.
        ticks: monotonic seconds.
        jitter: gives a number from 0 to 1; waits are between half and all of what they are at most.
    """

    def __init__(
        self,
        channel: Channel,
        landed: Callable[[Landed], None],
        *,
        max_age: float,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.channel = channel
        self._landed = landed
        self._max_age = max_age
        self._clock = clock
        self._ticks = ticks
        self._jitter = jitter
        self._queue: deque[Notification] = deque()
        self._generation = self._asked_since = 0  # of what is in the queue: `clear` begins another one
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._not_before = float("-inf")
        self._firing: Callable[[], Sequence[Alert] | None] = tuple
        self._refresh_at = ticks() if channel.refresh is not None else float("inf")
        for result in ("taken", "unavailable", "refused"):  # from 0, so that the first one is an increase
            telemetry.DELIVERIES.labels(channel.name, result)
        for cause in ("cap", "inhibited", "quiet_hours", "refused", "shadow", "silenced"):
            telemetry.HELD_BACK.labels(channel.name, cause)

    def send(self, notification: Notification) -> None:
        """Put it into the queue. Returns at once."""
        with self._changed:
            self._queue.append(notification)
            self._changed.notify()

    def refresh(self, firing: Callable[[], Sequence[Alert] | None]) -> None:
        """What fires, to be asked for whenever it is to be said again; None: ask again in a moment."""
        self._firing = firing

    def start(self) -> None:
        """Deliver from a thread from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"deliver {self.channel.name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin nothing more; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self, seconds: float) -> list[Notification]:
        """Stop, wait so long for what is at hand, close the channel, and say what is left in the queue."""
        self.stop()
        if self._thread is not None:
            self._thread.join(seconds)
        if self._thread is None or not self._thread.is_alive():
            with contextlib.suppress(Exception):
                self.channel.close()
        return self.clear()

    def clear(self) -> list[Notification]:
        """Take back all that is not under way. What is, lands as `left` unless somebody takes it."""
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._generation += 1
        return left

    def abandon(self) -> None:
        """Forget all of it. What is under way is not tried again, and does not land."""
        with self._changed:
            self._queue.clear()
            self._generation += 1
            self._asked_since = self._generation

    def work(self) -> bool:
        """Do what there is to do now, once; False when there is nothing. Blocks as long as the channel does."""
        now = self._ticks()
        with self._changed:
            notification = self._queue.popleft() if self._queue and now >= self._not_before else None
            generation = self._generation
        if notification is not None:
            self._deliver(notification, generation)
            return True
        if now >= max(self._refresh_at, self._not_before):
            self._keep_firing()
            return True
        return False

    def _run(self) -> None:
        while not self._stopping:
            if self.work():
                continue
            with self._changed:
                until = max(self._not_before, float("-inf") if self._queue else self._refresh_at)
                wait = until - self._ticks()
                if not self._stopping and wait > 0.0:
                    self._changed.wait(min(wait, LONGEST_BACKOFF_SECONDS))

    def _deliver(self, notification: Notification, generation: int) -> None:
        if self._clock() - seconds(notification.time) > self._max_age:
            self._land(Landed(notification, "too_old"), generation)
            return
        try:
            self._attempt(lambda: self.channel.deliver(notification))
        except ChannelUnavailable as error:
            self._wait(error)
            with self._changed:
                left = self._stopping or generation != self._generation
                if not left:  # behind the others: what fails by itself must not hold them up
                    self._queue.append(notification)
            if left:
                self._land(Landed(notification, "left"), generation)
        except ChannelError as error:
            _log.error(
                "the receiver refuses a notification; it is tried later in other words",
                integration=self.channel.name,
                notification=notification.id,
                alerts=len(notification.covered),
                problem=error.problem,
                cure=error.cure,
            )
            self._land(Landed(notification, "refused"), generation)
        except ConfigurationError as error:
            self._land(Landed(notification, "broken", error), generation)
            self._not_before = self._ticks() + LONGEST_BACKOFF_SECONDS
        except Exception:  # a fault of ours in one channel must not silence it, nor the others
            _log.exception("a channel failed", integration=self.channel.name, notification=notification.id)
            self._land(Landed(notification, "refused"), generation)
        else:
            if self._failures:
                _log.info("the receiver is back", integration=self.channel.name, failed_tries=self._failures)
            self._failures = 0
            telemetry.NOTIFICATIONS.labels(self.channel.name, notification.reason).inc()
            self._land(Landed(notification, "taken"), generation)

    def _keep_firing(self) -> None:
        assert self.channel.refresh is not None
        self._refresh_at = self._ticks() + self.channel.refresh
        try:
            alerts = self._firing()
            if alerts is None:
                self._refresh_at = self._ticks() + SOON_SECONDS
            elif alerts:
                self._attempt(lambda: self.channel.keep_firing(alerts))
        except ChannelUnavailable as error:
            self._wait(error)
            self._refresh_at = self._not_before
        except ChannelError as error:
            _log.error(
                "the receiver refuses to hear what still fires",
                integration=self.channel.name,
                problem=error.problem,
                cure=error.cure,
            )
        except Exception:
            _log.exception("a channel failed", integration=self.channel.name)

    def _attempt(self, do: Callable[[], None]) -> None:
        began, result = time.monotonic(), "refused"
        try:
            do()
            result = "taken"
        except ChannelUnavailable:
            result = "unavailable"
            raise
        finally:
            telemetry.DELIVERIES.labels(self.channel.name, result).inc()
            telemetry.DELIVERY_SECONDS.labels(self.channel.name).observe(time.monotonic() - began)

    def _wait(self, error: ChannelUnavailable) -> None:
        self._failures += 1
        longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures - 1, 10))
        wait = longest * (0.5 + 0.5 * self._jitter())
        if error.retry_after is not None:
            wait = max(wait, min(error.retry_after, LONGEST_WAIT_SECONDS))
        self._not_before = self._ticks() + wait
        if self._failures & (self._failures - 1) == 0:  # a long outage must not fill the log file
            _log.warning(
                "the receiver does not answer; it is tried again",
                integration=self.channel.name,
                problem=error.problem,
                cure=error.cure,
                failed_tries=self._failures,
            )

    def _land(self, landed: Landed, generation: int) -> None:
        if generation >= self._asked_since:
            self._landed(landed)
