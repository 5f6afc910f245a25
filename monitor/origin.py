"""Where an audited conversation comes from, and what could not be audited. It knows places in logs, and no text."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["Origin", "Skipped"]


class Origin(Struct, frozen=True, kw_only=True):
    """One logged conversation: whose it is, and where it lies.

    Attributes:
        conversation_id: the log's own id; where it has none, made of file name and record.
        deployment: the population it is judged against: the model that the log names, or what the auditor said.
        source: the file, as it was given; `-` is standard input.
        record: the record's line in it, or its number where the format has no lines; from 1.
        user: who held it, where the log says so; conversations of one user are one unit of a calibration.
        turns: assistant turns, scored or not.
        notes: what was done to it to read it, in words.
    """

    conversation_id: str
    deployment: str
    source: str
    record: int
    user: str | None = None
    turns: int = 0
    notes: tuple[str, ...] = ()


class Skipped(Struct, frozen=True, kw_only=True):
    """A record, or one assistant turn of it, that was not audited, and why.

    Attributes:
        source, record: as in `Origin`; record 0 is the whole file.
        reason: in words, without any text of the conversation.
        conversation_id, turn: where they are known.
    """

    source: str
    record: int
    reason: str
    conversation_id: str | None = None
    turn: int | None = None
