"""Connected clients: how each is made, proves who it is, and is thrown away. It knows no topic."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import TypeVar

from kafka import KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import KafkaAdminClient
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl.oauth import AbstractTokenProvider

from monitor.errors import LogError
from monitor.stream.options import KafkaOptions
from monitor.stream.tokens import token_source

__all__ = ["connected", "discard", "milliseconds", "open_client"]

METADATA_SECONDS = 30.0  # so soon is it seen that partitions came, or that a topic was made anew
RECONNECT_SECONDS = 1.0

_Client = TypeVar("_Client", KafkaConsumer, KafkaProducer, KafkaAdminClient)

# All that matters is raised; and at its debug level the library writes out whole records.
logging.getLogger("kafka").setLevel(logging.CRITICAL)


def open_client(
    kind: type[_Client], bootstrap: str, options: KafkaOptions, **config: object
) -> tuple[_Client, KafkaNetClient]:
    """A connected client, and the network beneath it. `bootstrap` is host:port, or several with commas between.

    Raises:
        KafkaError: why it could not connect or was not let in; nothing is left behind then.
        LogError: the TLS or token settings can't be used.
    """
    made: list[KafkaNetClient] = []

    def network(**given: object) -> KafkaNetClient:
        client = KafkaNetClient(**given)
        made.append(client)
        # Up to 3.0.12 this setting does not get where it is read, and asking for a topic would make it.
        client.cluster.config["allow_auto_create_topics"] = False
        _shake_hands(client, options.answer_seconds)
        return client

    unmeasured = {} if kind is KafkaAdminClient else {"metrics_enabled": False}
    try:
        opened = kind(
            bootstrap_servers=[server.strip() for server in bootstrap.split(",")],
            client_id=options.client_id,
            kafka_client=network,
            bootstrap_timeout_ms=milliseconds(options.answer_seconds),
            reconnect_backoff_max_ms=milliseconds(RECONNECT_SECONDS),
            metadata_max_age_ms=milliseconds(METADATA_SECONDS),
            **_security(options),
            **unmeasured,
            **config,
        )
    except BaseException:
        for client in made:
            client.close()
        raise
    return opened, made[0]


def connected(client: KafkaNetClient) -> bool:
    """Whether any broker is; one that coordinates a group has a connection of its own."""
    return any(
        client.connected(broker.node_id) or client.connected(f"coordinator-{broker.node_id}")
        for broker in client.cluster.brokers()
    )


def discard(producer: KafkaProducer) -> None:
    """End a producer and forget what it holds, without waiting for a broker."""
    # Up to 3.0.12 `close` raises where records are left, and leaves them and the sending thread to whoever holds it.
    with contextlib.suppress(kafka_errors.KafkaError):
        producer.close(timeout=0)
    producer._sender.force_close()


def milliseconds(seconds: float) -> int:
    """As the library wants it."""
    return round(seconds * 1000)


def _shake_hands(client: KafkaNetClient, seconds: float) -> None:
    """Connect to any of the named brokers, or raise why the last of them can't be."""

    async def connect(node: str) -> None:
        await client._manager.get_connection(node, timeout_ms=milliseconds(seconds), refresh_metadata_on_err=False)

    failure: Exception = kafka_errors.KafkaConnectionError("no broker is named")
    for broker in client.cluster.bootstrap_brokers():
        try:
            client._net.run(connect, broker.node_id)
        except (kafka_errors.KafkaError, LogError) as error:
            failure = error
        except (KeyError, ValueError, IndexError) as error:  # of a SASL answer that the library did not expect
            failure = kafka_errors.SaslAuthenticationFailedError(f"unexpected answer: {type(error).__name__}")
            failure.__cause__ = error
        else:
            client.close(broker.node_id)
            return
    raise failure


def _security(options: KafkaOptions) -> dict[str, object]:
    config: dict[str, object] = {"security_protocol": options.security_protocol.upper()}
    if options.tls:
        config["ssl_context"] = _tls(options)
    if options.sasl:
        config["sasl_mechanism"] = options.mechanism
        if options.mechanism == "OAUTHBEARER":
            source = token_source(
                file=options.token_file,
                url=options.token_url,
                client_id=options.username,
                secret=options.password,
                scope=options.token_scope,
                seconds=options.answer_seconds,
            )
            config["sasl_oauth_token_provider"] = _Tokens(source)
        else:
            config |= {"sasl_plain_username": options.username, "sasl_plain_password": options.password}
    return config


class _Tokens(AbstractTokenProvider):  # type: ignore[misc]
    def __init__(self, source: Callable[[], str]) -> None:
        super().__init__()
        self._source = source

    def token(self) -> str:
        return self._source()


def _tls(options: KafkaOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.cert_file is not None:
            context.load_cert_chain(options.cert_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise LogError(
            f"the TLS files for Kafka can't be used: {error}",
            cure="check ANCHORWATCH_KAFKA_CA_FILE, ANCHORWATCH_KAFKA_CERT_FILE and ANCHORWATCH_KAFKA_KEY_FILE: PEM, "
            "readable for this user, the key without a passphrase and of that certificate",
        ) from error
    return context
