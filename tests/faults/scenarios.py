"""What goes wrong, one function each: an installation, its traffic, a fault, and the checker's verdict on what is left.

Each takes a directory, a seed and how much to do, and raises AssertionError where a promise is broken. `test_faults`
runs them small, `soak` runs them long.
"""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import servers
from msgspec.structs import replace
from receiver import Answer, Receiver
from standardwebhooks import Webhook

from alerts.dispatcher import LEASE
from faults.cluster import Cluster, Process, installation, wait_for
from faults.collector import AXIS, read_times
from faults.history import Delivery, Report, Told
from faults.kills import Victim, kill_rounds
from monitor.actions import Paging, append_action
from monitor.control import calibration_message
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, Readout
from monitor.placement import partition_of
from monitor.stream.log import PROJECTIONS, Message

CONFIG = DetectorConfig(
    axis_id=AXIS,
    readout=Readout({"assistant_axis": 1.0, "poem": -0.2}),
    baselines={"shop": Baseline("shop", AXIS, 0.0, 1.0, -1.0, 1.0, 100, 1000)},
    boundaries=Boundaries(level=2.0, drop=2.5, cusum=4.0, dip=3.0),
)

SESSION_SECONDS = 6.0  # shorter, and Tansu does not take a crashed worker's partitions over
QUICK = {"KAFKA_SESSION_SECONDS": f"{SESSION_SECONDS:g}", "BATCH_SIZE": "50"}


class Outcome(NamedTuple):
    """How one scenario ended: what was done, what the checker found, and what else was measured."""

    name: str
    kills: int
    report: Report
    measured: Mapping[str, float] = {}

    def __str__(self) -> str:
        r = self.report
        more = "".join(f", {name} {value:.3g}" for name, value in self.measured.items())
        return (
            f"{self.name}: kills {self.kills}, events {r.events}, findings {r.findings}, deliveries {r.deliveries}, "
            f"lost {r.lost}, duplicated {r.duplicated}, forgotten by the broker {r.forgotten}{more}"
        )


class Forgetful:
    """A broker that forgets, when it is killed, what it acknowledged in the seconds before.

    Workers must not have folded any of that, or the store is right and the log wrong. So readers and writers are frozen
    until it has written down what it has; then the writers go on for a moment, and are lied to.
    """

    def __init__(self, broker: servers.Server, workers: list[Process], writers: list[Process]) -> None:
        self._broker = broker
        self._workers = workers
        self._writers = writers

    def kill(self) -> None:
        self._write_down()
        self._broker.kill()

    def stop(self) -> None:
        """In good order; it forgets what it acknowledges while it ends all the same."""
        self._write_down()
        self._broker.stop()

    def start(self) -> None:
        self._broker.start()
        for worker in self._workers:
            worker.thaw()

    def _write_down(self) -> None:
        for process in [*self._workers, *self._writers]:
            if process.running():
                process.freeze()
        time.sleep(2.5)
        for writer in self._writers:
            writer.thaw()
        time.sleep(0.3)


class Regrouped:
    """A worker at a broker that never lets go of a dead member: the broker is restarted in good order, too."""

    def __init__(self, worker: Process, broker: Forgetful) -> None:
        self._worker = worker
        self._broker = broker

    def kill(self) -> None:
        self._worker.kill()

    def start(self) -> None:
        self._broker.stop()
        self._broker.start()
        self._worker.start()


