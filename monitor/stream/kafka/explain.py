"""What goes wrong with Kafka, in our words: which of the library's errors may pass, and what cures the others.

Pure. Never with an error's text where that may quote a record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kafka import errors as kafka_errors

from monitor.errors import LogError, LogUnavailable
from monitor.stream.log import Span

__all__ = ["LARGEST_REQUEST_BYTES", "closed", "explained", "made_anew", "no_partition", "no_topic", "outside"]

LARGEST_REQUEST_BYTES = 1 << 20  # what a broker takes unless told otherwise


@contextlib.contextmanager
def explained(bootstrap: str, topic: str = "") -> Iterator[None]:
    """Whatever the library raises within comes out as `LogUnavailable` or `LogError`, with the cure."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise _explain(error, bootstrap, topic) from error
    except (OSError, RuntimeError) as error:  # the library's network thread has ended, or a name can't be resolved
        raise LogUnavailable(f"Kafka at {bootstrap} fails: {error}", cure="try again; then see the brokers") from error


def closed() -> LogError:
    """It was used after it was closed."""
    return LogError("the log is closed", cure="open it again")


def no_topic(topic: str) -> LogError:
    """Using a topic never makes it."""
    return LogError(
        f"there is no topic {topic}",
        cure="anchorwatch topics create; or name the right cluster in ANCHORWATCH_LOG_URL. Where the topic was there "
        "before, the cluster has lost it or this is another one: find out before you go on",
    )


def no_partition(topic: str, partition: int, partitions: int) -> LogError:
    """It was never there."""
    return LogError(
        f"{topic} has no partition {partition}, but {partitions} from 0 on",
        cure="a topic's partitions are never taken away: check that this is the cluster you mean",
    )


def made_anew(topic: str) -> LogError:
    """Another topic has taken its name."""
    return LogError(
        f"the topic {topic} was deleted and made anew",
        cure="the store was folded from the old one. Move the store aside: it is then rebuilt from the new one",
    )


def outside(topic: str, partition: int, offset: int, span: Span) -> LogError:
    """Never silently the nearest offset: on one side records are gone, on the other they are not the same."""
    where = f"offset {offset} of {topic}/{partition} is outside the log, which holds {span.begin} to {span.end}"
    if offset < span.begin:
        return LogError(
            f"{where}: retention has overtaken the worker",
            cure="what lies between is gone. Move the store aside, and it is rebuilt from what the log still holds; "
            "then keep the log longer (retention.ms) than the longest outage you mean to survive",
        )
    return LogError(
        f"{where}: it is {offset - span.end} records shorter than it was",
        cure="a broker has lost records that it had acknowledged, or the topic was made anew. Stop the collectors, "
        "since new records get the offsets of lost ones; move the store aside, and it is rebuilt from what the log "
        "holds. Against it: three replicas, min.insync.replicas=2, unclean.leader.election.enable=false",
    )


def _explain(error: kafka_errors.KafkaError, bootstrap: str, topic: str) -> LogError:
    """Our error for one of the library's. Never with its text where that may quote a record."""
    where = f"Kafka at {bootstrap}"
    match error:
        case (
            kafka_errors.SaslAuthenticationFailedError()
            | kafka_errors.UnsupportedSaslMechanismError()
            | kafka_errors.IllegalSaslStateError()
        ):
            return LogError(
                f"{where} refuses who we say we are: {error}",
                cure="check ANCHORWATCH_KAFKA_SASL_MECHANISM, ANCHORWATCH_KAFKA_USERNAME and the password or token",
            )
        case kafka_errors.AuthorizationError():
            return LogError(
                f"{where} does not allow this user what is needed of {topic or 'the cluster'}: {type(error).__name__}",
                cure="grant it: a collector Write and Describe on the topic; a worker Read and Describe on it, Write "
                "on the dead letters, Read and Write on the actions, and Read on its group; a dispatcher Read and "
                "Write on the actions",
            )
        case kafka_errors.MessageSizeTooLargeError() | kafka_errors.RecordListTooLargeError():
            return LogError(
                f"a record is larger than {where} takes",
                cure=f"records of at most {LARGEST_REQUEST_BYTES} bytes are sent; a topic's max.message.bytes may "
                "allow less. Send fewer attributes or directions per response",
            )
        case kafka_errors.NotEnoughReplicasError() | kafka_errors.NotEnoughReplicasAfterAppendError():
            return LogUnavailable(
                f"{where} has fewer replicas of {topic} in sync than min.insync.replicas asks for",
                cure="bring the brokers that are down back; nothing is lost meanwhile",
            )
        case kafka_errors.OffsetOutOfRangeError() if error.args and isinstance(error.args[0], dict):
            here, offset = next(iter(error.args[0].items()))
            return LogError(
                f"offset {offset} of {here.topic}/{here.partition} is outside the log",
                cure="start again: the start says whether retention has overtaken the worker, or the log is shorter",
            )
        case kafka_errors.LogTruncationError():
            return LogError(
                f"a broker has lost records of {topic} that it had acknowledged: an unclean leader election",
                cure="move the store aside, and it is rebuilt from what the log holds. Against it: three replicas, "
                "min.insync.replicas=2, unclean.leader.election.enable=false",
            )
        case kafka_errors.CorruptRecordError():
            return LogError(
                f"records of {topic} are damaged", cure="repair the broker's disk, or restore the topic from a replica"
            )
        case kafka_errors.UnsupportedCodecError():
            return LogError(
                f"records of {topic} are compressed with what this installation can't read",
                cure="pip install 'anchorwatch[kafka]' has gzip, lz4 and zstd; for snappy, python-snappy",
            )
        case kafka_errors.UnsupportedVersionError():
            return LogError(f"{where} is too old: {error}", cure="Kafka 2.1 or newer is needed")
        case kafka_errors.InvalidTopicError():
            return LogError(
                f"{topic!r} can't be a topic's name", cure="letters, digits, . _ and -, at most 249 of them"
            )
        case kafka_errors.KafkaConnectionError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return LogError(
                f"{where} shows a certificate that we do not trust: {error}",
                cure="name whoever signed it in ANCHORWATCH_KAFKA_CA_FILE, and reach it by a name in the certificate",
            )
        case kafka_errors.KafkaConnectionError() if "SSL" in str(error) and "EOF" not in str(error):
            return LogError(
                f"{where} does not speak TLS as we do: {error}",
                cure="name the TLS listener's port, or set ANCHORWATCH_KAFKA_SECURITY_PROTOCOL as the listener has it",
            )
        case kafka_errors.KafkaConfigurationError():
            return LogError(f"{where} can't be used so: {error}", cure="correct the settings that begin with KAFKA_")
        # The plain class is what the library calls the end of a producer, whatever ended it.
        case _ if error.retriable or isinstance(error, _PASSING) or type(error) is kafka_errors.KafkaError:
            return LogUnavailable(
                f"{where} does not answer as it should: {_first_line(error)}",
                cure="check that the brokers run, can be reached from here, and listen as ANCHORWATCH_LOG_URL and "
                "ANCHORWATCH_KAFKA_SECURITY_PROTOCOL say",
            )
        case _:
            return LogError(f"{where} fails: {_first_line(error)}", cure="see the broker's own log")


# What a new producer, or a new place in the group, sets right.
_PASSING = (
    kafka_errors.IllegalStateError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.InvalidProducerIdMappingError,
    kafka_errors.ProducerFencedError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.CommitFailedError,
    kafka_errors.UnknownError,
    kafka_errors.UnknownBrokerIdError,
    kafka_errors.BrokerNotAvailableError,
    kafka_errors.KafkaProtocolError,
)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
