"""What one worker of an installation does for all of them, in a thread of its own: it keeps house.

Every worker offers itself; the one that holds the lease does the duties. The lease only saves work: each duty commits
by compare-and-set, and is right when two do it at once. It knows no duty by itself, nor what a failed one means.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from monitor import telemetry
from monitor.errors import AnchorwatchError, CommitRefused
from monitor.store.store import Housekeeping

__all__ = ["Duty", "Housekeeper"]

LEASE = "housekeeping"
LEASE_SECONDS = 15.0
ROUND_SECONDS = 1.0

_log = structlog.get_logger("anchorwatch.housekeeping")


class Duty(NamedTuple):
    """Something to do every so many seconds. It returns soon, and what it leaves undone it does the next time."""

    name: str
    seconds: float
    do: Callable[[], object]


class Housekeeper:
    """Offers itself for the lease, and does the duties while it has it.

    Args:
        store: who gives the lease.
        holder: a name that no other process has.
        duties: done in this order.
        clock: monotonic seconds.
    """

    def __init__(
        self, store: Housekeeping, holder: str, duties: Sequence[Duty], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._holder = holder
        self._duties = duties
        self._clock = clock
        self._due = dict.fromkeys((duty.name for duty in duties), float("-inf"))

    def run(self, stop: threading.Event) -> None:
        """Keep house until `stop` is set, then give the lease back. Nothing that fails ends it: it is told and tried
        again, since the folding goes on without it."""
        failing: dict[str, str] = {}
        mine = False
        while not stop.is_set():
            mine = self.run_once(failing, stop)
            stop.wait(ROUND_SECONDS)
        if not mine or failing:  # who does not answer now would hold up the end, and the lease ends by itself
            return
        try:
            self._store.release(LEASE, self._holder)
        except AnchorwatchError:
            _log.info("the lease is left to run out", seconds=LEASE_SECONDS)

    def run_once(self, failing: dict[str, str] | None = None, stop: threading.Event | None = None) -> bool:
        """One round, ended early by `stop`; True when the lease was had. `failing` remembers what has been told."""
        failing = {} if failing is None else failing
        mine = False

        def lease() -> None:
            nonlocal mine
            mine = self._store.lease(LEASE, self._holder, LEASE_SECONDS)

        _attempt("lease", lease, failing)
        telemetry.HOUSEKEEPER.set(mine)
        if not mine:
            return False
        for duty in self._duties:
            if stop is not None and stop.is_set():
                break
            if self._clock() >= self._due[duty.name]:
                _attempt(duty.name, duty.do, failing)
                self._due[duty.name] = self._clock() + duty.seconds
        return True


def _attempt(name: str, do: Callable[[], object], failing: dict[str, str]) -> None:
    try:
        do()
    except CommitRefused:
        pass  # another housekeeper was faster
    except Exception as error:
        told = isinstance(error, AnchorwatchError)
        problem = error.problem if isinstance(error, AnchorwatchError) else type(error).__name__
        cure = error.cure if isinstance(error, AnchorwatchError) else "a fault of this release: report it"
        telemetry.DUTY_FAILURES.labels(name).inc()
        if failing.get(name) != problem:
            _log.error("a duty failed; it is tried again", duty=name, problem=problem, cure=cure, exc_info=not told)
        failing[name] = problem
        return
    if failing.pop(name, None):
        _log.info("a duty is done again", duty=name)
