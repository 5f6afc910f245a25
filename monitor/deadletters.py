"""The dead letters: what could not be folded, with its bytes, its place and the reason; to look at, and to send again.

A letter's key says where its record lay, `topic/partition/offset`, and is its identity: one that a crash wrote twice is
one letter. Sending again appends the original bytes under the original key to the original topic, and then a mark
behind the letter, under the same key: an empty value with the header `requeued`.

The bytes may hold whatever a collector sent. Nothing here prints; whoever does, prints them on demand only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import msgspec
from msgspec import Struct

from monitor.events import now_utc
from monitor.placement import partition_of
from monitor.stream.log import DEAD_LETTERS, Log, Message, Record

__all__ = ["HOPELESS", "DeadLetter", "Mark", "Refusal", "find_letter", "newest_letters", "obstacle", "plain", "requeue"]

WINDOW = 500
REQUEUED = "requeued"
ORIGIN = "anchorwatch-requeued-from"

HOPELESS = {
    "wrong_key": "its key is not its conversation_id, and no release changes that. The collector must send it anew",
    "bad_control": "it is a control record. Put the calibration into force anew: anchorwatch calibration activate",
}


class Mark(Struct, frozen=True):
    """Who sent a letter again, and when."""

    by: str
    time: str


class DeadLetter(Struct, frozen=True, kw_only=True):
    """One letter.

    Attributes:
        id: its key, `topic/partition/offset`.
        topic, partition, offset: where its record lay.
        key: the record's own key; a conversation's id, if all was well with it.
        reason: one of a few words.
        detail: what was wrong in particular; may quote the record.
        value: the record's bytes.
        requeued: who has sent it again; None when nobody has.
    """

    id: str
    topic: str
    partition: int
    offset: int
    key: str
    reason: str
    detail: str
    value: bytes
    requeued: Mark | None = None


class Refusal(Struct, frozen=True):
    """A letter that was not sent again, and why."""

    id: str
    why: str


def newest_letters(log: Log, limit: int, *, wanted: Callable[[DeadLetter], bool] | None = None) -> list[DeadLetter]:
    """The newest ones of each partition of the dead letters, at most `limit` together, as they lay in their topics.

    Reads backwards from the end, so it costs what it gives; with `wanted`, all that it passes over, too. Records that
    are no letters are passed over.
    """
    found: list[DeadLetter] = []
    for partition in range(log.partitions(DEAD_LETTERS)):
        letters = _letters(log, partition)
        found += islice((letter for letter in letters if wanted is None or wanted(letter)), limit)
    found.sort(key=lambda letter: (letter.topic, letter.offset, letter.partition), reverse=True)
    return found[:limit]


def find_letter(log: Log, id: str) -> DeadLetter | None:
    """The letter of that key, its newest copy; None where there is none (any more)."""
    partition = partition_of(id, log.partitions(DEAD_LETTERS))
    return next((letter for letter in _letters(log, partition) if letter.id == id), None)


def obstacle(letter: DeadLetter, *, again: bool = False) -> str | None:
    """Why a letter should not be sent again; None when nothing speaks against it."""
    if letter.requeued is not None and not again:
        return f"{letter.requeued.by} has sent it again at {letter.requeued.time}; to do it once more: --again"
    if letter.reason in HOPELESS:
        return HOPELESS[letter.reason]
    if not letter.key:
        return "its record had no key, so that it belongs to no conversation. The collector must send it anew"
    if "\ufffd" in letter.key:
        return "its record's key was no text, and is lost. The collector must send it anew"
    return None


def requeue(
    log: Log, letters: Sequence[DeadLetter], *, by: str, at: str | None = None, again: bool = False
) -> tuple[list[str], list[Refusal]]:
    """Send letters again; says which went, and which did not and why. Blocks until they are safe.

    The mark comes after the record: after a crash in between, a letter may go twice. A response that comes twice is a
    duplicate by its id, while its conversation remembers it.

    Raises:
        LogUnavailable, LogError: some may have gone; those that are marked have. Do it again.
    """
    gone: list[str] = []
    refused: list[Refusal] = []
    taken: list[DeadLetter] = []
    for letter in letters:
        why = obstacle(letter, again=again)
        if why is None:
            taken.append(letter)
        else:
            refused.append(Refusal(letter.id, why))
    for start in range(0, len(taken), WINDOW):
        part = taken[start : start + WINDOW]
        for topic in sorted({letter.topic for letter in part}):
            again_in = [letter for letter in part if letter.topic == topic]
            again_in.sort(key=lambda letter: letter.offset)
            log.append(
                topic, [Message(letter.key, letter.value, ((ORIGIN, letter.id.encode()),)) for letter in again_in]
            )
        mark = msgspec.json.encode(Mark(by, at or now_utc()))
        log.append(DEAD_LETTERS, [Message(letter.id, b"", ((REQUEUED, mark),)) for letter in part])
        gone += [letter.id for letter in part]
    return gone, refused


def plain(text: str) -> str:
    """Text that a terminal may be given: each control character as its escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _letters(log: Log, partition: int) -> Iterator[DeadLetter]:
    """The letters of one partition of the dead letters, newest first, one of each key."""
    marks: dict[str, Mark] = {}
    seen: set[str] = set()
    for record in _backwards(log, partition):
        headers = dict(record.headers)
        if REQUEUED in headers:
            marks.setdefault(record.key, _mark(headers[REQUEUED]))
        elif record.key not in seen and (letter := _letter(record, headers, marks.get(record.key))):
            seen.add(record.key)
            yield letter


def _backwards(log: Log, partition: int) -> Iterator[Record]:
    begin, end, _ = log.span(DEAD_LETTERS, partition)
    while end > begin:
        start = max(begin, end - WINDOW)
        window: list[Record] = []
        offset = start
        while offset < end and (records := log.read(DEAD_LETTERS, partition, offset, end - offset)):
            window += [record for record in records if record.offset < end]
            offset = records[-1].offset + 1
        yield from reversed(window)
        end = start


def _letter(record: Record, headers: dict[str, bytes], mark: Mark | None) -> DeadLetter | None:
    place = record.key.rsplit("/", 2)
    if len(place) < 3 or not (place[1].isdecimal() and place[2].isdecimal()):
        return None

    def text(name: str) -> str:
        return headers.get(name, b"").decode(errors="replace")

    return DeadLetter(
        id=record.key,
        topic=place[0],
        partition=int(place[1]),
        offset=int(place[2]),
        key=text("key"),
        reason=text("reason"),
        detail=text("detail"),
        value=record.value,
        requeued=mark,
    )


def _mark(data: bytes) -> Mark:
    try:
        return msgspec.json.decode(data, type=Mark)
    except msgspec.MsgspecError:
        return Mark("somebody", "a time that can't be read")
