"""How many bytes a response costs on the wire and in Kafka: real events in real record batches, by every codec.

    python -m benchmarks.events --json

The events are those that the shipped bundle's collector measured while the develop scripts were played, with ids as
long as a service's (36 characters), in no order, since neighbours in a partition belong to different conversations.
They travel as the publisher sends them: canonical JSON, CloudEvents headers, the conversation as key; packed by
kafka-python's own batch builder. How well a batch compresses depends on how many responses share it, so each codec is
tried with batches of 1, 10 and 100. CPU seconds are the producer's, per million responses.

lz4 is measured where the package `lz4` is installed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from kafka import codec
from kafka.record.default_records import DefaultRecordBatchBuilder as Builder
from msgspec.structs import replace

from monitor.axis.bundle import resolve_bundle
from monitor.envelope import message_of
from monitor.events import Projection, decode_projection, now_utc
from monitor.stream.log import Message

CODECS = {
    "none": (Builder.CODEC_NONE, lambda: True),
    "gzip": (Builder.CODEC_GZIP, codec.has_gzip),
    "lz4": (Builder.CODEC_LZ4, codec.has_lz4),
    "zstd": (Builder.CODEC_ZSTD, codec.has_zstd),
}
RESPONSES_IN_A_BATCH = (1, 10, 100)


def run(events: int = 1500) -> dict[str, Any]:
    """Pack so many real events in every way, and return what `--json` prints."""
    projections = list(recorded(events))
    messages = [message_of(one) for one in projections]
    batches: dict[str, dict[str, float]] = {}
    cpu: dict[str, dict[str, float]] = {}
    for name, (number, available) in CODECS.items():
        if available():
            batches[name], cpu[name] = {}, {}
            for size in RESPONSES_IN_A_BATCH:
                started = time.process_time()
                packed = [pack(messages[at : at + size], number) for at in range(0, len(messages), size)]
                seconds = time.process_time() - started
                batches[name][str(size)] = round(sum(packed) / len(messages), 1)
                cpu[name][str(size)] = round(seconds / len(messages) * 1e6, 1)
    return {
        "value_bytes": round(statistics.mean(len(one.value) for one in messages), 1),
        "header_bytes": round(statistics.mean(sum(len(k) + len(v) for k, v in one.headers) for one in messages), 1),
        "coordinates": round(statistics.mean(len(one.coordinates) for one in projections), 1),
        "kafka_bytes": batches,
        "cpu_seconds_per_million": cpu,
        "events": len(messages),
    }


def recorded(count: int) -> Iterator[Projection]:
    """Up to `count` real responses, in no order, each conversation under an id of its own."""
    path = resolve_bundle("smollm2") / "develop.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    random.Random(0).shuffle(lines)
    for line in lines[:count]:
        one = decode_projection(line)
        conversation = uuid.uuid5(uuid.NAMESPACE_OID, one.conversation_id)
        yield replace(one, conversation_id=str(conversation), id=str(uuid.uuid4()), time=now_utc())


def pack(messages: Sequence[Message], codec_number: int) -> int:
    """Bytes of one record batch, as it is sent and as the broker keeps it."""
    builder = Builder(
        magic=2,
        compression_type=codec_number,
        is_transactional=False,
        producer_id=1,
        producer_epoch=0,
        base_sequence=0,
        batch_size=1 << 20,
    )
    for offset, one in enumerate(messages):
        assert builder.append(offset, 1_700_000_000_000 + offset, one.key.encode(), one.value, list(one.headers))
    return len(builder.build())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(json.dumps(run(options.events), indent=None if options.json else 2))


if __name__ == "__main__":
    main()
