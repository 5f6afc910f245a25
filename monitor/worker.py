"""The worker: poll a topic, fold its records, commit what came of them together with the partition's new position.

It knows nothing of how the fold judges, nor of who is told. It may be killed at any moment: the position moves in the
same transaction as everything else, so the next worker goes on exactly there. Poison goes to the dead letters before
the position moves; a dead letter's key says where its record lay, so that one which a crash wrote twice is still one.
"""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import msgspec
import structlog

from monitor import telemetry
from monitor.batch import (
    Fold,
    Folded,
    decode,
    fold_batch,
    misplaced,
    mostly_poison,
    to_commit,
    to_dead_letter,
)
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, decode_state, step
from monitor.errors import AnchorwatchError, CommitRefused, LogError, LogUnavailable, StoreError, StoreUnavailable
from monitor.events import Projection
from monitor.store.store import Commit, Position, Store
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, Batch, EmbeddedSubscription, Log, Subscription
from monitor.tally import MOST_SESSIONS, Tally

__all__ = ["Listener", "Recorded", "Worker", "collect_rarely", "stop_on_signals"]

Listener: TypeAlias = Callable[[Projection, Step], None]
Recorded: TypeAlias = Callable[[int, int], DetectorConfig | None]

CACHED_CONVERSATIONS = 100_000
IDLE_SECONDS = 0.05
LOOK_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 10.0

_log = structlog.get_logger("anchorwatch.worker")


class _Share:
    """What the worker knows of one partition that is its own. Thrown away whenever the store may know better."""

    def __init__(self, expected: Position | None, config: DetectorConfig, topic_id: str, partitions: int) -> None:
        self.expected = expected
        self.config = config
        self.topic_id = topic_id
        self.partitions = partitions
        self.began = False
        self.poison: tuple[bool, ...] = ()
        self.cache: OrderedDict[str, ConversationState] = OrderedDict()


class _Pending(NamedTuple):
    """A commit under way."""

    batch: Batch
    folded: Folded
    started: float
    answer: Future[None]