def kills(
    directory: Path,
    seed: int,
    *,
    rounds: int = 20,
    freezes: int = 0,
    broker: str | None = "tansu",
    redis: bool = True,
) -> Outcome:
    """SIGKILL of a random component at a random moment: worker, collector, dispatcher, Redis, and a durable broker.

    After that workers are frozen, so many times, as in `zombie`.
    """
    with installation(directory, CONFIG, broker=broker, redis=redis, **QUICK) as cluster:
        workers = [cluster.worker(number) for number in range(2 if broker else 1)]
        collectors = [
            cluster.collector("bow", seed=seed, conversations=16, turns=100_000),
            cluster.collector("stern", seed=seed, conversations=16, turns=100_000, skew=3.0, old_duplicates=0.01),
        ]
        dispatcher = cluster.dispatcher()
        victims: dict[str, Victim] = {process.name: process for process in [*workers, *collectors, dispatcher]}
        if broker == "noida":
            assert cluster.broker is not None
            victims = {p.name: p for p in [*collectors, dispatcher]}
            server, writers = cluster.broker, [*collectors, dispatcher]
            for worker in workers:
                others = [other for other in workers if other is not worker]
                victims[worker.name] = Regrouped(worker, Forgetful(server, others, writers))
            victims["broker"] = Forgetful(server, workers, writers)
        if cluster.redis:
            victims["redis"] = cluster.redis
        for process in [*workers, *collectors, dispatcher]:
            process.start()
        cluster.until_folded(100)
        died = kill_rounds(victims, rounds, seed)
        for number in range(freezes):
            outlive(cluster, workers[number % 2])
        cluster.until_folded(100)
        for collector in collectors:
            collector.stop(90.0)
        cluster.settle()
        report = cluster.examine(forgetful=broker == "noida").insist()
    return Outcome(f"kills/{broker or 'embedded'}", died.total(), report)


def dispatcher_kills(directory: Path, seed: int, *, rounds: int = 20) -> Outcome:
    """SIGKILL of the dispatcher, again and again, while a receiver writes down what it is sent, and is busy at times.

    Every alert is delivered at least once, with a valid signature, and never under a second id.
    """
    chance = random.Random(seed)
    hook = Receiver()
    hook.answer = lambda request: Answer(503) if chance.random() < 0.1 else Answer(delay=chance.random() * 0.01)
    try:
        with installation(directory, CONFIG, broker=None, redis=False, **QUICK) as cluster:
            cluster.worker().start()
            collector = cluster.collector("bow", seed=seed, conversations=40, turns=100_000).start()
            with cluster.opened() as (log, _):
                append_action(log, "paging", "mode", Paging("live"), by="faults")
            dispatcher = cluster.webhook(hook.url).start()
            cluster.until_folded(100)
            victims: dict[str, Victim] = {"dispatcher": Successor(directory / "store.db", dispatcher)}
            died = kill_rounds(victims, rounds, seed, longest_life=3.0, longest_death=0.1)
            collector.stop(90.0)
            cluster.settle()
            signed = Webhook((directory / "secret").read_text())
            deliveries = []
            for one in hook.received:
                signed.verify(one.body.decode(), one.headers)
                told = tuple(_told(alert) for alert in one.json["alerts"])
                deliveries.append(Delivery(one.headers["webhook-id"], one.body, told))
            report = cluster.examine(deliveries=deliveries).insist()
    finally:
        hook.close()
    return Outcome("dispatcher kills/embedded", died.total(), report)


class Successor:
    """A dispatcher whose lease is gone when it is started again, so that it need not wait until the lease ends."""

    def __init__(self, store: Path, dispatcher: Process) -> None:
        self._store = store
        self._dispatcher = dispatcher

    def kill(self) -> None:
        self._dispatcher.kill()

    def start(self) -> None:
        with contextlib.closing(sqlite3.connect(self._store, timeout=30.0)) as connection, connection:
            connection.execute("DELETE FROM leases WHERE name = ?", (LEASE,))
        self._dispatcher.start()


def _told(alert: Mapping[str, Any]) -> Told:
    over = alert["status"] == "resolved"
    return Told(alert["labels"]["episode_id"], "resolved" if over else alert["labels"]["severity"])


def zombie(
    directory: Path, seed: int, *, freezes: int = 3, broker: str | None = "tansu", redis: bool = True
) -> Outcome:
    """A worker is frozen past its session timeout, another takes over, and the first one wakes in mid-batch."""
    chance = random.Random(seed)
    with installation(directory, CONFIG, broker=broker, redis=redis, **QUICK) as cluster:
        workers = [cluster.worker(number) for number in range(2)]
        collector = cluster.collector("bow", seed=seed, conversations=40, turns=100_000, pause=0.001)
        for process in [*workers, collector]:
            process.start()
        cluster.until_folded(100)
        for number in range(freezes):
            time.sleep(chance.uniform(0.1, 0.6))
            outlive(cluster, workers[number % 2])
        collector.stop(90.0)
        cluster.settle()
        report = cluster.examine().insist()
        for worker in workers:
            assert worker.stop() == 0, worker.tail()
    return Outcome(f"zombie/{broker or 'embedded'}", freezes, report)


