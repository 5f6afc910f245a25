"""What one key, one request, and all of them together may take: rate, size, time and memory.

It knows nothing of what is in a request. A rate is a token bucket per key. A body is measured as it comes, so that one
of unknown length ends where it gets too long, and every byte of it is taken from one allowance for all requests, so
that memory is bounded by a number and not by how many clients there are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager

from monitor.api.problems import Problem

__all__ = ["Allowance", "Buckets", "Share", "read_body"]


class Buckets:
    """One token bucket per key.

    Args:
        rate: tokens per second that each one gets.
        burst: tokens that each one holds at most, and begins with.
        clock: monotonic seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._held: dict[str, tuple[float, float]] = {}

    def take(self, key: str, tokens: float) -> float:
        """Take so many tokens, at most the burst. Gives 0, or after how many seconds they would be there."""
        now = self._clock()
        held, since = self._held.get(key, (self._burst, now))
        held = min(self._burst, held + (now - since) * self._rate)
        missing = min(tokens, self._burst) - held
        self._held[key] = (held if missing > 0 else held - tokens, now)
        return max(0.0, missing / self._rate)


class Allowance:
    """Bytes that all requests under way may hold together. For one thread."""

    def __init__(self, size: int, changed: Callable[[int], object] = lambda _held: None) -> None:
        """`changed` is told how many bytes are held."""
        self.size = size
        self.held = 0
        self._changed = changed

    @contextmanager
    def share(self) -> Iterator[Share]:
        """One request's part of it, given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self._take(-share.held)

    def _take(self, count: int) -> bool:
        if count > self.size - self.held:
            return False
        self.held += count
        self._changed(self.held)
        return True


class Share:
    """What one request holds of an `Allowance`."""

    def __init__(self, allowance: Allowance) -> None:
        self.held = 0
        self._allowance = allowance

    def grow(self, count: int) -> bool:
        """Hold so many bytes more; False where there are not as many left."""
        if not self._allowance._take(count):
            return False
        self.held += count
        return True


async def read_body(
    chunks: AsyncIterable[bytes], declared: str | None, *, most: int, seconds: float, share: Share
) -> bytes:
    """The whole body.

    Args:
        chunks: it, as it comes.
        declared: its Content-Length, if it has one.
        most: bytes it may have.
        seconds: within which it must be here.
        share: what its bytes are taken from.

    Raises:
        Problem: it is too long (413), too slow (408), or there is no room now (429).
    """
    too_long = Problem(413, f"the body has more than {most} bytes", "send fewer projections in one request")
    if declared is not None and declared.isdecimal() and int(declared) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in chunks:
                if len(body) + len(chunk) > most:
                    raise too_long
                if not share.grow(len(chunk)):
                    raise no_room()
                body += chunk
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {seconds:g} s", "send it faster, or less of it") from None
    return bytes(body)


def no_room() -> Problem:
    """There is more waiting than memory is set aside for."""
    return Problem(429, "too much is waiting to be written", "wait as long as Retry-After says", retry_after=1)


def too_fast(wait: float) -> Problem:
    """A key has used up its rate; `wait` seconds fill the bucket again."""
    return Problem(
        429,
        "this key sends faster than its rate allows",
        "wait as long as Retry-After says",
        retry_after=math.ceil(wait),
    )
