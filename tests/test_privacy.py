"""No conversation text leaves the model's machine: marker strings in prompts and replies are looked for everywhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import structlog
from conftest import tiny_bundle
from prometheus_client import generate_latest

from collectors.publish import QueuePublisher
from collectors.spans import encode_prompt
from collectors.watch import watch
from monitor.axis.readout import Readout
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import EmbeddedLog
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
