"""A projection as it travels: the one place that makes a log's message of it. It knows no log and no network."""

from __future__ import annotations

from monitor.events import Projection, encode, headers
from monitor.stream.log import Message

__all__ = ["message_of"]


def message_of(projection: Projection) -> Message:
    """The projection under its conversation's key, with the headers that make it a CloudEvent.

    Raises:
        ValueError: it holds text that is no Unicode, such as half a surrogate pair.
    """
    return Message(key=projection.conversation_id, value=encode(projection), headers=headers(projection))
