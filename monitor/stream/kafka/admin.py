"""What a cluster says of its topics, and how they are made. It knows nothing of what should be said about them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewTopic
from kafka.net.compat import KafkaNetClient
from kafka.protocol.consumer import OffsetSpec

from monitor.errors import LogError
from monitor.stream.kafka.client import milliseconds, open_client
from monitor.stream.kafka.explain import explained, no_partition, no_topic
from monitor.stream.log import Span
from monitor.stream.options import KafkaOptions
from monitor.stream.topics import TopicSpec, TopicState

__all__ = ["KafkaTopics"]

CREATE_SECONDS = 15.0

_Answer = TypeVar("_Answer")


class KafkaTopics:
    """The topics of one cluster. Connects when it is first used. Any number of threads may use it.

    Every method raises `LogUnavailable` where the cluster does not answer now, else `LogError`.
    """

    def __init__(self, bootstrap: str, options: KafkaOptions | None = None) -> None:
        """`bootstrap` is host:port, or several with commas between."""
        self._bootstrap = bootstrap
        self._options = options or KafkaOptions()
        self._lock = threading.Lock()
        self._client: tuple[KafkaAdminClient, KafkaNetClient] | None = None

    def brokers(self) -> int:
        """How many there are now."""
        return self._ask(lambda _, network: len(network.cluster.brokers()))

    def state(self, topic: str) -> TopicState:
        """How one topic is made, as far as metadata tell. `LogError` where there is none of that name."""
        found = self._ask(lambda admin, _: _state(admin.describe_topics([topic]), topic), topic)
        if found is None:
            raise no_topic(topic)
        return found

    def states(self, topics: Sequence[str]) -> dict[str, TopicState]:
        """Those of the topics that exist, with their settings where the broker tells them."""

        def ask(admin: KafkaAdminClient, _: KafkaNetClient) -> dict[str, TopicState]:
            described = admin.describe_topics(list(topics))
            found = {topic: state for topic in topics if (state := _state(described, topic)) is not None}
            asked = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in found]
            try:
                told = admin.describe_configs(asked, config_filter="all").get("topic", {}) if asked else {}
            except kafka_errors.AuthorizationError:
                told = {}
            return {
                topic: state.with_config({name: str(entry["value"]) for name, entry in told.get(topic, {}).items()})
                for topic, state in found.items()
            }

        return self._ask(ask)

    def span(self, topic: str, partition: int) -> Span:
        """See `Log.span`; but a broker may tell the place of its newest batch instead of its end (Tansu does)."""
        state = self.state(topic)
        if not 0 <= partition < state.partitions:
            raise no_partition(topic, partition, state.partitions)
        here = TopicPartition(topic, partition)

        def ask(admin: KafkaAdminClient, _: KafkaNetClient) -> Span:
            begin = admin.list_partition_offsets({here: OffsetSpec.EARLIEST})[here].offset
            end = admin.list_partition_offsets({here: OffsetSpec.LATEST})[here].offset
            return Span(begin, end, state.topic_id)

        return self._ask(ask, topic)

    def create(self, specs: Sequence[TopicSpec]) -> None:
        """Make them all. Blocks until the brokers know them. `LogError` where one exists, or the cluster refuses."""
        wanted = [
            NewTopic(spec.name, spec.partitions, spec.replication, topic_configs=dict(spec.config)) for spec in specs
        ]

        def ask(admin: KafkaAdminClient, _: KafkaNetClient) -> None:
            try:
                admin.create_topics(wanted)
            except kafka_errors.BrokerResponseError as error:
                if error.retriable:
                    raise
                raise _refused(error, self._bootstrap) from error
            admin.wait_for_topics([spec.name for spec in specs], timeout_ms=milliseconds(CREATE_SECONDS))

        if wanted:
            self._ask(ask)

    def close(self) -> None:
        """Give everything back. Using it again connects again."""
        with self._lock:
            self._forget()

    def _ask(self, question: Callable[[KafkaAdminClient, KafkaNetClient], _Answer], topic: str = "") -> _Answer:
        with self._lock, explained(self._bootstrap, topic):
            if self._client is not None:
                try:
                    return question(*self._client)
                except kafka_errors.KafkaError:
                    self._forget()  # what it believed of the cluster may be why: ask once more with a new one
            self._client = open_client(
                KafkaAdminClient,
                self._bootstrap,
                self._options,
                request_timeout_ms=milliseconds(self._options.answer_seconds),
            )
            try:
                return question(*self._client)
            except BaseException:
                self._forget()
                raise

    def _forget(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client[0].close()


def _state(described: Sequence[Mapping[str, Any]], topic: str) -> TopicState | None:
    """A topic of `describe_topics`, or None where there is none."""
    for found in described:
        if found["name"] == topic:
            error = kafka_errors.for_code(found["error_code"])
            if error is kafka_errors.UnknownTopicOrPartitionError:
                return None
            if error is not kafka_errors.NoError:
                raise error(topic)
            partitions = found["partitions"]
            topic_id = str(found.get("topic_id") or "")
            return TopicState(
                name=topic,
                topic_id=topic_id if topic_id.strip("0-") else "",
                partitions=len(partitions),
                replication=min((len(each["replica_nodes"]) for each in partitions), default=0),
                in_sync=min((len(each["isr_nodes"]) for each in partitions), default=0),
            )
    return None


def _refused(error: kafka_errors.BrokerResponseError, bootstrap: str) -> LogError:
    where = f"Kafka at {bootstrap} refuses to make the topics"
    match error:
        case kafka_errors.TopicAlreadyExistsError():
            return LogError(f"{where}: one exists already", cure="anchorwatch topics check says how it is made")
        case kafka_errors.InvalidReplicationFactorError():
            return LogError(
                f"{where}: it has fewer brokers than replicas are asked for",
                cure="ANCHORWATCH_KAFKA_REPLICATION=1 for one broker; for anything that matters, three brokers",
            )
        case kafka_errors.AuthorizationError():
            return LogError(
                f"{where} for this user",
                cure="grant it Create on the topics, or let an administrator make them as docs/kafka.md says",
            )
        case _:
            return LogError(f"{where}: {type(error).__name__}", cure="see the broker's own log")
