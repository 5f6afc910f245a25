"""How many responses a worker judges: Kafka → fold → Redis, beside a bare poll-and-parse loop on the same topic.

    python -m benchmarks.stream --json                       one worker, on the broker that keeps its log on disk
    python -m benchmarks.stream --json --broker tansu        on the one that keeps it in memory
    python -m benchmarks.stream --json --workers 2           two of them, each a process

Everything is real: the broker, Redis with its append-only file, the worker's own loop. The topic is filled beforehand,
so that nothing else works meanwhile, with responses of 100,000 conversations as the shipped bundle's collector sends
them, CloudEvents headers and all; one in a hundred makes a finding. The bare loop is kafka-python's own `poll` with the
worker's own limits, the worker's own decoder, and nothing else. Both run in a process of their own, by turns, over the
whole topic.

The clock runs from the moment a position is sought to the last commit; starting up and joining the group are left out.
CPU seconds are the worker process's own, without broker and Redis. With `--workers N` the clock runs from the first
position that any of them sought to the last commit of all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.load import Traffic, servers
from monitor import telemetry
from monitor.detect.baseline import DetectorConfig
from monitor.envelope import message_of
from monitor.events import decode_projection
from monitor.store import open_store
from monitor.stream import open_log, open_subscription, open_topics
from monitor.stream.log import Batch, Message, Subscription
from monitor.stream.topics import TopicSpec
from monitor.worker import Worker, collect_rarely

TOPIC = "benchmark.projections"
PARTITIONS = 8
PRODUCED = 2000  # records in one append
BATCH = 500  # the worker's default
QUIET_SECONDS = 5.0  # so long without a record means that the topic has been read


def run(
    broker: str = "noida", *, conversations: int = 100_000, turns: int = 2, workers: int = 1, rounds: int = 2
) -> dict[str, Any]:
    """Fill a topic, read it bare and read it for good by turns, and return what `--json` prints."""
    with tempfile.TemporaryDirectory(prefix="anchorwatch-stream-") as scratch:
        kafka, redis = (
            servers.broker(broker, Path(scratch) / "kafka"),
            servers.redis(Path(scratch) / "redis", "--appendfsync", "everysec"),
        )
        try:
            kafka.start()
            redis.start()
            traffic = Traffic(conversations, turns=turns)
            (Path(scratch) / "config.json").write_bytes(traffic.config.to_json())
            size = _fill(f"kafka://{kafka.address}", traffic)
            bare, judged = [], []
            for number in range(rounds):
                bare.append(_race("bare", 1, kafka, redis, scratch, len(traffic), f"bare-{number}"))
                judged.append(_race("worker", workers, kafka, redis, scratch, len(traffic), f"worker-{number}"))
                findings = _findings(redis)
        finally:
            redis.kill()
            kafka.kill()
    rate = statistics.median([one["rate"] for one in judged])
    bare_rate = statistics.median([one["rate"] for one in bare])
    return {
        "responses_per_second": round(rate),
        "bare_loop_per_second": round(bare_rate),
        "ratio": round(rate / bare_rate, 3),
        "workers": workers,
        "broker": broker,
        "cpu_seconds_per_million": round(statistics.median([one["cpu"] for one in judged]) / len(traffic) * 1e6, 1),
        "bare_cpu_seconds_per_million": round(statistics.median([one["cpu"] for one in bare]) / len(traffic) * 1e6, 1),
        "rss_mb": round(max(one["rss"] for one in judged) / 2**20),
        "rounds": [[round(one["rate"]) for one in pair] for pair in zip(bare, judged, strict=True)],
        "responses": len(traffic),
        "conversations": conversations,
        "findings": findings,
        "event_bytes": size,
        "partitions": PARTITIONS,
        "cores": os.cpu_count(),
    }


def _fill(url: str, traffic: Traffic) -> int:
    """Write all responses to the topic; returns the mean size of a record's value."""
    topics = open_topics(url)
    assert topics is not None
    topics.create([TopicSpec(name=TOPIC, partitions=PARTITIONS, replication=1, config={})])
    topics.close()
    log = open_log(url)
    waiting: list[Message] = []
    size = 0
    try:
        for projection in traffic.responses():
            waiting.append(message_of(projection))
            size += len(waiting[-1].value)
            if len(waiting) == PRODUCED:
                log.append(TOPIC, waiting)
                waiting.clear()
        log.append(TOPIC, waiting)
    finally:
        log.close()
    return round(size / len(traffic))