def outlive(cluster: Cluster, worker: Process) -> None:
    """Freeze a worker until the others have taken over all that it had, and wake it."""
    worker.freeze()
    before = cluster.ends()
    wait_for(lambda: cluster.beyond(before), 60.0, cluster.tails)
    worker.thaw()


def store_away(directory: Path, seed: int, *, seconds: float = 10.0, broker: str = "tansu") -> Outcome:
    """Redis is killed, stopped for a while, frozen, and wiped: nothing is lost, and nobody is paged again."""
    with installation(directory, CONFIG, broker=broker, **QUICK) as cluster:
        assert cluster.redis is not None
        workers = [cluster.worker(number).start() for number in range(2)]
        collector = cluster.collector("bow", seed=seed, conversations=20, turns=100_000).start()
        dispatcher = cluster.dispatcher().start()
        cluster.until_folded(200)
        cluster.redis.kill()
        time.sleep(seconds)
        cpu = [worker.cpu_seconds() for worker in workers]
        time.sleep(1.0)
        spun = max(after.cpu_seconds() - before for after, before in zip(workers, cpu, strict=True))
        cluster.redis.start()
        cluster.until_folded(200)
        cluster.redis.freeze()
        time.sleep(min(seconds, 3.0))
        cluster.redis.thaw()
        collector.stop(90.0)
        cluster.settle()
        first = cluster.examine().insist()
        told = cluster.deliveries() or []
        assert all(worker.running() for worker in [*workers, dispatcher]), cluster.tails()
        assert spun < 0.5, f"a worker spun for {spun} of a second while Redis was away"
        cluster.redis.wipe()
        cluster.redis.start()
        cluster.settle()
        again = cluster.examine().insist()
        assert again.events == first.events and again.findings == first.findings
        after = cluster.deliveries() or []
        assert sorted(after) == sorted(told), "somebody was paged again after the store had been wiped"
    return Outcome(f"store away/{broker}", 2, again, {"cpu_while_away": spun})


