"""Where records wait between a collector and a worker. Backends are chosen by URL, here and nowhere else."""

from __future__ import annotations

from urllib.parse import urlsplit

from monitor.address import kafka_servers
from monitor.database import sqlite_path
from monitor.errors import ConfigurationError
from monitor.stream.log import EmbeddedLog, EmbeddedSubscription, Log, Subscription
from monitor.stream.options import KafkaOptions
from monitor.stream.topics import Topics

__all__ = ["open_log", "open_subscription", "open_topics"]

_EXAMPLES = "ANCHORWATCH_LOG_URL=sqlite:///absolute/path, or kafka://host1:9092,host2:9092"


def open_log(url: str, kafka: KafkaOptions | None = None) -> Log:
    """The log that `url` names: `sqlite:///absolute/path`, or `kafka://host1:9092,host2:9092`.

    Raises:
        ConfigurationError: no such backend, or it is not installed.
        LogError: it can't be opened. Kafka is reached when it is first used.
    """
    match urlsplit(url).scheme:
        case "sqlite":
            return EmbeddedLog(sqlite_path(url))
        case "kafka":
            servers = kafka_servers(url)
            try:
                from monitor.stream.kafka import KafkaLog
            except ModuleNotFoundError as error:
                raise _not_installed(error) from error
            return KafkaLog(servers, kafka)
        case scheme:
            raise ConfigurationError(f"no log is called {scheme!r}", cure=_EXAMPLES)


def open_subscription(url: str, log: Log, topic: str, group: str, kafka: KafkaOptions | None = None) -> Subscription:
    """This worker's share of a topic of the log that `url` names, and that `log` is.

    Raises:
        ConfigurationError: as `open_log`.
    """
    if urlsplit(url).scheme != "kafka":
        return EmbeddedSubscription(log, topic)
    servers = kafka_servers(url)
    try:
        from monitor.stream.kafka import KafkaSubscription
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    return KafkaSubscription(servers, topic, group, kafka)


def open_topics(url: str, kafka: KafkaOptions | None = None) -> Topics | None:
    """What the cluster that `url` names says of its topics; None for the embedded log, which makes its own.

    Raises:
        ConfigurationError: as `open_log`.
    """
    if urlsplit(url).scheme != "kafka":
        return None
    servers = kafka_servers(url)
    try:
        from monitor.stream.kafka import KafkaTopics
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    return KafkaTopics(servers, kafka)


def _not_installed(error: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(f"Kafka needs {error.name}", cure="pip install 'anchorwatch[kafka]'")