def _race(
    role: str, processes: int, kafka: servers.Server, redis: servers.Server, scratch: str, total: int, group: str
) -> dict[str, float]:
    """Let so many processes read the topic to its end; responses a second, CPU seconds, largest resident set."""
    store = f"{servers.redis_url(redis)}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.stream",
        "--role",
        role,
        f"kafka://{kafka.address}",
        store,
        group,
        scratch,
    ]
    if role == "worker":
        _empty(redis)
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    reports = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    handled = sum(report["handled"] for report in reports)
    if handled != total:
        raise SystemExit(f"{role}: {handled} of {total} responses were read: the figure would mean nothing")
    seconds = max(report["last"] for report in reports) - min(report["first"] for report in reports)
    return {"rate": total / seconds, "cpu": sum(r["cpu"] for r in reports), "rss": max(r["rss"] for r in reports)}


class _Timed:
    """A subscription that notes when it was told where to begin, and when all that it gave out had been committed; and
    stops its worker when nothing has come for a while."""

    def __init__(self, inner: Subscription, stop: threading.Event) -> None:
        self.first = self.last = 0.0
        self.cpu_at_first = self.cpu_at_last = 0.0
        self._open = 0  # polls until all is committed: the worker settles a batch while it folds the next one
        self._inner = inner
        self._stop = stop
        self.assigned, self.rest, self.close = inner.assigned, inner.rest, inner.close

    def seek(self, partition: int, offset: int) -> None:
        if not self.first:
            self.first, self.cpu_at_first = time.time(), time.process_time()
        self._inner.seek(partition, offset)

    def poll(self, limit: int, timeout: float) -> list[Batch]:
        if self._open:
            self.last, self.cpu_at_last = time.time(), time.process_time()
            self._open -= 1
        batches = self._inner.poll(limit, timeout)
        if batches:
            self._open = 2
        elif self.last and time.time() - self.last > QUIET_SECONDS:
            self._stop.set()
        return batches


def _work(url: str, store_url: str, group: str, config: DetectorConfig) -> dict[str, float]:
    """The worker's own loop, to the end of the topic."""
    log, store, stop = open_log(url), open_store(store_url), threading.Event()
    timed = _Timed(open_subscription(url, log, TOPIC, group), stop)
    before = _responses()
    collect_rarely()
    Worker(log, store, config, subscription=timed, topic=TOPIC, batch_size=BATCH).run(stop)
    timed.close()
    return {
        "first": timed.first,
        "last": timed.last,
        "handled": _responses() - before,
        "cpu": timed.cpu_at_last - timed.cpu_at_first,
    }


def _responses() -> float:
    return sum(
        sample.value
        for family in telemetry.RESPONSES.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )


def _read_bare(address: str, config: DetectorConfig) -> dict[str, float]:
    """kafka-python's own poll, and the worker's decoder."""
    from kafka import KafkaConsumer, TopicPartition

    from monitor.stream.kafka.log import FETCH_BYTES, LARGEST_ANSWER_BYTES

    consumer = KafkaConsumer(
        bootstrap_servers=address,
        enable_auto_commit=False,
        group_id=None,
        max_poll_records=BATCH,
        fetch_max_bytes=FETCH_BYTES,
        receive_message_max_bytes=LARGEST_ANSWER_BYTES,
    )
    consumer.assign([TopicPartition(TOPIC, partition) for partition in range(PARTITIONS)])
    consumer.seek_to_beginning()
    first, cpu_first = time.time(), time.process_time()
    last, handled = 0.0, 0
    while not last or time.time() - last < QUIET_SECONDS:
        polled = consumer.poll(timeout_ms=200)
        for records in polled.values():
            for record in records:
                handled += decode_projection(record.value).axis_id == config.axis_id
        if polled:
            last, cpu = time.time(), time.process_time()
    consumer.close()
    return {"first": first, "last": last, "handled": handled, "cpu": cpu - cpu_first}


def _empty(redis: servers.Server) -> None:
    subprocess.run(["redis-cli", "-p", str(redis.port), "flushall"], check=True, stdout=subprocess.DEVNULL)


def _findings(redis: servers.Server) -> int:
    store = open_store(servers.redis_url(redis))
    try:
        return len(store.pending(10**9))
    finally:
        store.close()


def _play(role: str, url: str, store_url: str, group: str, scratch: str) -> None:
    """A child process's part."""
    config = DetectorConfig.from_json((Path(scratch) / "config.json").read_bytes())
    report = (
        _work(url, store_url, group, config) if role == "worker" else _read_bare(url.removeprefix("kafka://"), config)
    )
    report["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(report))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--broker", choices=["noida", "tansu"], default="noida")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--role", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role:
        _play(*chosen.role)
        return
    result = run(
        chosen.broker,
        conversations=chosen.conversations,
        turns=chosen.turns,
        workers=chosen.workers,
        rounds=chosen.rounds,
    )
    if chosen.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<26} {value}")


if __name__ == "__main__":
    main()