def broker_away(directory: Path, seed: int, *, seconds: float = 10.0, when_full: str = "spool") -> Outcome:
    """The broker is killed and comes back: the collector never waits, its memory is bounded, what it kept is sent."""
    with installation(directory, CONFIG, broker="noida", **QUICK, KAFKA_APPEND_SECONDS="3") as cluster:
        assert cluster.broker is not None
        worker = cluster.worker().start()
        # With a spool, the queue holds what comes while one append waits for its answer.
        queue = {"QUEUE_SIZE": "500"} if when_full != "spool" else {"SPOOL_DIR": str(directory / "spool")}
        collector = cluster.collector(
            "bow", {"WHEN_FULL": when_full, **queue}, seed=seed, conversations=50, turns=100_000
        ).start()
        cluster.until_folded(300)
        time.sleep(2.0)
        there = collector.rss_mb()
        Forgetful(cluster.broker, [worker], [collector]).kill()
        gone = time.monotonic()
        time.sleep(seconds)
        away = collector.rss_mb()
        back = time.monotonic()
        cluster.broker.start()
        worker.thaw()
        time.sleep(1.0)
        collector.stop(90.0)
        cluster.settle()
        report = cluster.examine(forgetful=True).insist()
        end = json.loads(collector.says().splitlines()[-1])
        if when_full == "spool":
            assert end["flushed"] and not end["dropped"], collector.tail()
        elif seconds > 5.0:
            assert end["dropped"] > 0, "a queue of 500 holds no outage of that length: drops were not counted"
        times = read_times(directory / "journals" / "bow.times")
        before = sorted(took for at, took in times if at < gone - 1.0)
        during = sorted(took for at, took in times if gone + 0.5 < at < back)
        assert len(before) > 50 and len(during) > 50
        assert during[-1] < 0.25, f"publish waited for {during[-1]:.3f} s while the broker was away"
        assert away - there < 40.0, f"memory rose from {there:.0f} to {away:.0f} MiB while the broker was away"
        median = [part[len(part) // 2] for part in (before, during)]
        high = [part[len(part) * 99 // 100] for part in (before, during)]
    return Outcome(
        f"broker away/{when_full}",
        1,
        report,
        {
            "publish_p50_ratio": median[1] / median[0],
            "publish_p99_ratio": high[1] / high[0],
            "rss_mb_before": there,
            "rss_mb_away": away,
            "dropped": end["dropped"],
        },
    )


def full_disk(directory: Path, seed: int, *, megabytes: int = 3) -> Outcome:
    """The disk under the spool fills up while the broker is away: drops are counted, and all that was kept is sent.

    A file system of that size is mounted for the collector alone.
    """
    with installation(directory, CONFIG, broker="noida", **QUICK, KAFKA_APPEND_SECONDS="3") as cluster:
        assert cluster.broker is not None
        worker = cluster.worker().start()
        disk = directory / "disk"
        disk.mkdir()
        collector = cluster.collector(
            "bow",
            {"WHEN_FULL": "spool", "SPOOL_DIR": str(disk / "spool"), "QUEUE_SIZE": "500"},
            seed=seed,
            conversations=50,
            turns=100_000,
            pause=0.0002,
        )
        mount = f'mount -t tmpfs -o size={megabytes}m none "$0" && exec "$@"'
        collector.command = ["unshare", "-Urm", "sh", "-c", mount, str(disk), *collector.command]
        collector.start()
        cluster.until_folded(100)
        Forgetful(cluster.broker, [worker], [collector]).kill()
        wait_for(lambda: "the spool takes no more" in collector.says(), 60.0, cluster.tails)
        time.sleep(1.0)
        assert collector.running(), collector.tail()
        cluster.broker.start()
        worker.thaw()
        time.sleep(2.0)
        collector.stop(90.0)
        cluster.settle()
        report = cluster.examine(forgetful=True).insist()
        end = json.loads(collector.says().splitlines()[-1])
        assert end["dropped"] > 0 and end["flushed"], collector.tail()
        kept = sum(len(collector.acknowledged) for collector in cluster.produced())
        offered = sum(len(set(collector.offered)) for collector in cluster.produced())
        assert kept + end["dropped"] >= offered, f"{offered} offered, {kept} acknowledged, {end['dropped']} dropped"
    return Outcome("full disk", 1, report, {"dropped": end["dropped"]})


def poison(directory: Path, seed: int, *, turns: int = 30, broker: str | None = "tansu") -> Outcome:
    """Poison of every kind among sound traffic never stops the line."""
    with installation(directory, CONFIG, broker=broker, redis=bool(broker), **QUICK) as cluster:
        kinds = ["poison", "unknown_version", *(["misplaced"] if broker else [])]
        sound = [cluster.collector(name, seed=seed, conversations=30, turns=turns) for name in ("bow", "stern")]
        foreign = [
            cluster.collector(kind, seed=seed, conversations=3, turns=max(2, turns // 4), pause=0.02, foreign=kind)
            for kind in kinds
        ]
        worker = cluster.worker()
        for process in [worker, *sound, *foreign]:
            process.start()
        for process in [*sound, *foreign]:
            assert process.ended(120.0) == 0, process.tail()
        cluster.settle()
        assert worker.running(), worker.tail()
        report = cluster.examine().insist()
        reasons = cluster.dead_letter_reasons()
        wanted = {"undecodable", "wrong_partition"} if broker else {"undecodable"}
        assert wanted <= reasons, reasons
    return Outcome(f"poison/{broker or 'embedded'}", 0, report)


def all_poison(directory: Path, seed: int) -> Outcome:
    """One partition gets nothing but poison: it is paused loudly, and the others go on."""
    with installation(directory, CONFIG, broker="tansu", partitions=3, **QUICK) as cluster:
        worker = cluster.worker().start()
        sound = cluster.collector("bow", seed=seed, conversations=30, turns=20).start()
        assert sound.ended(60.0) == 0
        cluster.settle()
        key = "bow-0"
        sick = partition_of(key, 3)
        with cluster.opened() as (log, _):
            log.append(PROJECTIONS, [Message(key, b"%d is no projection" % number) for number in range(400)])
        wait_for(lambda: "partition paused" in worker.says(), 30.0, cluster.tails)
        after = cluster.collector("stern", seed=seed, conversations=30, turns=20).start()
        assert after.ended(60.0) == 0
        others = [partition for partition in range(3) if partition != sick]
        wait_for(lambda: cluster.behind(others) == 0, 60.0, cluster.tails)
        assert worker.running() and cluster.behind([sick]) > 0
        with cluster.opened() as (_, store):
            stands = store.position(PROJECTIONS, sick).offset
        report = cluster.examine(through={sick: stands}, believed=False).insist()
        paused = next(json.loads(line) for line in worker.says().splitlines() if "partition paused" in line)
        assert paused["level"] == "critical" and paused["cure"]
        # All of them: then there is nothing left to do, and it ends loudly.
        with cluster.opened() as (log, _):
            for partition in range(3):
                rows = [Message(key, b"nothing", partition=partition) for _ in range(200)]
                log.append(PROJECTIONS, rows)
        assert worker.ended(30.0) == 2 and "every partition is paused" in worker.says(), worker.tail()
    return Outcome("100 % poison", 0, report)


def strange_traffic(directory: Path, seed: int, *, turns: int = 120, broker: str | None = None) -> Outcome:
    """Clocks apart by minutes, duplicates at once and much later, branches, late turns, a later minor version."""
    with installation(directory, CONFIG, broker=broker, redis=bool(broker), **QUICK) as cluster:
        worker = cluster.worker().start()
        odd: dict[str, Any] = {"duplicates": 0.1, "old_duplicates": 0.05, "branches": 0.05, "late": 0.05}
        collectors = [
            cluster.collector("bow", seed=seed, conversations=6, turns=turns, skew=-240.0, **odd).start(),
            cluster.collector("stern", seed=seed, conversations=6, turns=turns, skew=240.0, **odd).start(),
            cluster.collector("later", seed=seed, conversations=6, turns=turns, minor=True).start(),
        ]
        for collector in collectors:
            assert collector.ended(120.0) == 0, collector.tail()
        cluster.settle()
        report = cluster.examine().insist()
        with cluster.opened() as (_, store):
            counts = store.counts()
        assert {"duplicate", "branch", "late", "folded"} <= counts.keys(), counts
        assert "dead_letter" not in counts, counts
        assert worker.stop() == 0, worker.tail()
    return Outcome(f"strange traffic/{broker or 'embedded'}", 0, report)


def long_and_flooded(directory: Path, seed: int, *, turns: int = 10_000, broker: str | None = None) -> Outcome:
    """A conversation of 10,000 turns, and one collector that does nothing but flood one conversation."""
    with installation(directory, CONFIG, broker=broker, redis=bool(broker), KAFKA_SESSION_SECONDS="6") as cluster:
        worker = cluster.worker().start()
        flood = cluster.collector(
            "flood", {"WHEN_FULL": "block"}, seed=seed, conversations=1, turns=turns, pause=0.0
        ).start()
        quiet = cluster.collector("quiet", seed=seed, conversations=20, turns=20).start()
        for collector in (flood, quiet):
            assert collector.ended(180.0) == 0, collector.tail()
        cluster.settle()
        report = cluster.examine().insist()
        rss = worker.rss_mb()
        assert rss < 400.0, f"the worker holds {rss:.0f} MiB"
    return Outcome(f"10,000 turns/{broker or 'embedded'}", 0, report, {"worker_rss_mb": rss})


def calibrations(directory: Path, seed: int, *, changes: int = 3, broker: str | None = "tansu") -> Outcome:
    """The calibration changes while traffic flows and workers come and go with older ones on their command line."""
    with installation(directory, CONFIG, broker=broker, redis=bool(broker), **QUICK) as cluster:
        workers = [cluster.worker(number).start() for number in range(2 if broker else 1)]
        collector = cluster.collector("bow", seed=seed, conversations=30, turns=100_000).start()
        cluster.until_folded(100)
        stricter = [
            replace(CONFIG, boundaries=replace(CONFIG.boundaries, level=1.2 + 0.01 * number))
            for number in range(changes)
        ]
        for number, config in enumerate(stricter):
            with cluster.opened() as (log, store):
                places = range(log.partitions(PROJECTIONS))
                log.append(PROJECTIONS, [calibration_message(config, partition) for partition in places])
                # A rolling restart: what the command line says is still the first one.
                restarted = workers[number % len(workers)]
                assert restarted.stop() == 0, restarted.tail()
                restarted.start()
                wait_for(
                    lambda id=config.config_id: id in {found.config_id for found in store.findings(1000)},
                    told=cluster.tails,
                )
        collector.stop(90.0)
        cluster.settle()
        report = cluster.examine().insist()
    return Outcome(f"calibrations/{broker or 'embedded'}", changes, report)


def swapping(directory: Path, seed: int, *, seconds: float = 20.0, broker: str = "tansu") -> Outcome:
    """A third worker comes and goes every second, so that partitions change hands all the time."""
    with installation(directory, CONFIG, broker=broker, **QUICK) as cluster:
        for number in range(2):
            cluster.worker(number).start()
        guest = cluster.worker(2)
        collector = cluster.collector("bow", seed=seed, conversations=40, turns=100_000).start()
        cluster.until_folded(100)
        ends, swaps = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            guest.start()
            time.sleep(1.5)
            guest.stop()
            swaps += 1
            time.sleep(0.5)
        collector.stop(90.0)
        cluster.settle()
        report = cluster.examine().insist()
    return Outcome(f"swapping/{broker}", swaps, report)


def grown_topic(directory: Path, seed: int, *, broker: str = "noida") -> Outcome:
    """Somebody adds partitions to the topic: the worker stops loudly with the cure, and has split no conversation."""
    from kafka.admin import KafkaAdminClient

    with installation(directory, CONFIG, broker=broker, partitions=2, **QUICK) as cluster:
        assert cluster.broker is not None
        worker = cluster.worker().start()
        collector = cluster.collector("bow", seed=seed, conversations=30, turns=20).start()
        assert collector.ended(60.0) == 0
        cluster.settle()
        report = cluster.examine().insist()
        admin = KafkaAdminClient(bootstrap_servers=cluster.broker.address)
        try:
            admin.create_partitions({PROJECTIONS: 4})
        finally:
            admin.close()
        more = cluster.collector("stern", seed=seed, conversations=30, turns=20).start()
        assert more.ended(60.0) == 0
        loud = worker.ended(90.0)
        assert loud == 2 and "cure" in worker.tail(), worker.tail()
    return Outcome(f"partitions added/{broker}", 0, report)


def topic_made_anew(directory: Path, seed: int, *, broker: str = "tansu") -> Outcome:
    """The topic is deleted and made anew under a running worker: a loud stop with the cure, now and at each start."""
    from kafka.admin import KafkaAdminClient

    with installation(directory, CONFIG, broker=broker, partitions=2, **QUICK) as cluster:
        assert cluster.broker is not None
        worker = cluster.worker().start()
        collector = cluster.collector("bow", seed=seed, conversations=30, turns=20).start()
        assert collector.ended(60.0) == 0
        cluster.settle()
        report = cluster.examine().insist()
        admin = KafkaAdminClient(bootstrap_servers=cluster.broker.address)
        try:
            admin.delete_topics([PROJECTIONS])
            time.sleep(1.0)
        finally:
            admin.close()
        cluster.create_topics()
        # More than there was: offsets alone would not tell.
        more = cluster.collector("stern", seed=seed, conversations=40, turns=40, pause=0.0).start()
        assert more.ended(60.0) == 0, more.tail()
        assert worker.ended(90.0) == 2 and "cure" in worker.tail(), worker.tail()
        again = cluster.worker(1).start()
        assert again.ended(90.0) == 2 and "cure" in again.tail(), again.tail()
    return Outcome(f"topic made anew/{broker}", 0, report)
