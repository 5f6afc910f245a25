"""What the tests of log, store and worker share: events, a calibration, and the oracle (the pure fold, in memory).

Run as a program it is a worker that a test may kill: `service.py LOG STORE BATCH_SIZE`.
"""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, Readout
from monitor.detect.conversation import ConversationState, encode_state, step
from monitor.errors import EventError
from monitor.events import Finding, Projection, Windows, decode_projection, encode
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog, Log, Message
from monitor.worker import Worker, stop_on_signals

AXIS = "axis-1"
POISON = b'{"id": "no projection"'

CONFIG = DetectorConfig(
    axis_id=AXIS,
    readout=Readout({"assistant_axis": 1.0}),
    baselines={
        "shop": Baseline(
            deployment="shop",
            axis_id=AXIS,
            mean=0.0,
            standard_deviation=1.0,
            window_mean=-1.0,
            window_standard_deviation=1.0,
            conversations=100,
            responses=1000,
        )
    },
    boundaries=Boundaries(level=2.0, drop=2.5, cusum=4.0, dip=3.0),
)


def projection(
    conversation: str, turn: int, value: float = 0.0, *, deployment: str = "shop", resent: str | None = None
) -> Projection:
    """One response. Its id follows from conversation and turn, unless `resent` names another."""
    at = {"assistant_axis": value}
    time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=30 * turn)
    return Projection(
        id=resent or f"{conversation}#{turn}",
        time=time.isoformat().replace("+00:00", "Z"),
        source="/test",
        conversation_id=conversation,
        turn=turn,
        model="toy",
        axis_id=AXIS,
        layer=1,
        deployment=deployment,
        projection=value,
        coordinates=at,
        prompt=at,
        windows=Windows(lowest={"assistant_axis": value - 1.0}, last=at),
        tokens=20,
    )


def message(event: Projection) -> Message:
    return Message(event.conversation_id, encode(event))


def traffic(conversations: int, turns: int, *, poison: float = 0.0, seed: int = 0) -> list[Message]:
    """Conversations side by side: half of them drift, some responses come twice, some records are poison."""
    chance = random.Random(seed)
    messages = []
    for turn in range(turns):
        for number in range(conversations):
            drift = -0.6 * turn if number % 2 else 0.0
            event = projection(f"c{number}", turn, round(chance.gauss(drift, 0.7), 3))
            messages.append(message(event))
            if chance.random() < 0.03:
                messages.append(message(event))
            if chance.random() < poison:
                messages.append(Message(f"c{number}", POISON))
    return messages


class Oracle:
    """What the log must come to: the pure fold over every record, in order, in one go."""

    def __init__(self, log: Log, topic: str = PROJECTIONS) -> None:
        self.states: dict[str, ConversationState] = {}
        self.findings: list[Finding] = []
        self.counts: dict[str, int] = {}
        self.dead: list[str] = []
        begin, end, _ = log.span(topic, 0)
        for record in log.read(topic, 0, begin, end - begin):
            try:
                event = decode_projection(record.value)
                done = step(self.states.get(event.conversation_id), event, CONFIG)
            except EventError:
                self.dead.append(f"{topic}/0/{record.offset}")
                outcome = "dead_letter"
            else:
                self.states[event.conversation_id] = done.state
                self.findings += done.findings
                outcome = done.outcome
            self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def encoded_states(self) -> dict[str, bytes]:
        return {key: encode_state(state) for key, state in self.states.items()}


def main() -> None:
    log, store, batch_size = sys.argv[1:]
    stop = stop_on_signals()
    worker = Worker(EmbeddedLog(Path(log)), SqliteStore(Path(store)), CONFIG, batch_size=int(batch_size))
    print("ready", flush=True)
    worker.run(stop)
    print("drained", flush=True)


if __name__ == "__main__":
    main()
