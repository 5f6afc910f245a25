"""A collector process: synthetic but real projections through the real publisher; its journal outlives a SIGKILL.

`python -m faults.collector PLAN` takes a `Plan` as JSON; log and queue come from ANCHORWATCH_* as for any collector.
Killed and started again with the same plan and journal, it goes on behind the last projection that it had offered.

The journal is one line a fact, written before an offer and after an acknowledgement, so that it never claims too much:
`o <index> <key> <digest>` and `a <key> <digest>`. A kernel keeps it when the process dies.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from collectors.publish import open_publisher
from faults.history import Produced, digest
from monitor import connect
from monitor.errors import LogUnavailable
from monitor.events import Projection, Windows, encode
from monitor.settings import Settings, load_settings
from monitor.stream.log import PROJECTIONS, Log, Message, Span
from monitor.telemetry import configure_logging
from monitor.worker import stop_on_signals

AXIS = "axis-1"
REMEMBERED = 20_000  # projections that a collector may hand over once more


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a collector does. Shares are of its responses.

    Attributes:
        name: begins its conversations' ids.
        journal: directory of the files it writes.
        conversations, turns: how many side by side, and how long each one gets; half of them drift.
        pause: seconds between two responses.
        skew: seconds by which its clock is ahead.
        duplicates: responses handed over twice, within the ids that the fold remembers.
        old_duplicates: responses handed over again a hundred responses of their conversation later.
        branches: the same turn with another id.
        late: turns far behind, with a new id.
        minor: written as a later minor version would, with fields that this release does not know.
        foreign: written past the publisher instead: "" for nothing, or poison, misplaced, unknown_version.
    """

    name: str
    journal: str
    seed: int = 0
    conversations: int = 10
    turns: int = 20
    pause: float = 0.002
    skew: float = 0.0
    duplicates: float = 0.02
    old_duplicates: float = 0.0
    branches: float = 0.01
    late: float = 0.01
    minor: bool = False
    foreign: str = ""


class Intent(msgspec.Struct, frozen=True):
    """One call of publish, before it has a time: the same for the same plan, whenever it is made."""

    conversation: str
    turn: int
    id: str
    value: float
    again: bool = False


def intents(plan: Plan) -> Iterator[Intent]:
    """All calls of a plan, in order."""
    chance = random.Random(f"{plan.seed}/{plan.name}")
    by_conversation: dict[str, deque[Intent]] = {}
    for turn in range(plan.turns):
        for number in range(plan.conversations):
            name = f"{plan.name}-{number}"
            drift = -0.6 * min(turn, 8) if number % 2 and turn % 40 < 25 else 0.0
            value = round(chance.gauss(drift, 0.7), 4)
            said = by_conversation.setdefault(name, deque(maxlen=100))
            new = [Intent(name, turn, f"{name}#{turn}", value)]
            if chance.random() < plan.branches:
                new.append(Intent(name, turn, f"{name}#{turn}b", value - 1.0))
            if turn > 40 and chance.random() < plan.late:
                new.append(Intent(name, turn - 40, f"{name}#{turn}l", value))
            if said and chance.random() < plan.duplicates:
                new.append(msgspec.structs.replace(chance.choice(list(said)[-20:]), again=True))
            if len(said) == said.maxlen and chance.random() < plan.old_duplicates:
                new.append(msgspec.structs.replace(said[0], again=True))
            said += [intent for intent in new if not intent.again]
            yield from new


def projection(intent: Intent, time: datetime) -> Projection:
    """The intent as it happens, with all that a real one carries: some 900 bytes on the wire."""
    names = ("assistant_axis", "persona_axis", "poem", "chat", "opinion", "pc1", "pc2", "pc3", "warmth", "evil")
    at = {name: intent.value if not n else round(intent.value / (n + 1), 5) for n, name in enumerate(names)}
    lowest = {name: value - 1.0 for name, value in at.items()}
    return Projection(
        id=intent.id,
        time=time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        source="/faults",
        conversation_id=intent.conversation,
        turn=intent.turn,
        model="toy",
        axis_id=AXIS,
        layer=1,
        deployment="shop",
        projection=intent.value,
        coordinates=at,
        prompt=at,
        windows=Windows(lowest=lowest, last=at),
        tokens=20,
    )


