"""What a batch adds to the fleet's minutes, and how far in event time it has come. Pure; it runs for every response.

It knows what the fold said of each response. It does not know which minutes are closed, nor what is made of the sums
(`monitor.fleet`).
"""

from __future__ import annotations

from collections.abc import Sequence

from monitor.detect.conversation import Step
from monitor.events import Projection
from monitor.store.store import MinuteSums

__all__ = ["minute_sums", "watermark"]

LARGEST = 20_000.0  # thousandths of a standard deviation: one absurd response can't be a fleet's mean


def minute_sums(steps: Sequence[tuple[Projection, Step]]) -> list[MinuteSums]:
    """The sums by deployment and event-time minute, in order. Only what was folded counts: the rest has no z.

    They are whole numbers, so adding them up gives the same whatever the batches and their order were.
    """
    sums: dict[tuple[int, str], list[int]] = {}
    for projection, step in steps:
        z = step.z
        if z is None:
            continue
        state = step.state
        thousandths = z * 1000.0
        if not -LARGEST <= thousandths <= LARGEST:
            thousandths = LARGEST if thousandths > 0.0 else -LARGEST
        # `folded_time` is this response's event time: the fold has read it, and to read it again would cost more than
        # all of this.
        key = int(state.folded_time // 60.0), projection.deployment
        row = sums.get(key)
        if row is None:
            sums[key] = [1, round(thousandths), state.risk >= 1.0]
        else:
            row[0] += 1
            row[1] += round(thousandths)
            row[2] += state.risk >= 1.0
    return [
        MinuteSums(minute, deployment, responses, z, int(warned))
        for (minute, deployment), (responses, z, warned) in sorted(sums.items())
    ]


def watermark(steps: Sequence[tuple[Projection, Step]], now: float) -> float | None:
    """How far a batch has come, seconds since 1970; None where it holds no response.

    The median of its event times, and never later than the wall clock `now`. The latest one would be the word of the
    one collector whose clock is furthest ahead: a single response dated in 2099 would say that all is over. A batch
    read live is seconds long, so the median lags by as much; while catching up it lags by half a batch, until the next.
    Duplicates say nothing new.
    """
    times = sorted(
        step.state.folded_time if step.outcome == "folded" else step.state.seen_time
        for _, step in steps
        if step.outcome != "duplicate"
    )
    return min(times[len(times) // 2], now) if times else None