class Worker:
    """A share of one topic, folded into one store.

    Args:
        log, store: where records come from, and where results go. Another thread may use them too.
        config: the calibration, for a partition that has none in force yet. Where one is in force, in the store or by a
            control record, that one judges.
        subscription: what gives out the records; by default the topic's one partition in an embedded log.
        topic: what is read.
        batch_size: most records in one poll, and so in one commit.
        cached_conversations: how many states are kept at hand.
        shown_sessions: how many of the riskiest conversations the metrics show by name.
        recorded: given partition and offset, the calibration that operators have put into force there; asked where the
            store has none, and the log's head, which had it, is gone.
        on_step: told of every committed response in log order. After a crash between commit and telling it is not told
            again, so it serves live displays, not alerts. What it raises is logged and counted.
        fold: the pure fold.
        clock: monotonic seconds.
        wall_clock: seconds since 1970; it bounds how far in event time a partition may claim to be.

    Attributes:
        paused: partition → why nothing of it is read until the worker is started anew.
    """

    def __init__(
        self,
        log: Log,
        store: Store,
        config: DetectorConfig,
        *,
        subscription: Subscription | None = None,
        topic: str = PROJECTIONS,
        batch_size: int = 500,
        cached_conversations: int = CACHED_CONVERSATIONS,
        shown_sessions: int = MOST_SESSIONS,
        recorded: Recorded | None = None,
        on_step: Listener | None = None,
        fold: Fold = step,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.topic = topic
        self.paused: dict[int, str] = {}
        self._log = log
        self._store = store
        self._config = config
        self._subscription = subscription or EmbeddedSubscription(log, topic)
        self._batch_size = batch_size
        self._cached_conversations = cached_conversations
        self._recorded = recorded
        self._on_step = on_step
        self._fold = fold
        self._clock = clock
        self._wall_clock = wall_clock
        self._shares: dict[int, _Share] = {}
        self._reached: dict[int, int] = {}  # partition → the offset up to which it is folded, for the lag
        self._assigned: frozenset[int] = frozenset()
        self._partitions = 1
        self._look_next = clock() + LOOK_SECONDS
        # One thread: commits go out in order, each after the one before it was answered.
        self._committing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="anchorwatch-commit")
        self._pending: _Pending | None = None
        self._tally = Tally(sessions=shown_sessions)

    def run_once(self, timeout: float = 0.0, *, settle: bool = True) -> int:
        """Take what one poll gives, fold it, commit it. Returns how many records were committed.

        None are while nothing is new, while the partitions are paused, and after a refused commit. Waits up to
        `timeout` seconds for the first one. Without `settle` the last commit may still be under way on return: the next
        call folds while the store works, and settles it then.

        Raises:
            LogUnavailable, StoreUnavailable: nothing is lost; call again later, and do call: it keeps this worker in
                its group.
            LogError, StoreError: somebody must look: a stored position outside the log, a damaged file.
        """
        handled = 0
        try:
            handled += self._claim()
        except BaseException:
            # Also those that have just gone: they may come back within the poll, at rest, and must be sought then.
            self._shares.clear()
            for partition in self._subscription.assigned():
                self._drop(partition)
            self._subscription.poll(self._batch_size, 0.0)  # all are at rest: this only keeps the place in the group
            raise
        batches = self._subscription.poll(self._batch_size, timeout)
        try:
            for batch in batches:
                handled += self._handle(batch)
            if settle or not batches:
                handled += self._settle()
        except BaseException:
            # After an unanswered commit nobody knows what was written; and what was polled with it is not folded.
            for unread in batches:
                self._drop(unread.partition)
            raise
        return handled

    def run(
        self,
        stop: threading.Event,
        *,
        idle_seconds: float = IDLE_SECONDS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Fold until `stop` is set; the batch at hand is finished first.

        While log or store are away it waits from 0.1 up to 10 s between tries, at random between half and all of it so
        that workers do not come back in step.

        Raises:
            LogError: every partition is paused; or as `run_once`, what waiting does not cure.
        """
        failures = 0
        while not stop.is_set():
            telemetry.WORKER_LOOP.set(self._wall_clock())
            try:
                handled = self.run_once(idle_seconds, settle=False)
            except (LogUnavailable, StoreUnavailable) as error:
                failures += 1
                telemetry.WORKER_WAITING.set(1)
                for partition in self._reached:
                    self._measure_lag(partition)
                stop.wait(_backoff(failures, error, jitter()))
                continue
            if failures:
                _log.info("back again", failed_tries=failures)
                telemetry.WORKER_WAITING.set(0)
                failures = 0
            assigned = self._subscription.assigned()
            if assigned and assigned <= self.paused.keys():
                raise self._all_paused()
            if not handled and idle_seconds <= 0.0:
                stop.wait(IDLE_SECONDS)
        try:
            self._settle()
        except (LogUnavailable, StoreUnavailable) as error:
            _log.info("the last commit was not answered; whoever goes on looks", problem=error.problem)

    def _claim(self) -> int:
        """Forget partitions that went to others; learn where to go on in those that came. As `_settle`, which comes
        first where the store's word is needed."""
        assigned = self._subscription.assigned()
        look = self._clock() >= self._look_next
        settled = self._settle() if look or assigned - self._shares.keys() - self.paused.keys() else 0
        if assigned != self._assigned:
            self._assigned = assigned
            self._partitions = self._log.partitions(self.topic)
            telemetry.WORKER_PARTITIONS.set(len(assigned))
            if any(share.partitions != self._partitions for share in self._shares.values()):
                self._shares.clear()  # keys are placed anew; the store refuses that, and says the cure
        for partition in self._shares.keys() - assigned:
            del self._shares[partition]
        for partition in list(self._reached.keys() - assigned):
            del self._reached[partition]
            self._tally.leave(partition)
            telemetry.LAG.remove(partition)  # whoever has it now says how far behind it is
        for partition in self.paused.keys() - assigned:
            del self.paused[partition]  # whoever has it now finds out for itself
            telemetry.WORKER_PAUSED.labels(partition).set(0)
        for partition in sorted(assigned - self._shares.keys() - self.paused.keys()):
            try:
                share, offset = self._open(partition)
            except CommitRefused as error:
                self._refused(partition, error)
                continue
            self._subscription.seek(partition, offset)
            self._shares[partition] = share
            self._reached[partition] = offset
            telemetry.LAG.labels(partition)
        if look:
            self._look_next = self._clock() + LOOK_SECONDS
            self._look()
            self._tally.show(self._wall_clock())
            for partition in self.paused:
                self._measure_lag(partition)
        return settled

    def _measure_lag(self, partition: int) -> None:
        """How far behind a partition is of which nothing is committed: it is paused, or the store is away.

        Of the others each commit tells it; to ask the log about all of them would hold up the loop.
        """
        try:
            end = self._log.span(self.topic, partition).end
        except LogError:
            return  # the log's own absence is told elsewhere
        telemetry.LAG.labels(partition).set(max(0, end - self._reached.get(partition, end)))

    def _look(self) -> None:
        """See whether the store still stands where it did. Who has nothing to commit would never learn that it was
        wiped, and would leave it empty until the next response comes."""
        for partition, share in list(self._shares.items()):
            if self._store.position(self.topic, partition) != share.expected:
                _log.warning("the store has moved without this worker", topic=self.topic, partition=partition)
                self._drop(partition)

    def _open(self, partition: int) -> tuple[_Share, int]:
        """Learn where to go on. An empty commit asks the store whether this is the log it was folded from, before
        anything is judged or set aside, and notes the calibration in force."""
        position = self._store.position(self.topic, partition)
        stored = self._store.config(self.topic, partition)
        begin, end, topic_id = self._log.span(self.topic, partition)
        if position is None and begin:
            _log.warning(
                "the store is new and the log has been cut: conversations that began before are seen in part",
                topic=self.topic,
                partition=partition,
                first_offset=begin,
            )
        offset = position.offset if position else begin
        if stored is not None:
            config = DetectorConfig.from_json(stored)
        else:
            config = (self._recorded(partition, offset) if self._recorded else None) or self._config
        if config.config_id != self._config.config_id:
            _log.warning(
                "another calibration is in force than the one given; the one in force judges",
                partition=partition,
                in_force=config.config_id,
                given=self._config.config_id,
                cure="to change it from now on: anchorwatch calibration activate",
            )
        nothing = Folded(offset, [], [], {}, ())
        before = _Share(position, config, topic_id, self._partitions)
        self._store.commit(self._to_commit(partition, nothing, before, end, stored is None))
        expected = Position(offset, position.revision if position else 0)
        return _Share(expected, config, topic_id, self._partitions), offset

    def _drop(self, partition: int) -> None:
        """Forget all that the store knows better, and read the partition's records again."""
        self._subscription.rest(partition)
        self._shares.pop(partition, None)

    def _handle(self, batch: Batch) -> int:
        """Fold a batch while the store still works on the one before, and begin to commit it. As `_settle`."""
        started = self._clock()
        share = self._shares.get(batch.partition)
        if share is None:  # refused or paused a moment ago
            return self._settle()
        if share.expected and batch.records[0].offset < share.expected.offset:
            _log.error("records came again; they are read anew", topic=self.topic, partition=batch.partition)
            self._drop(batch.partition)
            return self._settle()
        if not share.began:
            share.began = True
            # A topic that is made by its first record had no id until now.
            share.topic_id = share.topic_id or self._log.span(self.topic, batch.partition).topic_id
        folded = self._fold_records(batch, share)
        settled = self._settle()
        if self._shares.get(batch.partition) is not share:  # what this was folded from is not what the store has
            return settled
        self._log.append(DEAD_LETTERS, [to_dead_letter(record, poison) for record, poison in folded.dead])
        if folded.config:
            share.config = folded.config
        commit = self._to_commit(batch.partition, folded, share, batch.end, folded.config is not None)
        self._pending = _Pending(batch, folded, started, self._committing.submit(self._commit, commit))
        # As if it had been answered: where it is not, or is refused, the share is thrown away.
        share.expected = Position(folded.offset, share.expected.revision if share.expected else 0)
        share.poison = folded.poison
        self._keep(share, folded.states)
        return settled + (self._settle() if mostly_poison(folded.poison) else 0)

    def _settle(self) -> int:
        """Wait for the commit under way, if one is. Returns how many records it was of; 0 when it was refused."""
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        batch, folded, started, answer = pending
        try:
            answer.result()
        except CommitRefused as error:
            self._refused(batch.partition, error)
            return 0
        except BaseException:
            self._drop(batch.partition)
            raise
        if folded.config:
            _log.info("a calibration came into force", partition=batch.partition, config_id=folded.config.config_id)
        telemetry.BATCH_SECONDS.observe(self._clock() - started)
        self._reached[batch.partition] = folded.offset
        telemetry.LAG.labels(batch.partition).set(max(0, batch.end - folded.offset))
        self._tell(batch.partition, folded)
        if mostly_poison(folded.poison):
            self._pause(batch.partition, folded)
        return sum(record.offset < folded.offset for record in batch.records) if folded.dead else len(batch.records)

    def _commit(self, commit: Commit) -> None:
        with telemetry.COMMIT_SECONDS.time():
            self._store.commit(commit)

    def _to_commit(self, partition: int, folded: Folded, share: _Share, end: int, with_config: bool) -> Commit:
        return to_commit(
            folded,
            topic=self.topic,
            partition=partition,
            topic_id=share.topic_id,
            partitions=share.partitions,
            expected=share.expected,
            end=end,
            config=share.config if with_config else None,
            now=self._wall_clock(),
        )

    def _refused(self, partition: int, error: CommitRefused) -> None:
        self._drop(partition)
        telemetry.COMMITS.labels("refused").inc()
        _log.warning("commit refused", topic=self.topic, partition=partition, problem=error.problem)

    def _fold_records(self, batch: Batch, share: _Share) -> Folded:
        decoded = [(record, decode(record)) for record in batch.records]
        wanted = {event.conversation_id for _, event in decoded if isinstance(event, Projection)}
        cache = share.cache
        states = {key: cache[key] for key in wanted if key in cache}
        unknown = wanted - states.keys()
        foreign = misplaced(unknown, batch.partition, share.partitions)
        if unknown - foreign:
            for key, data in self._store.load(self.topic, batch.partition, sorted(unknown - foreign)).items():
                try:
                    states[key] = decode_state(data)
                except msgspec.MsgspecError as error:
                    raise StoreError(
                        f"the stored state of a conversation can't be read: {error}",
                        cure="run the Anchorwatch release that wrote it, or move the store aside to rebuild it",
                    ) from error
        return fold_batch(decoded, states, share.poison, share.config, self._fold, foreign)

    def _keep(self, share: _Share, states: dict[str, ConversationState]) -> None:
        cache = share.cache
        for key, state in states.items():
            cache[key] = state
            cache.move_to_end(key)
        most = max(self._cached_conversations // max(len(self._shares), 1), len(states))
        while len(cache) > most:
            cache.popitem(last=False)

    def _tell(self, partition: int, folded: Folded) -> None:
        """Count what has been committed, and show it to whoever watches live."""
        telemetry.COMMITS.labels("committed").inc()
        for reason, count in Counter([poison.reason for _, poison in folded.dead]).items():
            telemetry.DEAD_LETTER_RECORDS.labels(reason).inc(count)
        if folded.dead:
            # One line a batch, and no details: those may quote the record, and stay in the dead letter.
            first, poison = folded.dead[0]
            _log.warning(
                "dead letters",
                topic=self.topic,
                partition=partition,
                count=len(folded.dead),
                first_offset=first.offset,
                first_reason=poison.reason,
            )
        share = self._shares.get(partition)
        self._tally.add(folded.steps, share.config if share else None, partition)
        if self._on_step is None:
            return
        for projection, result in folded.steps:
            try:
                self._on_step(projection, result)
            except Exception:
                telemetry.LISTENER_ERRORS.inc()
                _log.exception("a live display failed")

    def _pause(self, partition: int, folded: Folded) -> None:
        self.paused[partition] = f"{sum(folded.poison)} of the last {len(folded.poison)} records were poison"
        self._drop(partition)
        telemetry.WORKER_PAUSED.labels(partition).set(1)
        _log.critical(
            "partition paused",
            topic=self.topic,
            partition=partition,
            offset=folded.offset,
            why=self.paused[partition],
            last_reason=folded.dead[-1][1].reason,
            cure=f"see `anchorwatch dead-letters list`; {_PAUSED_CURE}",
        )

    def _all_paused(self) -> LogError:
        places = "; ".join(f"{self.topic}/{partition}: {why}" for partition, why in sorted(self.paused.items()))
        return LogError(
            f"every partition is paused ({places})", cure=f"read the reasons in {DEAD_LETTERS}. {_PAUSED_CURE}"
        )


_PAUSED_CURE = (
    "Stop the producer that writes them, or run the release that can read them; then start the worker again. "
    "The dead letters hold the original bytes"
)


def _backoff(failures: int, error: AnchorwatchError, jitter: float) -> float:
    """Seconds to wait after so many failures in a row; `jitter` lies in [0, 1)."""
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10))
    if failures & (failures - 1) == 0:  # at 1, 2, 4, 8 … so that a long outage does not fill the log file
        _log.warning("waiting", problem=error.problem, cure=error.cure, failed_tries=failures)
    return longest * (0.5 + 0.5 * jitter)


def collect_rarely() -> None:
    """Have the garbage collector look for cycles seldom, in a process that does nothing but fold.

    What lives long there is cached states, which can't be part of one; to look after every 700 new objects would take a
    tenth of the worker's time.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


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
