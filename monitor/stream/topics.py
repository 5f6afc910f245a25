"""The three topics: how each should be made, made so, and what to say where one is made otherwise.

It knows Kafka's words for topics, but no client library. Times are in Kafka's milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from monitor.stream.log import ACTIONS, DEAD_LETTERS, PROJECTIONS

__all__ = ["Advice", "TopicSpec", "TopicState", "Topics", "advice", "check", "create", "topic_specs"]

Severity = Literal["error", "warning", "note"]
DAY_MS = 86_400_000
LEAST_RETENTION_MS = DAY_MS
LEAST_MESSAGE_BYTES = 1 << 20


class TopicSpec(Struct, frozen=True, kw_only=True):
    """How a topic should be made. `config` is in Kafka's own words."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]


class TopicState(Struct, frozen=True, kw_only=True):
    """How a topic is made.

    Attributes:
        topic_id: made with the topic; empty where the broker has none.
        replication: copies of the partition that has fewest.
        in_sync: those of them that are up to date, of the partition that has fewest.
        config: its settings; empty where the broker does not tell.
    """

    name: str
    topic_id: str
    partitions: int
    replication: int
    in_sync: int
    config: Mapping[str, str] = {}

    def with_config(self, config: Mapping[str, str]) -> TopicState:
        """The same, with its settings."""
        return msgspec.structs.replace(self, config=config)


class Advice(Struct, frozen=True):
    """What is wrong with a topic, and the cure. An error loses or misjudges records sooner or later."""

    severity: Severity
    topic: str
    problem: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.topic}: {self.problem}" + (f"\n  cure: {self.cure}" if self.cure else "")


class Topics(Protocol):
    """A cluster's topics. Every method raises `LogUnavailable` where trying again may help, else `LogError`."""

    def brokers(self) -> int:
        """How many there are now."""

    def states(self, topics: Sequence[str]) -> dict[str, TopicState]:
        """Those of the topics that exist."""

    def create(self, specs: Sequence[TopicSpec]) -> None:
        """Make them all; `LogError` where one exists, or the cluster refuses."""

    def close(self) -> None:
        """Give everything back."""


def create(topics: Topics, specs: Sequence[TopicSpec]) -> list[str]:
    """Make those that are missing, and name them. The others stay as they are: `check` says what is wrong with them."""
    there = topics.states([spec.name for spec in specs])
    missing = [spec for spec in specs if spec.name not in there]
    topics.create(missing)
    return [spec.name for spec in missing]


def check(topics: Topics, specs: Sequence[TopicSpec]) -> list[Advice]:
    """What an operator should know of the topics as they are now."""
    return advice(specs, topics.states([spec.name for spec in specs]))


def topic_specs(*, partitions: int, replication: int, retention_days: float) -> list[TopicSpec]:
    """What `anchorwatch topics create` makes.

    One copy may fail without losing a record or stopping a collector, where there are three. Dead letters are kept
    four times as long as projections, since a person must look at them. Actions are kept for ever, the newest of each
    key, and have one partition: their order matters, and they are few.
    """
    in_sync = "2" if replication >= 3 else "1"
    safe = {"min.insync.replicas": in_sync, "unclean.leader.election.enable": "false"}
    kept = round(retention_days * DAY_MS)
    return [
        TopicSpec(
            name=PROJECTIONS,
            partitions=partitions,
            replication=replication,
            config={"cleanup.policy": "delete", "retention.ms": str(kept), **safe},
        ),
        TopicSpec(
            name=DEAD_LETTERS,
            partitions=1,
            replication=replication,
            config={"cleanup.policy": "delete", "retention.ms": str(4 * kept), **safe},
        ),
        TopicSpec(name=ACTIONS, partitions=1, replication=replication, config={"cleanup.policy": "compact", **safe}),
    ]


def advice(specs: Sequence[TopicSpec], found: Mapping[str, TopicState]) -> list[Advice]:
    """The same, of topics that were asked for before. Pure; nothing where all is well."""
    told: list[Advice] = []
    for spec in specs:
        state = found.get(spec.name)
        if state is None:
            told.append(Advice("error", spec.name, "there is no such topic", "anchorwatch topics create"))
        else:
            told += _partitions(spec, state) + _copies(state) + _settings(spec, state)
    return told


