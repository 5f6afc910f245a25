"""No conversation text leaves the model's machine: marker strings in prompts and replies are looked for everywhere."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import servers
import structlog
from conftest import tiny_bundle
from faults.cluster import installation, wait_for
from faults.history import records
from prometheus_client import generate_latest

from collectors.publish import QueuePublisher
from collectors.spans import encode_prompt
from collectors.watch import watch
from monitor.axis.readout import Readout
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS, EmbeddedLog, Message
from monitor.telemetry import REGISTRY
from monitor.worker import Worker

MARKERS = ("XQZPROMPTXQZ", "XQZSYSTEMXQZ", "XQZCALLERXQZ")


def watched_turn(llama: Any, tokenizer: Any, publisher: Any, bundle: Any, *, caller: str | None) -> str:
    """One watched reply to a prompt that is full of markers; returns what was said."""
    talk = [{"role": "system", "content": MARKERS[1]}, {"role": "user", "content": f"Say {MARKERS[0]}, please."}]
    inputs = tokenizer.pad({"input_ids": [encode_prompt(tokenizer, talk)]}, return_tensors="pt")
    with (
        watch(llama, tokenizer, bundle, publisher, installation_key=b"k" * 32) as watched,
        watched.identify(caller=caller),
    ):
        output = llama.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_neither_prompt_nor_reply_nor_caller_is_in_log_store_metrics_or_log_lines(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle(llama, tokenizer)
    config = DetectorConfig(
        axis_id=bundle.id,
        readout=Readout({"assistant_axis": 1.0}),
        baselines={"tiny": Baseline("tiny", bundle.id, 100.0, 1.0, 100.0, 1.0, 2, 2)},
        boundaries=Boundaries(1.0, 1.0, 1.0, 1.0),
    )
    lines = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(lines))
    try:
        log, store = EmbeddedLog(tmp_path / "log.db"), SqliteStore(tmp_path / "store.db")
        with QueuePublisher(log) as publisher:
            said = watched_turn(llama, tokenizer, publisher, bundle, caller=MARKERS[2])
        worker = Worker(log, store, config)
        while worker.run_once():
            pass
        assert store.counts()["folded"] == 1
        assert store.findings(10), "the response was so far off that something must have been told about it"
        log.close()
        store.close()
    finally:
        structlog.reset_defaults()
    written = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert b"assistant_axis" in written, "the search would find what is there"
    everywhere = written + generate_latest(REGISTRY) + lines.getvalue().encode()
    for marker in (*MARKERS, *{word for word in said.split() if len(word) >= 6}):
        assert marker.encode() not in everywhere, marker


def test_a_failing_measurement_logs_no_text(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Refuses:
        def publish(self, projection: Any) -> bool:
            raise RuntimeError(f"can't take {MARKERS[0]}")

    lines = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(lines))
    try:
        watched_turn(llama, tokenizer, Refuses(), tiny_bundle(llama, tokenizer), caller=None)
    finally:
        structlog.reset_defaults()
    assert "RuntimeError" in lines.getvalue()
    assert not any(marker in lines.getvalue() for marker in MARKERS)


def everything_in_redis(url: str) -> bytes:
    """Every key with its value as it is stored, uncompressed."""
    redis = pytest.importorskip("redis")
    with redis.Redis.from_url(url) as client:
        client.config_set("rdbcompression", "no")
        return b"\n".join(key + b" " + (client.dump(key) or b"") for key in client.keys("*"))


def everything_in_topics(log: Any) -> bytes:
    """Keys, values and headers of all records of all topics."""
    found = []
    for topic in (PROJECTIONS, DEAD_LETTERS, ACTIONS):
        for partition in range(log.partitions(topic)):
            for record in records(log, topic, partition):
                found += [record.key.encode(), record.value, *(n.encode() + b"=" + v for n, v in record.headers)]
    return b"\n".join(found)


def test_neither_is_in_kafka_redis_what_is_delivered_log_lines_or_metrics(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle(llama, tokenizer)
    config = DetectorConfig(
        axis_id=bundle.id,
        readout=Readout({"assistant_axis": 1.0}),
        baselines={"tiny": Baseline("tiny", bundle.id, 100.0, 1.0, 100.0, 1.0, 2, 2)},
        boundaries=Boundaries(1.0, 1.0, 1.0, 1.0),
    )
    spoiled = "XQZPOISONXQZ"
    metrics = servers.free_port()
    lines = io.StringIO()
    with installation(tmp_path, config, broker="noida", LOG_LEVEL="debug") as cluster:
        cluster.worker(METRICS_PORT=str(metrics)).start()
        cluster.dispatcher().start()
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(lines))
        try:
            with cluster.opened() as (log, store), QueuePublisher(log) as publisher:
                said = [
                    watched_turn(llama, tokenizer, publisher, bundle, caller=f"{MARKERS[2]}{number}")
                    for number in range(3)
                ]
                assert publisher.flush()
                # What a broken collector writes must be kept for whoever mends it, but shown to nobody else.
                poison = f'{{"id": "{spoiled}", "time": "{spoiled}"'.encode()
                log.append(PROJECTIONS, [Message("somebody", poison)])
                log.append(PROJECTIONS, [Message(spoiled, poison)])
                wait_for(lambda: store.counts().get("folded") == 3 and store.counts().get("dead_letter") == 2)
                cluster.settle()
                assert cluster.deliveries(), "the responses were so far off that something must have been told"
                in_topics = everything_in_topics(log)
        finally:
            structlog.reset_defaults()
        assert cluster.redis is not None
        in_redis = everything_in_redis(servers.redis_url(cluster.redis))
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
            in_metrics = answer.read() + generate_latest(REGISTRY)
        cluster.end()
        on_disk = b"".join(path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file())
        alert = next(told.alert for delivery in cluster.deliveries() or [] for told in delivery.told)
    for place in (in_topics, in_redis, on_disk):
        assert alert.encode() in place, "the search would find what is there"
    assert b"anchorwatch_" in in_metrics
    told = lines.getvalue().encode() + b"".join(process.says().encode() for process in cluster.processes.values())
    assert b"dead letters" in told
    assert spoiled.encode() in in_topics
    for place in (in_redis, in_metrics, told, b"".join(one.body for one in cluster.deliveries() or [])):
        assert spoiled.encode() not in place
    for marker in (*MARKERS, *{word for text in said for word in text.split() if len(word) >= 6}):
        assert marker.encode() not in in_topics + in_redis + in_metrics + told + on_disk, marker
