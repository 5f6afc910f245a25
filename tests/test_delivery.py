"""Promises of an integration's queue: nothing in it is lost, nothing holds up the rest, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from test_stages import alert, group
from timeline import BEGIN

from alerts.delivery import Delivery, Landed
from monitor.alert import Alert, Notification
from monitor.errors import ChannelError, ChannelUnavailable, ConfigurationError


class Line:
    """A channel that fails as it is told to."""

    name, send_resolved = "ops/line[0]", True

    def __init__(self, refresh: float | None = None) -> None:
        self.refresh = refresh
        self.taken: list[str] = []
        self.kept: list[list[str]] = []
        self.fails: dict[str, list[Exception]] = {}
        self.closed = False

    def deliver(self, notification: Notification) -> None:
        if errors := self.fails.get(notification.note):
            raise errors.pop(0)
        self.taken.append(notification.note)

    def keep_firing(self, alerts: Sequence[Alert]) -> None:
        if errors := self.fails.get("refresh"):
            raise errors.pop(0)
        self.kept.append([one.id for one in alerts])

    def close(self) -> None:
        self.closed = True


class Queue:
    """A delivery with clocks that a test moves."""

    def __init__(self, channel: Line, **more: Any) -> None:
        self.now = BEGIN
        self.landed: list[Landed] = []
        self.delivery = Delivery(
            channel,
            self.landed.append,
            max_age=3600.0,
            clock=lambda: self.now,
            ticks=lambda: self.now,
            jitter=lambda: 1.0,
            **more,
        )

    def work(self) -> None:
        while self.delivery.work():
            pass

    def send(self, *notes: str) -> None:
        for note in notes:
            self.delivery.send(replace(group([alert("a")]), id=note, note=note))

    @property
    def results(self) -> list[tuple[str, str]]:
        return [(one.notification.note, one.result) for one in self.landed]


def away(count: int = 1, **more: Any) -> list[Exception]:
    return [ChannelUnavailable("away", cure="wait", **more) for _ in range(count)]


def test_they_go_out_in_order() -> None:
    line = Line()
    queue = Queue(line)
    queue.send("a", "b", "c")
    queue.work()
    assert line.taken == ["a", "b", "c"] and {result for _, result in queue.results} == {"taken"}


def test_one_that_fails_by_itself_goes_behind_the_others_and_comes_again() -> None:
    line = Line()
    line.fails["a"] = away(3)
    queue = Queue(line)
    queue.send("a", "b", "c")
    for _ in range(8):
        queue.work()
        queue.now += 1.0
    assert line.taken == ["b", "c", "a"]


def test_it_waits_twice_as_long_each_time_and_as_long_as_it_is_asked_to() -> None:
    line = Line()
    line.fails["a"] = away(9) + away(1, retry_after=200.0) + away(1, retry_after=1e9)
    queue = Queue(line)
    queue.send("a")
    waits, last = [], queue.now
    for _ in range(11):
        left = len(line.fails["a"])
        while len(line.fails["a"]) == left:
            queue.work()
            queue.now += 0.1
        waits.append(round(queue.now - 0.1 - last, 1))
        last = queue.now - 0.1
        if len(waits) == 11:
            break
        queue.delivery._max_age = float("inf")
    assert waits[1:10] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0], abs=0.15)
    assert waits[10] == pytest.approx(200.0, abs=0.2)
    assert queue.delivery._not_before - queue.now <= 300.0, "nobody is left alone for long because he asks for it"


@pytest.mark.parametrize("error", [ChannelError("no"), RuntimeError("a fault of ours")])
def test_what_is_refused_leaves_the_queue_and_the_next_one_goes_out(error: Exception) -> None:
    line = Line()
    line.fails["a"] = [error]
    queue = Queue(line)
    queue.send("a", "b")
    queue.work()
    assert queue.results == [("a", "refused"), ("b", "taken")]


def test_what_is_too_old_is_given_back() -> None:
    queue = Queue(Line())
    queue.send("a")
    queue.now += 3601.0
    queue.work()
    assert queue.results == [("a", "too_old")]


def test_a_channel_that_can_not_go_on_says_so() -> None:
    line = Line()
    line.fails["a"] = [ConfigurationError("nobody reads standard output any more")]
    queue = Queue(line)
    queue.send("a")
    queue.work()
    assert queue.results == [("a", "broken")] and queue.landed[0].error is not None


def test_what_fires_is_said_again_and_again_also_after_a_failure() -> None:
    line = Line(refresh=60.0)
    line.fails["refresh"] = [*away(), ChannelError("no"), RuntimeError("a fault of ours")]
    queue = Queue(line)
    queue.delivery.refresh(lambda: [alert("a")])
    for _ in range(400):
        queue.work()
        queue.now += 1.0
    assert len(line.kept) == 5 and line.kept[0] == ["e-a"]


def test_what_fires_is_said_a_moment_later_where_nobody_can_say_what_does() -> None:
    line = Line(refresh=60.0)
    queue = Queue(line)
    known: list[list[Alert] | None] = [None, None, [alert("a")]]
    queue.delivery.refresh(lambda: known.pop(0))
    queue.now += 60.0
    queue.work()
    assert not line.kept and len(known) == 2, "asked once, and not again at once"
    for _ in range(10):
        queue.now += 0.1
        queue.work()
    assert line.kept == [["e-a"]]


@pytest.mark.parametrize("end", ["stop", "clear"])
def test_what_fails_after_its_queue_was_emptied_is_handed_back(end: str) -> None:
    line = Line()
    queue = Queue(line)

    def fail(notification: Notification) -> None:
        getattr(queue.delivery, end)()
        raise ChannelUnavailable("away", cure="wait")

    line.deliver = fail  # type: ignore[method-assign]
    queue.send("a")
    queue.work()
    assert queue.results == [("a", "left")] and queue.delivery.clear() == []


@pytest.mark.parametrize("error", [None, ChannelUnavailable("away", cure="wait"), ChannelError("no")])
def test_nobody_hears_again_of_what_is_abandoned(error: Exception | None) -> None:
    line = Line()
    queue = Queue(line)

    def fail(notification: Notification) -> None:
        if notification.note == "a":
            queue.delivery.abandon()
            if error is not None:
                raise error

    line.deliver = fail  # type: ignore[method-assign]
    queue.send("a", "b")
    queue.work()
    assert queue.results == []
    queue.now += 60.0
    queue.send("c")
    queue.work()
    assert queue.results == [("c", "taken")]


def test_nobody_waits_for_a_thread_that_waits_for_its_receiver() -> None:
    line, hold, began = Line(), threading.Event(), threading.Event()
    taken = line.deliver

    def slow(notification: Notification) -> None:
        began.set()
        hold.wait(30)
        taken(notification)

    line.deliver = slow  # type: ignore[method-assign]
    landed: list[Landed] = []
    delivery = Delivery(line, landed.append, max_age=1e12)
    delivery.start()
    one = group([alert("a")])
    delivery.send(replace(one, note="a"))
    assert began.wait(30)
    delivery.send(replace(one, note="b"))
    before = time.monotonic()
    left = delivery.close(0.1)
    assert [one.note for one in left] == ["b"] and time.monotonic() - before < 10.0 and not line.closed
    hold.set()
    assert delivery._thread is not None
    delivery._thread.join(30)
    assert line.taken == ["a"] and [one.result for one in landed] == ["taken"]
