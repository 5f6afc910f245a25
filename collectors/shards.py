"""Scores logs shard by shard, and keeps every finished shard, so that an audit that was killed goes on where it was.

It knows files and the order of work; what is scored is the witness's business. A shard is some consecutive
conversations of one log. It lies in the folder under the digest of its text and of the witness's settings, so that it
is found again whatever else has changed, and never taken for another one's. No text is kept.

::

    <digest>.jsonl.gz       a header (`schema`, origins, what was skipped, notes, how many projections), then one
                            projection a line; written beside its place, synced, and moved there
"""

from __future__ import annotations

import fcntl
import functools
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from msgspec import Struct

from collectors.logs import Logged, read_log
from collectors.ray_engine import spread
from collectors.witness import Shard, Witness
from monitor.errors import ConfigurationError, EventError
from monitor.events import decode_projection, encode
from monitor.origin import Origin, Skipped

__all__ = ["SHARD_SIZE", "Progress", "score_logs"]

SHARD_SIZE = 64
# A shard's text is held at once: very long conversations make smaller shards.
SHARD_CHARACTERS = 1 << 22
MESSAGE_CHARACTERS = 36  # what a message takes in JSON beside its text
SHARD_RECORDS = 1 << 12  # with those that can't be read
SCHEMA = 1
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.\d+\.partial")


@dataclass(frozen=True)
class Progress:
    """How far the scoring has come.

    Attributes:
        conversations: read so far, scored or not.
        bytes_read: of the logs, so far; what is compressed, compressed.
        bytes_kept: of these, in shards that were there already.
        bytes_total: of all logs; None where one of them is a pipe.
    """

    conversations: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    bytes_total: int | None = None

    def remaining(self, elapsed: float) -> float | None:
        """Seconds left, at the pace of what was really scored in `elapsed` seconds; None where it can't be told."""
        scored = self.bytes_read - self.bytes_kept
        if self.bytes_total is None or scored <= 0:
            return 0.0 if self.bytes_read == self.bytes_total else None
        return max(0, self.bytes_total - self.bytes_read) * elapsed / scored


