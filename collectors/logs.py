"""Reads conversation logs: files of any common format, as they lie about. It knows no model and no detector.

The format is told from the content, never from the name: JSON Lines, JSON (an array of records, or one), Parquet and
Arrow files (so Hugging Face data set folders, too), the text ones also compressed with gzip or zstd, and standard input
as `-`. What a record may look like is told in `records`. Memory stays the same however long a log is: it holds one
record, and of Arrow one record batch. A file is read up to the size it has when it is opened.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from collectors.framing import Piece, layout, lines, too_long, values
from collectors.records import FIELDS, HOLDERS, Unreadable, conversation_of, is_message, short_name
from collectors.tables import rows, table_kind
from monitor.errors import ConfigurationError
from monitor.origin import Origin, Skipped

__all__ = ["MAX_RECORD_BYTES", "Logged", "log_files", "read_log"]

MAX_RECORD_BYTES = 32 << 20
_CHUNK = 1 << 16
_ZSTD_INPUT = 1 << 10  # a kilobyte of zstd can hold no more than 32 MiB
# What stands beside the data in a data set's folder.
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


class Logged(Struct, frozen=True, kw_only=True):
    """One conversation of a log.

    Attributes:
        origin: whose it is, where it lies, and what was done to read it.
        messages: role (system, user or assistant) and content of each; see `records.Conversation`.
        time: its start, RFC 3339 in UTC with a `Z`, where the log says so.
    """

    origin: Origin
    messages: tuple[dict[str, str], ...]
    time: str | None = None


def log_files(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files to read, in this order: folders with what lies in them, sorted; `-` stays; nothing twice.

    In folders hidden files are passed over, as are the `.md` files, metadata and caches of data sets.

    Raises:
        ConfigurationError: what is missing, folders that are empty or closed to us; all of them at once.
    """
    found: dict[str, str] = {}
    problems = []
    for path in (os.fspath(each) for each in paths):
        if path == "-":
            found.setdefault("-", "-")
            continue
        try:
            within = _within(path) if stat.S_ISDIR(Path(path).stat().st_mode) else [path]
        except (OSError, ValueError) as error:
            problems.append(f"{_printable(path)}: {_said(error)}")
            continue
        if not within:
            problems.append(f"{_printable(path)}: no logs in this folder")
        for file in within:
            found.setdefault(os.path.realpath(file), file)
    if not paths:
        problems.append("no logs are named")
    if problems:
        raise ConfigurationError("; ".join(problems), cure="check the paths")
    return list(found.values())


def read_log(
    file: str | os.PathLike[str],
    *,
    deployment: str | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
    at_byte: Callable[[int], None] = lambda _place: None,
) -> Iterator[Logged | Skipped]:
    """The conversations of one file, in its order, and each record that is none with the reason.

    `deployment` says whose they are; else the model that a record names does, else they are "logs". Ids are kept as
    they are, also where they repeat; a record without one is called by file name and record. A fault in the file
    itself ends it with one `Skipped`, after everything before the fault. Nothing that is in a file raises. `at_byte` is
    told before each record how far into the file the reading has come (what is compressed, compressed); not of a pipe.

    Raises:
        ConfigurationError: pyarrow or zstandard is not installed, and the file needs it.
    """
    source = _printable(os.fspath(file))
    record = 0
    try:
        for record, found in _records(os.fspath(file), max_record_bytes, at_byte):
            try:
                yield _logged(found, source, record, deployment)
            except Unreadable as error:
                yield Skipped(source=source, record=record, reason=error.problem)
    except Unreadable as error:
        yield Skipped(source=source, record=record + 1 if record else 0, reason=error.problem)
        return
    if not record:
        yield Skipped(source=source, record=0, reason="nothing in it")


def _within(folder: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(where, name)) for name in names if not _beside(name)]
    return sorted(name for name in found if Path(name).is_file() or Path(name).is_symlink())


def _beside(name: str) -> bool:
    cache = name.startswith("cache-") and name.endswith(".arrow")
    return name in _METADATA or name.startswith(".") or name.endswith((".md", ".lock")) or cache


def _raise(error: OSError) -> None:
    raise error


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _logged(found: object, source: str, record: int, deployment: str | None) -> Logged:
    if isinstance(found, Unreadable):
        raise found
    said = conversation_of(found)
    origin = Origin(
        conversation_id=said.conversation_id or short_name(f"{Path(source).name}:{record}"),
        deployment=deployment or said.model or "logs",
        source=source,
        record=record,
        user=said.user,
        turns=sum(message["role"] == "assistant" for message in said.messages),
        notes=said.notes,
    )
    return Logged(origin=origin, messages=said.messages, time=said.time)


# From a file to records of plain data, or why they are none