class Journal:
    """Facts, one write each. See the module."""

    def __init__(self, plan: Plan) -> None:
        directory = Path(plan.journal)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(directory / f"{plan.name}.journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def offered(self, index: int, key: str, value: bytes) -> None:
        os.write(self._file, f"o {index} {key} {digest(value)}\n".encode())

    def acknowledged(self, messages: Sequence[Message]) -> None:
        lines = "".join(f"a {message.key} {digest(message.value)}\n" for message in messages)
        os.write(self._file, lines.encode())


def read_journal(path: Path) -> tuple[Produced, int]:
    """What a collector said, and the index of its next intent. A line that a SIGKILL cut off is no fact."""
    produced, index = Produced(), 0
    for line in path.read_text().splitlines() if path.exists() else []:
        match line.split(" "):
            case ["o", number, key, hashed]:
                produced.offered.append((key, hashed))
                index = max(index, int(number) + 1)
            case ["a", key, hashed]:
                produced.acknowledged.add((key, hashed))
    return produced, index


class Journalled:
    """A log that notes what it has acknowledged; else the log itself."""

    def __init__(self, log: Log, journal: Journal, change: Callable[[Message], Message]) -> None:
        self._log = log
        self._journal = journal
        self._change = change

    def append(self, topic: str, messages: Sequence[Message]) -> list[int]:
        changed = [self._change(message) for message in messages]
        offsets = self._log.append(topic, changed)
        if topic == PROJECTIONS:
            self._journal.acknowledged(changed)
        return offsets

    def span(self, topic: str, partition: int) -> Span:
        return self._log.span(topic, partition)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


def of_a_release_to_come(message: Message) -> Message:
    """The same record as a later minor version would write it: a field more, and the version says so."""
    fields = msgspec.json.decode(message.value)
    fields |= {"version": "1.7", "temperament": {"sanguine": 0.5}, "sampled": True}
    return msgspec.structs.replace(message, value=msgspec.json.encode(fields, order="sorted"))


def foreign(plan: Plan, partitions: int) -> Iterator[tuple[int, Message]]:
    """Records that no release of ours would write."""
    from monitor.placement import partition_of

    for index, intent in enumerate(intents(plan)):
        value = encode(projection(intent, datetime.now(UTC)))
        key = intent.conversation
        match plan.foreign:
            case "poison":
                yield index, Message(key, value[: len(value) // 2] + f"{index}".encode())
            case "unknown_version":
                yield index, Message(key, value.replace(b'"version":"1.0"', b'"version":"2.0"'))
            case "misplaced":
                wrong = (partition_of(key, partitions) + 1) % partitions
                yield index, Message(key, value, partition=wrong)
            case other:
                raise ValueError(other)


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    settings = load_settings()
    configure_logging(settings.log_level, "json")
    stop = stop_on_signals()
    journal = Journal(plan)
    _, begin = read_journal(Path(plan.journal) / f"{plan.name}.journal")
    if plan.foreign:
        write_foreign(plan, settings, journal, begin, stop.is_set)
        return
    change = of_a_release_to_come if plan.minor else lambda message: message
    publisher = open_publisher(Journalled(connect.log(settings), journal, change), settings)
    made: OrderedDict[str, Projection] = OrderedDict()
    times = array("d")
    taken = 0
    print("ready", flush=True)
    for index, intent in enumerate(intents(plan)):
        if index < begin:
            continue
        if stop.is_set():
            break
        if intent.again and intent.id not in made:
            continue  # made before the last death: nobody has its bytes any more
        event = (
            made[intent.id] if intent.again else projection(intent, datetime.now(UTC) + timedelta(seconds=plan.skew))
        )
        made[intent.id] = event
        if len(made) > REMEMBERED:
            made.popitem(last=False)
        journal.offered(index, event.conversation_id, change(Message(event.conversation_id, encode(event))).value)
        started = time.monotonic()
        taken += publisher.publish(event)
        times.extend((started, time.monotonic() - started))
        time.sleep(plan.pause)
        if index % 200 == 0:
            write_times(plan, times)
    flushed = publisher.flush(60.0)
    publisher.close()
    write_times(plan, times)
    print(
        msgspec.json.encode(
            {
                "taken": taken,
                "dropped": publisher.dropped,
                "flushed": flushed,
                "most_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        ).decode(),
        flush=True,
    )


def write_foreign(plan: Plan, settings: Settings, journal: Journal, begin: int, stopped: Callable[[], bool]) -> None:
    """Straight into the log, as a client in another language would."""
    log = connect.log(settings)
    print("ready", flush=True)
    for index, message in foreign(plan, log.partitions(PROJECTIONS)):
        if index < begin:
            continue
        journal.offered(index, message.key, message.value)
        while not stopped():
            try:
                log.append(PROJECTIONS, [message])
            except LogUnavailable:
                time.sleep(0.1)
            else:
                journal.acknowledged([message])
                break
        if stopped():
            break
        time.sleep(plan.pause)
    log.close()


def write_times(plan: Plan, times: array[float]) -> None:
    """Append (monotonic seconds, seconds that publish took) pairs to a file; the list begins anew."""
    with (Path(plan.journal) / f"{plan.name}.times").open("ab") as file:
        times.tofile(file)
    del times[:]


def read_times(path: Path) -> list[tuple[float, float]]:
    """What `write_times` wrote."""
    times = array("d")
    times.frombytes(path.read_bytes())
    return list(zip(times[::2], times[1::2], strict=True))


if __name__ == "__main__":
    main()
