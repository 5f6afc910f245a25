"""From the settings to an open log, store and subscription, and from a name to a calibration.

It knows where each setting goes, and no more.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from msgspec.structs import replace

from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.errors import ConfigurationError
from monitor.settings import Settings
from monitor.store import Backend, open_store
from monitor.stream import open_log, open_subscription, open_topics
from monitor.stream.log import PROJECTIONS, Log, Subscription
from monitor.stream.options import KafkaOptions
from monitor.stream.topics import Topics, TopicSpec, topic_specs

__all__ = ["calibration", "kafka_options", "log", "shown", "store", "subscription", "topic_plan", "topics"]


def log(settings: Settings) -> Log:
    """The log of ANCHORWATCH_LOG_URL."""
    return open_log(settings.log_url, kafka_options(settings))


def store(settings: Settings) -> Backend:
    """The store of ANCHORWATCH_STORE_URL."""
    return open_store(
        settings.store_url,
        trajectory_points=settings.trajectory_points,
        ttl_seconds=settings.store_ttl_seconds,
        password=_secret(settings.store_password_file),
        sentinel_password=_secret(settings.store_sentinel_password_file),
        ca_file=str(settings.store_ca_file) if settings.store_ca_file else None,
    )


def subscription(settings: Settings, log: Log, topic: str = PROJECTIONS) -> Subscription:
    """This worker's share of a topic of that log."""
    return open_subscription(settings.log_url, log, topic, settings.kafka_group, kafka_options(settings))


def topics(settings: Settings) -> Topics | None:
    """The topics of the cluster of ANCHORWATCH_LOG_URL; None for a file, which makes its own."""
    return open_topics(settings.log_url, kafka_options(settings))


def topic_plan(settings: Settings) -> list[TopicSpec]:
    """How those topics should be made."""
    return topic_specs(
        partitions=settings.kafka_partitions,
        replication=settings.kafka_replication,
        retention_days=settings.kafka_retention_days,
    )


def kafka_options(settings: Settings) -> KafkaOptions:
    """Everything about a Kafka cluster but its address.

    Raises:
        ConfigurationError: the password's file can't be read.
    """
    password = _secret(settings.kafka_password_file)
    if password is None and settings.kafka_password is not None:
        password = settings.kafka_password.get_secret_value()
    return KafkaOptions(
        security_protocol=settings.kafka_security_protocol,
        mechanism=settings.kafka_sasl_mechanism,
        username=settings.kafka_username,
        password=password or "",
        ca_file=settings.kafka_ca_file,
        cert_file=settings.kafka_cert_file,
        key_file=settings.kafka_key_file,
        token_file=settings.kafka_token_file,
        token_url=settings.kafka_token_url,
        token_scope=settings.kafka_token_scope,
        compression=settings.kafka_compression,
        append_seconds=settings.kafka_append_seconds,
        session_seconds=settings.kafka_session_seconds,
    )


def calibration(name: str, settings: Settings | None = None) -> DetectorConfig:
    """A calibration file's, or a bundle's own, by the bundle's name or folder; with the settings' session gap.

    Raises:
        ConfigurationError, BundleError: it can't be read, or is none.
    """
    path = Path(name)
    if path.is_file() or path.suffix == ".json":
        try:
            config = DetectorConfig.from_json(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(
                f"the calibration {path} can't be read: {error.strerror}",
                cure="give the file of `anchorwatch calibrate`",
            ) from error
    else:
        config = detector_config(load_bundle(resolve_bundle(name)))
    return config if settings is None else replace(config, session_gap_seconds=settings.session_gap_seconds)


def shown(url: str) -> str:
    """A URL for people: without the password that it may hold."""
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":***@", 1)


def _secret(path: Path | None) -> str | None:
    """What a secret's file holds, without the newline at its end."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the secret in {path} can't be read ({type(error).__name__})", cure="let this user read it, as UTF-8 text"
        ) from error