def _records(file: str, limit: int, at_byte: Callable[[int], None]) -> Iterator[tuple[int, object]]:
    """Each record's number and what it holds.

    Raises:
        Unreadable: what is left of the file can't be read.
    """
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as opened:
            status = os.fstat(opened.fileno()) if file != "-" else None
            size = status.st_size if status and stat.S_ISREG(status.st_mode) else None
            stream = io.BufferedReader(_UpTo(opened, size), _CHUNK)
            head = stream.peek(8)[:8]
            if kind := table_kind(head):
                if kind != "Arrow stream" and size is None:
                    raise Unreadable(f"{kind} data can't be read from a pipe; save it to a file first")
                table = rows(kind, _seekable(stream, opened, kind), FIELDS, HOLDERS, limit)
                for number, row in enumerate(table, start=1):
                    if size is not None:
                        at_byte(opened.tell())
                    yield number, Unreadable(row) if isinstance(row, str) else row
            else:
                for piece in _pieces(_text(stream, head), limit):
                    if size is not None:
                        at_byte(opened.tell())
                    yield piece.record, Unreadable(piece.reason) if piece.reason else _decoded(piece.data)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise Unreadable(f"can't be read on: {_said(error)}") from error


def _seekable(stream: BinaryIO, opened: BinaryIO, kind: str) -> BinaryIO:
    """What a table is read from: the stream where that will do, else the file from its start."""
    if kind == "Arrow stream":
        return stream
    opened.seek(0)
    return opened


class _UpTo(io.RawIOBase):
    """A file up to the size that it had: what is written to it later is for a later audit."""

    def __init__(self, file: BinaryIO, size: int | None) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer) if self._left is None else min(len(buffer), self._left)
        data = self._file.read(wanted) if wanted else b""
        buffer[: len(data)] = data
        if self._left is not None:
            self._left -= len(data)
        return len(data)


def _text(stream: io.BufferedReader[Any], head: bytes) -> Iterator[bytes]:
    """The text in chunks, unpacked."""
    if head.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield from iter(lambda: unpacked.read1(_CHUNK), b"")
    elif head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        yield from _zstd(stream)
    else:
        yield from iter(lambda: stream.read1(_CHUNK), b"")


def _zstd(stream: io.BufferedReader[Any]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigurationError("reading zstd needs zstandard", cure="pip install 'anchorwatch[audit]'") from error
    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    try:
        while data := stream.read(_ZSTD_INPUT):
            while data:
                frame = unpacker.decompressobj() if frame.eof else frame
                if unpacked := frame.decompress(data):
                    yield unpacked
                data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not frame.eof:
        raise EOFError("its zstd data ends early")


def _pieces(chunks: Iterator[bytes], limit: int) -> Iterator[Piece]:
    head, chunks = _ahead(chunks)
    if not head.strip():
        return lines(chunks, limit)
    if table_kind(head):
        raise Unreadable("a compressed table: unpack it first; Parquet and Arrow have compression of their own")
    if b"\0" in head[:4]:
        raise Unreadable("neither UTF-8 text nor a table: binary, or UTF-16")
    if (shape := layout(head)) is None:
        raise Unreadable("neither JSON nor Parquet nor Arrow")
    return lines(chunks, limit) if shape == "lines" else _bare(values(chunks, limit), limit)


def _ahead(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first few chunks joined, without a byte order mark, and all of them; a fault comes at its place."""
    head = bytearray()
    fault: Exception | None = None
    try:
        while len(head) < _CHUNK and (chunk := next(chunks, b"")):
            head += chunk
    except Exception as error:  # told when everything before it has been read
        fault = error
    text = bytes(head).removeprefix(b"\xef\xbb\xbf")
    if fault is None:
        return text, chain((text,), chunks)
    return text, chain((text,), _raising(fault))


def _raising(fault: Exception) -> Iterator[bytes]:
    raise fault
    yield b""


def _bare(pieces: Iterator[Piece], limit: int) -> Iterator[Piece]:
    """The pieces, and an array of bare messages as the one conversation that it is."""
    for array, items in groupby(pieces, key=lambda piece: piece.array):
        rest = iter(items)
        first = next(rest)
        if not array or first.reason or not is_message(_decoded(first.data)):
            yield from chain((first,), rest)
            continue
        held, reason = bytearray(b"[" + first.data), ""
        for item in rest:
            held += b"," + item.data
            if not reason and (reason := item.reason or (too_long(limit) if len(held) > limit else "")):
                held.clear()
        yield Piece(first.record, b"" if reason else bytes(held + b"]"), reason)


def _decoded(data: bytes) -> object:
    """The plain data, or why it is none."""
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        return Unreadable("nested too deep")
    except UnicodeError:
        return Unreadable("not UTF-8")
    except msgspec.MsgspecError as error:
        place = str(error).rpartition("(byte ")[2].rstrip(")")
        odd = data[int(place) :] if place.isdigit() else b""
        if odd.startswith((b"NaN", b"Infinity", b"-Infinity")):
            return Unreadable("not JSON: NaN or infinity")
        return Unreadable(f"not JSON: {str(error).removeprefix('JSON is malformed: ')}")


def _said(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
