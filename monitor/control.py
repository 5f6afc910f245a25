"""Control records: what concerns a whole partition of the log and takes effect at its own place there.

The only kind so far is a calibration. The fold reads nothing that is not in the log or in the store, so that a replay
judges every response by the calibration that was in force when it came. A control record has an empty key, which no
conversation can have, and goes into every partition.
"""

from __future__ import annotations

from monitor.detect.baseline import DetectorConfig
from monitor.errors import ConfigurationError, EventError
from monitor.stream.log import Message, Record

__all__ = ["calibration_in", "calibration_message", "is_control"]

HEADER = "anchorwatch-control"
CALIBRATION = b"calibration"


def calibration_message(config: DetectorConfig, partition: int) -> Message:
    """The record that puts a calibration into force from its place on, in one partition."""
    return Message(key="", value=config.to_json(), headers=((HEADER, CALIBRATION),), partition=partition)


def is_control(record: Record) -> bool:
    """Whether the record is addressed to the partition. Whether it can be read is another question."""
    return not record.key and any(name == HEADER for name, _ in record.headers)


def calibration_in(record: Record) -> DetectorConfig:
    """The calibration that a control record carries.

    Raises:
        EventError: it is of a kind that this release does not know, or malformed.
    """
    if dict(record.headers).get(HEADER) != CALIBRATION:
        raise EventError("a control record of an unknown kind", cure="run the Anchorwatch release that wrote it")
    try:
        return DetectorConfig.from_json(record.value)
    except ConfigurationError as error:
        raise EventError(f"a control record's calibration is wrong: {error.problem}", cure=error.cure) from error