def _partitions(spec: TopicSpec, state: TopicState) -> list[Advice]:
    if state.partitions == spec.partitions:
        return []
    if spec.partitions == 1:
        return [
            Advice(
                "error",
                spec.name,
                f"it has {state.partitions} partitions; it must have one, or its records have no order",
                "delete it if it is empty, and run: anchorwatch topics create",
            )
        ]
    return [
        Advice(
            "note",
            spec.name,
            f"it has {state.partitions} partitions, the setting says {spec.partitions}",
            f"ANCHORWATCH_KAFKA_PARTITIONS={state.partitions}. Never add partitions to a topic in use: conversations "
            "would move, and the store refuses a log of another count. To scale out, make a new topic and a new store",
        )
    ]


def _copies(state: TopicState) -> list[Advice]:
    told = []
    if state.replication == 1:
        told.append(
            Advice(
                "warning",
                state.name,
                "it has one copy: what that broker's disk loses is lost, and while the broker is away nothing is taken",
                "three brokers, and ANCHORWATCH_KAFKA_REPLICATION=3 when the topics are made",
            )
        )
    if state.in_sync < state.replication:
        told.append(
            Advice(
                "warning",
                state.name,
                f"a partition has {state.in_sync} of {state.replication} copies in sync",
                "see which broker is down or behind",
            )
        )
    return told


def _settings(spec: TopicSpec, state: TopicState) -> list[Advice]:
    if not state.config:
        return [Advice("note", state.name, "the broker does not tell its settings, so they were not checked")]
    return [*_cleanup(spec, state), *_safety(state), *_limits(state)]


def _cleanup(spec: TopicSpec, state: TopicState) -> list[Advice]:
    policy = state.config.get("cleanup.policy")
    wanted = spec.config["cleanup.policy"]
    if policy is not None and policy != wanted:
        lost = (
            "compaction keeps the newest response of each conversation only"
            if wanted == "delete"
            else "what operators did is forgotten in time, and a wiped store would not come back whole"
        )
        return [Advice("error", state.name, f"cleanup.policy={policy}: {lost}", f"set cleanup.policy={wanted}")]
    told = []
    kept = _number(state, "retention.ms")
    if wanted == "delete" and kept is not None and 0 <= kept < LEAST_RETENTION_MS:
        told.append(
            Advice(
                "warning",
                state.name,
                f"it keeps records for {kept / 3_600_000:g} hours: a worker that is away longer stops, and has lost "
                "records",
                f"set retention.ms={spec.config['retention.ms']}",
            )
        )
    size = _number(state, "retention.bytes")
    if size is not None and size >= 0:
        told.append(
            Advice(
                "warning",
                state.name,
                f"retention.bytes={size} deletes records however young they are",
                "set retention.bytes=-1, or see that it holds the longest outage you mean to survive",
            )
        )
    return told


def _safety(state: TopicState) -> list[Advice]:
    told = []
    if state.config.get("unclean.leader.election.enable") == "true":
        told.append(
            Advice(
                "warning",
                state.name,
                "unclean.leader.election.enable=true: a broker may lose records that it has acknowledged",
                "set unclean.leader.election.enable=false",
            )
        )
    least = _number(state, "min.insync.replicas")
    if least is not None and state.replication >= 2:
        if least >= state.replication:
            told.append(
                Advice(
                    "warning",
                    state.name,
                    f"min.insync.replicas={least} of {state.replication} copies: when one broker is away nothing is "
                    "taken",
                    f"set min.insync.replicas={state.replication - 1}",
                )
            )
        elif least < 2 <= state.replication - 1:
            told.append(
                Advice(
                    "warning",
                    state.name,
                    f"min.insync.replicas={least}: a record may be acknowledged when only one copy of it exists",
                    "set min.insync.replicas=2",
                )
            )
    return told


def _limits(state: TopicState) -> list[Advice]:
    largest = _number(state, "max.message.bytes")
    if largest is not None and largest < LEAST_MESSAGE_BYTES:
        return [
            Advice(
                "warning",
                state.name,
                f"max.message.bytes={largest}: batches of up to {LEAST_MESSAGE_BYTES} bytes are sent",
                f"set max.message.bytes={LEAST_MESSAGE_BYTES}",
            )
        ]
    return []


def _number(state: TopicState, name: str) -> int | None:
    try:
        return int(state.config.get(name, ""))
    except ValueError:
        return None