def score_logs(
    files: Sequence[str],
    folder: Path,
    witness: Callable[[], Witness],
    *,
    engine: Literal["local", "ray"] = "local",
    actors: int | None = None,
    shard_size: int = SHARD_SIZE,
    deployment: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Iterator[Shard]:
    """Score logs; yields all shards in the order of files and records, those of earlier runs too.

    A shard that lies in the folder whole, with the same digest, is not scored again. One audit at a time may work in a
    folder; the lock goes when the iterator is closed or ends, or with the process.

    Args:
        files: as `log_files` gives them.
        folder: made if need be. On the Ray engine with several machines it must be one that all of them share, as must
            the logs and the model.
        witness: makes the witness; on the Ray engine once in every actor, so it must be picklable.
        engine: `local` scores in this process; `ray` in `actors` others. The rows are the same, to the bit where the
            machines are alike and each process has as many threads.
        actors: processes on the Ray engine; by default one per GPU here, or per 4 cores.
        shard_size: conversations a shard; very long ones make smaller shards.
        deployment: see `read_log`.
        progress: told after every shard.

    Raises:
        ConfigurationError: an option is wrong, the folder can't be written, or another audit is at work in it. No
            finished shard is lost.
        AnchorwatchError: as `witness()`, `Witness.score` and `read_log`.
    """
    if shard_size < 1 or (actors is not None and actors < 1):
        raise ConfigurationError(f"shard_size {shard_size}, actors {actors}", cure="give at least one of each")
    if engine == "ray" and "-" in files:
        raise ConfigurationError(
            "the Ray engine can't read standard input: other processes do not have it",
            cure="save it to a file first, or use the local engine",
        )
    cut = functools.partial(_cut, shard_size=shard_size, deployment=deployment)
    make = functools.partial(_Scorer, folder, witness)
    if engine == "local":
        return _scored(files, folder, make, cut, progress)
    count = actors or torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // 4)
    threads = max(1, torch.get_num_threads() // count)
    work = functools.partial(_Elsewhere, make, threads)
    return _scored_by(files, folder, lambda: spread(files, cut, work, actors=count), progress)


class _Piece(NamedTuple):
    """The text of one shard, and how many bytes of its log it took to read it."""

    items: list[Logged | Skipped]
    bytes: int


class _Done(NamedTuple):
    """What became of one shard: where it lies, whether it was there already, and how much it was."""

    digest: str
    kept: bool
    conversations: int
    bytes: int


def _cut(file: str, *, shard_size: int, deployment: str | None) -> Iterator[_Piece]:
    """A log's fixed shards, one held at a time: what they are depends on the log alone."""
    place = _Place()
    items: list[Logged | Skipped] = []
    conversations = characters = before = 0
    for item in read_log(file, deployment=deployment, at_byte=place.read_to):
        if conversations >= shard_size or characters >= SHARD_CHARACTERS or len(items) >= SHARD_RECORDS:
            yield _Piece(items, place.byte - before)
            items, conversations, characters, before = [], 0, 0, place.byte
        items.append(item)
        if isinstance(item, Logged):
            conversations += 1
            length = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in item.messages)
            characters += length
            place.said(length)
    yield _Piece(items, max(before, _size(file)) - before)


class _Place:
    """How far into a log its conversations have come. The reader reads ahead: between its steps the text tells."""

    def __init__(self) -> None:
        self._from = self._to = 0  # the stretch of the file that the reader holds
        self._characters = 0  # of text that came out of it so far
        self._rate = 1.0  # bytes a character, in the stretch before

    def read_to(self, byte: int) -> None:
        """The reader has come to this byte."""
        if byte > self._to:
            if self._characters:
                self._rate = (self._to - self._from) / self._characters
            self._from, self._to, self._characters = self._to, byte, 0

    def said(self, characters: int) -> None:
        """A conversation came out."""
        self._characters += characters

    @property
    def byte(self) -> int:
        """Where we are; never goes back."""
        return min(self._to, self._from + int(self._characters * self._rate))


def _size(file: str) -> int:
    try:
        return 0 if file == "-" else Path(file).stat().st_size
    except OSError:
        return 0


class _Scorer:
    """Scores one shard at a time, or finds it in the folder."""

    def __init__(self, folder: Path, witness: Callable[[], Witness]) -> None:
        self._folder = folder
        self._witness = witness()

    def __call__(self, piece: _Piece) -> tuple[Shard, _Done]:
        digest = self._witness.digest(piece.items)
        path = self._folder / f"{digest}.jsonl.gz"
        shard = _read(path, digest)
        kept = shard is not None
        if shard is None:
            shard = self._witness.score(piece.items)
            _write(path, shard)
        return shard, _Done(digest, kept, sum(isinstance(item, Logged) for item in piece.items), piece.bytes)


class _Elsewhere:
    """The same in another process, from which only the outcome is sent: the shard lies in the folder."""

    def __init__(self, make: Callable[[], _Scorer], threads: int) -> None:
        torch.set_num_threads(threads)
        self._score = make()

    def __call__(self, piece: _Piece) -> _Done:
        return self._score(piece)[1]


def _scored(
    files: Sequence[str],
    folder: Path,
    make: Callable[[], _Scorer],
    cut: Callable[[str], Iterator[_Piece]],
    progress: Callable[[Progress], None],
) -> Iterator[Shard]:
    with _claimed(folder):
        score = make()
        so_far = _begin(files)
        for file in files:
            for piece in cut(file):
                shard, done = score(piece)
                so_far = _after(so_far, done)
                progress(so_far)
                yield shard


def _scored_by(
    files: Sequence[str],
    folder: Path,
    outcomes: Callable[[], Iterator[_Done]],
    progress: Callable[[Progress], None],
) -> Iterator[Shard]:
    with _claimed(folder):
        so_far = _begin(files)
        for done in outcomes():
            shard = _read(folder / f"{done.digest}.jsonl.gz", done.digest)
            if shard is None:
                raise ConfigurationError(
                    f"what another process scored is not to be found in {folder}",
                    cure="give a folder that all machines of the Ray cluster share",
                )
            so_far = _after(so_far, done)
            progress(so_far)
            yield shard


def _begin(files: Sequence[str]) -> Progress:
    return Progress(bytes_total=None if "-" in files else sum(map(_size, files)))


def _after(before: Progress, done: _Done) -> Progress:
    return replace(
        before,
        conversations=before.conversations + done.conversations,
        bytes_read=before.bytes_read + done.bytes,
        bytes_kept=before.bytes_kept + (done.bytes if done.kept else 0),
    )


# The folder


class _Header(Struct, frozen=True, kw_only=True):
    """The first line of a shard's file."""

    schema: int
    digest: str
    origins: list[Origin]
    skipped: list[Skipped]
    notes: list[str]
    projections: int


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder, ours alone, and without what killed writes left behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.iterdir():
                if _PARTIAL.fullmatch(left.name):
                    left.unlink()
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another audit is at work in {folder}", cure="wait for it, or give another folder"
            ) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def _read(path: Path, digest: str) -> Shard | None:
    """The shard; None where there is none, or none that is whole and what its name says."""
    try:
        first, *lines = gzip.decompress(path.read_bytes()).splitlines()
        header = msgspec.json.decode(first, type=_Header)
        if (header.schema, header.digest, header.projections) != (SCHEMA, digest, len(lines)):
            return None
        projections = [decode_projection(line) for line in lines]
    except (OSError, EOFError, ValueError, zlib.error, msgspec.MsgspecError, EventError):
        return None
    return Shard(
        digest=digest, origins=header.origins, projections=projections, skipped=header.skipped, notes=header.notes
    )


def _write(path: Path, shard: Shard) -> None:
    """Keep a shard. At any moment its place holds nothing or all of it."""
    header = _Header(
        schema=SCHEMA,
        digest=shard.digest,
        origins=shard.origins,
        skipped=shard.skipped,
        notes=shard.notes,
        projections=len(shard.projections),
    )
    lines = [msgspec.json.encode(header), *(encode(projection) for projection in shard.projections)]
    partial = path.with_name(f".{shard.digest}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(gzip.compress(b"\n".join(lines), compresslevel=6, mtime=0))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync(path.parent)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error


def _sync(folder: Path) -> None:
    """The move itself must outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{path} can't be written: {error.strerror or error}",
        cure="free some room there, or allow writing, and run the same command again: it goes on where it was",
    )
