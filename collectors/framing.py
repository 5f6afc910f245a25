"""Where one record of a text log ends and the next one begins. It knows brackets and line ends, not what is said.

No more than one record is ever held, and of one that is longer than the limit nothing. A parser of the whole stream
would do less: it ends at the first mistake, and it holds a long record before anybody can refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

__all__ = ["Piece", "layout", "lines", "too_long", "values"]

_BEGIN = re.compile(rb"[^\s,]")
_BRACKETS = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_SCALAR_END = re.compile(rb"[\s,]")
_ITEM_END = re.compile(rb"[\s,\]]")


class Piece(NamedTuple):
    """One record's bytes, or why there are none.

    `record` counts lines or values from 1. `array` counts the top-level arrays from 1; it is 0 for a value outside.
    """

    record: int
    data: bytes = b""
    reason: str = ""
    array: int = 0


def layout(head: bytes) -> Literal["lines", "values"] | None:
    """How the text that begins with `head` is laid out: one record a line, or JSON over many lines. None: neither."""
    first, ended, rest = head.lstrip().partition(b"\n")
    if not first.startswith((b"{", b"[")):
        if b"\0" in head:
            return None
        started = any(line.lstrip().startswith((b"{", b"[")) for line in head.split(b"\n"))
        return "lines" if started or (head and b"\n" not in head and len(head) > 1 << 12) else None
    if _is_json(first):
        return "lines" if first.startswith(b"{") or rest.strip() else "values"
    if first.startswith(b"["):
        return "values"
    # An object that goes on, or a torn line? Strings can't go on, and the next line of an object is no object.
    second = rest.lstrip().partition(b"\n")[0]
    torn = not ended or _ends_in_string(first) or _is_json(second)
    return "lines" if torn else "values"


def lines(chunks: Iterable[bytes], limit: int) -> Iterator[Piece]:
    """The lines of the text, without blank ones; a line over `limit` bytes is passed over without being held."""
    number, held, size = 1, bytearray(), 0
    for chunk in chunks:
        for place, part in enumerate(chunk.split(b"\n")):
            if place:  # a line end lies before this part
                yield from _line(number, held, size, limit)
                number, held, size = number + 1, bytearray(), 0
            size += len(part)
            if size <= limit:
                held += part
            else:
                held.clear()
    yield from _line(number, held, size, limit)


def values(chunks: Iterable[bytes], limit: int) -> Iterator[Piece]:
    """The values of the text: the items of top-level arrays, and whatever stands outside of arrays.

    Commas are not checked. A bracket that is never closed takes the rest of the text with it, and says so.
    """
    cutter = _Cutter(limit)
    for chunk in chunks:
        yield from cutter.feed(chunk)
    yield from cutter.end()


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return False
    return True


def _ends_in_string(text: bytes) -> bool:
    return len(re.findall(rb'"', re.sub(rb"\\.", b"", text))) % 2 == 1


def too_long(limit: int) -> str:
    """The reason of a record of more than `limit` bytes."""
    return f"longer than {limit} bytes"


def _line(number: int, held: bytearray, size: int, limit: int) -> Iterator[Piece]:
    if size > limit:
        yield Piece(number, reason=too_long(limit))
    elif held.strip():
        yield Piece(number, bytes(held))


class _Cutter:
    """The state of `values` between two chunks."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.records = self.arrays = 0
        self.in_array = False
        self.kind = ""  # of the value that is open: container, string or scalar; empty between values
        self.depth = 0
        self.in_string = self.escaped = False
        self.held, self.size = bytearray(), 0

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        place = 0
        while place < len(chunk):
            if not self.kind:
                place = self._begin(chunk, place)
                continue
            start = place
            place, ended = self._go_on(chunk, place)
            self.size += place - start
            if self.size <= self.limit:
                self.held += chunk[start:place]
            else:
                self.held.clear()
            if ended:
                yield self._take()

    def end(self) -> Iterator[Piece]:
        if self.kind == "scalar":
            yield self._take()
        if self.kind:
            yield self._take("the text ends inside this record: it is cut off, or a bracket or quote is not closed")
        elif self.in_array:
            self.kind = "scalar"
            yield self._take("the text ends before its array does: it is cut off")

    def _begin(self, chunk: bytes, place: int) -> int:
        """Where the next value starts; the brackets of top-level arrays are passed over."""
        found = _BEGIN.search(chunk, place)
        if found is None:
            return len(chunk)
        match found[0]:
            case b"[" if not self.in_array:
                self.in_array, self.arrays = True, self.arrays + 1
                return found.end()
            case b"]" if self.in_array:
                self.in_array = False
                return found.end()
            case b"{" | b"[":
                self.kind = "container"
            case b'"':
                self.kind = "string"
            case _:
                self.kind = "scalar"
        return found.start()

    def _go_on(self, chunk: bytes, place: int) -> tuple[int, bool]:
        """How far the open value reaches in this step, and whether it ends there."""
        if self.escaped:
            self.escaped = False
            return place + 1, False
        if self.kind == "scalar":
            found = (_ITEM_END if self.in_array else _SCALAR_END).search(chunk, place)
            return (found.start(), True) if found else (len(chunk), False)
        found = (_IN_STRING if self.in_string else _BRACKETS).search(chunk, place)
        if found is None:
            return len(chunk), False
        match found[0]:
            case b"\\":
                self.escaped = True
            case b'"':
                self.in_string = not self.in_string
            case b"{" | b"[":
                self.depth += 1
            case _:
                self.depth -= 1
        return found.end(), self.depth == 0 and not self.in_string and not self.escaped

    def _take(self, reason: str = "") -> Piece:
        self.records += 1
        if not reason and self.size > self.limit:
            reason = too_long(self.limit)
        data = b"" if reason else bytes(self.held)
        self.kind, self.depth, self.in_string, self.escaped = "", 0, False, False
        self.held, self.size = bytearray(), 0
        return Piece(self.records, data, reason, self.arrays if self.in_array else 0)
