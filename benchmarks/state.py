"""What an idle conversation costs in Redis, and what a batch costs to commit and to load.

    python -m benchmarks.state --json

A real redis-server is filled by the real fold through the store: responses as the shipped bundle's collector sends
them, conversations with 36-character ids and 8 turns each, one in a hundred with a finding that has been told.
`bytes_per_conversation` is the difference of `used_memory` over all keys: states, trajectories, rankings, findings,
fleet sums, expiry times and the tables of keys themselves, as the allocator rounds them.

CPU is counted apart: `commit_*` and `load_*` while batches of 500 responses of 500 conversations are committed and
loaded, in the client's process (packing included, the fold not) and in Redis.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from redis import Redis

from benchmarks.load import Traffic, servers
from monitor.batch import Folded, to_commit
from monitor.detect.conversation import ConversationState, Step, decode_state, encode_state, step
from monitor.events import Projection
from monitor.placement import partition_of
from monitor.store.redis import RedisStore
from monitor.store.store import Position

TOPIC = "anchorwatch.projections"
BATCH = 500
TOLD = 0.01  # share of conversations with a finding


class Bill:
    """CPU seconds of this process and of Redis, the wall clock, and bytes to and from Redis, over some responses."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.responses = 0
        self.here = self.there = self.wall = self.wire = 0.0

    def __enter__(self) -> Bill:
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        here, there, wall, wire = (now - then for now, then in zip(self._now(), self._began, strict=True))
        self.here += here
        self.there += there
        self.wall += wall
        self.wire += wire

    def _now(self) -> tuple[float, float, float, float]:
        cpu, net = self._server.info("cpu"), self._server.info("stats")
        wire = net["total_net_input_bytes"] + net["total_net_output_bytes"]
        return time.process_time(), cpu["used_cpu_user"] + cpu["used_cpu_sys"], time.perf_counter(), wire

    def microseconds(self) -> dict[str, float]:
        """Per response."""
        return {
            "client_cpu": round(self.here / self.responses * 1e6, 2),
            "redis_cpu": round(self.there / self.responses * 1e6, 2),
            "wall": round(self.wall / self.responses * 1e6, 2),
        }

    def bytes(self) -> float:
        """Per response, to and from Redis."""
        return round(self.wire / self.responses, 1)


def run(conversations: int = 100_000, *, turns: int = 8, partitions: int = 16) -> dict[str, Any]:
    """Fill a Redis and return what `--json` prints."""
    with tempfile.TemporaryDirectory(prefix="anchorwatch-state-") as scratch:
        redis = servers.redis(Path(scratch), "--appendfsync", "everysec")
        try:
            redis.start()
            server: Any = Redis(redis.host, redis.port)
            store = RedisStore(servers.redis_url(redis))
            empty = server.info("memory")["used_memory"]
            commits, loads = Bill(server), Bill(server)
            traffic = Traffic(conversations, turns=turns, findings=TOLD / turns)
            state_bytes, findings = _fill(store, traffic, partitions, commits, loads)
            store.settle([waiting.reference for waiting in store.pending(findings + 1)])
            store.close()
            time.sleep(1.5)  # what is due to the append-only file is flushed every second
            memory = server.info("memory")
            used = memory["used_memory"] - memory.get("mem_aof_buffer", 0) - empty
            return {
                "bytes_per_conversation": round(used / conversations, 1),
                "conversations": conversations,
                "turns": turns,
                "partitions": partitions,
                "findings": findings,
                "keys": server.dbsize(),
                "state_bytes": round(state_bytes / conversations, 1),
                "commit_microseconds": commits.microseconds(),
                "load_microseconds": loads.microseconds(),
                "wire_bytes": {"commit": commits.bytes(), "load": loads.bytes()},
                "redis": server.info("server")["redis_version"],
            }
        finally:
            redis.kill()


def _fill(store: RedisStore, traffic: Traffic, partitions: int, commits: Bill, loads: Bill) -> tuple[int, int]:
    """Fold and commit all of it; the bytes of all last states, and how many findings there were."""
    waiting: dict[int, list[Projection]] = {p: [] for p in range(partitions)}
    positions: dict[int, Position | None] = dict.fromkeys(waiting)
    sizes: dict[str, int] = {}
    findings = 0

    def flush(partition: int) -> None:
        nonlocal findings
        events, waiting[partition] = waiting[partition], []
        if not events:
            return
        ids = [event.conversation_id for event in events]
        with loads:
            found = store.load(TOPIC, partition, ids)
        loads.responses += len(events)
        steps: list[tuple[Projection, Step]] = []
        states: dict[str, ConversationState] = {}
        for event in events:
            key = event.conversation_id
            known: ConversationState | None = states.get(key) or (decode_state(found[key]) if key in found else None)
            steps.append((event, step(known, event, traffic.config)))
            states[key] = steps[-1][1].state
        before = positions[partition]
        offset = (before.offset if before else 0) + len(events)
        batch = to_commit(
            Folded(offset, steps, [], states, ()),
            topic=TOPIC,
            partition=partition,
            topic_id="benchmark",
            partitions=partitions,
            expected=before,
            end=offset,
            config=None if before else traffic.config,
            now=time.time(),
        )
        with commits:
            store.commit(batch)
        commits.responses += len(events)
        positions[partition] = Position(offset)
        findings += len(batch.findings)
        for key, state in states.items():
            sizes[key] = len(encode_state(state))

    for event in traffic.responses():
        partition = partition_of(event.conversation_id, partitions)
        waiting[partition].append(event)
        if len(waiting[partition]) == BATCH:
            flush(partition)
    for partition in waiting:
        flush(partition)
    return sum(sizes.values()), findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    report = run(arguments.conversations, turns=arguments.turns)
    print(json.dumps(report) if arguments.json else msgspec.json.format(json.dumps(report), indent=2))


if __name__ == "__main__":
    main()
