"""The worker: poll a partition of the log, fold its records, commit what came of it together with the new position.

It knows nothing of how the fold judges, nor of who is told. It may be killed at any moment: the position moves in the
same transaction as everything else, so the next worker goes on exactly there. Poison goes to the dead letters before
the position moves.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import structlog

from monitor import telemetry
from monitor.batch import Fold, Folded, Poison, decode, fold_batch, mostly_poison, to_commit, to_dead_letter
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, step
from monitor.errors import AnchorwatchError, CommitRefused, LogError, LogUnavailable, StoreError, StoreUnavailable
from monitor.events import Projection
from monitor.store.store import Position, Store
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, Log, Record

__all__ = ["Listener", "Worker", "run_workers", "stop_on_signals"]

Listener: TypeAlias = Callable[[Projection, Step], None]

CACHED_CONVERSATIONS = 10_000
IDLE_SECONDS = 0.05
FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 10.0

_state = msgspec.json.Decoder(ConversationState)
_log = structlog.get_logger("anchorwatch.worker")


class Worker:
    """One partition of one topic, folded into one store.

    Args:
        log, store: where records come from, and where results go. Another thread may use them too.
        config: the frozen calibration.
        topic, partition: what to read.
        batch_size: most records in one commit.
        on_step: told of every committed response in log order. After a crash between commit and telling it is not told
            again, so it serves live displays, not alerts. What it raises is logged and counted.
        fold: the pure fold.
        clock: monotonic seconds, for the batch histogram only.

    Attributes:
        paused: why it stopped reading until it is made anew, or None.
    """

    def __init__(
        self,
        log: Log,
        store: Store,
        config: DetectorConfig,
        *,
        topic: str = PROJECTIONS,
        partition: int = 0,
        batch_size: int = 500,
        on_step: Listener | None = None,
        fold: Fold = step,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.paused: str | None = None
        self._log = log
        self._store = store
        self._config = config
        self._batch_size = batch_size
        self._on_step = on_step
        self._fold = fold
        self._clock = clock
        self._poison: tuple[bool, ...] = ()
        self._next: int | None = None
        self._expected: Position | None = None
        self._cache: OrderedDict[str, ConversationState] = OrderedDict()
        self._buried: set[str] = set()

    def run_once(self) -> int:
        """Fold one batch. Returns how many records it took: 0 when nothing is new, when paused, or when refused.

        Raises:
            LogUnavailable, StoreUnavailable: nothing is lost; call again later.
            LogError, StoreError: somebody must look: a stored position outside the log, a damaged file.
        """
        if self.paused:
            return 0
        started = self._clock()
        try:
            start = self._seek() if self._next is None else self._next
            records = self._log.read(self.topic, self.partition, start, self._batch_size)
            if not records:
                telemetry.LAG.labels(self.partition).set(0)
                return 0
            span = self._log.span(self.topic, self.partition)
            folded = self._fold_records(records)
            self._bury(folded.dead)
            self._store.commit(
                to_commit(
                    folded,
                    topic=self.topic,
                    partition=self.partition,
                    topic_id=span.topic_id,
                    expected=self._expected,
                )
            )
        except CommitRefused as error:
            self._drop()
            telemetry.COMMITS.labels("refused").inc()
            _log.warning("commit refused", topic=self.topic, partition=self.partition, problem=error.problem)
            return 0
        except BaseException:
            # After an unanswered commit nobody knows what was written: believe nothing, read it all again.
            self._drop()
            raise
        self._next = folded.offset
        self._expected = Position(folded.offset, self._expected.revision if self._expected else 0)
        self._poison = folded.poison
        self._buried.clear()
        self._keep(folded.states)
        telemetry.BATCH_SECONDS.observe(self._clock() - started)
        telemetry.LAG.labels(self.partition).set(span.end - folded.offset)
        self._tell(folded)
        if mostly_poison(folded.poison):
            self._pause(folded)
        return folded.offset - start

    def run(self, stop: threading.Event) -> None:
        """Fold until `stop` is set; see `run_workers`."""
        run_workers([self], stop)

    def _drop(self) -> None:
        """Forget all that the store knows better."""
        self._next = None
        self._expected = None
        self._cache.clear()
        self._buried.clear()

    def _seek(self) -> int:
        """Learn from the store where to go on; from the dead letters, what a predecessor buried but did not commit."""
        self._expected = self._store.position(self.topic, self.partition)
        span = self._log.span(self.topic, self.partition)
        if self._expected is None and span.begin:
            _log.warning(
                "the store is new and the log has been cut: conversations that began before are seen in part",
                topic=self.topic,
                partition=self.partition,
                first_offset=span.begin,
            )
        graves = self._log.span(DEAD_LETTERS, 0)
        last = self._log.read(
            DEAD_LETTERS, 0, max(graves.begin, graves.end - 2 * self._batch_size), 2 * self._batch_size
        )
        self._buried = {record.key for record in last}
        self._next = self._expected.offset if self._expected else span.begin
        return self._next

    def _fold_records(self, records: Sequence[Record]) -> Folded:
        decoded = [(record, decode(record)) for record in records]
        wanted = {event.conversation_id for _, event in decoded if isinstance(event, Projection)}
        states = {key: self._cache[key] for key in wanted if key in self._cache}
        for key, data in self._store.load(sorted(wanted - states.keys())).items():
            try:
                states[key] = _state.decode(data)
            except msgspec.MsgspecError as error:
                raise StoreError(
                    f"the stored state of a conversation can't be read: {error}",
                    cure="run the Anchorwatch release that wrote it, or move the store aside to rebuild it",
                ) from error
        return fold_batch(decoded, states, self._poison, self._config, self._fold)

    def _bury(self, dead: Sequence[tuple[Record, Poison]]) -> None:
        """Write poison to the dead letters, but what lies there already after a crash."""
        letters = [to_dead_letter(record, poison) for record, poison in dead]
        self._log.append(DEAD_LETTERS, [letter for letter in letters if letter.key not in self._buried])

    def _keep(self, states: dict[str, ConversationState]) -> None:
        for key, state in states.items():
            self._cache[key] = state
            self._cache.move_to_end(key)
        while len(self._cache) > CACHED_CONVERSATIONS:
            self._cache.popitem(last=False)

    def _tell(self, folded: Folded) -> None:
        """Count what has been committed, and show it to whoever watches live."""
        telemetry.COMMITS.labels("committed").inc()
        for _, poison in folded.dead:
            telemetry.DEAD_LETTER_RECORDS.labels(poison.reason).inc()
        if folded.dead:
            # One line a batch, and no details: those may quote the record, and stay in the dead letter.
            first, poison = folded.dead[0]
            _log.warning(
                "dead letters",
                topic=self.topic,
                partition=self.partition,
                count=len(folded.dead),
                first_offset=first.offset,
                first_reason=poison.reason,
            )
        for projection, result in folded.steps:
            telemetry.RESPONSES.labels(result.outcome).inc()
            for finding in result.findings:
                telemetry.FINDINGS.labels(finding.kind, finding.severity).inc()
            if self._on_step is not None:
                try:
                    self._on_step(projection, result)
                except Exception:
                    telemetry.LISTENER_ERRORS.inc()
                    _log.exception("a live display failed")

    def _pause(self, folded: Folded) -> None:
        self.paused = f"{sum(folded.poison)} of the last {len(folded.poison)} records were poison"
        telemetry.WORKER_PAUSED.labels(self.partition, "poison").set(1)
        _log.critical(
            "partition paused",
            topic=self.topic,
            partition=self.partition,
            offset=folded.offset,
            why=self.paused,
            last_reason=folded.dead[-1][1].reason,
        )


def run_workers(
    workers: Sequence[Worker],
    stop: threading.Event,
    *,
    idle_seconds: float = IDLE_SECONDS,
    jitter: Callable[[], float] = random.random,
) -> None:
    """Run workers by turns until `stop` is set; the batch at hand is finished first. Waits only by `stop.wait`.

    While log or store are away it waits from 0.1 up to 10 s between tries, at random between half and all of it so that
    workers do not come back in step.

    Raises:
        LogError: every partition is paused; or as `Worker.run_once`, what waiting does not cure.
    """
    failures = 0
    while not stop.is_set():
        handled, unavailable = 0, None
        for worker in workers:
            gauge = telemetry.WORKER_PAUSED.labels(worker.partition, "unavailable")
            try:
                handled += worker.run_once()
            except (LogUnavailable, StoreUnavailable) as error:
                unavailable = error
                gauge.set(1)
            else:
                gauge.set(0)
        if all(worker.paused for worker in workers):
            raise _all_paused(workers)
        if unavailable is not None:
            failures += 1
            stop.wait(_backoff(failures, unavailable, jitter()))
        else:
            if failures:
                _log.info("back again", failed_tries=failures)
            failures = 0
            if not handled:
                stop.wait(idle_seconds)


def _backoff(failures: int, error: AnchorwatchError, jitter: float) -> float:
    """Seconds to wait after so many failures in a row; `jitter` lies in [0, 1)."""
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10))
    if failures & (failures - 1) == 0:  # at 1, 2, 4, 8 … so that a long outage does not fill the log file
        _log.warning("waiting", problem=error.problem, cure=error.cure, failed_tries=failures)
    return longest * (0.5 + 0.5 * jitter)


def _all_paused(workers: Sequence[Worker]) -> LogError:
    places = "; ".join(f"{worker.topic}/{worker.partition}: {worker.paused}" for worker in workers)
    return LogError(
        f"every partition is paused ({places})",
        cure=f"read the reasons in {DEAD_LETTERS}. Stop the producer that writes them, or run the release that can "
        "read them; then start the worker again. The dead letters hold the original bytes",
    )


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM or SIGINT sets; a second signal kills as usual. Call it in the main thread."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:  # noqa: ARG001
        signal.signal(number, signal.SIG_DFL)
        # The handler may interrupt this very thread inside stop.wait, which holds the lock that stop.set wants.
        threading.Thread(target=stop.set).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop
